"""A decomposition of the weights in the form of all other methods, so that nothing scores it differently."""

import torch
from torch import Tensor

from weightdecomp._decomposition import Decomposition, Parts
from weightdecomp._sites import Site
from weightdecomp._trade import opened
from weightdecomp.baselines._bank import Bank, Fitted


def as_fitted(decomposition: Decomposition, name: str = "weight decomposition") -> Fitted:
    """Components as units: v reads, u writes, the gate is the importance; nothing is fitted anew."""
    banks = [_bank(site, decomposition.parts[site.path]) for site in decomposition.sites]
    stored = sum(int(bank.numbers.sum()) for bank in banks)
    return Fitted(name, f"tolerance {decomposition.tolerance:g}", decomposition.sites, banks, {}, stored)


def _bank(site: Site, parts: Parts) -> Bank:
    pieces = parts.pieces
    ranks = pieces.ranks().to(torch.float32)

    def importance(inner: Tensor) -> Tensor:
        return opened(pieces.activations(inner), parts.thresholds)

    return Bank(
        reads=(site.path,),
        encode=lambda x: x @ pieces.v.T,
        writes={site.path: pieces.u},
        offsets={},
        directions={site.path: pieces.v},
        # As the engine's own ledger counts: a component's two thresholds are not charged there either.
        numbers=ranks * sum(site.shape),
        values=ranks,
        owner=pieces.owner,
        importance=importance,
    )
