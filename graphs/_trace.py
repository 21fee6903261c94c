"""Trace: the target cut at its sites, so that autograd shows what each site's input depends on.

Every call of a site returns a leaf that holds what the site really wrote. The values are therefore the target's
own, and a gradient at an activation reaches only the leaves that lead to it through no other site.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from weightdecomp.engine import Batch, Operands, Site, call, output_tensor, replaced, tensors

Reader = Callable[[Site, Operands], Tensor]
"""From what a site was called with, the inner activations of its pieces."""

_POKE = 0.5  # of a leaf's root mean square, to see whether anything changes


class Event(NamedTuple):
    """One call of a site.

    Attributes:
        site: The site.
        call: Number of the call, from 0.
        operands: What the module was called with, attached to earlier leaves.
        rows: The leaf: what the site wrote, without its bias.
        inner: Inner activations of the site's pieces, attached to earlier leaves.
    """

    site: Site
    call: int
    operands: Operands
    rows: Float[Tensor, "*batch d_out"]
    inner: Float[Tensor, "*batch piece"]


class Feed(NamedTuple):
    """One tensor that enters the model.

    Attributes:
        name: The keyword, the number of the argument, or "" where it is the only one.
        leaf: The tensor itself; for token ids what a lookup that is no site made of them, or None.
        ids: The token ids, or None.
    """

    name: str
    leaf: Tensor | None
    ids: Int[Tensor, "*batch"] | None


class Trace(NamedTuple):
    """One pass of the cut target.

    Attributes:
        events: Calls of sites, in the order in which the target makes them.
        feeds: What entered.
        output: The output tensor, attached to the leaves.
        returned: What the model returned.
    """

    events: list[Event]
    feeds: list[Feed]
    output: Float[Tensor, "*batch d_output"]
    returned: Any

    def leaves(self, before: int) -> list[tuple[int, Tensor]]:
        """Leaves that an event of this number can depend on: (-1 - number, leaf) for feeds, (number, leaf) else."""
        feeds = [(-1 - i, feed.leaf) for i, feed in enumerate(self.feeds) if feed.leaf is not None]
        return [*feeds, *((i, event.rows) for i, event in enumerate(self.events[:before]))]


def by_position(x: Tensor, n: int) -> Shaped[Tensor, "input position d"]:
    """Rows with their positions flattened; rows that no single input owns belong to the only input there is."""
    # Sites without units have rows of width 0, whose positions reshape cannot tell.
    return x.reshape(n, x.shape[:-1].numel() // n, x.shape[-1])


def traced(
    model: nn.Module,
    sites: Sequence[Site],
    readers: Mapping[str, Reader],
    batch: Batch,
    held: Sequence[Tensor] | None = None,
    scale: float = 1.0,
) -> Trace:
    """Run the target once, cut at its sites.

    Args:
        model: The target.
        sites: Where it is cut.
        readers: What is read from each site's input.
        batch: The inputs.
        held: What every call writes, in the order of the calls; None takes what it really writes.
        scale: Multiplies whatever enters and whatever a site writes, its bias included.
    """
    cut = _Cut(readers, held, scale)
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), replaced(sites, cut):
        entering, feeds = _entering(batch, scale)
        with _lookups(model, sites, feeds, scale):
            returned = call(model, entering)
    if held is not None and len(cut.events) < len(held):
        raise ValueError(
            f"the order of the model cannot be traced: it makes {len(cut.events)} calls of sites, {len(held)} before, "
            "when its sites' outputs change; a graph needs the same calls on every pass"
        )
    return Trace(cut.events, feeds, output_tensor(returned), returned)


class _Cut:
    """Stands in for every site: notes the call and returns a leaf."""

    def __init__(self, readers: Mapping[str, Reader], held: Sequence[Tensor] | None, scale: float) -> None:
        self.readers, self.held, self.scale = readers, held, scale
        self.events: list[Event] = []

    def __call__(self, site: Site, index: int, operands: Operands) -> Any:
        inner = self.readers[site.path](site, operands)
        rows = self._rows(site, operands).detach().requires_grad_()
        self.events.append(Event(site, index, operands, rows, inner))
        # The product is no leaf, so that the model may change it in place.
        return site.write(rows, operands) * self.scale

    def _rows(self, site: Site, operands: Operands) -> Tensor:
        if self.held is None:
            with torch.no_grad():
                return site.read(operands, site.matrix())
        if len(self.events) >= len(self.held):
            raise ValueError(
                f"the order of the model cannot be traced: it calls {site.path!r} once more when its sites' outputs "
                "change; a graph needs the same calls on every pass"
            )
        return self.held[len(self.events)]


def _entering(batch: Batch, scale: float) -> tuple[Batch, list[Feed]]:
    """The batch with leaves in it, and those leaves."""
    feeds: list[Feed] = []

    def leaf(name: str, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if not x.is_floating_point():
            feeds.append(Feed(name, None, x))
            return x
        entering = x.detach().requires_grad_()
        feeds.append(Feed(name, entering, None))
        return entering * scale

    if isinstance(batch, Mapping):
        return {name: leaf(name, x) for name, x in batch.items()}, feeds
    if isinstance(batch, Tensor):
        return leaf("", batch), feeds
    several = len(tensors(batch)) > 1
    return tuple(leaf(str(i) if several else "", x) for i, x in enumerate(batch)), feeds


@contextmanager
def _lookups(model: nn.Module, sites: Sequence[Site], feeds: list[Feed], scale: float) -> Iterator[None]:
    """Let lookups of token ids that are no sites return leaves."""
    known = {id(site.module) for site in sites}

    def hook(module: nn.Module, args: tuple, output: Tensor) -> Any:
        for i, feed in enumerate(feeds):
            if feed.ids is not None and args[0].shape == feed.ids.shape and torch.equal(args[0], feed.ids):
                leaf = output.detach().requires_grad_()
                feeds[i] = feed._replace(leaf=leaf)
                return leaf * scale
        return None

    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, nn.Embedding) and id(module) not in known:
                stack.callback(module.register_forward_hook(hook).remove)
        yield


def parents(trace: Trace) -> list[set[int]]:
    """Per event, and last for the output, the leaves that it depends on, as `Trace.leaves` numbers them."""
    found = []
    for number in range(len(trace.events) + 1):
        target = trace.events[number].inner if number < len(trace.events) else trace.output
        leaves = trace.leaves(number)
        if not target.requires_grad or not leaves:
            found.append(set())
            continue
        grads = _gradients(target.sum(), [leaf for _, leaf in leaves])
        found.append({i for (i, _), grad in zip(leaves, grads, strict=True) if grad is not None})
    return found


def _gradients(of: Tensor, leaves: Sequence[Tensor]) -> Sequence[Tensor | None]:
    try:
        return torch.autograd.grad(of, leaves, retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        # The one way in which a model that runs has no gradients; torch has no error of its own for it.
        if "inplace" not in str(error):
            raise
        raise ValueError(
            "the order of the model cannot be traced: a step in forward changes a tensor in place that an earlier step "
            f"needs for its gradient ({error}); write it without the change, as x = x + y for x += y"
        ) from error


def check_order(model: nn.Module, sites: Sequence[Site], readers: Mapping[str, Reader], batch: Batch) -> None:
    """Refuse a model in which a site has an influence that autograd does not see.

    Raises:
        ValueError: Naming the two places.
    """
    trace = traced(model, sites, readers, batch)
    used = set().union(*parents(trace))
    held = [event.rows.detach() for event in trace.events]
    for number, event in enumerate(trace.events):
        if number in used:
            continue
        poked = list(held)
        noise = torch.randn(event.rows.shape, generator=torch.Generator().manual_seed(number)).to(event.rows)
        poked[number] = held[number] + _POKE * held[number].square().mean().sqrt().clamp_min(1e-3) * noise
        other = traced(model, sites, readers, batch, poked)
        where = _changed(trace, other)
        if where is not None:
            raise ValueError(
                f"the order of the model cannot be traced: {event.site.path!r} changes {where}, but autograd does not "
                "see how; a detach, torch.no_grad, NumPy or a step to integers lies between. Remove it from forward, "
                "or leave that site out of the decomposition with sites="
            )


def _changed(trace: Trace, other: Trace) -> str | None:
    for one, two in zip(trace.events, other.events, strict=True):
        if not torch.allclose(one.inner, two.inner, rtol=1e-4, atol=1e-6):
            return f"the input of {one.site.path!r}"
    same = torch.allclose(trace.output, other.output, rtol=1e-4, atol=1e-6)
    return None if same else "the output"
