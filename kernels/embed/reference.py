"""Embedding in plain PyTorch."""

from torch import Tensor

from kernels.linear.weight import LinearWeight


def embed(token_ids: Tensor, weight: LinearWeight) -> Tensor:
    """See `kernels.embed.embed`."""
    return weight.dequantised()[token_ids.long()]
