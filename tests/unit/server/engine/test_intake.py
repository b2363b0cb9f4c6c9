"""What a request must be before the engine takes it in."""

import math
from dataclasses import replace

import pytest

from server.engine.intake import MAX_COMPLETIONS, check_request
from server.errors import ContextLengthExceeded, DeadlineExceeded, InvalidRequest
from server.messages import GenerateRequest, SamplingParams

NOW_S = 5.0
GOOD = SamplingParams(seed=0, max_tokens=2)


def test_returns_the_prompt_as_an_array() -> None:
    """A good request costs one conversion."""
    prompt = check_request(
        GenerateRequest("r", (3, 1, 2), SamplingParams(seed=0, max_tokens=1)),
        vocabulary_size=4,
        max_tokens=4,
        now_s=NOW_S,
    )

    assert prompt.tolist() == [3, 1, 2]
    assert prompt.dtype == "int32"


def test_names_all_wrong_fields_at_once() -> None:
    """One refusal lists every field that is out of range."""
    sampling = SamplingParams(seed=-1, max_tokens=-2, n=MAX_COMPLETIONS + 1, stop_token_ids=(9,), logit_bias={-1: 1.0})

    with pytest.raises(InvalidRequest) as refused:
        check_request(GenerateRequest("r", (), sampling), vocabulary_size=4, max_tokens=4, now_s=NOW_S)

    assert {violation.field for violation in refused.value.violations} == {
        "input",
        "sampling_params.seed",
        "sampling_params.max_tokens",
        "sampling_params.n",
        "sampling_params.stop_token_ids",
        "sampling_params.logit_bias",
    }


def test_a_prompt_may_fill_the_context_only_if_nothing_is_generated() -> None:
    """Scoring needs no room for a token."""
    prompt = (1, 2, 3, 0)
    check_request(
        GenerateRequest("r", prompt, SamplingParams(seed=0, max_tokens=0)), vocabulary_size=4, max_tokens=4, now_s=NOW_S
    )

    with pytest.raises(ContextLengthExceeded):
        check_request(
            GenerateRequest("r", prompt, SamplingParams(seed=0, max_tokens=1)),
            vocabulary_size=4,
            max_tokens=4,
            now_s=NOW_S,
        )


def test_a_past_deadline_is_not_begun() -> None:
    """What comes too late costs no compute."""
    late = GenerateRequest("r", (1,), SamplingParams(seed=0, max_tokens=1), deadline_s=NOW_S)

    with pytest.raises(DeadlineExceeded):
        check_request(late, vocabulary_size=4, max_tokens=4, now_s=NOW_S)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((name, math.nan) for name in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty")),
        *(("temperature", value) for value in (-0.1, math.inf, 1e39)),
        *(("top_p", value) for value in (0.0, 1.1, 1e-60)),
        *(("min_p", value) for value in (-0.1, 1.1)),
        *(("repetition_penalty", value) for value in (0.0, math.inf, 1e39, 1e-60)),
        *(("presence_penalty", value) for value in (-2.1, 2.1)),
        *(("frequency_penalty", value) for value in (math.nan, -2.1, 2.1, math.inf)),
        *(("min_tokens", value) for value in (-1, 3)),
        *((name, -1) for name in ("logprobs", "prompt_logprobs", "top_k")),
    ],
)
def test_a_number_out_of_its_range_is_refused(field: str, value: float) -> None:
    """Every number of the sampling parameters keeps to the public contract, whoever sent it."""
    request = GenerateRequest("r", (1,), replace(GOOD, **{field: value}))

    with pytest.raises(InvalidRequest) as refused:
        check_request(request, vocabulary_size=4, max_tokens=4, now_s=NOW_S)

    assert [violation.field for violation in refused.value.violations] == [f"sampling_params.{field}"]


@pytest.mark.parametrize("bias", [math.nan, math.inf, -100.1, 100.1])
def test_a_bias_out_of_its_range_is_refused(bias: float) -> None:
    """The refusal names the token."""
    request = GenerateRequest("r", (1,), replace(GOOD, logit_bias={1: 100.0, 2: bias}))

    with pytest.raises(InvalidRequest, match=r"logit_bias\[2\]"):
        check_request(request, vocabulary_size=4, max_tokens=4, now_s=NOW_S)


def test_a_number_that_no_counter_holds_is_refused() -> None:
    """max_tokens is at most what the public contract can say, and min_tokens with it."""
    request = GenerateRequest("r", (1,), replace(GOOD, max_tokens=1 << 31, min_tokens=1 << 64))

    with pytest.raises(InvalidRequest, match="max_tokens"):
        check_request(request, vocabulary_size=4, max_tokens=4, now_s=NOW_S)


def test_a_deadline_that_is_no_number_is_refused() -> None:
    """NaN would upset the order of deadlines."""
    request = GenerateRequest("r", (1,), GOOD, deadline_s=math.nan)

    with pytest.raises(InvalidRequest, match="deadline_s"):
        check_request(request, vocabulary_size=4, max_tokens=4, now_s=NOW_S)


def test_ends_of_ranges_are_taken() -> None:
    """The ranges' ends are inside."""
    least = replace(GOOD, temperature=0.0, min_p=0.0, presence_penalty=-2.0, frequency_penalty=-2.0, logprobs=0)
    most = replace(GOOD, top_p=1.0, min_p=1.0, presence_penalty=2.0, min_tokens=2, logit_bias={3: -100.0})

    for sampling in (least, most):
        check_request(GenerateRequest("r", (1,), sampling), vocabulary_size=4, max_tokens=4, now_s=NOW_S)
