"""A model's matrix as one backend reads it."""

import abc
from dataclasses import dataclass

from torch import Tensor

from kernels.backend import Backend


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class LinearWeight(abc.ABC):
    """A packed matrix `[N, K]`. Opaque: each backend extends it and alone looks inside."""

    num_rows: int
    """N, the outputs of all stacked matrices."""
    num_columns: int
    """K, the inputs."""
    num_bytes: int
    """Memory that the packed numbers take."""
    backend: Backend
    """The backend that it was packed for; the reference reads all of them."""
    bias: Tensor | None = None
    """`[N]` float32, added to the outputs."""
    is_gated: bool = False
    """Made by `pack_gated`: the first half of the rows is the gate, the second is what it opens."""

    @abc.abstractmethod
    def dequantised(self) -> Tensor:
        """Return the numbers as a new or shared `[N, K]` float32; not to be written to."""
