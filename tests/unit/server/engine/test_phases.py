"""Where the compute thread says that its time went."""

import asyncio
from collections.abc import Callable
from contextlib import aclosing

from server.config import EngineConfig
from server.engine.engine import Engine
from server.engine.report import Phase, StepReport
from server.messages import GenerateRequest, SamplingParams
from tests.fixtures.fake_model import FakeModel


def engine_of(clock: Callable[[], float], reports: list[StepReport]) -> Engine:
    """Make an engine on a clock that keeps its reports."""
    model = FakeModel()
    config = EngineConfig(max_step_tokens=16, page_pool_bytes=model.page_bytes * 512)
    return Engine(model, config, fingerprint="f", observer=reports.append, clock=clock)


async def answer(engine: Engine, num_prompt_tokens: int) -> None:
    """Read a whole answer of nine tokens."""
    request = GenerateRequest("r", tuple(range(num_prompt_tokens)), SamplingParams(seed=1, max_tokens=9))
    async with aclosing(engine.generate(request)) as events:
        async for _ in events:
            pass


async def test_phases_make_up_the_time_of_steps() -> None:
    """On a clock that moves with every look, each step's phases hold all its time, and nothing is counted twice."""
    reports: list[StepReport] = []
    now_s = 0.0

    def clock() -> float:
        nonlocal now_s
        now_s += 1.0
        return now_s

    async with engine_of(clock, reports) as engine:
        await asyncio.gather(*(answer(engine, 20 + n) for n in range(3)))

    spent_s = sum(sum(report.phases_s.values()) for report in reports)
    assert sum(report.duration_s for report in reports) < spent_s <= now_s
    assert all(
        {Phase.SCHEDULE, Phase.ROWS, Phase.KERNELS, Phase.SAMPLE, Phase.COMMIT} <= report.phases_s.keys()
        for report in reports
    )


async def test_waiting_for_the_start_is_nobodys_time() -> None:
    """An engine that stood ready for long, while others were loaded, counts from its start."""
    reports: list[StepReport] = []
    now_s = 0.0
    engine = engine_of(lambda: now_s, reports)
    now_s = 1000.0
    async with engine:
        await answer(engine, 5)

    assert reports
    assert sum(sum(report.phases_s.values()) for report in reports) == 0
