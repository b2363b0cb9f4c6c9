"""What a request must be before the engine takes it in."""

import time

import pytest

from server.engine.intake import MAX_COMPLETIONS, check_request
from server.errors import ContextLengthExceeded, DeadlineExceeded, InvalidRequest
from server.messages import GenerateRequest, SamplingParams


def test_returns_the_prompt_as_an_array() -> None:
    """A good request costs one conversion."""
    prompt = check_request(
        GenerateRequest("r", (3, 1, 2), SamplingParams(seed=0, max_tokens=1)), vocabulary_size=4, max_tokens=4
    )

    assert prompt.tolist() == [3, 1, 2]
    assert prompt.dtype == "int32"


def test_names_all_wrong_fields_at_once() -> None:
    """One refusal lists every field that is out of range."""
    sampling = SamplingParams(seed=-1, max_tokens=-2, n=MAX_COMPLETIONS + 1, stop_token_ids=(9,), logit_bias={-1: 1.0})

    with pytest.raises(InvalidRequest) as refused:
        check_request(GenerateRequest("r", (), sampling), vocabulary_size=4, max_tokens=4)

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
    check_request(GenerateRequest("r", prompt, SamplingParams(seed=0, max_tokens=0)), vocabulary_size=4, max_tokens=4)

    with pytest.raises(ContextLengthExceeded):
        check_request(
            GenerateRequest("r", prompt, SamplingParams(seed=0, max_tokens=1)), vocabulary_size=4, max_tokens=4
        )


def test_a_past_deadline_is_not_begun() -> None:
    """What comes too late costs no compute."""
    late = GenerateRequest("r", (1,), SamplingParams(seed=0, max_tokens=1), deadline_s=time.monotonic())

    with pytest.raises(DeadlineExceeded):
        check_request(late, vocabulary_size=4, max_tokens=4)
