"""RMS norm in plain PyTorch."""

import torch
from torch import Tensor

from kernels.rms_norm.norm import Norm


def rms_norm(x: Tensor, norm: Norm) -> Tensor:
    """See `kernels.rms_norm.rms_norm`."""
    wide = x.to(torch.float32)
    scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + norm.epsilon)
    return (wide * scale * norm.weight).to(x.dtype)
