# mypy: disallow-untyped-decorators=False
# (Triton ships no types.)
"""RMS norm in Triton: one program norms one row, in blocks of a fixed width, in order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import tiles
from kernels.rms_norm.norm import Norm


def rms_norm(x: Tensor, norm: Norm) -> Tensor:
    """See `kernels.rms_norm.rms_norm`."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    _rms_norm_kernel[(x.shape[0],)](
        x,
        norm.weight,
        y,
        x.shape[1],
        x.stride(0),
        norm.epsilon,
        BLOCK_K=tiles.NORM_COLUMNS,
        enable_fp_fusion=tiles.MAY_FUSE,
    )
    return y


@triton.jit
def _rms_norm_kernel(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    y_ptr: tl.tensor,
    num_columns: tl.tensor,
    x_stride: tl.tensor,
    epsilon: tl.tensor,
    BLOCK_K: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_K)
    squares = 0.0
    for start in range(0, num_columns, BLOCK_K):
        k = start + columns
        x = tl.load(x_ptr + row * x_stride + k, mask=k < num_columns, other=0.0).to(tl.float32)
        squares += tl.sum(x * x, axis=0)
    factor = 1.0 / tl.sqrt(squares / num_columns + epsilon)
    for start in range(0, num_columns, BLOCK_K):
        k = start + columns
        x = tl.load(x_ptr + row * x_stride + k, mask=k < num_columns, other=0.0).to(tl.float32)
        y = x * factor * tl.load(weight_ptr + k, mask=k < num_columns, other=0.0)
        tl.store(y_ptr + row * num_columns + k, y.to(y_ptr.dtype.element_ty), mask=k < num_columns)
