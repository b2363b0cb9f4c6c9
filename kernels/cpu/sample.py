"""The sampler's C++ op: hands structs of pointers to `src/sample.cpp`. Chooses what `kernels/sample/reference.py` says.

Shapes: L rows, V vocabulary, k top tokens.
"""

import ctypes
from typing import ClassVar

import torch
from torch import Tensor

from kernels.checks import require
from kernels.cpu import library
from kernels.sample.rows import RaggedTokens, SampledRows, SamplingRows

_COLUMNS = (
    *("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("top_k", "index", "logprobs", "position", "seed"),
)
_LISTS = ("prompt", "output", "bias", "banned")


class _Ragged(ctypes.Structure):
    _fields_: ClassVar = [("offsets", ctypes.c_void_p), ("token_ids", ctypes.c_void_p)]


class _SamplingRows(ctypes.Structure):
    _fields_: ClassVar = [
        *((name, ctypes.c_void_p) for name in _COLUMNS),
        *((name, _Ragged) for name in _LISTS),
        ("bias_values", ctypes.c_void_p),
    ]


class _SampledRows(ctypes.Structure):
    _fields_: ClassVar = [
        *((name, ctypes.c_void_p) for name in ("token_ids", "logprobs", "ranks", "top_token_ids", "top_logprobs")),
        ("num_top", ctypes.c_int32),
    ]


def sample(logits: Tensor, rows: SamplingRows) -> SampledRows:
    """Choose a token for each row."""
    num_rows, vocabulary = logits.shape
    for name in _LISTS:
        _check_token_ids(getattr(rows, name).token_ids, vocabulary)
    given = _SamplingRows(
        *(getattr(rows, name).data_ptr() for name in _COLUMNS),
        *(_ragged(getattr(rows, name)) for name in _LISTS),
        rows.bias_values.data_ptr(),
    )
    result, answer = _allocate(num_rows, min(max(rows.max_logprobs, 0), vocabulary))
    library.load().pathfox_sample(
        _pointer(logits),
        ctypes.c_int32(num_rows),
        ctypes.c_int32(vocabulary),
        ctypes.byref(given),
        ctypes.byref(answer),
    )
    return result


def score(logits: Tensor, token_ids: Tensor, num_top: int) -> SampledRows:
    """Report on tokens that were chosen before."""
    num_rows, vocabulary = logits.shape
    _check_token_ids(token_ids, vocabulary)
    result, answer = _allocate(num_rows, min(num_top, vocabulary))
    library.load().pathfox_score(
        _pointer(logits),
        ctypes.c_int32(num_rows),
        ctypes.c_int32(vocabulary),
        _pointer(token_ids),
        ctypes.c_int32(num_top),
        ctypes.byref(answer),
    )
    return result


def _check_token_ids(token_ids: Tensor, vocabulary: int) -> None:
    """Refuse ids that would be written outside the row: the C++ side does not look."""
    if token_ids.numel():
        lowest, highest = (int(end) for end in token_ids.aminmax())
        require(lowest >= 0 and highest < vocabulary, "token ids", (lowest, highest), "0 ..", vocabulary - 1)


def _allocate(num_rows: int, num_top: int) -> tuple[SampledRows, _SampledRows]:
    """Make room for an answer. The struct points into the tensors and must not outlive them."""
    result = SampledRows(
        token_ids=torch.empty(num_rows, dtype=torch.int32),
        logprobs=torch.empty(num_rows, dtype=torch.float32),
        ranks=torch.empty(num_rows, dtype=torch.int32),
        top_token_ids=torch.empty(num_rows, num_top, dtype=torch.int32),
        top_logprobs=torch.empty(num_rows, num_top, dtype=torch.float32),
    )
    pointers = (result.token_ids, result.logprobs, result.ranks, result.top_token_ids, result.top_logprobs)
    return result, _SampledRows(*(tensor.data_ptr() for tensor in pointers), num_top)


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _ragged(lists: RaggedTokens) -> _Ragged:
    return _Ragged(lists.offsets.data_ptr(), lists.token_ids.data_ptr())
