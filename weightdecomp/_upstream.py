"""Upstream: what a model computes before a site first runs, kept so that masking that site alone does not repeat it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from weightdecomp._batches import Batch, call
from weightdecomp._forward import forwards
from weightdecomp._sites import Site


class Upstream:
    """Outputs, on one batch, of the module calls that are over before a site's module is first called.

    What a site does cannot change them. Whole modules are kept rather than their parts, so that of a transformer the
    blocks before the site's are not run again, nor the attention in them.

    Attributes:
        model: The target.
        batch: The inputs.
        site: The site.
    """

    def __init__(self, model: nn.Module, batch: Batch, site: Site) -> None:
        """Run the target once."""
        self.model, self.batch, self.site = model, batch, site
        calls = _Calls(site.module)
        with torch.no_grad(), forwards({one: calls.noting(one) for one in model.modules()}):
            call(model, batch)
        self._outputs: dict[nn.Module, list[Any]] = {}
        for module, output in calls.found:
            self._outputs.setdefault(module, []).append(output)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Let one forward pass on the same batch take these outputs as they are; gradients end there."""
        with forwards({module: _replayed(module.forward, own) for module, own in self._outputs.items()}):
            yield


class _Calls:
    """Follows the calls of a forward pass up to that of one module.

    Attributes:
        found: Calls that were over by then and are no part of another one that was, with copies of their outputs.
    """

    def __init__(self, until: nn.Module) -> None:
        self.until, self.found = until, list[tuple[nn.Module, Any]]()
        self._levels: list[list[tuple[nn.Module, Any]]] | None = [[]]  # of every call that is going on, those within it

    def noting(self, module: nn.Module) -> Callable[..., Any]:
        """The module's own forward, noted."""
        forward = module.forward

        def noted(*args: Any, **kwargs: Any) -> Any:
            if self._levels is None:
                return forward(*args, **kwargs)
            if module is self.until:
                self.found, self._levels = [one for level in self._levels for one in level], None
                return forward(*args, **kwargs)
            self._levels.append([])
            output = forward(*args, **kwargs)
            if self._levels is not None:
                self._levels.pop()
                # What follows may write into an output.
                self._levels[-1].append((module, _copied(output)))
            return output

        return noted


def _replayed(forward: Callable[..., Any], outputs: list[Any]) -> Callable[..., Any]:
    """Answers the first calls with what is known, and runs later ones."""
    known = iter(outputs)
    missing = object()

    def answered(*args: Any, **kwargs: Any) -> Any:
        output = next(known, missing)
        return forward(*args, **kwargs) if output is missing else _copied(output)

    return answered


def _copied(output: Any) -> Any:
    return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, output)
