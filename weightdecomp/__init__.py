"""Decompose a trained model's weights into circuits, at a stated damage under the worst ablation found."""

from weightdecomp import baselines
from weightdecomp._assembled import assemble
from weightdecomp._circuits import Circuit
from weightdecomp._compare import compare
from weightdecomp._comparison import Comparison
from weightdecomp._config import Config
from weightdecomp._decompose import NumericalWarning, decompose
from weightdecomp._decomposition import Component, Decomposition
from weightdecomp._edit_report import EditReport, edit_report
from weightdecomp._fold import fold_norms
from weightdecomp._ledger import Ledger
from weightdecomp._monitor import Monitor, monitor
from weightdecomp._pretrained import Pretrained, load_hf
from weightdecomp._responsible import Responsible, responsible
from weightdecomp._save import load
from weightdecomp._save_hf import save_hf
from weightdecomp._split import split
from weightdecomp._tokens import sampled_batches, text_batches, token_batches
from weightdecomp._verification import Verification

__all__ = [
    "Circuit",
    "Comparison",
    "Component",
    "Config",
    "Decomposition",
    "EditReport",
    "Ledger",
    "Monitor",
    "NumericalWarning",
    "Pretrained",
    "Responsible",
    "Verification",
    "assemble",
    "baselines",
    "compare",
    "decompose",
    "edit_report",
    "fold_norms",
    "load",
    "load_hf",
    "monitor",
    "responsible",
    "sampled_batches",
    "save_hf",
    "split",
    "text_batches",
    "token_batches",
]
