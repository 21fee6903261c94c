"""What the project's other packages build on: batches, sites, pieces, passes, attacks and files.

Not part of the surface for users, which is `weightdecomp` itself; it may change with any release.
"""

from weightdecomp._attack import Ablation, Part, ablated_divergence, attacked
from weightdecomp._batches import Batch, call, read_batches, select, size, tensors, unpadded
from weightdecomp._batches import digest as batch_digest
from weightdecomp._check import unreadable_named
from weightdecomp._decomposition import Parts
from weightdecomp._divergence import Divergence, output_tensor
from weightdecomp._edit import Selection
from weightdecomp._forward import Operands, Record, masked, recorded, replaced
from weightdecomp._made import package_version
from weightdecomp._pieces import Pieces
from weightdecomp._sites import Site
from weightdecomp._storage import digest as tensor_digest

__all__ = [
    "Ablation",
    "Batch",
    "Divergence",
    "Operands",
    "Part",
    "Parts",
    "Pieces",
    "Record",
    "Selection",
    "Site",
    "ablated_divergence",
    "attacked",
    "batch_digest",
    "call",
    "masked",
    "output_tensor",
    "package_version",
    "read_batches",
    "recorded",
    "replaced",
    "select",
    "size",
    "tensor_digest",
    "tensors",
    "unpadded",
    "unreadable_named",
]
