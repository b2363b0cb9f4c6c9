"""When a completion ends, and which logits it needs."""

import numpy as np
import pytest

from server.engine.sequence import Seniority, Sequence, Submission
from server.messages import FinishReason, GenerateRequest, SamplingParams, TokenLogprob

PROMPT = (1, 2, 3)


def sequence(sampling: SamplingParams, emitted: tuple[int, ...] = (), *, max_sequence_tokens: int = 100) -> Sequence:
    """Make the first completion of a request."""
    request = GenerateRequest("r", PROMPT, sampling, emitted_token_ids=(emitted,))
    submission = Submission(request, 1, np.array(PROMPT, dtype=np.int32), submitted_s=0.0)
    return Sequence(submission, 0, seniority=Seniority(0, 2, 1, 0), max_sequence_tokens=max_sequence_tokens)


def test_an_ending_token_comes_before_a_limit() -> None:
    """A token that ends the turn at max_tokens ends it with STOP; the end of turn comes before a stop token."""
    params = SamplingParams(seed=0, max_tokens=2, eos_token_ids=(8,), stop_token_ids=(8, 9))

    assert sequence(params, (5,)).accept(8) is FinishReason.STOP
    assert sequence(params, (5,)).accept(9) is FinishReason.STOP_SEQUENCE
    assert sequence(params, (5,)).accept(7) is FinishReason.LENGTH
    assert sequence(params).accept(7) is None


def test_max_tokens_comes_before_the_context() -> None:
    """Where both limits are reached at once the caller's own is named."""
    params = SamplingParams(seed=0, max_tokens=2)

    assert sequence(params, (5,), max_sequence_tokens=5).accept(7) is FinishReason.LENGTH
    assert sequence(params, max_sequence_tokens=4).accept(7) is FinishReason.CONTEXT_FULL


@pytest.mark.parametrize(
    ("emitted", "reason"),
    [((), None), ((5,), None), ((5, 9), FinishReason.STOP_SEQUENCE), ((5, 6, 7), FinishReason.LENGTH)],
)
def test_knows_whether_an_interrupted_run_had_ended(emitted: tuple[int, ...], reason: FinishReason | None) -> None:
    """What was emitted says whether anything is left to do."""
    params = SamplingParams(seed=0, max_tokens=3, stop_token_ids=(9,))

    assert sequence(params, emitted).finished_before() is reason


def test_more_than_fits_is_no_overflow() -> None:
    """Tokens emitted under larger limits than ours are kept, and end the completion."""
    made = sequence(SamplingParams(seed=0, max_tokens=50), tuple(range(20)), max_sequence_tokens=10)

    assert made.known_tokens[made.num_prompt_tokens :].tolist() == list(range(20))
    assert made.finished_before() is FinishReason.CONTEXT_FULL


def test_backlog_is_bounded_by_the_context() -> None:
    """A max_tokens without meaning does not make the queue look endless."""
    made = sequence(SamplingParams(seed=0, max_tokens=2**31 - 1))

    assert made.num_backlog_tokens == 3 + 97


def test_needs_the_last_logits_and_before_them_those_it_reports() -> None:
    """Without prompt_logprobs only the last position counts, with them the first that was not reported yet."""
    plain = sequence(SamplingParams(seed=0, max_tokens=9), (4, 5))
    scored = sequence(SamplingParams(seed=0, max_tokens=9, prompt_logprobs=0))
    assert (plain.first_needed_position, scored.first_needed_position) == (4, 0)
    assert scored.prompt_logprobs is not None

    scored.prompt_logprobs += [TokenLogprob(2, -1.0, 1)]
    assert scored.first_needed_position == 1

    scored.prompt_logprobs += [TokenLogprob(3, -1.0, 1)]
    assert scored.first_needed_position == 2
