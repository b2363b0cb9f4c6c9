"""What a request must be before the engine takes it in: whatever the front end has checked, this guards memory."""

import time

import numpy as np

from server.engine.chain import TokenArray
from server.errors import ContextLengthExceeded, DeadlineExceeded, InvalidRequest, Violation, violation
from server.messages import GenerateRequest

MAX_SEED = (1 << 64) - 1
MAX_COMPLETIONS = 1024
"""Each takes memory for its token ids before it gets a slot."""


def check_request(request: GenerateRequest, *, vocabulary_size: int, max_tokens: int) -> TokenArray:
    """Check a request and return its prompt as an array.

    Args:
        request: what came.
        vocabulary_size: token ids are below it.
        max_tokens: prompt + output that one completion may have.

    Raises:
        InvalidRequest: every field that is out of range.
        ContextLengthExceeded: no room is left for one token after the prompt.
        DeadlineExceeded: it is too late already.
    """
    sampling = request.sampling
    wrong = list(_out_of_range(request))
    prompt = _token_array("input", request.prompt_token_ids, vocabulary_size, wrong)
    for emitted in request.emitted_token_ids:
        _token_array("emitted_token_ids", emitted, vocabulary_size, wrong)
    _token_array("sampling_params.logit_bias", tuple(sampling.logit_bias), vocabulary_size, wrong)
    endings = (*sampling.eos_token_ids, *sampling.stop_token_ids)
    _token_array("sampling_params.stop_token_ids", endings, vocabulary_size, wrong)
    if wrong:
        raise InvalidRequest(wrong)
    if prompt.size + min(sampling.max_tokens, 1) > max_tokens:
        raise ContextLengthExceeded(prompt_tokens=prompt.size, max_tokens=sampling.max_tokens, limit=max_tokens)
    if request.deadline_s is not None and request.deadline_s <= time.monotonic():
        raise DeadlineExceeded("the request's deadline has passed")
    return prompt


def _out_of_range(request: GenerateRequest) -> list[Violation]:
    sampling = request.sampling
    checks = (
        (bool(request.prompt_token_ids), "input", "no tokens", "at least one token"),
        (1 <= sampling.n <= MAX_COMPLETIONS, "sampling_params.n", sampling.n, f"1 .. {MAX_COMPLETIONS}"),
        (
            len(request.emitted_token_ids) <= sampling.n,
            "emitted_token_ids",
            len(request.emitted_token_ids),
            "at most n lists",
        ),
        (0 <= sampling.seed <= MAX_SEED, "sampling_params.seed", sampling.seed, "0 .. 2^64 - 1"),
        (sampling.max_tokens >= 0, "sampling_params.max_tokens", sampling.max_tokens, "at least 0"),
        (sampling.min_tokens >= 0, "sampling_params.min_tokens", sampling.min_tokens, "at least 0"),
        (sampling.top_k >= 0, "sampling_params.top_k", sampling.top_k, "at least 0"),
    )
    return [violation(name, seen=seen, limit=limit) for is_good, name, seen, limit in checks if not is_good]


def _token_array(name: str, token_ids: tuple[int, ...], vocabulary_size: int, wrong: list[Violation]) -> TokenArray:
    """Return token ids as an array, or note the first that is none."""
    if not token_ids:
        return np.zeros(0, dtype=np.int32)
    least, largest = min(token_ids), max(token_ids)
    if least < 0 or largest >= vocabulary_size:
        seen = least if least < 0 else largest
        wrong.append(violation(name, seen=seen, limit=f"token ids 0 .. {vocabulary_size - 1}"))
        return np.zeros(0, dtype=np.int32)
    return np.array(token_ids, dtype=np.int32)
