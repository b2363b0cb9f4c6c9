"""Which steps' tokens wait for the next step's, and that readers see all of them in order."""

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import replace

import pytest
from torch import Tensor

from server.config import EngineConfig
from server.engine.delivery import PATIENCE_PER_STREAM_S, Delivery
from server.engine.engine import Engine
from server.engine.events import Emission, EmittedToken
from server.engine.report import StepReport
from server.errors import Internal
from server.messages import Event, Finished, FinishReason, GenerateRequest, SamplingParams, Started, TokenDelta
from server.model.memory import LayerMemory
from server.model.rows import Rows
from tests.fixtures.fake_model import FakeModel, FakeSpec

STEADY = StepReport(
    duration_s=0.006,
    model_s=0.005,
    num_rows=8,
    num_prefill_tokens=0,
    num_decode_tokens=8,
    num_cached_tokens=0,
    num_preemptions=0,
    num_running=8,
    num_waiting=0,
    used_pages=8,
    cached_pages=0,
    free_pages=0,
)
TOKENS: list[tuple[int, Emission]] = [(serial, EmittedToken(0, 7, None)) for serial in range(8)]


def pattern(report: StepReport, *, max_delay_s: float, steps: int) -> str:
    """Step with nothing but tokens; `.` = they wait, `|` = all that waited is delivered."""
    delivery, seen = Delivery(max_delay_s), ""
    for step in range(steps):
        waits = delivery.may_wait(TOKENS, report, (step + 1) * report.duration_s)
        seen += "." if waits else "|"
        if not waits:
            delivery.delivered()
    return seen


@pytest.mark.parametrize(
    ("streams", "step_s", "max_delay_s", "expected"),
    [
        (1, 0.002, 1.0, "..|..|"),  # steps that are shorter than anybody can see
        (1, 0.006, 1.0, "||||||"),
        (2, 0.006, 1.0, "||||||"),  # so few streams that their frames cost little
        (8, 0.012, 1.0, "..|..|"),
        (8, 0.006, 0.010, ".|.|.|"),  # the setting bounds it
        (8, 0.006, 0.0, "||||||"),
        (32, 0.019, 1 / 30, ".|.|.|"),
        (32, 0.040, 1 / 30, "||||||"),  # slow steps: each delivers
    ],
)
def test_tokens_wait_only_as_long_as_they_may(streams: int, step_s: float, max_delay_s: float, expected: str) -> None:
    """The more streams and the shorter the steps, the more steps share a frame; never beyond the patience."""
    report = replace(STEADY, num_running=streams, duration_s=step_s)

    assert pattern(report, max_delay_s=max_delay_s, steps=6) == expected
    held = max((len(run) for run in expected.split("|")), default=0)
    assert held * step_s <= min(max_delay_s, PATIENCE_PER_STREAM_S * max(1, streams - 1))


@pytest.mark.parametrize(
    "event", [Started("f", 0), Finished(0, FinishReason.LENGTH, 5), Internal("the step failed")], ids=type
)
def test_what_is_no_token_takes_all_with_it(event: Emission) -> None:
    """A start (with its first token), an end and an error never wait, nor does what was emitted before them."""
    delivery = Delivery(1.0)

    assert delivery.may_wait(TOKENS, STEADY, 0.0)
    assert not delivery.may_wait([*TOKENS, (9, event)], STEADY, 0.001)


@pytest.mark.parametrize("change", [{"num_prefill_tokens": 16}, {"num_waiting": 1}])
def test_nothing_waits_for_a_step_that_may_be_long(change: dict[str, int]) -> None:
    """While a prompt is being read, or waits to be, every step delivers."""
    assert not Delivery(1.0).may_wait(TOKENS, replace(STEADY, **change), 0.0)  # type: ignore[arg-type]


class TickingModel(FakeModel):
    """Each step takes 6 ms by its own clock."""

    def __init__(self) -> None:
        super().__init__(FakeSpec(context_length_tokens=1024))
        self.now_s = 0.0

    def forward(self, rows: Rows, memory: Sequence[LayerMemory]) -> Tensor:
        self.now_s += 0.006
        return super().forward(rows, memory)


async def read_together(max_delay_s: float) -> tuple[list[list[Event]], int, int]:
    """Serve eight requests at once; return their events, the deliveries and the steps."""
    model = TickingModel()
    config = EngineConfig(max_num_seqs=8, page_pool_bytes=model.page_bytes * 512, max_delivery_delay_s=max_delay_s)
    reports: list[StepReport] = []
    num_deliveries = 0
    async with Engine(model, config, fingerprint="f", clock=lambda: model.now_s, observer=reports.append) as engine:
        deliver = engine._deliver

        def counted(*arguments: object) -> None:
            nonlocal num_deliveries
            num_deliveries += 1
            deliver(*arguments)  # type: ignore[arg-type]

        engine._deliver = counted  # type: ignore[method-assign, assignment]

        async def read(number: int) -> list[Event]:
            request = GenerateRequest(
                str(number), tuple(range(number + 1)), SamplingParams(seed=number, max_tokens=40 + number)
            )
            async with aclosing(engine.generate(request)) as events:
                return [event async for event in events]

        answers = await asyncio.gather(*(read(number) for number in range(8)))
    return answers, num_deliveries, len(reports)


async def test_readers_miss_nothing_in_order() -> None:
    """Tokens that waited arrive, all of them, in order and before the end: the same answers as without waiting."""
    together, num_deliveries, num_steps = await read_together(1 / 30)
    at_once, _, _ = await read_together(0.0)

    assert tokens_of(together) == tokens_of(at_once)
    assert [len(tokens) for tokens in tokens_of(together)] == list(range(40, 48))
    assert all(isinstance(answer[-1], Finished) for answer in together)
    assert num_deliveries < num_steps * 2 / 3


def tokens_of(answers: list[list[Event]]) -> list[list[int]]:
    """Join each answer's deltas."""
    return [
        [token_id for event in answer if isinstance(event, TokenDelta) for token_id in event.token_ids]
        for answer in answers
    ]
