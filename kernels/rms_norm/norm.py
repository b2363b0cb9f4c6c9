"""What an RMS norm needs to know besides its rows."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kernels.checks import require_tensor


@dataclass(frozen=True, slots=True, eq=False)
class Norm:
    """`y = x / sqrt(mean(x^2) + epsilon) * weight`."""

    weight: Tensor
    """`[K]` float32."""
    epsilon: float
    num_columns: int = field(init=False)
    """K."""

    def __post_init__(self) -> None:
        require_tensor("norm.weight", self.weight, shape=(None,), dtypes=(torch.float32,))
        object.__setattr__(self, "num_columns", self.weight.shape[0])
