"""What a request must be before the engine takes it in: whatever the front end has checked, this guards memory."""

import math

import numpy as np

from server.engine.chain import TokenArray
from server.errors import ContextLengthExceeded, DeadlineExceeded, InvalidRequest, Violation, violation
from server.messages import GenerateRequest, SamplingParams

MAX_SEED = (1 << 64) - 1
MAX_TOKENS = (1 << 31) - 1
MAX_FLOAT = float(np.finfo(np.float32).max)
MIN_FLOAT = 2.0**-149
"""The sampler keeps its parameters as float32; beyond these a number would become infinity or 0."""
MAX_PENALTY = 2.0
MAX_LOGIT_BIAS = 100.0
"""These two, and every other range of the sampling parameters, as the public contract says."""
MAX_COMPLETIONS = 1024
"""Each takes memory for its token ids before it gets a slot."""


def check_request(request: GenerateRequest, *, vocabulary_size: int, max_tokens: int, now_s: float) -> TokenArray:
    """Check a request and return its prompt as an array.

    Args:
        request: what came.
        vocabulary_size: token ids are below it.
        max_tokens: prompt + output that one completion may have.
        now_s: the time, on the clock of `GenerateRequest.deadline_s`.

    Raises:
        InvalidRequest: every field that is out of range.
        ContextLengthExceeded: no room is left for one token after the prompt.
        DeadlineExceeded: it is too late already.
    """
    sampling = request.sampling
    wrong = [*_out_of_range(request), *_floats_out_of_range(sampling)]
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
    if request.deadline_s is not None and request.deadline_s <= now_s:
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
        (
            0 <= sampling.max_tokens <= MAX_TOKENS,
            "sampling_params.max_tokens",
            sampling.max_tokens,
            f"0 .. {MAX_TOKENS}",
        ),
        (
            0 <= sampling.min_tokens <= max(sampling.max_tokens, 0),
            "sampling_params.min_tokens",
            sampling.min_tokens,
            "0 .. max_tokens",
        ),
        (sampling.top_k >= 0, "sampling_params.top_k", sampling.top_k, "at least 0"),
        ((sampling.logprobs or 0) >= 0, "sampling_params.logprobs", sampling.logprobs, "at least 0"),
        (
            (sampling.prompt_logprobs or 0) >= 0,
            "sampling_params.prompt_logprobs",
            sampling.prompt_logprobs,
            "at least 0",
        ),
        (not math.isnan(request.deadline_s or 0.0), "deadline_s", request.deadline_s, "a number"),
    )
    return [violation(name, seen=seen, limit=limit) for is_good, name, seen, limit in checks if not is_good]


def _floats_out_of_range(sampling: SamplingParams) -> list[Violation]:
    """Comparisons are written so that NaN fails them."""
    ranges = (
        ("temperature", 0.0, MAX_FLOAT),
        ("top_p", MIN_FLOAT, 1.0),
        ("min_p", 0.0, 1.0),
        ("repetition_penalty", MIN_FLOAT, MAX_FLOAT),
        ("presence_penalty", -MAX_PENALTY, MAX_PENALTY),
        ("frequency_penalty", -MAX_PENALTY, MAX_PENALTY),
    )
    wrong = [
        violation(f"sampling_params.{name}", seen=value, limit=f"{least:g} .. {most:g}")
        for name, least, most in ranges
        if not least <= (value := getattr(sampling, name)) <= most
    ]
    for token_id, bias in sampling.logit_bias.items():
        if not -MAX_LOGIT_BIAS <= bias <= MAX_LOGIT_BIAS:
            limit = f"-{MAX_LOGIT_BIAS:g} .. {MAX_LOGIT_BIAS:g}"
            wrong.append(violation(f"sampling_params.logit_bias[{token_id}]", seen=bias, limit=limit))
            break
    return wrong


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
