"""A clock that jumps to the next thing that waits for it, and a target that does what a script says at its times."""

import asyncio
import heapq
import itertools
import math
from collections.abc import AsyncIterator, Coroutine, Sequence

from server.cli.bench.recording import Usage
from server.cli.bench.target import Ask, CallFailed, Heard, Served

TURNS = 20
"""Of the event loop, enough for everything that can go on without the clock."""

Step = tuple[float, int | CallFailed]
"""Seconds to wait, then either so many new tokens or an end."""


class FakeClock:
    """Time that passes only when everybody waits, and then at once."""

    def __init__(self) -> None:
        self._now_s = 100.0
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._order = itertools.count()

    def now(self) -> float:
        return self._now_s

    def cpu_s(self) -> float:
        return self._now_s / 10

    async def sleep(self, duration_s: float) -> None:
        woken = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self._now_s + duration_s, next(self._order), woken))
        await woken

    async def run(self, work: Coroutine[None, None, None], *, cancel_after_s: float = math.inf) -> None:
        """Let time pass until the work is done, or cancel it."""
        cancel_at_s = self._now_s + cancel_after_s
        task = asyncio.create_task(work)
        while not task.done():
            for _ in range(TURNS):
                await asyncio.sleep(0)
            if self._sleepers and self._sleepers[0][0] > cancel_at_s:
                self._now_s = cancel_at_s
                task.cancel()
            elif self._sleepers:
                self._now_s, _, woken = heapq.heappop(self._sleepers)
                if not woken.done():
                    woken.set_result(None)
        task.result()


class ScriptedTarget:
    """Answers each request with the next script; asked what it serves, it may be gone."""

    def __init__(self, clock: FakeClock, scripts: Sequence[Sequence[Step]], *, is_gone: bool = False) -> None:
        self._clock = clock
        self._scripts = itertools.cycle(scripts)
        self._is_gone = is_gone
        self.asked: list[Ask] = []
        self.num_closed = 0

    async def served(self) -> Served:
        if self._is_gone:
            raise CallFailed("UNAVAILABLE", "connection refused")
        return Served("scripted", 1000, 4096)

    async def tokens_of(self, text: str) -> list[int]:
        return list(text.encode())

    async def answer(self, ask: Ask, *, timeout_s: float) -> AsyncIterator[Heard]:
        del timeout_s
        self.asked.append(ask)
        num_tokens = 0
        try:
            for wait_s, what in next(self._scripts):
                await self._clock.sleep(wait_s)
                if isinstance(what, CallFailed):
                    raise what
                num_tokens += what
                yield Heard(num_tokens, "x" * what)
            yield Heard(num_tokens, usage=Usage(len(ask.prompt), num_tokens))
        finally:
            self.num_closed += 1
