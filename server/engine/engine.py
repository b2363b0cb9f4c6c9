"""The engine as a token source: a compute thread that steps, and an asyncio face that hands out its events.

The event loop never waits for a kernel and the thread never waits for a reader. Commands (submit, cancel, stop) go to
the thread through an inbox, which also wakes it; a step's events come back in one `call_soon_threadsafe`, or with the
next step's (`delivery.py`). One engine serves one event loop: the one that `start` was called on.
"""

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import NamedTuple, Self, TypeVarTuple

import structlog

from server.config import EngineConfig
from server.engine.chain import TokenArray
from server.engine.core import ClosedPage, Core, CoreSizes, LogitsObserver
from server.engine.delivery import Delivery
from server.engine.events import Emission, EventStream
from server.engine.intake import check_request
from server.engine.report import Phase, StepReport
from server.engine.runner import StepModel, page_bytes
from server.engine.speculation import Speculation
from server.errors import ConfigError, Internal, SourceLost, Unavailable
from server.messages import Event, GenerateRequest, Load, Page, PageSource
from server.model.fingerprint import fingerprint as fingerprint_of
from server.model.model import Model

log = structlog.get_logger(__name__)

Arguments = TypeVarTuple("Arguments")


class _Submit(NamedTuple):
    request: GenerateRequest
    prompt: TokenArray
    serial: int


class _Cancel(NamedTuple):
    serial: int


class _Stop(NamedTuple):
    """End everything and the thread."""


_Command = _Submit | _Cancel | _Stop


class Engine:
    """Generates tokens with one model. A `TokenSource`; use it as an async context manager, or `start` and `stop`.

    Args:
        model: what computes.
        config: slots, rows a step, memory.
        fingerprint: the model's compute class; None = probe the model for it.
        page_source: is offered every page that closes; None = pages live and die in the pool. It is not asked for pages
            yet: that belongs before admission, where the scheduler counts what the pool has of a sequence.
        observer: told of every step, on the compute thread; must be quick and must not raise.
        clock: seconds, the clock of deadlines and of what steps take.
        logits_observer: sees logits, for tests of the prefix law.

    Raises:
        ConfigError: the page pool holds no page of this model.
    """

    def __init__(
        self,
        model: StepModel,
        config: EngineConfig,
        *,
        fingerprint: str | None = None,
        page_source: PageSource | None = None,
        observer: Callable[[StepReport], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        logits_observer: LogitsObserver | None = None,
    ) -> None:
        num_pages = config.page_pool_bytes // page_bytes(model)
        if not num_pages:
            raise ConfigError(
                f"engine.page_pool_bytes: {config.page_pool_bytes} holds no page of {page_bytes(model)} bytes"
            )
        if fingerprint is None:
            assert isinstance(model, Model)
            fingerprint = fingerprint_of(model)
        self.fingerprint = fingerprint
        self.failed = asyncio.Event()
        """Set when the compute thread has died of a mistake: nothing is served any more, and the process should end."""
        self._vocabulary_size = model.spec.vocabulary_size
        self._page_source = page_source
        self._observer = observer
        self._clock = clock
        self._core = Core(
            model,
            CoreSizes(config.max_num_seqs, config.max_step_tokens, num_pages, config.target_step_s),
            fingerprint=fingerprint,
            clock=clock,
            speculation=Speculation() if config.speculation else None,
            logits_observer=logits_observer,
        )
        self._load = self._core.load()
        self._delivery = Delivery(config.max_delivery_delay_s)
        self._inbox: SimpleQueue[_Command] = SimpleQueue()
        self._thread = threading.Thread(target=self._compute, name="pathfox-engine")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_stopping = False
        self._streams: dict[int, EventStream] = {}
        self._num_serials = 0

    @property
    def max_sequence_tokens(self) -> int:
        """Prompt + output that one completion may have: the model's context, or the page pool where that is smaller."""
        return self._core.max_sequence_tokens

    def start(self) -> None:
        """Start the compute thread. Called once, on the event loop that will call `generate`."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """End every request with `SourceLost` and join the compute thread. May take as long as one step."""
        if self._loop is None or self._is_stopping:
            return
        self._is_stopping = True
        self._inbox.put(_Stop())
        await asyncio.to_thread(self._thread.join)

    async def __aenter__(self) -> Self:
        self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.stop()

    def load(self) -> Load:
        """Return how busy the engine was when it last delivered: after its last step, or a few before."""
        return self._load

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        """Yield `Started`, then deltas, then one `Finished` per index. Closing the generator cancels the request.

        Raises:
            InvalidRequest: a field is out of range, or the prompt does not fit.
            DeadlineExceeded: the deadline has passed.
            Unavailable: the engine is not running.
            SourceLost: the engine was stopped, or failed, in the middle.
            Internal: computing this request failed.
        """
        if self._is_stopping or self._loop is None:
            raise Unavailable("the engine is not running", subject="ENGINE_STOPPED")
        if self.failed.is_set():
            raise Unavailable("the engine has failed", subject="ENGINE_FAILED")
        prompt = check_request(
            request,
            vocabulary_size=self._vocabulary_size,
            max_tokens=self.max_sequence_tokens,
            now_s=self._clock(),
        )
        self._num_serials += 1
        serial = self._num_serials
        stream = self._streams[serial] = EventStream(request.sampling.n)
        self._inbox.put(_Submit(request, prompt, serial))
        try:
            async with aclosing(stream.events()) as events:
                async for event in events:
                    yield event
        finally:
            del self._streams[serial]
            if not stream.is_over:
                self._inbox.put(_Cancel(serial))

    def _compute(self) -> None:
        """Step while there is work, sleep while there is none. The thread's life, which never ends unnoticed."""
        try:
            self._core.watch.skip()  # an engine may stand ready for long before it is started
            while self._obey():
                self._publish(self._step())
                self._core.watch.lap(Phase.DELIVER)
            self._core.fail_all(SourceLost("the engine was stopped"))
            self._publish()
        except BaseException:
            self._load = Load()
            self._call_on_loop(self._deliver, self._core.emissions, [])
            self._call_on_loop(self._fail)
            log.exception("engine_failed")

    def _step(self) -> StepReport | None:
        try:
            report = self._core.step()
        except Exception:
            log.exception("engine_recovered")
            self._core.recover(Internal("the engine made a mistake and ended its requests"))
            return None
        self._observe(report)
        return report

    def _obey(self) -> bool:
        """Carry out what is in the inbox, waiting for it if there is nothing to compute; return whether to go on."""
        watch = self._core.watch
        while True:
            is_idle = not self._core.scheduler.has_work
            watch.lap(Phase.INTAKE)
            try:
                command = self._inbox.get(block=is_idle)
            except Empty:
                return True
            if is_idle:
                watch.skip()
            match command:
                case _Submit(request, prompt, serial):
                    self._core.submit(request, prompt, serial)
                case _Cancel(serial):
                    self._core.cancel(serial)
                case _Stop():
                    return False
            self._publish()

    def _observe(self, report: StepReport) -> None:
        if self._observer is None:
            return
        try:
            self._observer(report)
        except Exception:
            log.exception("step_observer_failed")

    def _publish(self, report: StepReport | None = None) -> None:
        """Hand events, closed pages and load to the event loop, in one call; after a step, its tokens may wait."""
        core = self._core
        closed, core.closed = core.closed, []
        pages = [] if self._page_source is None else self._read_pages(closed)
        if (
            report is not None
            and core.scheduler.has_work
            and not pages
            and self._delivery.may_wait(core.emissions, report, self._clock())
        ):
            return
        self._load = core.load()
        self._delivery.delivered()
        emissions, core.emissions = core.emissions, []
        if emissions or pages:
            self._call_on_loop(self._deliver, emissions, pages)

    def _read_pages(self, closed: list[ClosedPage]) -> list[Page]:
        """Copy pages for the page source; none of them when one cannot be read: that costs time, never an answer."""
        try:
            return [self._core.read_page(*each) for each in closed]
        except Exception:
            log.exception("page_offer_dropped", num_pages=len(closed))
            return []

    def _call_on_loop(self, callback: Callable[[*Arguments], None], *arguments: *Arguments) -> None:
        assert self._loop is not None
        with suppress(RuntimeError):  # the loop was closed: nobody is left to read
            self._loop.call_soon_threadsafe(callback, *arguments)

    def _fail(self) -> None:
        """End every stream, those that the thread has not heard of included: it hears nothing more."""
        self.failed.set()
        for stream in self._streams.values():
            stream.push(SourceLost("the engine has failed"))

    def _deliver(self, emissions: list[tuple[int, Emission]], pages: list[Page]) -> None:
        streams = self._streams
        for serial, emission in emissions:
            stream = streams.get(serial)
            if stream is not None:
                stream.push(emission)
        if pages and self._page_source is not None:
            self._page_source.offer(pages)
