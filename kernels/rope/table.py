"""The rotations of every position."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.checks import require_tensor


@dataclass(frozen=True, slots=True, eq=False)
class RopeTable:
    """Cosines and sines for T positions.

    `W <= D / 2` pairs rotate the first `2 W` numbers of a head; the others stay as they are.
    """

    cos: Tensor
    """`[T, W]` float32."""
    sin: Tensor
    """`[T, W]` float32."""
    is_interleaved: bool
    """True: pairs are (0, 1), (2, 3), ... (GGUF's llama family). False: i goes with i + W (Hugging Face)."""

    def __post_init__(self) -> None:
        require_tensor("cos", self.cos, shape=(None, None), dtypes=(torch.float32,))
        require_tensor("sin", self.sin, shape=tuple(self.cos.shape), dtypes=(torch.float32,))
