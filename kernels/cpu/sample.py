"""The sampler's C++ op: hands structs of pointers to `src/sample.cpp`. Chooses what `kernels/sample/reference.py` says.

Shapes: L rows, V vocabulary, k top tokens.
"""

import functools
import struct
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.checks import require
from kernels.cpu import library
from kernels.sample.rows import SampledRows, SamplingRows

_columns = attrgetter(
    *("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("top_k", "index", "logprobs", "position", "seed"),
    *("prompt.offsets", "prompt.token_ids", "output.offsets", "output.token_ids"),
    *("bias.offsets", "bias.token_ids", "banned.offsets", "banned.token_ids", "bias_values"),
)
"""The tensors of `SamplingRows` in the order of the struct."""

_ANSWER = "5Pi4x"
_pack_sample = struct.Struct(f"Pii20P{_ANSWER}").pack
"""Packs `PathfoxSampleCall`."""
_pack_score = struct.Struct(f"PiiPq{_ANSWER}").pack
"""Packs `PathfoxScoreCall`."""


def sample(logits: Tensor, rows: SamplingRows) -> SampledRows:
    """Choose a token for each row."""
    global _given  # noqa: PLW0603 a cache of one; replaced as a whole, so threads need no lock
    given = _given
    if given.rows is not rows:
        _given = given = _Given(rows, [tensor.data_ptr() for tensor in _columns(rows)])
    num_rows, vocabulary = logits.shape
    for lists in (rows.prompt, rows.output, rows.bias, rows.banned):
        _check_token_ids(lists.token_ids, vocabulary)
    num_top = min(rows.max_logprobs, vocabulary)
    report = _report(num_rows, num_top) if num_top >= 0 else _no_report(num_rows)
    answer = SampledRows(torch.empty(num_rows, dtype=torch.int32), *report)
    library.load().pathfox_sample(
        _pack_sample(logits.data_ptr(), num_rows, vocabulary, *given.addresses, *_places(answer))
    )
    return answer


def score(logits: Tensor, token_ids: Tensor, num_top: int) -> SampledRows:
    """Report on tokens that were chosen before."""
    num_rows, vocabulary = logits.shape
    _check_token_ids(token_ids, vocabulary)
    report = _report(num_rows, min(num_top, vocabulary))
    answer = SampledRows(torch.empty(num_rows, dtype=torch.int32), *report)
    library.load().pathfox_score(
        _pack_score(logits.data_ptr(), num_rows, vocabulary, token_ids.data_ptr(), num_top, *_places(answer))
    )
    return answer


class _Given(NamedTuple):
    """Rows and where their columns lie."""

    rows: SamplingRows | None
    addresses: list[int]


_given = _Given(None, [])
"""The rows that were sampled last: they are the same objects while the same sequences decode."""


def _check_token_ids(token_ids: Tensor, vocabulary: int) -> None:
    """Refuse ids that would be written outside the row: the C++ side does not look."""
    if token_ids.numel():
        lowest, highest = (int(end) for end in token_ids.aminmax())
        require(lowest >= 0 and highest < vocabulary, "token ids", (lowest, highest), "0 ..", vocabulary - 1)


def _report(num_rows: int, num_top: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Make room for what an answer says besides the tokens: log probabilities, ranks, top tokens and theirs."""
    return (
        torch.empty(num_rows),
        torch.empty(num_rows, dtype=torch.int32),
        torch.empty((num_rows, num_top), dtype=torch.int32),
        torch.empty((num_rows, num_top)),
    )


@functools.lru_cache
def _no_report(num_rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Make it once where no row asks: answers may share what always says NaN and 0."""
    return _report(num_rows, 0)


def _places(answer: SampledRows) -> tuple[int, ...]:
    """Return where an answer goes, and how many top tokens it has room for."""
    tensors = (answer.token_ids, answer.logprobs, answer.ranks, answer.top_token_ids, answer.top_logprobs)
    return (*(tensor.data_ptr() for tensor in tensors), answer.top_token_ids.size(1))
