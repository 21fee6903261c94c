"""Methods that use gradients: local interaction basis, attribution dictionary learning, end-to-end autoencoders."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from weightdecomp._batches import call, select, size
from weightdecomp._divergence import output_tensor
from weightdecomp._forward import Operands, replaced
from weightdecomp._sites import Site
from weightdecomp.baselines._bank import Bank, Fitted, dictionary
from weightdecomp.baselines._closed import SHARES, per_site
from weightdecomp.baselines._coder import Coder, fitted, scale, started
from weightdecomp.baselines._data import Data, Inapplicable, OnStep, output_gradients
from weightdecomp.baselines._rules import L1, Rule
from weightdecomp.baselines._sae import coder_bank, latents_at
from weightdecomp.baselines._train import Training, trained

_PROBES = 4  # random projections of the output
_MOST_DIRECTIONS = 64  # of the next basis that are differentiated one by one; beyond it random mixtures of them
_FLAT = 1e-5  # eigenvalues below this share of the largest are dropped, as published


@dataclass(frozen=True, kw_only=True)
class LocalInteractionBasis:
    """Principal components of activations and gradients together, those that matter most for the next site kept.

    Attributes:
        share: Share of the directions kept, by eigenvalue.

    Source:
        Bushnaq et al. 2024, arXiv 2405.10928, section 3: `G = U D U^T`, `R = U D^(-1/2)`, `M = E[J^T J]` with J the
        Jacobian of the next basis's coordinates, `R^+ M R^+T = V L V^T`, `C = R V L^(1/2)`; eigenvalues below 1e-5
        dropped. Rows are centred instead of given a constant coordinate; the last site's next basis is the output's
        principal components.
    """

    share: float = 1.0
    name = "local interaction basis"

    @property
    def setting(self) -> str:
        """Share of directions kept."""
        return f"{self.share:g} of the directions"

    def grid(self) -> Sequence["LocalInteractionBasis"]:
        """Shares kept."""
        return [replace(self, share=share) for share in SHARES]

    def fit(self, data: Data, seed: int = 0, on_step: OnStep | None = None) -> Fitted:
        """Backward from the output, site by site."""
        rng, banks, following = data.generator(seed), {}, None
        for site in reversed(data.sites):
            data.check_varies(site.path)
            bank, following = self._site(data, site, following, rng)
            banks[site.path] = bank
        found = [banks[site.path] for site in data.sites]
        parameters = sum(int(bank.numbers.sum()) + bank.shared for bank in found)
        return Fitted(self.name, self.setting, data.sites, found, {}, parameters)

    def _site(
        self, data: Data, site: Site, following: tuple[str, Tensor] | None, rng: torch.Generator
    ) -> tuple[Bank, tuple[str, Tensor]]:
        x = data.inputs(site.path)
        mean = x.mean(0)
        centred = (x - mean).double()
        power, axes = torch.linalg.eigh(centred.T @ centred / len(x))
        kept = power > 1e-10 * power[-1]
        root, axes = power[kept].sqrt(), axes[:, kept]
        moment = _jacobian_moment(data, site.path, following, rng)
        inner = (root[:, None] * axes.T) @ moment @ (axes * root)
        values, turn = torch.linalg.eigh(inner)
        values, turn = values.flip(0), turn.flip(1)
        live = values > _FLAT * values[0].clamp_min(1e-30)
        values, turn = values[live], turn[:, live]
        n = max(1, round(self.share * len(values)))
        # C^T reads a centred row; what it writes is the pseudo-inverse.
        read = (axes / root @ turn * values.sqrt()).T.to(x)
        write = ((axes * root) @ turn / values.sqrt()).T.to(x)
        top = read[:n]
        bank = dictionary(site, lambda rows: (rows - mean) @ top.T, write[:n], mean, numbers=2 * x.shape[1])
        return bank, (site.path, read)


def _jacobian_moment(
    data: Data, path: str, following: tuple[str, Tensor] | None, rng: torch.Generator
) -> Float[Tensor, "d_in d_in"]:
    """`E[J^T J]` of the next basis's coordinates with respect to a site's input rows."""
    total: Tensor | None = None
    rows = 0
    for batch in data.batches:

        def scalars(output: Any, inputs: Any) -> list[Tensor]:
            if following is None:
                values = output_tensor(output).flatten(0, -2)
                read = torch.eye(values.shape[1]).to(values)
            else:
                values, read = torch.cat([one.flatten(0, -2) for one in inputs[following[0]]]), following[1]
            if len(read) > _MOST_DIRECTIONS:
                # Random mixtures keep the moment on average.
                mix = torch.randn(_MOST_DIRECTIONS, len(read), generator=rng, device=rng.device).to(read)
                read = mix @ read / _MOST_DIRECTIONS**0.5
            return [(values @ direction).sum() for direction in read]

        found = output_gradients(data.model, batch, data.sites, [path], scalars)
        for one in found:
            grad = one[path].double()
            total = grad.T @ grad if total is None else total + grad.T @ grad
        rows += len(found[0][path])
    assert total is not None
    if not bool(total.any()):
        if following is not None:  # a site beside this one, not after it: the output is what follows
            return _jacobian_moment(data, path, None, rng)
        raise Inapplicable(f"what follows does not depend on {path!r}, so that it has no interaction basis")
    return total / rows


def probes(data: Data, rng: torch.Generator) -> dict[str, Float[Tensor, "probe row d_in"]]:
    """Gradients of random projections of the output with respect to every site's input rows.

    Random signs for squared errors; for KL the scores of classes drawn from the target's own distribution.
    """
    paths = [site.path for site in data.sites]
    by_batch = []
    for batch in data.batches:

        def scalars(output: Any, _: Any) -> list[Tensor]:
            values = output_tensor(output)
            found = []
            for _ in range(_PROBES):
                if data.divergence.name == "kl":
                    log_p = values.log_softmax(-1)
                    drawn = torch.multinomial(log_p.detach().exp().flatten(0, -2), 1, generator=rng)
                    found.append(log_p.flatten(0, -2).gather(1, drawn).sum())
                else:
                    signs = torch.randint(0, 2, values.shape, generator=rng, device=rng.device) * 2 - 1
                    found.append((values * signs).sum())
            return found

        found = output_gradients(data.model, batch, data.sites, paths, scalars)
        by_batch.append({path: torch.stack([one[path] for one in found]) for path in paths})
    return {path: torch.cat([one[path] for one in by_batch], 1).detach() for path in paths}


@dataclass(frozen=True, kw_only=True)
class AttributionDictionary:
    """An autoencoder that is sparse in what latents do to the output, not only in how large they are.

    Attributes:
        attribution: Weight of `|a * grad_a|_1`.
        unexplained: Weight of `|sum (x - x') * grad_x|`.
        rule: The sparsity in size beside it.
        ratio: Number of latents as a multiple of the site's width.
        training: Settings of the trainer.

    Source:
        Anthropic, April 2024 update, "Attribution dictionary learning", which states no defaults. Gradients are of
        random projections of the output, scaled to one, since no labels are at hand for the loss.
    """

    attribution: float = 1.0
    unexplained: float = 1.0
    rule: Rule = field(default_factory=lambda: L1(coefficient=0.1))
    ratio: float = 4.0
    training: Training = Training()
    name = "attribution dictionary"

    @property
    def setting(self) -> str:
        """Width and weights."""
        return f"{self.ratio:g} x width, {self.rule.setting}, attribution {self.attribution:g}"

    def grid(self) -> Sequence["AttributionDictionary"]:
        """Weights of the attributions."""
        return [replace(self, attribution=a) for a in (0.1, 0.3, 1.0, 3.0)]

    def fit(self, data: Data, seed: int = 0, on_step: OnStep | None = None) -> Fitted:
        """Train one autoencoder a site."""
        rng = data.generator(seed)
        gradients = probes(data, rng)

        def made(site: Site) -> Bank:
            x, g = data.inputs(site.path), gradients[site.path]
            n = latents_at(data, site.path, self.ratio, self.name)
            g = g / (g.square().mean().sqrt() + 1e-30)
            s = scale(x)

            def extra(coder: Coder, index: Tensor, latents: Tensor, written: Tensor) -> Tensor:
                slopes = g[:, index]
                felt = (latents * (slopes @ coder.decoder.T)).abs().sum(-1).mean()
                left = ((x[index] / s - written) * slopes).sum(-1).abs().mean()
                return self.attribution * felt + self.unexplained * left

            return coder_bank(site, fitted(x, x, n, self.rule, self.training, rng, extra=extra, on_step=on_step))

        return per_site(data, self.name, self.setting, made)


@dataclass(frozen=True, kw_only=True)
class EndToEndSAE:
    """An autoencoder trained for the model's output, and with `downstream` for what later sites read as well.

    Attributes:
        coefficient: Of the latents' sizes over the width, against damage (1: all behaviour lost).
        downstream: Add the mean squared error of later sites' inputs.
        ratio: Number of latents as a multiple of the site's width.
        training: Settings of the trainer; a row is one input of the model.

    Source:
        Braun et al. 2024, arXiv 2405.12241: `KL + phi / d |a|_1`, with downstream `0.5 KL + phi / d |a|_1 + 2.5 mean
        over later sites MSE`; 60 times the width, gradients clipped at 10. Output divergence and errors are divided by
        those of ablating the site, so that one coefficient serves every model.
    """

    coefficient: float = 0.1
    downstream: bool = False
    ratio: float = 4.0
    training: Training = Training(steps=1000, batch=256)

    @property
    def name(self) -> str:
        """With or without downstream."""
        return "sae end-to-end + downstream" if self.downstream else "sae end-to-end"

    @property
    def setting(self) -> str:
        """Width and sparsity."""
        return f"{self.ratio:g} x width, l1 {self.coefficient:g}"

    def grid(self) -> Sequence["EndToEndSAE"]:
        """Coefficients."""
        return [replace(self, coefficient=c) for c in (0.01, 0.03, 0.1, 0.3)]

    def fit(self, data: Data, seed: int = 0, on_step: OnStep | None = None) -> Fitted:
        """Train one autoencoder a site, the other sites as in the target."""
        rng = data.generator(seed)

        def made(site: Site) -> Bank:
            n, x = latents_at(data, site.path, self.ratio, self.name), data.inputs(site.path)
            s = scale(x)
            rows = x / s
            coder = started(rows, rows, n, L1(coefficient=self.coefficient), rng)
            loss = _end_to_end_loss(self, data, site, coder, s)
            trained(coder.trained, loss, size(data.batches[0]), self.training, rng, None, on_step)
            return coder_bank(site, coder.rescaled(s, s))

        return per_site(data, self.name, self.setting, made)


def _end_to_end_loss(
    method: EndToEndSAE, data: Data, site: Site, coder: Coder, s: float
) -> Callable[[Tensor, float], Tensor]:
    """Output divergence, sparsity and, downstream, errors at later sites, of a random part of the first batch."""
    batch = data.batches[0]
    paths = [one.path for one in data.sites]
    later = data.sites[paths.index(site.path) + 1 :] if method.downstream else []
    matrix = site.matrix()

    def run(inputs: Any, rebuilt: bool) -> tuple[Any, list[Tensor], list[Tensor]]:
        latents: list[Tensor] = []
        seen: list[Tensor] = []

        def forward(one: Site, _: int, operands: Operands) -> Any:
            rows = one.vectors(operands)
            if one in later:
                seen.append(rows)
            if rebuilt and one is site:
                own = coder.rule.latents(coder.pre(rows / s), coder.state, True)
                latents.append(own)
                rows = (own @ coder.decoder + coder.offset) * s
            return one.write(rows @ (matrix if one is site else one.matrix()).T, operands)

        with replaced(data.sites, forward):
            return call(data.model, inputs), latents, seen

    def ablated(one: Site, _: int, operands: Operands) -> Any:
        rows = one.vectors(operands)
        return one.write((0 if one is site else 1) * rows @ one.matrix().T, operands)

    with torch.no_grad(), replaced(data.sites, ablated):
        nothing = call(data.model, batch)
    with torch.no_grad():
        unit = float(data.divergence(nothing, call(data.model, batch)).mean())
    if not unit > 0:
        raise Inapplicable(f"ablating {site.path!r} changes nothing, so that nothing can be trained end to end")

    def loss(index: Tensor, done: float) -> Tensor:
        part = select(batch, index)
        with torch.no_grad():
            target, _, wanted = run(part, False)
        output, latents, seen = run(part, True)
        total = (0.5 if method.downstream else 1.0) * data.divergence(output, target).mean() / unit
        sizes = torch.cat([one.flatten(0, -2) for one in latents]) * coder.decoder.norm(dim=1)
        total = total + method.coefficient / matrix.shape[1] * sizes.sum(-1).mean() * min(1.0, done / 0.05)
        errors = [
            (a - b).square().mean() / (b - b.mean(0)).square().mean().clamp_min(1e-12)
            for a, b in zip(seen, wanted, strict=True)
        ]
        return total + 2.5 * torch.stack(errors).mean() if errors else total

    return loss
