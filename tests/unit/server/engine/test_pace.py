"""How many rows of prompts go beside decode rows when steps take a time of their own."""

from collections.abc import Sequence

import pytest
from torch import Tensor

from server.engine.pace import MIN_ROWS, Pace
from server.messages import SamplingParams
from server.model.memory import LayerMemory
from server.model.rows import Rows
from tests.fixtures.fake_model import FakeModel, FakeSpec
from tests.fixtures.stepping import Stepping

MAX_STEP_TOKENS = 256


class TimedModel(FakeModel):
    """Moves the clock by a time for each row."""

    def __init__(self, row_s: float) -> None:
        super().__init__(FakeSpec(context_length_tokens=4096))
        self.row_s = row_s
        self.stepping = Stepping(self, num_pages=1024, max_step_tokens=MAX_STEP_TOKENS, target_step_s=1.0)

    def forward(self, rows: Rows, memory: Sequence[LayerMemory]) -> Tensor:
        """Take the rows' time."""
        self.stepping.now_s += self.row_s * rows.placement.num_rows
        return super().forward(rows, memory)

    def submit(self, num_tokens: int, max_tokens: int) -> int:
        """Submit a prompt of its own."""
        prompt = [num_tokens % 64, *(place % 64 for place in range(num_tokens - 1))]
        return self.stepping.submit(prompt, SamplingParams(seed=0, max_tokens=max_tokens))

    def chunks(self, num_steps: int) -> list[int]:
        """Step; return the prompt rows of each step."""
        return [self.stepping.step().num_prefill_tokens for _ in range(num_steps)]


def test_a_slow_model_reads_in_smaller_chunks_while_somebody_decodes() -> None:
    """One step is too long, the next ones keep to the target."""
    model = TimedModel(row_s=1 / 64)
    model.submit(2, 1000)
    model.chunks(1)
    model.submit(1000, 1)

    assert model.chunks(3) == [255, 63, 63]
    assert [report.duration_s for report in model.stepping.reports[-3:]] == [4.0, 1.0, 1.0]


def test_a_model_that_becomes_fast_gets_its_whole_budget_back() -> None:
    """The chunk grows as far as the measured time allows, up to the rows of a step."""
    model = TimedModel(row_s=1 / 64)
    model.submit(2, 1000)
    model.chunks(1)
    model.submit(2000, 1)
    model.chunks(2)
    model.row_s = 1 / 1024

    assert model.chunks(2) == [63, 255]


def test_a_prompt_advances_however_slow_steps_are() -> None:
    """Of a model that misses the target with a single row, a step still reads a page's worth, and both end."""
    model = TimedModel(row_s=2.0)
    decoding = model.submit(2, 12)
    model.chunks(1)
    reading = model.submit(400, 1)

    assert model.chunks(4) == [MIN_ROWS] * 4
    model.stepping.run()
    assert set(model.stepping.finished) == {(decoding, 0), (reading, 0)}


def test_prompts_alone_use_the_whole_budget() -> None:
    """Where nobody waits for the next token, only the rows of a step count; the time is known when somebody does."""
    model = TimedModel(row_s=1 / 64)
    model.submit(3 * MAX_STEP_TOKENS, 1000)

    assert model.chunks(3) == [MAX_STEP_TOKENS] * 3
    model.submit(500, 1)
    assert model.chunks(2) == [64, 63]


def test_a_failed_step_teaches_nothing() -> None:
    """A step that was run again, request by request, took longer than its rows take."""
    model = TimedModel(row_s=1 / 64)
    model.submit(2, 1000)
    model.chunks(1)
    model._explosive = frozenset({63})
    model.submit(100, 1)
    assert model.stepping.step().is_failed
    model._explosive = frozenset()
    model.submit(300, 1)

    assert model.chunks(1) == [255]


def test_the_short_end_of_a_prompt_does_not_shrink_the_next_chunk() -> None:
    """A step in time with few rows has mostly fixed costs, which say little about more rows."""
    pace = Pace(1.0)
    pace.note(256, 2.0)
    pace.note(1, 0.5)

    assert pace.limit(256) == 128


def test_a_late_step_with_few_rows_shrinks_the_next_chunk() -> None:
    """Too slow is too slow, whatever was allowed."""
    pace = Pace(1.0)
    pace.note(256, 2.0)
    pace.note(50, 2.0)

    assert pace.limit(256) == 25


@pytest.mark.parametrize("target_s", [None, 0.0])
def test_without_a_target_only_rows_count(target_s: float | None) -> None:
    """No time bounds anything."""
    pace = Pace(target_s)
    pace.note(256, 1000.0)

    assert pace.limit(256) == 256
