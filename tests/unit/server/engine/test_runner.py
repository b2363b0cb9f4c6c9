"""From plans to rows."""

from server.messages import SamplingParams
from tests.fixtures.fake_model import FakeModel
from tests.fixtures.stepping import Stepping


def test_lays_out_decode_rows_then_chunks() -> None:
    """Rows carry token, position and slot; logits are wanted of samples, then of scored rows."""
    stepping = Stepping(FakeModel(), max_step_tokens=6)
    sampling = SamplingParams(seed=0, max_tokens=9, temperature=0.0)
    first = stepping.submit([10, 11], sampling)
    stepping.step()
    stepping.submit([20, 21, 22, 23, 24, 25], SamplingParams(seed=0, max_tokens=9, prompt_logprobs=0))
    plan = stepping.core.scheduler.plan()

    rows = stepping.core.runner.rows(plan)

    assert rows.token_ids.tolist() == [stepping.tokens[first, 0][0], 20, 21, 22, 23, 24]
    assert rows.placement.positions.tolist() == [2, 0, 1, 2, 3, 4]
    assert rows.placement.sequences.tolist() == [0, 1, 1, 1, 1, 1]
    assert rows.logit_rows.tolist() == [0, 1, 2, 3, 4, 5]
    assert [(span.first_row, span.first_position, span.num_rows) for span in plan.spans] == [(1, 0, 5)]


def test_a_chunk_that_does_not_end_a_prompt_wants_no_logits() -> None:
    """Only the last row of a prompt is sampled."""
    stepping = Stepping(FakeModel(), max_step_tokens=4)
    stepping.submit(list(range(6)), SamplingParams(seed=0, max_tokens=9))
    plan = stepping.core.scheduler.plan()

    rows = stepping.core.runner.rows(plan)

    assert rows.token_ids.tolist() == [0, 1, 2, 3]
    assert rows.logit_rows.tolist() == []
