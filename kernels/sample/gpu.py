# mypy: disallow-untyped-decorators=False
# (Triton ships no types.)
"""The sampler on a GPU: one Triton kernel for a greedy batch, else the reference's tensor operations.

Those keep the law there: a row's maximum is exact, its sort is stable, its probabilities are summed as integers, and
`exp` works on each element alone, so nothing depends on the shape of the batch or on how a reduction is split.
Shapes: L rows, V vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import tiles
from kernels.sample import reference
from kernels.sample.reference import score
from kernels.sample.rows import SampledRows, SamplingRows

__all__ = ["sample", "score"]


def sample(logits: Tensor, rows: SamplingRows) -> SampledRows:
    """See `kernels.sample.sample`."""
    if not rows.is_all_greedy or rows.has_edits:
        return reference.sample(logits, rows)
    num_rows, vocabulary = logits.shape
    token_ids = torch.empty(num_rows, dtype=torch.int32, device=logits.device)
    _argmax_kernel[(num_rows,)](
        logits, token_ids, vocabulary, BLOCK_V=tiles.ARGMAX_COLUMNS, enable_fp_fusion=tiles.MAY_FUSE
    )
    return reference.report(logits, token_ids.long(), rows.logprobs, rows.max_logprobs)


@triton.jit
def _argmax_kernel(logits_ptr: tl.tensor, token_ptr: tl.tensor, vocabulary: tl.tensor, BLOCK_V: tl.constexpr) -> None:
    """Find the lowest id of one row's largest logit; -1 if the row holds no distribution."""
    row = tl.program_id(0).to(tl.int64)
    largest = tl.full([], float("-inf"), tl.float32)
    token = tl.full([], 0, tl.int32)
    num_nan = tl.full([], 0, tl.int32)
    for start in range(0, vocabulary, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        x = tl.load(logits_ptr + row * vocabulary + v, mask=v < vocabulary, other=float("-inf"))
        num_nan += tl.sum((x != x).to(tl.int32), axis=0)  # noqa: PLR0124 only a NaN differs from itself
        block_largest = tl.max(x, axis=0)
        block_token = tl.min(tl.where(x == block_largest, v, vocabulary), axis=0)
        token = tl.where(block_largest > largest, block_token, token)
        largest = tl.maximum(largest, block_largest)
    is_sound = (num_nan == 0) & (largest > float("-inf")) & (largest < float("inf"))
    tl.store(token_ptr + row, tl.where(is_sound, token, -1))
