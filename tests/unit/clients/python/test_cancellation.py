import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Self

import pytest

from pathfox.client import AsyncClient, Cancelled, Client, Started
from tests.unit.clients.python.scripted_server import WAIT_S, Script, endless


class TestCancellation:
    """Going away early, in all its ways."""

    def test_leaving_the_with_cancels(self, script: Script) -> None:
        """The server learns at once that nobody listens."""
        script.answers["Generate"] = endless
        with Client(script.address) as client:
            with client.generate(text="x") as events:
                assert isinstance(next(events), Started)
            assert script.ended.wait(WAIT_S)
            assert list(events) == []

    def test_dropping_the_stream_cancels(self, script: Script) -> None:
        """A loop that is left without closing anything does not keep the server busy."""
        script.answers["Generate"] = endless
        with Client(script.address) as client:
            for event in client.generate(text="x"):
                assert isinstance(event, Started)
                break
            assert script.ended.wait(WAIT_S)

    def test_another_thread_may_close(self, script: Script) -> None:
        """A thread that waits for the next event is woken with Cancelled."""
        script.answers["Generate"] = endless
        with Client(script.address) as client, ThreadResult() as thread:
            events = client.generate(text="x")
            assert isinstance(next(events), Started)
            thread.start(lambda: next(events))
            events.close()
            assert isinstance(thread.error(), Cancelled | StopIteration)
            assert script.ended.wait(WAIT_S)

    def test_closing_before_the_first_event_sends_nothing(self, script: Script) -> None:
        """A generation that was never asked for anything never reaches the server."""
        with Client(script.address) as client:
            client.generate(text="x").close()
        assert not script.seen

    async def test_leaving_the_async_with_cancels(self, script: Script) -> None:
        """As the blocking client does."""
        script.answers["Generate"] = endless
        async with AsyncClient(script.address) as client:
            async with client.generate(text="x") as events:
                assert isinstance(await anext(events), Started)
            assert await asyncio.to_thread(script.ended.wait, WAIT_S)
            assert [event async for event in events] == []

    async def test_cancelling_the_task_cancels_the_call(self, script: Script) -> None:
        """The cancellation of asyncio goes through, and the server learns of it."""
        script.answers["Generate"] = endless
        started = asyncio.Event()
        async with AsyncClient(script.address) as client:

            async def listen() -> None:
                async for _ in client.generate(text="x"):
                    started.set()

            task = asyncio.create_task(listen())
            await asyncio.wait_for(started.wait(), WAIT_S)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await asyncio.to_thread(script.ended.wait, WAIT_S)

    async def test_another_task_may_close(self, script: Script) -> None:
        """A task that waits for the next event gets Cancelled, and is not cancelled itself."""
        script.answers["Generate"] = endless
        async with AsyncClient(script.address) as client:
            events = client.generate(text="x")
            assert isinstance(await anext(events), Started)
            waiting = asyncio.ensure_future(anext(events))
            await asyncio.sleep(0)
            await events.aclose()
            with pytest.raises((Cancelled, StopAsyncIteration)):
                await waiting
            assert not waiting.cancelled()


class ThreadResult:
    """A thread, joined, and how it ended."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.error()

    def start(self, function: Callable[[], object]) -> None:
        """Run a function in a thread."""

        def run() -> None:
            with contextlib.suppress(Exception):
                try:
                    function()
                except Exception as error:
                    self._error = error
                    raise

        self._thread = threading.Thread(target=run)
        self._thread.start()

    def error(self) -> BaseException | None:
        """Join, and return what it raised."""
        if self._thread is not None:
            self._thread.join(WAIT_S)
            assert not self._thread.is_alive()
        return self._error
