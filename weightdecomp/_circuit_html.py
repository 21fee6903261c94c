"""The circuits of a report as HTML: members, prices, and when each is active."""

from collections.abc import Callable
from html import escape

import torch
from jaxtyping import Bool
from torch import Tensor

from weightdecomp import _figures
from weightdecomp._circuits import Circuit
from weightdecomp._decomposition import Decomposition
from weightdecomp._figures import Images

_FREQUENT, _SPECIFIC = 10, 6  # circuits listed by class
_LISTED = 40  # of a model whose inputs have no class
_RARE = 0.02  # circuits active on fewer images are not called specific
_MEMBERS = 8  # components named of one circuit
_SHADES = 5

Link = Callable[[str, int], str | None]  # the id of a component's card, None without one


def listed(decomposition: Decomposition, link: Link) -> str:
    """The most frequent circuits with their prices."""
    live = [one for one in decomposition.circuits if one.frequency > 0]
    rows = "".join(
        f"<tr><td>{i + 1}</td><td>{_members(one, link)}</td><td>{one.frequency:.1%}</td><td>{one.bits:.2f}</td></tr>"
        for i, one in enumerate(live[:_LISTED])
    )
    head = "<tr><th></th><th>members</th><th>active on</th><th>bits per input</th></tr>"
    note = f"{min(_LISTED, len(live))} of {len(live)} live circuits, most frequent first, on the run's own inputs."
    return f"<div class=scroll><table class=circuits>{head}{rows}</table></div><p class=note>{note} {_PLAIN}</p>"


def by_class(decomposition: Decomposition, images: Images, link: Link) -> str:
    """The most frequent circuits, those that tell most about the class, and when each is active."""
    active = _figures.active_circuits(decomposition, images)
    frequent = list(range(min(_FREQUENT, len(active))))
    common = [i for i, on in enumerate(active) if float(on.double().mean()) >= _RARE]
    specific = sorted(common, key=lambda i: -_told_about_class(active[i], images))[:_SPECIFIC]
    head = "".join(f"<th>{label}</th>" for label in range(images.n_classes))
    tables = []
    for name, chosen in (("Most frequent", frequent), ("Most telling about the class", specific)):
        rows = "".join(_circuit(i, decomposition.circuits[i], active[i], images, link) for i in chosen)
        top = f"<tr><th></th><th>members</th><th>all</th>{head}</tr>"
        tables.append(f"<h3>{name}</h3><div class=scroll><table class=circuits>{top}{rows}</table></div>")
    return "".join(tables) + f"<p class=note>{_CIRCUITS} {_PLAIN}</p>"


def _told_about_class(on: Bool[Tensor, " image"], images: Images) -> float:
    """Mutual information between a circuit's activity and the class, in nats."""
    joint = torch.stack([torch.bincount(images.labels[a], minlength=images.n_classes) for a in (on, ~on)])
    p = joint.double() / joint.sum()
    apart = p.sum(0, keepdim=True) * p.sum(1, keepdim=True)
    return float(torch.special.xlogy(p, p / apart.clamp_min(1e-12)).sum())


def _circuit(number: int, circuit: Circuit, on: Bool[Tensor, " image"], images: Images, link: Link) -> str:
    shares = [float(on.double().mean()), *images.by_class(on).tolist()]
    cells = "".join(f"<td class=s{round(_SHADES * share)}>{100 * share:.0f}</td>" for share in shares)
    return f"<tr><td>{number + 1}</td><td>{_members(circuit, link)}</td>{cells}</tr>"


def _members(circuit: Circuit, link: Link) -> str:
    """Members by site, as links to their cards where there are any."""
    more = f" and {len(circuit.members) - _MEMBERS} more" if len(circuit.members) > _MEMBERS else ""
    sites: dict[str, list[str]] = {}
    for path, index in circuit.members[:_MEMBERS]:
        found = link(path, index)
        sites.setdefault(path, []).append(f'<a href="#{found}">{index}</a>' if found else str(index))
    named = (f"{escape(path) or '(model)'}: {' '.join(numbers)}" for path, numbers in sites.items())
    return ", ".join(named) + more


_CIRCUITS = (
    "Numbers: per cent of these images on which any member is active; first all images, then by class. "
    "Members are named as site: component numbers."
)
_PLAIN = "Members without a link have no card."
