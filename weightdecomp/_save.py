"""Saving and loading: a folder with safetensors and JSON, bound to its target by the weights' fingerprint."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from weightdecomp import _storage
from weightdecomp._check import check_module
from weightdecomp._config import Config
from weightdecomp._cost import Cost
from weightdecomp._divergence import named
from weightdecomp._ledger import Ledger
from weightdecomp._made import Made
from weightdecomp._pieces import Pieces
from weightdecomp._sites import Site, Skipped, bound_site

if TYPE_CHECKING:
    from weightdecomp._decomposition import Decomposition

_KIND = "decomposition"


def site_digests(sites: tuple[Site, ...]) -> dict[str, str]:
    """A fingerprint of every site's weight."""
    return {site.path: _storage.digest({"weight": site.weight.detach()}) for site in sites}


def save(decomposition: "Decomposition", directory: Path) -> None:
    """Write a decomposition; see `Decomposition.save`."""
    tensors: dict[str, Tensor] = {}
    for path, parts in decomposition.parts.items():
        values = (*parts.pieces, parts.thresholds, parts.frequencies)
        for name, value in zip(("v", "u", "owner", "thresholds", "frequencies"), values, strict=True):
            tensors[f"{path}|{name}"] = value
    digests = site_digests(decomposition.sites)
    document = {
        "sites": [
            {
                "path": site.path,
                "n_calls": site.n_calls,
                "start": decomposition.parts[site.path].start,
                "weight": digests[site.path],
            }
            for site in decomposition.sites
        ],
        "skipped": [list(skipped) for skipped in decomposition.skipped],
        "target": _storage.digest(decomposition.target.state_dict()),
        "divergence": [decomposition.divergence.name, decomposition.divergence.reason],
        "tolerance": decomposition.tolerance,
        "config": decomposition.config.to_dict(),
        "outcome": asdict(decomposition.outcome),
        "groups": [[list(member) for member in group] for group in decomposition.groups],
        "group_frequencies": list(decomposition.group_frequencies),
    }
    _storage.write(directory, _KIND, tensors, document)


def load(
    directory: str | Path, model: nn.Module, divergence: Callable[[Any, Any], Tensor] | None = None
) -> "Decomposition":
    """Read a decomposition that `Decomposition.save` wrote, for the model it was made from.

    Args:
        directory: The folder.
        model: The same target; its weights are compared with those that were decomposed.
        divergence: The callable, if the run was given one of the user's own.

    Raises:
        TypeError: For what is no module.
        ValueError: For another model, a newer format, unknown settings, or a damaged file; nothing is unpickled.
    """
    check_module(model)
    tensors, document = _storage.read(Path(directory), _KIND)
    try:
        return _assembled(directory, model, tensors, document, divergence)
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"'{directory}' is not what this version of weightdecomp writes ({error!r}): "
            "load it with the version that wrote it, or decompose anew"
        ) from error


def _assembled(
    directory: str | Path,
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    document: Mapping[str, Any],
    divergence: Callable[[Any, Any], Tensor] | None,
) -> "Decomposition":
    from weightdecomp._decomposition import Decomposition, Outcome, Parts

    sites = tuple(_bound(model, entry, directory) for entry in document["sites"])
    if _storage.digest(model.state_dict()) != document["target"]:
        raise ValueError(
            f"{directory} decomposes another model: the sites' weights agree but other parameters differ; "
            "load the checkpoint that was decomposed"
        )
    device = next(model.parameters()).device
    parts = {}
    for entry in document["sites"]:
        values = [
            tensors[f"{entry['path']}|{name}"].to(device) for name in ("v", "u", "owner", "thresholds", "frequencies")
        ]
        parts[entry["path"]] = Parts(Pieces(*values[:3]), values[3], values[4], entry["start"])
    outcome = dict(document["outcome"])
    outcome["ledger"] = Ledger(**outcome["ledger"])
    outcome["cost"] = Cost(**outcome["cost"]) if outcome.get("cost") else None
    outcome["made"] = Made(**outcome["made"]) if outcome.get("made") else None
    return Decomposition(
        model,
        sites,
        [Skipped(*entry) for entry in document["skipped"]],
        parts,
        named(document["divergence"][0], document["divergence"][1], divergence),
        document["tolerance"],
        Config.from_dict(document["config"]),
        Outcome(**outcome),
        [[(path, index) for path, index in group] for group in document["groups"]],
        document["group_frequencies"],
    )


def _bound(model: nn.Module, entry: dict[str, Any], directory: str | Path) -> Site:
    site = bound_site(model, entry["path"], entry["n_calls"])
    if site is None:
        raise ValueError(
            f"{directory} decomposes another model: this one has no weight matrix at {entry['path']!r}; "
            "prepare it in the same way (split, fold_norms)"
        )
    with torch.no_grad():
        if _storage.digest({"weight": site.weight.detach()}) != entry["weight"]:
            raise ValueError(
                f"{directory} decomposes another model: the weight of {entry['path']!r} differs; "
                "load the checkpoint that was decomposed"
            )
    return site
