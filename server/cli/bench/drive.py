"""Send requests when they are due and write down every frame. Knows no formulas and prints nothing.

What was seen is in the `Recording` at every moment, so that a run which is cut short keeps what it has.
"""

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

import grpc
import grpc.aio

from pathfox.v1 import generation_pb2 as pb

if TYPE_CHECKING:  # the class exists for type checkers only
    from pathfox.v1.generation_pb2_grpc import GenerationServiceAsyncStub

OK = "OK"
INCOMPLETE = "INCOMPLETE"


class Frame(NamedTuple):
    """One frame that brought tokens."""

    at_s: float
    sequence: int
    """Output tokens up to its end."""


@dataclass(slots=True)
class Call:
    """One request, as its client saw it. Times are the clock's."""

    due_s: float
    sent_s: float
    status: str = INCOMPLETE
    """OK, the name of a gRPC status, or INCOMPLETE: not at its end when the run was."""
    message: str = ""
    frames: list[Frame] = field(default_factory=list)
    ended_s: float | None = None
    """When `Finished` or the status came."""
    usage: pb.Usage = field(default_factory=pb.Usage)
    """By the server's count; all zeros before the end."""


@dataclass(slots=True)
class Recording:
    """All that a run saw so far."""

    asked: int
    """Requests that the run was to send."""
    begun_s: float = 0.0
    ended_s: float = 0.0
    calls: list[Call] = field(default_factory=list)
    """In the order of sending."""

    @property
    def is_partial(self) -> bool:
        """Whether something is missing that was asked for."""
        return len(self.calls) < self.asked or any(call.status != OK for call in self.calls)


class Clock(Protocol):
    """Time, so that tests need not wait for it."""

    def now(self) -> float:
        """Return seconds since any moment."""
        ...

    async def sleep(self, duration_s: float) -> None:
        """Let time pass."""
        ...


class SystemClock:
    """The time of this machine."""

    def now(self) -> float:
        """Return seconds that never run backwards."""
        return time.perf_counter()

    async def sleep(self, duration_s: float) -> None:
        """Wait."""
        await asyncio.sleep(duration_s)


@dataclass(frozen=True, slots=True)
class Limits:
    """What bounds a run besides its number of requests."""

    concurrency: int
    """Requests at once; what is due beyond it waits."""
    run_s: float | None = None
    """After it nothing is sent and what goes on is cancelled."""
    call_s: float = 600.0


async def drive(
    requests: Sequence[pb.GenerateRequest],
    due_s: Sequence[float],
    *,
    stubs: "Sequence[GenerationServiceAsyncStub]",
    metadata: tuple[tuple[str, str], ...],
    limits: Limits,
    recording: Recording,
    clock: Clock,
    on_end: Callable[[Call], None] = lambda _: None,
) -> None:
    """Send each request at its time, over the stubs in turn; return when all have ended or the run's time is over."""
    slots = asyncio.Semaphore(limits.concurrency)
    recording.begun_s = clock.now()

    async def run(stub: "GenerationServiceAsyncStub", request: pb.GenerateRequest, call: Call) -> None:
        try:
            await _stream(stub, request, call, metadata=metadata, timeout_s=limits.call_s, clock=clock)
        finally:
            slots.release()
        on_end(call)

    try:
        # When the time is over the recording shows what is missing.
        async with _quietly_bounded(limits.run_s), asyncio.TaskGroup() as running:
            for request, after_s, stub in zip(requests, due_s, itertools.cycle(stubs), strict=False):
                due = recording.begun_s + after_s
                if (early_s := due - clock.now()) > 0:
                    await clock.sleep(early_s)
                await slots.acquire()
                call = Call(due, clock.now())
                recording.calls.append(call)
                running.create_task(run(stub, request, call))
    finally:
        recording.ended_s = clock.now()


@contextlib.asynccontextmanager
async def _quietly_bounded(duration_s: float | None) -> AsyncIterator[None]:
    """Cancel the body when the time is over, and go on behind it."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(duration_s):
            yield


async def _stream(
    stub: "GenerationServiceAsyncStub",
    request: pb.GenerateRequest,
    call: Call,
    *,
    metadata: tuple[tuple[str, str], ...],
    timeout_s: float,
    clock: Clock,
) -> None:
    """Read one answer to its end."""
    sequence = 0
    call.sent_s = clock.now()
    stream = stub.Generate(request, timeout=timeout_s, metadata=metadata)
    try:
        async for frame in stream:
            if frame.sequence > sequence:
                sequence = frame.sequence
                call.frames.append(Frame(clock.now(), sequence))
            if frame.WhichOneof("event") == "finished":
                call.ended_s = clock.now()
                call.usage = frame.finished.usage
        if call.ended_s is not None:
            call.status = OK
    except grpc.aio.AioRpcError as error:
        call.status, call.message, call.ended_s = error.code().name, error.details() or "", clock.now()
    finally:
        stream.cancel()
