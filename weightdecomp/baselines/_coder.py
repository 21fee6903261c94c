"""The sparse coder: one hidden layer of latents from rows to rows, and its training."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from weightdecomp.baselines._data import OnStep
from weightdecomp.baselines._rules import Rule
from weightdecomp.baselines._train import Training, trained

_AUXILIARY = 1 / 32  # weight of the loss that revives dead latents (Gao et al. 2024)
_DEAD = 50  # steps without being active after which a latent counts as dead


@dataclass(eq=False)
class Coder:
    """Latents `rule((x - centre) encoder^T + bias)` and output rows `latents decoder + offset`.

    Attributes:
        encoder: What each latent reads.
        bias: Of the latents.
        decoder: What each latent writes.
        centre: Taken from rows before they are read.
        offset: Written always.
        rule: Its sparsity.
        state: Of the rule.
        skip: A linear map beside the latents, or None.
    """

    encoder: Float[Tensor, "unit d_in"]
    bias: Float[Tensor, " unit"]
    decoder: Float[Tensor, "unit d_out"]
    centre: Float[Tensor, " d_in"]
    offset: Float[Tensor, " d_out"]
    rule: Rule
    state: Tensor
    skip: Float[Tensor, "d_out d_in"] | None = None

    def pre(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch unit"]:
        """Pre-activations."""
        return (x - self.centre) @ self.encoder.T + self.bias

    def latents(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch unit"]:
        """Latents as after training."""
        return self.rule.latents(self.pre(x), self.state, False)

    def written(self, latents: Float[Tensor, "*batch unit"], x: Float[Tensor, "*batch d_in"]) -> Tensor:
        """Output rows."""
        rows = latents @ self.decoder + self.offset
        return rows if self.skip is None else rows + (x - self.centre) @ self.skip.T

    @property
    def trained(self) -> list[Tensor]:
        """What gradients change; the centre is not."""
        found = (self.encoder, self.bias, self.decoder, self.offset, self.state, self.skip)
        return [x for x in found if x is not None and x.requires_grad]

    def rescaled(self, s_in: float, s_out: float) -> "Coder":
        """The same map between rows in their own units, for a coder of rows divided by `s_in` and `s_out`.

        Latents keep their scale, so that thresholds do too.
        """
        with torch.no_grad():
            return Coder(
                (self.encoder / s_in).detach(),
                self.bias.detach(),
                (self.decoder * s_out).detach(),
                self.centre * s_in,
                (self.offset * s_out).detach(),
                self.rule,
                self.state.detach(),
                None if self.skip is None else (self.skip * s_out / s_in).detach(),
            )


def started(
    x: Float[Tensor, "row d_in"], y: Float[Tensor, "row d_out"], n: int, rule: Rule, rng: torch.Generator
) -> Coder:
    """A coder whose decoder is random unit rows, and its encoder their transpose where it rebuilds its input."""
    decoder = _unit(torch.randn(n, y.shape[1], generator=rng, device=x.device, dtype=x.dtype))
    same = x is y
    encoder = decoder if same else _unit(torch.randn(n, x.shape[1], generator=rng, device=x.device, dtype=x.dtype))
    return Coder(
        encoder.clone().requires_grad_(),
        x.new_zeros(n).requires_grad_(),
        (decoder if same else decoder * 0.1).clone().requires_grad_(),
        x.mean(0),
        y.mean(0).clone().requires_grad_(),
        rule,
        rule.start(n, x),
    )


def scale(x: Float[Tensor, "row _"]) -> float:
    """Root mean square per dimension of centred rows, the unit that rows are trained in."""
    return float((x - x.mean(0)).square().mean().sqrt()) or 1.0


def fitted(
    x: Float[Tensor, "row d_in"],
    y: Float[Tensor, "row d_out"],
    n: int,
    rule: Rule,
    training: Training,
    rng: torch.Generator,
    *,
    prefixes: Sequence[int] | None = None,
    extra: Callable[[Coder, Int[Tensor, " row"], Tensor, Tensor], Tensor] | None = None,
    norms: Callable[[Tensor], Tensor] = lambda decoder: decoder.norm(dim=1),
    skip: bool = False,
    on_step: OnStep | None = None,
) -> Coder:
    """Train a coder from rows x to rows y.

    The loss is `|y - y'|^2`, summed over dimensions of rows scaled to a mean square of one and averaged over rows,
    plus the rule's penalty, plus AuxK for rules that have it.

    Args:
        x: Rows to read.
        y: Rows to write; x itself for an autoencoder.
        n: Number of latents.
        rule: Sparsity.
        training: Settings.
        rng: Of the start and of the rows drawn.
        prefixes: Numbers of first latents that must write y on their own (Matryoshka); None: all together.
        extra: One more loss, from the coder, the rows' numbers, their latents and what they wrote, in scaled units.
        norms: Of the decoder's rows, what the penalty weighs latents by.
        skip: Train a linear map beside the latents, from zero.
        on_step: Called with the step and its loss.
    """
    same, s_in, s_out = x is y, scale(x), scale(y)
    rows = x / s_in
    wanted = rows if same else y / s_out
    coder = started(rows, wanted, n, rule, rng)
    if skip:
        coder.skip = y.new_zeros(y.shape[1], x.shape[1]).requires_grad_()
    silent = torch.zeros(n, device=x.device)

    def loss(index: Tensor, done: float) -> Tensor:
        pre = coder.pre(rows[index])
        latents = rule.latents(pre, coder.state, True)
        written = coder.written(latents, rows[index])
        goal = wanted[index]
        total = _nested(latents, coder, goal, prefixes) if prefixes else _squared(goal - written)
        # The penalty is warmed up over the first twentieth (Anthropic, April 2024).
        total = total + min(1.0, done / 0.05) * rule.penalty(latents, pre, coder.state, norms(coder.decoder))
        silent.add_(1).masked_fill_((latents.detach() > 0).flatten(0, -2).any(0), 0)
        if rule.auxiliary:
            total = total + _AUXILIARY * _revived(pre, silent > _DEAD, coder, goal - written.detach())
        return total if extra is None else total + extra(coder, index, latents, written)

    def after() -> None:
        with torch.no_grad():
            if same and rule.unit_norm:
                coder.decoder.div_(coder.decoder.norm(dim=1, keepdim=True).clamp_min(1e-8))

    trained(coder.trained, loss, len(rows), training, rng, after, on_step)
    return coder.rescaled(s_in, s_out)


def _unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True)


def _squared(error: Float[Tensor, "row _"]) -> Tensor:
    return error.square().sum(-1).mean()


def _nested(latents: Tensor, coder: Coder, goal: Tensor, prefixes: Sequence[int]) -> Tensor:
    """Mean over nested prefixes of the error of the first latents alone."""
    errors = [_squared(goal - latents[:, :m] @ coder.decoder[:m] - coder.offset) for m in prefixes]
    return torch.stack(errors).mean()


def _revived(pre: Tensor, dead: Tensor, coder: Coder, residual: Tensor) -> Tensor:
    """How badly the largest dead latents predict what is left over."""
    n = int(dead.sum())
    if not n:
        return residual.new_zeros(())
    k = min(n, max(1, residual.shape[-1] // 2))
    # ReLU would leave latents that are negative everywhere dead for ever.
    values, index = pre.masked_fill(~dead, -torch.inf).topk(k, dim=-1)
    chosen = torch.zeros_like(pre).scatter(-1, index, values)
    return _squared(residual - chosen @ coder.decoder)
