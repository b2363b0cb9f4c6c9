# mypy: disallow-untyped-decorators=False
# (Triton ships no types.)
"""Embedding in Triton: reads rows of the packed matrix, quantised or not.

Its result sets the dtype of a model's activations on a GPU: that of an unquantised matrix, else `QUANTISED_DTYPE`.
Shapes: R rows, V tokens, K columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import tiles
from kernels.checks import require
from kernels.linear.gpu import GpuWeight
from kernels.linear.weight import LinearWeight

QUANTISED_DTYPE = torch.bfloat16
"""Half the bytes of float32, and the range of it: the residual stream of some models leaves float16's."""


def embed(token_ids: Tensor, weight: LinearWeight) -> Tensor:
    """See `kernels.embed.embed`. A token id outside the weight gives zeros."""
    assert isinstance(weight, GpuWeight)
    require(len(weight.parts) == 1, "encodings of an embedding", len(weight.parts), 1)
    part = weight.parts[0]
    num_rows, num_columns = token_ids.shape[0], weight.num_columns
    dtype = part.values.dtype if part.scales is None else QUANTISED_DTYPE
    result = torch.empty(num_rows, num_columns, dtype=dtype, device=token_ids.device)
    _embed_kernel[(num_rows, triton.cdiv(num_columns, tiles.EMBED_COLUMNS))](
        token_ids,
        part.values,
        part.scales,
        part.minimums,
        result,
        weight.num_rows,
        num_columns,
        KIND=part.kind,
        BLOCK_K=tiles.EMBED_COLUMNS,
        enable_fp_fusion=tiles.MAY_FUSE,
    )
    return result


@triton.jit
def _embed_kernel(
    token_ptr: tl.tensor,
    value_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    minimum_ptr: tl.tensor,
    result_ptr: tl.tensor,
    num_tokens: tl.tensor,
    num_columns: tl.tensor,
    KIND: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    token = tl.load(token_ptr + row).to(tl.int64)
    is_column = k < num_columns
    is_known = k < tl.where((token >= 0) & (token < num_tokens), num_columns, 0)
    if KIND == "q4":
        packed = tl.load(value_ptr + token * (num_columns // 2) + k // 32 * 16 + k % 16, mask=is_known, other=0)
        value = tl.where(k % 32 < 16, packed & 15, packed >> 4).to(tl.float32)
    else:
        value = tl.load(value_ptr + token * num_columns + k, mask=is_known, other=0).to(tl.float32)
    if KIND == "q4" or KIND == "q8":  # noqa: PLR1714 Triton compiles no `in`
        block = token * (num_columns // 32) + k // 32
        value = value * tl.load(scale_ptr + block, mask=is_known, other=0.0).to(tl.float32)
        if KIND == "q4":
            value = value + tl.load(minimum_ptr + block, mask=is_known, other=0.0).to(tl.float32)
    tl.store(result_ptr + row * num_columns + k, value.to(result_ptr.dtype.element_ty), mask=is_column)
