"""The gated feed-forward network of the Llama family."""

from torch import Tensor

from kernels.linear import LinearWeight, gated_linear, linear
from kernels.rms_norm import Norm


class GatedFeedForward:
    """`x + down(silu(gate(norm(x))) * up(norm(x)))`."""

    def __init__(self, *, norm: Norm, gate_up: LinearWeight, down: LinearWeight) -> None:
        self.norm = norm
        self.gate_up = gate_up
        self.down = down

    def forward(self, x: Tensor) -> Tensor:
        """See `FeedForward.forward`."""
        return linear(gated_linear(x, self.gate_up, norm=self.norm), self.down, residual=x)
