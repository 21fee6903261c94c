"""The bridge to the engine: components as a `weightdecomp.Decomposition` of the model they are written back into."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from bilinear._modules import BilinearMLP
from bilinear._rewriting import HINT, put, write_back
from bilinear._squares import Squares


class SquaresMLP(nn.Module):
    """Components as two sites: `read` (one row a component), a square, and `write` (one column a component)."""

    def __init__(self, squares: Squares) -> None:
        super().__init__()
        layer = squares.layer()
        module = layer.module()
        self.read, self.write = module.w, module.d
        self.norm, self.skip = module.norm, module.skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The components' output."""
        z = x if self.norm is None else self.norm(x)
        y = self.write(self.read(z).square())
        return y if self.skip is None else y + self.skip(x)


def to_decomposition(model: nn.Module, batches: Iterable[Any], squares: Mapping[str, Squares], **options: Any) -> Any:
    """The engine's `Decomposition` of a model whose bilinear modules are made of the given components.

    The modules are replaced, in a copy of the model, by two linear maps around a square; component r is row r of the
    site `<path>.read` and column r of the site `<path>.write`. Where the components sum to the layer, the copy computes
    what the model does, and everything that the engine does with a decomposition (`verify`, `circuits`, `edit`,
    `save`) runs on it.

    Args:
        model: Any module in eval mode; it is not changed.
        batches: Sample inputs, as in `weightdecomp.decompose`.
        squares: By module path, the components in its place ("" is the model itself).
        **options: `tolerance`, `divergence`, `seed`, `config`, as in `weightdecomp.decompose`.

    Returns:
        A `weightdecomp.Decomposition` of the copy.

    Raises:
        ValueError: For paths without a module, or batches that do not fit the model.
        TypeError: For what is no `Squares`.
    """
    import weightdecomp

    for path, own in squares.items():
        if not isinstance(own, Squares):
            raise TypeError(
                f"{path!r}: expected bilinear.Squares, got {type(own).__name__}; {HINT}, those of a layer "
                "bilinear.neuron_squares(layer)"
            )
    changed = write_back(model, squares)
    components = {}
    for path, own in squares.items():
        placed = changed.get_submodule(path)
        assert isinstance(placed, BilinearMLP)
        module = SquaresMLP(own).to(placed.w.weight).eval()
        changed = put(changed, path, module)
        eye = torch.eye(own.n, dtype=module.read.weight.dtype, device=module.read.weight.device)
        prefix = f"{path}." if path else ""
        components[f"{prefix}read"] = (module.read.weight, eye)
        components[f"{prefix}write"] = (eye, module.write.weight.T)
    return weightdecomp.assemble(changed.eval(), batches, components, start="squares", **options)
