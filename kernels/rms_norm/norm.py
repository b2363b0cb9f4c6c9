"""What an RMS norm needs to know besides its rows."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.checks import require_tensor


@dataclass(frozen=True, slots=True, eq=False)
class Norm:
    """`y = x / sqrt(mean(x^2) + epsilon) * weight`."""

    weight: Tensor
    """`[K]` float32."""
    epsilon: float

    def __post_init__(self) -> None:
        require_tensor("norm.weight", self.weight, shape=(None,), dtypes=(torch.float32,))
