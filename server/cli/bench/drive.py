"""Send requests when they are due and write down every frame. Knows no formulas and prints nothing."""

import asyncio
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from server.cli.bench.recording import Call, Frame, OnEnd, Outcome, Recording
from server.cli.bench.target import Ask, CallFailed, Target

UNAVAILABLE = "UNAVAILABLE"


class Clock(Protocol):
    """Time, so that tests need not wait for it."""

    def now(self) -> float:
        """Return seconds since any moment."""
        ...

    def cpu_s(self) -> float:
        """Return the processor time of this process so far."""
        ...

    async def sleep(self, duration_s: float) -> None:
        """Let time pass."""
        ...


class SystemClock:
    """The time of this machine."""

    def now(self) -> float:
        """Return seconds that never run backwards."""
        return time.perf_counter()

    def cpu_s(self) -> float:
        """Return what the operating system has counted."""
        return time.process_time()

    async def sleep(self, duration_s: float) -> None:
        """Wait."""
        await asyncio.sleep(duration_s)


@dataclass(frozen=True, slots=True)
class Limits:
    """What bounds a run besides its number of requests."""

    concurrency: int
    """Requests at once; what is due beyond it waits."""
    run_s: float | None = None
    """After it nothing is sent; what goes on may end."""
    call_s: float = 600.0


class ServerLost(Exception):
    """A call broke off and nobody answers at the address any more."""


async def drive(
    target: Target,
    asks: Iterable[Ask],
    due_s: Sequence[float],
    *,
    limits: Limits,
    recording: Recording,
    clock: Clock,
    on_end: OnEnd = lambda _: None,
) -> None:
    """Send each ask at its time; return when all have ended, or the server is gone: `recording.stopped` tells."""
    recording.begun_s, begun_cpu_s = clock.now(), clock.cpu_s()
    try:
        await _send_all(target, asks, due_s, limits=limits, recording=recording, clock=clock, on_end=on_end)
        if recording.stopped is None:
            recording.asked = len(recording.calls)
    except asyncio.CancelledError:
        recording.stopped = "interrupted"
        raise
    finally:
        recording.ended_s, recording.cpu_s = clock.now(), clock.cpu_s() - begun_cpu_s


async def _send_all(
    target: Target,
    asks: Iterable[Ask],
    due_s: Sequence[float],
    *,
    limits: Limits,
    recording: Recording,
    clock: Clock,
    on_end: OnEnd,
) -> None:
    slots = asyncio.Semaphore(limits.concurrency)
    end_s = recording.begun_s + limits.run_s if limits.run_s is not None else float("inf")

    async def run(ask: Ask, call: Call) -> None:
        try:
            await _listen(target, ask, call, timeout_s=limits.call_s, recording=recording, clock=clock)
        finally:
            slots.release()
        on_end(call)
        if call.status == UNAVAILABLE and call.outcome is Outcome.FAILED and await _is_lost(target):
            raise ServerLost(call.message)

    try:
        async with asyncio.TaskGroup() as running:
            for ask, after_s in zip(asks, due_s, strict=False):  # there is no end of asks
                due = recording.begun_s + after_s
                if due >= end_s:
                    return
                if (early_s := due - clock.now()) > 0:
                    await clock.sleep(early_s)
                await slots.acquire()
                if (now := clock.now()) >= end_s:
                    return
                call = Call(due, now, prompt_tokens=len(ask.prompt))
                recording.calls.append(call)
                running.create_task(run(ask, call))
    except* ServerLost as lost:
        recording.stopped = f"the server is gone: {lost.exceptions[0]}"


async def _listen(
    target: Target, ask: Ask, call: Call, *, timeout_s: float, recording: Recording, clock: Clock
) -> None:
    """Write down one answer to its end."""
    num_tokens = 0
    call.sent_s = clock.now()
    try:
        async for heard in target.answer(ask, timeout_s=timeout_s):
            if heard.num_tokens > num_tokens:
                num_tokens = heard.num_tokens
                call.frames.append(Frame(clock.now(), num_tokens))
            if recording.keeps_text:
                call.text += heard.text
            if heard.usage is not None:
                call.usage = heard.usage
        call.outcome = Outcome.COMPLETED if call.frames else Outcome.FAILED
        call.message = "" if call.frames else "the answer ended without a token"
    except CallFailed as failure:
        call.status, call.message = failure.status, failure.message
        call.outcome = Outcome.FAILED if call.frames else failure.outcome
    call.ended_s = clock.now()


async def _is_lost(target: Target) -> bool:
    try:
        await target.served()
    except CallFailed as failure:
        return failure.status == UNAVAILABLE
    return False
