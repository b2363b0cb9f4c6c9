"""Feed-forward networks: what a layer does to each row by itself."""

from typing import Protocol

from torch import Tensor


class FeedForward(Protocol):
    """Changes a row by itself: dense, or a mixture of experts."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the residual stream `[R, hidden]` with this layer's share added; x is not changed."""
        ...
