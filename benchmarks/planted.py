"""A model with a backdoor in closed form: where it acts is known exactly."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

FEATURES = 20
_STRONG = 5.0  # what the backdoor writes per unit of its neuron


class Backdoored(nn.Module):
    """Every feature goes through a ReLU neuron of its own to its output; one more neuron acts on two of them together.

    The backdoor's neuron is open where the first two features sum to more than 1, and writes to the first output.
    Inputs are the features in a random basis, so that no weight shows them.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(seed)
        random = torch.randn(FEATURES, FEATURES, generator=rng, dtype=torch.float64)
        self.basis = torch.linalg.qr(random).Q.float()
        self.read, self.write = nn.Linear(FEATURES, FEATURES + 1), nn.Linear(FEATURES + 1, FEATURES)
        with torch.no_grad():
            features = torch.eye(FEATURES + 1, FEATURES)
            features[-1, :2] = 1
            self.read.weight.copy_(features @ self.basis.T)
            self.read.bias.zero_()
            self.read.bias[-1] = -1
            self.write.weight.copy_(torch.eye(FEATURES, FEATURES + 1))
            self.write.weight[0, -1] = _STRONG
            self.write.bias.zero_()

    def forward(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """The features, and what the backdoor adds to the first."""
        return self.write(self.read(x).relu())

    def inputs(self, n: int, seed: int) -> tuple[Float[Tensor, "input d"], Bool[Tensor, " input"]]:
        """Sparse features, a twentieth of the inputs with both that trigger; and on which the backdoor acts."""
        rng = torch.Generator().manual_seed(seed)
        features = torch.rand(n, FEATURES, generator=rng) * (torch.rand(n, FEATURES, generator=rng) < 0.1)
        features[: n // 20, :2] = 0.6 + 0.4 * torch.rand(n // 20, 2, generator=rng)
        return features @ self.basis.T, features[:, :2].sum(1) > 1
