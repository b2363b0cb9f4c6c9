"""The asyncio face and the compute thread."""

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from queue import SimpleQueue

import pytest
import structlog
from torch import Tensor

from server.config import EngineConfig
from server.engine.engine import Engine
from server.engine.report import StepReport
from server.errors import ConfigError, DeadlineExceeded, SourceLost, Unavailable
from server.messages import Event, Finished, GenerateRequest, Page, SamplingParams, Started, TokenDelta
from server.model.memory import LayerMemory
from server.model.rows import Rows
from tests.fixtures.fake_model import FakeModel, FakeSpec

SPEC = FakeSpec(context_length_tokens=1024)


class GatedModel(FakeModel):
    """Computes a step only when it is let."""

    def __init__(self) -> None:
        super().__init__(SPEC)
        self.gate = threading.Semaphore(0)
        self.entered = threading.Semaphore(0)
        self.is_open = False

    def forward(self, rows: Rows, memory: Sequence[LayerMemory]) -> Tensor:
        self.entered.release()
        assert self.is_open or self.gate.acquire(timeout=10)
        return super().forward(rows, memory)

    async def enter(self) -> None:
        """Wait until a step is being computed."""
        assert await asyncio.to_thread(self.entered.acquire, timeout=10)

    async def pass_steps(self, count: int) -> None:
        """Let steps through and wait until the next one is being computed."""
        for _ in range(count):
            self.gate.release()
            await self.enter()

    async def pass_idle(self, engine: Engine) -> None:
        """Let the step that is running be the last, and assert that nothing is held after it."""
        checked = asyncio.create_task(idle(engine))
        await self.pass_steps(1)
        self.gate.release()
        await checked

    def open(self) -> None:
        """Let everything through from now on."""
        self.is_open = True
        self.gate.release()


def config(model: FakeModel, *, max_num_seqs: int = 8, num_pages: int = 512) -> EngineConfig:
    """Make a configuration for a model of this size."""
    return EngineConfig(max_num_seqs=max_num_seqs, max_step_tokens=16, page_pool_bytes=model.page_bytes * num_pages)


def ask(max_tokens: int = 8, *, prompt: int = 5, n: int = 1, deadline_s: float | None = None) -> GenerateRequest:
    """Make a request."""
    return GenerateRequest(
        "r", tuple(range(prompt)), SamplingParams(seed=1, max_tokens=max_tokens, n=n), deadline_s=deadline_s
    )


async def collect(engine: Engine, request: GenerateRequest) -> list[Event]:
    """Read a whole answer."""
    async with aclosing(engine.generate(request)) as events:
        return [event async for event in events]


async def idle(engine: Engine) -> None:
    """Assert that nothing is held or leaked once the engine has done everything that was asked of it before.

    Commands are carried out in order, so the end of one more request (of one step) comes after all cancellations.
    """
    await collect(engine, ask(1, prompt=1))
    load = engine.load()
    assert (load.running_requests, load.waiting_requests, load.used_pages) == (0, 0, 0)
    engine._core.scheduler.pool.check()
    assert not engine._streams
    assert engine._core.scheduler.num_free_slots == engine._core.scheduler.limits.max_num_seqs


class Clock:
    """Stands still unless it is told to go."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class WatchedInbox(SimpleQueue[object]):
    """An inbox that tells when the compute thread goes to sleep on it."""

    def __init__(self) -> None:
        self.slept = threading.Semaphore(0)

    def get(self, block: bool = True, timeout: float | None = None) -> object:  # noqa: FBT002 the queue's own
        if block:
            self.slept.release()
        return super().get(block, timeout)


@asynccontextmanager
async def gated(clock: Clock | None = None) -> AsyncIterator[tuple[Engine, GatedModel]]:
    """Run an engine on a gated model with two slots."""
    model = GatedModel()
    async with Engine(model, config(model, max_num_seqs=2), fingerprint="f", clock=clock or Clock()) as engine:
        try:
            yield engine, model
        finally:
            model.open()


async def test_runs_a_named_thread_and_joins_it() -> None:
    """The compute thread carries the engine's name while it runs and is gone after stop."""
    model = FakeModel()
    engine = Engine(model, config(model), fingerprint="f")
    async with engine:
        assert "pathfox-engine" in {thread.name for thread in threading.enumerate()}
        await collect(engine, ask())

    assert not engine._thread.is_alive()
    await engine.stop()


async def test_sleeps_when_there_is_nothing_to_do() -> None:
    """An idle engine computes no steps."""
    model = FakeModel()
    reports: list[StepReport] = []
    engine = Engine(model, config(model), fingerprint="f", observer=reports.append)
    engine._inbox = inbox = WatchedInbox()  # type: ignore[assignment]
    async with engine:
        assert await asyncio.to_thread(inbox.slept.acquire, timeout=10)
        await collect(engine, ask())
        assert await asyncio.to_thread(inbox.slept.acquire, timeout=10)

        assert len(reports) == 8


async def test_wakes_the_loop_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many sequences a step advances, it crosses to the event loop in one call."""
    model = FakeModel()
    reports: list[StepReport] = []
    async with Engine(model, config(model), fingerprint="f", observer=reports.append) as engine:
        loop = asyncio.get_running_loop()
        calls = []
        real = loop.call_soon_threadsafe

        def counted(callback: object, *arguments: object, context: object = None) -> object:
            if callback == engine._deliver:
                calls.append(arguments)
            return real(callback, *arguments, context=context)  # type: ignore[arg-type]

        monkeypatch.setattr(loop, "call_soon_threadsafe", counted)
        await asyncio.gather(*(collect(engine, ask(20)) for _ in range(6)))
        monkeypatch.undo()

    assert len(calls) <= len(reports)


async def test_a_reader_that_stops_reading_delays_nobody() -> None:
    """Tokens of a slow reader wait merged in its stream while others are served; it misses none."""
    async with gated() as (engine, model):
        slow = engine.generate(ask(50))
        first = asyncio.create_task(anext(slow))
        await model.enter()
        model.open()
        assert isinstance(await first, Started)
        others = [await collect(engine, ask(8)) for _ in range(8)]
        rest = [event async for event in slow]

    assert all(isinstance(events[-1], Finished) for events in others)
    assert sum(len(event.token_ids) for event in rest if isinstance(event, TokenDelta)) == 50
    assert len(rest) < 20


async def test_cancels_in_every_phase_within_one_step() -> None:
    """Queued, in the prompt and decoding: closing the generator frees the pages with the step that is running."""
    async with gated() as (engine, model):
        tasks = [asyncio.create_task(collect(engine, ask(100, prompt=40))) for _ in range(3)]
        await model.enter()
        await model.pass_steps(1)
        assert engine.load().used_pages == 10
        assert engine.load().waiting_requests == 2
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await model.pass_idle(engine)
        decoding = engine.generate(ask(100))
        started = asyncio.create_task(anext(decoding))
        await model.enter()
        await model.pass_steps(2)
        await started
        await decoding.aclose()
        await model.pass_idle(engine)
        assert engine.load().queued_tokens == 0


async def test_closing_after_the_end_is_harmless() -> None:
    """A generator may be closed after its last event, and more than once."""
    model = FakeModel()
    async with Engine(model, config(model), fingerprint="f") as engine:
        events = engine.generate(ask(2))
        seen = [event async for event in events]
        await events.aclose()
        await events.aclose()
        await idle(engine)

    assert isinstance(seen[-1], Finished)


async def test_a_deadline_passes_in_the_queue() -> None:
    """A request that never got a slot ends with DeadlineExceeded, and those that run go on."""
    clock = Clock()
    async with gated(clock) as (engine, model):
        running = [asyncio.create_task(collect(engine, ask(10))) for _ in range(2)]
        await model.enter()
        late = asyncio.create_task(collect(engine, ask(10, deadline_s=clock.now_s + 1.0)))
        await asyncio.sleep(0)  # it is in the inbox now
        assert len(engine._streams) == 3
        clock.now_s += 2.0
        await model.pass_steps(2)
        with pytest.raises(DeadlineExceeded):
            await late
        model.open()
        for events in await asyncio.gather(*running):
            assert isinstance(events[-1], Finished)
        await idle(engine)


async def test_stopping_hands_running_requests_over() -> None:
    """Whoever is being served when the engine stops learns that the request can go on elsewhere."""
    async with gated() as (engine, model):
        tasks = [asyncio.create_task(collect(engine, ask(1000))) for _ in range(3)]
        await model.enter()
        model.open()
        await engine.stop()
        results = await asyncio.gather(*tasks, return_exceptions=True)

        assert [type(result) for result in results] == [SourceLost] * 3
        with pytest.raises(Unavailable):
            await collect(engine, ask())


async def test_refuses_before_it_was_started() -> None:
    """An engine that was never started is not there yet."""
    model = FakeModel()
    with pytest.raises(Unavailable):
        await collect(Engine(model, config(model), fingerprint="f"), ask())


async def test_reports_what_a_step_did() -> None:
    """Reports add up to the tokens of the requests, and rates are measured."""
    model = FakeModel()
    reports: list[StepReport] = []
    async with Engine(model, config(model), fingerprint="f", observer=reports.append) as engine:
        await asyncio.gather(*(collect(engine, ask(9, prompt=20 + n)) for n in range(3)))
        load = engine.load()

    assert sum(report.num_decode_tokens for report in reports) == 3 * 8
    assert sum(r.num_prefill_tokens + r.num_cached_tokens for r in reports) == 20 + 21 + 22
    assert all(0 < report.model_s <= report.duration_s for report in reports)
    assert all(r.used_pages + r.cached_pages + r.free_pages == 512 for r in reports)
    assert load.decode_tokens_per_s > 0
    assert load.prefill_tokens_per_s > 0


async def test_an_observer_that_fails_harms_nobody() -> None:
    """An exception in the observer is logged and the answer is given."""
    model = FakeModel()

    def explode(_: StepReport) -> None:
        raise RuntimeError("observer")

    async with Engine(model, config(model), fingerprint="f", observer=explode) as engine:
        events = await collect(engine, ask(3))

    assert isinstance(events[-1], Finished)


async def test_recovers_from_a_mistake_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception outside the model ends the requests with Internal, and the engine goes on serving."""
    model = FakeModel()
    async with Engine(model, config(model), fingerprint="f") as engine:
        with monkeypatch.context() as patch:
            patch.setattr(engine._core.scheduler, "plan", lambda: 1 / 0)
            with pytest.raises(Exception, match="mistake"):
                await collect(engine, ask())

        assert isinstance((await collect(engine, ask()))[-1], Finished)
        await idle(engine)


class Shelf:
    """A page source that keeps what it is offered."""

    def __init__(self) -> None:
        self.pages: list[Page] = []

    async def get(self, chain_ids: Sequence[bytes]) -> list[Page | None]:
        return [None for _ in chain_ids]

    def offer(self, pages: Sequence[Page]) -> None:
        self.pages += pages


async def test_offers_closed_pages_once() -> None:
    """Each page that closes is offered on the event loop, with its address, bytes and checksum; a page found is not."""
    model = FakeModel()
    shelf = Shelf()
    async with Engine(model, config(model), fingerprint="f", page_source=shelf) as engine:
        await collect(engine, ask(4, prompt=9))
        await collect(engine, ask(4, prompt=9))

    assert len({page.chain_id for page in shelf.pages}) == len(shelf.pages) == 3
    assert {len(page.payload) for page in shelf.pages} == {16}


async def test_a_page_that_cannot_be_read_is_not_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Failing to copy pages costs the offer alone: the answer comes whole, and the engine goes on."""
    model = FakeModel()
    shelf = Shelf()
    async with Engine(model, config(model), fingerprint="f", page_source=shelf) as engine:
        with monkeypatch.context() as patch, structlog.testing.capture_logs() as logs:
            patch.setattr(engine._core, "read_page", lambda *_: 1 / 0)
            broken = await collect(engine, ask(4, prompt=9))
        whole = await collect(engine, ask(4, prompt=12))

    assert isinstance(broken[-1], Finished)
    assert isinstance(whole[-1], Finished)
    assert "page_offer_dropped" in {entry["event"] for entry in logs}
    assert len(shelf.pages) == 1


@pytest.mark.parametrize("broken", ["cancel", "recover", "load", "submit"])
async def test_a_compute_thread_that_dies_says_so(monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    """Whatever kills the thread ends all streams with SourceLost, is logged once, and tells the composition root."""
    with structlog.testing.capture_logs() as logs:
        async with gated() as (engine, model):
            reading = [asyncio.create_task(collect(engine, ask(100))) for _ in range(3)]
            await model.enter()
            monkeypatch.setattr(engine._core, broken, lambda *_: 1 / 0)
            if broken == "recover":
                monkeypatch.setattr(engine._core, "step", lambda: 1 / 0)
            unheard = asyncio.create_task(collect(engine, ask(100)))
            leaving = engine.generate(ask(100))
            starting = asyncio.create_task(anext(leaving))
            await asyncio.sleep(0)  # both are in the inbox now
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            model.open()
            async with asyncio.timeout(10):
                await engine.failed.wait()
                ends = await asyncio.gather(*reading, unheard, return_exceptions=True)
            with pytest.raises(Unavailable):
                await collect(engine, ask())
            assert engine.load().running_requests == 0

    assert [type(end) for end in ends] == [SourceLost] * 4
    assert not engine._thread.is_alive()
    assert [(entry["event"], entry["exc_info"]) for entry in logs if entry["event"] == "engine_failed"] == [
        ("engine_failed", True)
    ]


async def test_an_engine_that_was_stopped_has_not_failed() -> None:
    """An orderly stop is no failure."""
    model = FakeModel()
    async with Engine(model, config(model), fingerprint="f") as engine:
        await collect(engine, ask())

    assert not engine.failed.is_set()


def test_refuses_a_pool_that_holds_no_page() -> None:
    """A pool smaller than a page stops the start with the setting's name."""
    model = FakeModel()
    with pytest.raises(ConfigError, match="page_pool_bytes"):
        Engine(model, EngineConfig(page_pool_bytes=1), fingerprint="f")
