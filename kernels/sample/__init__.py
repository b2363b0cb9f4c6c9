"""Choosing the next token of each row, and scoring tokens that were chosen before.

Order: log probabilities are read from the raw logits; then logit bias, bans, repetition, frequency and presence
penalties. A temperature of 0 takes the largest logit (of equal ones the lowest id). Any other divides, keeps the top k,
of these the fewest most probable tokens that hold top_p of their probability, of these what has at least min_p of the
largest probability, and draws from what is kept. At least one token always is.

Shapes: L rows of logits, V vocabulary, k top tokens.
Law: a row's token is a function of its logits, its parameters and (seed, index, position). Probabilities are summed as
integers, so no order of summation can change them.
"""

import torch
from torch import Tensor

from kernels.backend import dispatch, gpu_twin
from kernels.checks import require, require_floats, require_tensor
from kernels.cpu import sample as cpu
from kernels.sample import reference
from kernels.sample.rows import (
    MAX_VOCABULARY,
    MIN_TEMPERATURE,
    RaggedTokens,
    SampledRows,
    SamplingRow,
    SamplingRows,
)

__all__ = [
    "MAX_VOCABULARY",
    "MIN_TEMPERATURE",
    "RaggedTokens",
    "SampledRows",
    "SamplingRow",
    "SamplingRows",
    "sample",
    "score",
]

_gpu_sample = gpu_twin(reference.sample)
_gpu_score = gpu_twin(reference.score)


def sample(logits: Tensor, rows: SamplingRows) -> SampledRows:
    """Choose a token for each row.

    Args:
        logits: `[L, V]` f32, contiguous; left as it is.
        rows: L rows on the device of the logits. Token ids in its lists are below V.

    Raises:
        ShapeError: logits and rows do not fit together.

    Source: top_p: Holtzman et al., The curious case of neural text degeneration, 2020; min_p: Nguyen et al., 2024.
    """
    _check_logits(logits)
    num_rows = logits.size(0)
    require(rows.temperature.size(0) == num_rows, "rows", rows.temperature.size(0), num_rows)
    op = dispatch(logits.device, cpu=cpu.sample, gpu=_gpu_sample, reference=reference.sample)
    return op(logits, rows)


def score(logits: Tensor, token_ids: Tensor, num_top: int) -> SampledRows:
    """Report the log probability and rank of given tokens, and the most probable ones.

    Args:
        logits: `[L, V]` f32, contiguous.
        token_ids: `[L]` int32, below V.
        num_top: how many of the most probable tokens to report.

    Raises:
        ShapeError: logits and token ids do not fit together.
    """
    _check_logits(logits)
    require_tensor("token_ids", token_ids, shape=(logits.shape[0],), dtypes=(torch.int32,))
    require(num_top >= 0, "num_top", num_top, "at least 0")
    op = dispatch(logits.device, cpu=cpu.score, gpu=_gpu_score, reference=reference.score)
    return op(logits, token_ids, num_top)


def _check_logits(logits: Tensor) -> None:
    require_floats("logits", logits)
    num_dimensions = logits.dim()
    require(num_dimensions == 2, "logits.dim()", num_dimensions, 2)
    vocabulary = logits.size(1)
    require(1 <= vocabulary <= MAX_VOCABULARY, "vocabulary", vocabulary, "1 ..", MAX_VOCABULARY)
