"""The stream from compute thread to reader."""

import asyncio

import pytest

from server.engine.events import EmittedToken, EventStream
from server.errors import SourceLost
from server.messages import Finished, FinishReason, Started, TokenDelta, TokenLogprob

STARTED = Started(fingerprint="f", cached_tokens=0)


def finished(index: int = 0) -> Finished:
    """Make a Finished."""
    return Finished(index, FinishReason.LENGTH, 1)


async def test_merges_all_that_is_ready_into_one_delta_per_index() -> None:
    """A reader that comes late gets the tokens of each completion in one delta, before its Finished."""
    stream = EventStream(2)
    logprob = TokenLogprob(5, -1.0, 1)
    for emission in (
        STARTED,
        EmittedToken(0, 5, logprob),
        EmittedToken(1, 6, None),
        EmittedToken(0, 7, None),
        finished(0),
        EmittedToken(1, 8, None),
    ):
        stream.push(emission)
    events = stream.events()

    seen = [await anext(events) for _ in range(4)]

    assert seen == [STARTED, TokenDelta(0, (5, 7), (logprob,)), finished(0), TokenDelta(1, (6, 8))]
    assert not stream.is_over
    await events.aclose()


async def test_ends_after_the_last_finished() -> None:
    """The stream is over when every completion has finished."""
    stream = EventStream(1)
    stream.push(STARTED)
    stream.push(finished())

    assert [event async for event in stream.events()] == [STARTED, finished()]
    assert stream.is_over


async def test_an_error_comes_after_the_tokens_before_it() -> None:
    """What was computed before a failure is still delivered."""
    stream = EventStream(1)
    stream.push(STARTED)
    stream.push(EmittedToken(0, 5, None))
    stream.push(SourceLost("gone"))
    events = stream.events()

    assert [await anext(events), await anext(events)] == [STARTED, TokenDelta(0, (5,))]
    with pytest.raises(SourceLost):
        await anext(events)
    assert stream.is_over


async def test_ignores_what_comes_after_the_end() -> None:
    """A stream that has ended is not ended again by an error that comes later."""
    stream = EventStream(1)
    finished = Finished(0, FinishReason.LENGTH, 1)
    for emission in (STARTED, finished, SourceLost("gone")):
        stream.push(emission)

    assert [event async for event in stream.events()] == [STARTED, finished]


async def test_waits_without_spinning_for_what_comes_later() -> None:
    """A reader sleeps until something is pushed."""
    stream = EventStream(1)
    reader = asyncio.create_task(anext(stream.events()))
    await asyncio.sleep(0)
    assert not reader.done()

    stream.push(STARTED)

    assert await reader == STARTED
