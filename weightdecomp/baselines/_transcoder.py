"""Transcoders, with and without skip, crosscoders and cross-layer transcoders: coders that span sites."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import takewhile
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from weightdecomp._batches import call, select, size, tensors
from weightdecomp._forward import Operands, replaced
from weightdecomp._sites import Site
from weightdecomp.baselines._bank import Bank, Fitted
from weightdecomp.baselines._coder import Coder, fitted, scale, started
from weightdecomp.baselines._data import Data, Inapplicable, OnStep
from weightdecomp.baselines._rules import L1, JumpReLU, Rule, TopK
from weightdecomp.baselines._sae import ROWS_PER_LATENT, latents_at
from weightdecomp.baselines._train import Training, trained

Span = tuple[str, str]
_TRIED = 8  # inputs on which it is tried whether rows depend on others
_ROUNDING = 1e-5  # change, relative to the rows, that does not count


def spans(data: Data) -> list[Span]:
    """Pairs of sites, the first one read and the second one written; a site that is left over is a pair of itself.

    Two neighbours in the model's order make a pair where a row of the second depends on no other row of the first, as
    in an MLP, but not on either side of attention. Of sites that read the same rows, as the gate and the up matrix of a
    gated MLP, the first one stands for all.
    """
    paths, found = [site.path for site in data.sites], []
    while paths:
        first = paths[0]
        alike = list(takewhile(partial(_read_alike, data, first), paths))
        paths = paths[len(alike) :]
        if paths and data.layout(first) == data.layout(paths[0]) and _by_row(data, alike, paths[0]):
            found.append((first, paths.pop(0)))
        else:
            found += [(path, path) for path in alike]
    return found


def _read_alike(data: Data, one: str, other: str) -> bool:
    return data.layout(one) == data.layout(other) and torch.equal(data.inputs(one), data.inputs(other))


def _by_row(data: Data, first: Sequence[str], then: str) -> bool:
    """Whether every other input row of a site stays as it is when the rows between are taken from sites before it."""
    batch = data.batches[0]
    batch = select(batch, torch.arange(min(size(batch), _TRIED), device=tensors(batch)[0].device))

    def rows(share: float) -> Tensor:
        seen: list[Tensor] = []

        def forward(site: Site, _: int, operands: Operands) -> Any:
            written = site.read(operands, site.matrix())
            if site.path == then:
                seen.append(site.vectors(operands).flatten(0, -2)[1::2])
            else:
                number = torch.arange(written[..., 0].numel(), device=written.device).view(*written.shape[:-1], 1)
                written = torch.where(number % 2 == 1, written, share * written)
            return site.write(written, operands)

        with torch.no_grad(), replaced([data.site(path) for path in (*first, then)], forward):
            call(data.model, batch)
        return torch.cat(seen)

    target = rows(1.0)
    return float((rows(0.0) - target).abs().sum()) <= _ROUNDING * float(target.abs().sum())


def _checked(data: Data) -> list[Span]:
    for site in data.sites:
        data.check_varies(site.path)
    return spans(data)


@dataclass(frozen=True, kw_only=True)
class Transcoder:
    """Latents read from what an MLP reads and written into what it writes, in place of the MLP.

    Attributes:
        rule: How it is sparse.
        ratio: Number of latents as a multiple of the width that is read.
        skip: Add a trained linear map; it is priced as units of rank one that are always on.
        training: Settings of the trainer.

    Source:
        Dunefsky et al. 2024, arXiv 2406.11944 (L1, 32 times the width); Paulo et al. 2025, arXiv 2501.18823 (TopK,
        the skip). TopK for both, as in eai-sparsify.
    """

    rule: Rule = field(default_factory=TopK)
    ratio: float = 4.0
    skip: bool = False
    training: Training = Training()

    @property
    def name(self) -> str:
        """With or without skip."""
        return "skip transcoder" if self.skip else "transcoder"

    @property
    def setting(self) -> str:
        """Width and sparsity."""
        return f"{self.ratio:g} x width, {self.rule.setting}"

    def grid(self) -> Sequence["Transcoder"]:
        """Levels of sparsity."""
        return [replace(self, rule=rule) for rule in self.rule.grid()]

    def fit(self, data: Data, seed: int = 0, on_step: OnStep | None = None) -> Fitted:
        """Train one transcoder a span."""
        rng, banks, skipped = data.generator(seed), [], {}
        for read, write in _checked(data):
            try:
                n = latents_at(data, read, self.ratio, self.name)
            except Inapplicable as error:
                skipped[write] = str(error)
                continue
            x, y = data.inputs(read), data.outputs(write)
            coder = fitted(x, y, n, self.rule, self.training, rng, skip=self.skip, on_step=on_step)
            banks += [_transcoder_bank((read, write), coder), *_skip_bank((read, write), coder)]
        return _whole(data, self.name, self.setting, banks, skipped)


def _whole(
    data: Data, name: str, setting: str, banks: Sequence[Bank], skipped: Mapping[str, str] | None = None
) -> Fitted:
    """All banks with their number of trained parameters.

    Raises:
        Inapplicable: If there is no bank, with the reason of the first span.
    """
    if not banks and skipped:
        raise Inapplicable(next(iter(skipped.values())))
    parameters = sum(int(bank.numbers.sum()) + bank.shared for bank in banks)
    return Fitted(name, setting, data.sites, banks, skipped or {}, parameters)


def _transcoder_bank(span: Span, coder: Coder) -> Bank:
    read, write = span
    n, d_in, d_out = len(coder.encoder), coder.encoder.shape[1], coder.decoder.shape[1]
    return Bank(
        reads=(read,),
        encode=coder.latents,
        writes={write: coder.decoder},
        offsets={write: coder.offset},
        directions={write: coder.decoder},
        numbers=torch.full((n,), float(d_in + d_out + 1 + (len(coder.state) == n))),
        values=torch.ones(n),
        shared=d_in + d_out,
    )


def _skip_bank(span: Span, coder: Coder) -> list[Bank]:
    """The linear map as its singular pairs, always on."""
    if coder.skip is None:
        return []
    left, sizes, right = torch.linalg.svd(coder.skip, full_matrices=False)
    kept = sizes > 1e-6 * sizes[0].clamp_min(1e-30)
    reads, writes = right[kept], (left[:, kept] * sizes[kept]).T
    n, centre = len(reads), coder.centre
    if not n:
        return []
    return [
        Bank(
            reads=(span[0],),
            encode=lambda x: (x - centre) @ reads.T,
            writes={span[1]: writes},
            offsets={},
            directions={span[1]: writes},
            numbers=torch.full((n,), float(reads.shape[1] + writes.shape[1])),
            values=torch.ones(n),
        )
    ]


@dataclass(frozen=True, kw_only=True)
class Crosscoder:
    """Latents read from the inputs of all corresponding sites at once and rebuilding all of them.

    It reads sites before and after those it writes, so in every protocol its codes come from the target's own rows.

    Attributes:
        coefficient: Of the sparsity penalty.
        ratio: Number of latents as a multiple of the mean width.
        training: Settings of the trainer.

    Source:
        Lindsey et al. 2024, Sparse Crosscoders: `sum_l |x^l - x'^l|^2 + c sum_i a_i sum_l |d_i^l|`, rows of every site
        scaled alike; the reproduction of model diffing uses c = 2.
    """

    coefficient: float = 2.0
    ratio: float = 4.0
    training: Training = Training()
    name = "crosscoder"

    @property
    def setting(self) -> str:
        """Width and sparsity."""
        return f"{self.ratio:g} x width, l1 {self.coefficient:g}"

    def grid(self) -> Sequence["Crosscoder"]:
        """Coefficients."""
        return [replace(self, coefficient=c) for c in (0.1, 0.3, 1.0, 2.0)]

    def fit(self, data: Data, seed: int = 0, on_step: OnStep | None = None) -> Fitted:
        """Train one crosscoder for every set of sites whose rows correspond."""
        rng, banks, skipped = data.generator(seed), [], {}
        groups: dict[tuple, list[str]] = {}
        for site in data.sites:
            data.check_varies(site.path)
            groups.setdefault(data.layout(site.path), []).append(site.path)
        for paths in groups.values():
            if len(paths) < 2:
                skipped[paths[0]] = "no other site has corresponding rows"
                continue
            banks.append(self._bank(data, paths, rng, on_step))
        if not banks:
            raise Inapplicable("a crosscoder needs at least two sites whose rows correspond, and there are none")
        parameters = sum(int(bank.numbers.sum()) + bank.shared for bank in banks)
        return Fitted(self.name, self.setting, data.sites, banks, skipped, parameters)

    def _bank(self, data: Data, paths: Sequence[str], rng: torch.Generator, on_step: OnStep | None) -> Bank:
        rows = {path: data.inputs(path) for path in paths}
        scales = {path: scale(x) for path, x in rows.items()}
        widths = [x.shape[1] for x in rows.values()]
        n = max(1, round(self.ratio * sum(widths) / len(widths)))
        data.check_enough(paths[0], ROWS_PER_LATENT * n, f"{self.name} with {n:,} latents")
        x = torch.cat([rows[path] / scales[path] for path in paths], -1)
        rule = L1(coefficient=self.coefficient)

        def norms(decoder: Tensor) -> Tensor:
            return torch.stack([part.norm(dim=1) for part in decoder.split(widths, 1)]).sum(0)

        coder = fitted(x, x, n, rule, self.training, rng, norms=norms, on_step=on_step)
        units = torch.cat([torch.full((width,), scales[path]) for path, width in zip(paths, widths, strict=True)]).to(x)
        parts = dict(zip(paths, (coder.decoder * units).split(widths, 1), strict=True))
        offsets = dict(zip(paths, (coder.offset * units).split(widths), strict=True))
        matrices = {path: data.site(path).matrix() for path in paths}
        return Bank(
            reads=tuple(paths),
            encode=lambda joint: coder.latents(joint / units),
            writes={path: parts[path] @ matrices[path].T for path in paths},
            offsets={path: matrices[path] @ offsets[path] for path in paths},
            directions=parts,
            numbers=torch.full((n,), float(2 * sum(widths) + 1)),
            values=torch.ones(n),
            shared=2 * sum(widths) + len(widths),
        )


@dataclass(frozen=True, kw_only=True)
class CrossLayerTranscoder:
    """Latents read at one span and written at that span and all later ones.

    Attributes:
        coefficient: Of the sparsity penalty.
        ratio: Number of latents of a span as a multiple of the width that is read.
        training: Settings of the trainer.

    Source:
        Ameisen et al. 2025, Circuit Tracing: JumpReLU (threshold 0.03), `sum_l |y^l - y'^l|^2 + c sum tanh(|W_dec,i|
        a_i)` with the coefficient ramped up linearly. Its term for dead latents, 3e-6 of the negative parts, is kept.
    """

    coefficient: float = 0.3
    ratio: float = 4.0
    training: Training = Training()
    name = "cross-layer transcoder"

    @property
    def setting(self) -> str:
        """Width and sparsity."""
        return f"{self.ratio:g} x width, tanh {self.coefficient:g}"

    def grid(self) -> Sequence["CrossLayerTranscoder"]:
        """Coefficients."""
        return [replace(self, coefficient=c) for c in (0.03, 0.1, 0.3, 1.0)]

    def fit(self, data: Data, seed: int = 0, on_step: OnStep | None = None) -> Fitted:
        """Train all spans together."""
        found = _checked(data)
        if len({data.layout(read) for read, _ in found}) > 1 or len(found) < 2:
            raise Inapplicable("a cross-layer transcoder needs at least two spans of sites whose rows correspond")
        rng = data.generator(seed)
        sizes = [latents_at(data, read, self.ratio, self.name) for read, _ in found]
        s_in = [scale(data.inputs(read)) for read, _ in found]
        s_out = [scale(data.outputs(write)) for _, write in found]
        rows = [data.inputs(read) / s for (read, _), s in zip(found, s_in, strict=True)]
        goals = [data.outputs(write) / s for (_, write), s in zip(found, s_out, strict=True)]
        coders = [
            started(x, torch.cat(goals[i:], -1), n, JumpReLU(), rng)
            for i, (x, n) in enumerate(zip(rows, sizes, strict=True))
        ]
        loss = self._loss(coders, rows, goals)
        trained([p for coder in coders for p in coder.trained], loss, len(rows[0]), self.training, rng, None, on_step)
        banks = []
        for i, coder in enumerate(coders):
            banks.append(_cross_layer_bank(data, found[i:], coder, s_in[i], s_out[i:]))
        return _whole(data, self.name, self.setting, banks)

    def _loss(
        self, coders: Sequence[Coder], rows: Sequence[Tensor], goals: Sequence[Tensor]
    ) -> Callable[[Int[Tensor, " row"], float], Tensor]:
        widths = [goal.shape[1] for goal in goals]

        def loss(index: Tensor, done: float) -> Tensor:
            sums: list[Tensor] = [goal.new_zeros(len(index), goal.shape[1]) for goal in goals]
            sparsity, dead = goals[0].new_zeros(()), goals[0].new_zeros(())
            for i, (coder, x) in enumerate(zip(coders, rows, strict=True)):
                pre = coder.pre(x[index])
                latents = coder.rule.latents(pre, coder.state, True)
                for k, part in enumerate((latents @ coder.decoder + coder.offset).split(widths[i:], 1)):
                    sums[i + k] = sums[i + k] + part
                sparsity = sparsity + torch.tanh(latents * coder.decoder.norm(dim=1)).sum(-1).mean()
                dead = dead + (coder.state.exp() - pre).relu().sum(-1).mean()
            errors = [(goal[index] - y).square().sum(-1).mean() for goal, y in zip(goals, sums, strict=True)]
            return torch.stack(errors).sum() + self.coefficient * done * sparsity + 3e-6 * dead

        return loss


def _cross_layer_bank(data: Data, found: Sequence[Span], coder: Coder, s_in: float, s_out: Sequence[float]) -> Bank:
    """One span's latents, written into their own and all later spans."""
    scaled, read, writes = coder.rescaled(s_in, 1.0), found[0][0], [write for _, write in found]
    widths = [data.site(path).shape[0] for path in writes]
    parts: list[Float[Tensor, "unit d_out"]] = list(scaled.decoder.split(widths, 1))
    offsets = list(scaled.offset.split(widths))
    n, d_in = scaled.encoder.shape
    by_site = {path: part * s for path, part, s in zip(writes, parts, s_out, strict=True)}
    return Bank(
        reads=(read,),
        encode=scaled.latents,
        writes=by_site,
        offsets={path: part * s for path, part, s in zip(writes, offsets, s_out, strict=True)},
        directions=by_site,
        numbers=torch.full((n,), float(d_in + scaled.decoder.shape[1] + 2)),
        values=torch.ones(n),
        shared=d_in + scaled.decoder.shape[1],
    )
