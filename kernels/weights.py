"""Matrices as files encode them, and as ops read them.

A loader makes an `EncodedMatrix`; `kernels.linear.pack` turns it into the `LinearWeight` of one backend.
Shapes: N outputs (rows), K inputs (columns).
Source of the quantised blocks: ggml's `block_q4_0`, `block_q4_1` and `block_q8_0`.
"""

import enum
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kernels.checks import require, require_tensor


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


@dataclass(frozen=True)
class EncodedMatrix:
    """A matrix as it stands in a model file, which may not have been read yet."""

    encoding: Encoding
    num_rows: int
    """N, the outputs."""
    num_columns: int
    """K, the inputs."""
    source: Tensor | Callable[[], Tensor]
    """Its data, or what makes it when that is work."""
    name: str = ""
    """What its model calls it: equal names in one model are equal matrices. Empty: it has no name to be kept under."""

    @cached_property
    def data(self) -> Tensor:
        """`[N, K]` in the float dtype, or `[N, bytes of a row]` uint8 with the file's blocks."""
        return self.source if isinstance(self.source, Tensor) else self.source()


BLOCK = 32
"""Columns of a quantised block."""
BLOCK_BYTES = {Encoding.Q4_0: 18, Encoding.Q4_1: 20, Encoding.Q8_0: 34}
"""Bytes of one block of a quantised encoding."""
DTYPES = {Encoding.F32: torch.float32, Encoding.F16: torch.float16, Encoding.BF16: torch.bfloat16}
"""The element type of an unquantised encoding."""


def check(matrix: EncodedMatrix) -> None:
    """Raise `ShapeError` unless the data has the size and type that the encoding asks for."""
    if matrix.encoding in DTYPES:
        require_tensor(
            "matrix.data", matrix.data, shape=(matrix.num_rows, matrix.num_columns), dtypes=(DTYPES[matrix.encoding],)
        )
        return
    require(
        matrix.num_columns % BLOCK == 0,
        f"columns of a {matrix.encoding} matrix",
        matrix.num_columns,
        "multiple of",
        BLOCK,
    )
    row_bytes = matrix.num_columns // BLOCK * BLOCK_BYTES[matrix.encoding]
    require_tensor("matrix.data", matrix.data, shape=(matrix.num_rows, row_bytes), dtypes=(torch.uint8,))


def dequantise(matrix: EncodedMatrix) -> Tensor:
    """Return the numbers of a matrix as `[N, K]` float32."""
    check(matrix)
    if matrix.encoding in DTYPES:
        return matrix.data.to(torch.float32)
    blocks = matrix.data.view(matrix.num_rows, -1, BLOCK_BYTES[matrix.encoding])
    scale = _halves(blocks, 0)
    match matrix.encoding:
        case Encoding.Q4_0:
            values = (_nibbles(blocks[..., 2:]) - 8.0) * scale
        case Encoding.Q4_1:
            values = _nibbles(blocks[..., 4:]) * scale + _halves(blocks, 2)
        case _:
            values = blocks[..., 2:].contiguous().view(torch.int8).to(torch.float32) * scale
    return values.reshape(matrix.num_rows, matrix.num_columns)


def _halves(blocks: Tensor, offset: int) -> Tensor:
    """Read the float16 at a byte offset of every block."""
    return blocks[..., offset : offset + 2].contiguous().view(torch.float16).to(torch.float32)


def _nibbles(packed: Tensor) -> Tensor:
    """Unpack 16 bytes to 32 numbers: the low nibbles, then the high ones."""
    return torch.cat([packed & 15, packed >> 4], dim=-1).to(torch.float32)
