"""Methods that a decomposition of weights is compared with, each an object with the same three questions.

`fit(data)` finds units; `protocols.replaced_output` runs the target through them; `protocols.ablated_output` takes
units out, and each bank of units has its directions and activations.
"""

from weightdecomp.baselines import protocols
from weightdecomp.baselines._apd import APD
from weightdecomp.baselines._bank import Bank, Fitted
from weightdecomp.baselines._closed import ICA, PCA, Neurons
from weightdecomp.baselines._clusters import NMF, KMeans, Polytopes
from weightdecomp.baselines._data import Data, Inapplicable
from weightdecomp.baselines._gradients import AttributionDictionary, EndToEndSAE, LocalInteractionBasis
from weightdecomp.baselines._l3d import L3D
from weightdecomp.baselines._matching import Matched, deletions, effect_matching
from weightdecomp.baselines._mdl import MDLSAE
from weightdecomp.baselines._method import Method
from weightdecomp.baselines._rules import L1, BatchTopK, JumpReLU, TopK
from weightdecomp.baselines._sae import SAE, Matryoshka
from weightdecomp.baselines._train import Training
from weightdecomp.baselines._transcoder import Crosscoder, CrossLayerTranscoder, Transcoder
from weightdecomp.baselines._tuned import tuned
from weightdecomp.baselines._weights import SPD, SVD

ALL: tuple[Method, ...] = (
    Neurons(),
    PCA(),
    ICA(),
    NMF(),
    KMeans(),
    Polytopes(),
    SAE(rule=L1()),
    SAE(rule=TopK()),
    SAE(rule=BatchTopK()),
    SAE(rule=JumpReLU()),
    Matryoshka(),
    MDLSAE(),
    EndToEndSAE(),
    EndToEndSAE(downstream=True),
    Transcoder(),
    Transcoder(skip=True),
    Crosscoder(),
    CrossLayerTranscoder(),
    LocalInteractionBasis(),
    AttributionDictionary(),
    SVD(),
    APD(),
    SPD(),
    L3D(),
)
"""Every method with its defaults."""

NAMES = tuple(method.name for method in ALL)
"""Their names, as `compare(methods=[...])` takes them."""

__all__ = [
    "ALL", "APD", "AttributionDictionary", "Bank", "BatchTopK", "CrossLayerTranscoder", "Crosscoder", "Data",
    "EndToEndSAE", "Fitted", "ICA", "Inapplicable", "JumpReLU", "KMeans", "L1", "L3D", "LocalInteractionBasis",
    "MDLSAE", "Matched", "Matryoshka", "Method", "NAMES", "NMF", "Neurons", "PCA", "Polytopes", "SAE", "SPD", "SVD",
    "TopK", "Training", "Transcoder", "deletions", "effect_matching", "protocols", "tuned",
]  # fmt: skip
