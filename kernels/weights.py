"""Matrices as files encode them, and as ops read them.

A loader makes an `EncodedMatrix`; `kernels.linear.pack` turns it into the `LinearWeight` of one backend.
Shapes: N outputs (rows), K inputs (columns).
"""

import enum
from dataclasses import dataclass

from torch import Tensor


class Encoding(enum.StrEnum):
    """How the numbers of a matrix are written. Quantised ones are GGUF's blocks of 32 along K, low nibbles first."""

    F32 = "f32"
    F16 = "f16"
    BF16 = "bf16"
    Q4_0 = "q4_0"
    """w = d (q - 8): fp16 d, 16 bytes of nibbles."""
    Q4_1 = "q4_1"
    """w = d q + m: fp16 d, fp16 m, 16 bytes of nibbles."""
    Q8_0 = "q8_0"
    """w = d q: fp16 d, 32 int8."""


@dataclass(frozen=True, slots=True)
class EncodedMatrix:
    """A matrix as it stands in a model file."""

    encoding: Encoding
    num_rows: int
    """N, the outputs."""
    num_columns: int
    """K, the inputs."""
    data: Tensor
    """`[N, K]` in the float dtype, or `[N, bytes of a row]` uint8 with the file's blocks."""
