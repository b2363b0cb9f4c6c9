"""The shipped fake: scripts, rates and faults. What every source promises is in tests/contract/test_token_source.py."""

import asyncio
import time
from contextlib import aclosing

import pytest

from server.engine.scripted import Fault, FaultKind, ScriptedSource
from server.errors import DeadlineExceeded, Overloaded, SourceLost
from server.messages import Event, Finished, FinishReason, GenerateRequest, SamplingParams, TokenDelta


def ask(**more: object) -> GenerateRequest:
    """Make a request."""
    return GenerateRequest("r", (1, 2), SamplingParams(seed=0, max_tokens=10), **more)  # type: ignore[arg-type]


async def collect(source: ScriptedSource, request: GenerateRequest, seen: list[Event]) -> None:
    """Read events into a list that survives an error."""
    async with aclosing(source.generate(request)) as events:
        async for event in events:
            seen.append(event)  # noqa: PERF401 an error after some events must leave them seen


def tokens(events: list[Event]) -> list[int]:
    """Return the token ids of all deltas."""
    return [token for event in events if isinstance(event, TokenDelta) for token in event.token_ids]


async def test_a_script_ends_like_a_turn() -> None:
    """After the script's last token the completion stops."""
    seen: list[Event] = []
    await collect(ScriptedSource([5, 6, 7]), ask(), seen)

    assert tokens(seen) == [5, 6, 7]
    assert seen[-1] == Finished(0, FinishReason.STOP, 4)


async def test_is_lost_once_and_then_continues() -> None:
    """A fault belongs to one call; the continuation gets the rest."""
    source = ScriptedSource([5, 6, 7, 8], faults=[Fault(FaultKind.LOST, after_tokens=2)])
    first: list[Event] = []
    with pytest.raises(SourceLost):
        await collect(source, ask(), first)
    rest: list[Event] = []
    await collect(source, ask(emitted_token_ids=(tuple(tokens(first)),)), rest)

    assert tokens(first) + tokens(rest) == [5, 6, 7, 8]
    assert source.load().running_requests == 0
    assert source.num_cancelled == 0


async def test_refuses_before_the_first_event() -> None:
    """A refusal says when to come back."""
    seen: list[Event] = []
    with pytest.raises(Overloaded):
        await collect(ScriptedSource([5], faults=[Fault(FaultKind.REFUSE)]), ask(), seen)

    assert seen == []


async def test_hangs_until_the_deadline() -> None:
    """A source that hangs is ended by the request's deadline, or by its reader."""
    source = ScriptedSource([5, 6], faults=[Fault(FaultKind.HANG, 1), Fault(FaultKind.HANG)])
    seen: list[Event] = []
    with pytest.raises(DeadlineExceeded):
        await collect(source, ask(deadline_s=time.monotonic() + 0.01), seen)
    task = asyncio.create_task(collect(source, ask(), []))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert tokens(seen) == [5]
    assert source.num_cancelled == 1
    assert source.load().running_requests == 0


async def test_keeps_to_its_rate() -> None:
    """Tokens come no faster than asked."""
    started_s = time.monotonic()
    await collect(ScriptedSource([1, 2, 3, 4], tokens_per_s=200.0), ask(), [])

    assert time.monotonic() - started_s >= 4 / 200.0
