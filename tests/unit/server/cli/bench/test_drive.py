import asyncio
import math
from collections.abc import Sequence

import pytest

from server.cli.bench.drive import Limits, drive
from server.cli.bench.recording import Call, Frame, Outcome, Recording
from server.cli.bench.target import CallFailed
from server.cli.bench.workload import Lengths, Workload, random_tokens
from tests.unit.server.cli.bench.fakes import FakeClock, ScriptedTarget, Step

BEGUN_S = 100.0
SECOND: list[Step] = [(0.5, 1), (0.5, 1)]
"""Two tokens, one after half a second each."""
GONE = CallFailed("UNAVAILABLE", "connection reset")
FULL = CallFailed("RESOURCE_EXHAUSTED", "full", is_refusal=True)
WORKLOAD = Workload(Lengths(4, 4), Lengths(2, 2))


class Run:
    """A run over a script."""

    def __init__(
        self,
        scripts: Sequence[Sequence[Step]],
        *,
        due_s: Sequence[float],
        is_gone: bool = False,
        keeps_text: bool = False,
    ) -> None:
        self.clock = FakeClock()
        self.target = ScriptedTarget(self.clock, scripts, is_gone=is_gone)
        self.due_s = due_s
        self.recording = Recording(len(due_s), keeps_text=keeps_text)
        self.ended: list[Call] = []

    async def drive(
        self, concurrency: int = 100, run_s: float | None = None, cancel_after_s: float = math.inf
    ) -> list[Call]:
        asks = WORKLOAD.asks(random_tokens(100), seed=0)
        await self.clock.run(
            drive(
                self.target,
                asks,
                self.due_s,
                limits=Limits(concurrency, run_s),
                recording=self.recording,
                clock=self.clock,
                on_end=self.ended.append,
            ),
            cancel_after_s=cancel_after_s,
        )
        return self.recording.calls


async def test_every_frame_is_written_down_at_its_time() -> None:
    """Frames with their counts, the usage, the end; the client's own processor time besides."""
    run = Run([SECOND], due_s=[0.0], keeps_text=True)

    (call,) = await run.drive()

    assert call.frames == [Frame(BEGUN_S + 0.5, 1), Frame(BEGUN_S + 1.0, 2)]
    assert (call.outcome, call.usage.completion_tokens, call.text) == (Outcome.COMPLETED, 2, "xx")
    assert [run.recording.duration_s, run.recording.cpu_s] == pytest.approx([1.0, 0.1])
    assert run.ended == [call]


async def test_an_open_loop_keeps_its_times() -> None:
    """A request is sent when it is due, though none of those before has ended."""
    run = Run([SECOND], due_s=[0.1, 0.2, 0.9])

    calls = await run.drive()

    assert [call.sent_s - BEGUN_S for call in calls] == pytest.approx([0.1, 0.2, 0.9])


async def test_what_is_due_beyond_the_cap_waits() -> None:
    """At most so many requests are under way; how late one was sent stays visible."""
    run = Run([SECOND], due_s=[0.0, 0.0, 0.25])

    calls = await run.drive(concurrency=1)

    assert [call.sent_s - BEGUN_S for call in calls] == pytest.approx([0.0, 1.0, 2.0])
    assert [call.due_s - BEGUN_S for call in calls] == pytest.approx([0.0, 0.0, 0.25])


async def test_after_its_time_a_run_sends_nothing_and_lets_the_rest_end() -> None:
    """That was the plan: the result is whole, and what was asked for is what was sent."""
    closed, opened = Run([SECOND], due_s=[0.0] * 50), Run([SECOND], due_s=[0.0, 1.0, 3.0])

    await closed.drive(concurrency=2, run_s=1.5)
    await opened.drive(run_s=2.0)

    for run, num_sent in ((closed, 4), (opened, 2)):
        assert [call.outcome for call in run.recording.calls] == [Outcome.COMPLETED] * num_sent
        assert (run.recording.asked, run.recording.stopped) == (num_sent, None)


async def test_refusals_and_failures_are_told_apart_and_the_load_goes_on() -> None:
    """A refusal is one only before the first token."""
    run = Run([[(0.1, FULL)], [(0.1, 1), (0.1, FULL)], [], SECOND], due_s=[0.0] * 4)

    calls = await run.drive()

    assert [call.outcome for call in calls] == [Outcome.REJECTED, Outcome.FAILED, Outcome.FAILED, Outcome.COMPLETED]
    assert calls[2].message == "the answer ended without a token"
    assert run.recording.stopped is None


async def test_a_server_that_is_gone_ends_the_run_and_keeps_what_there_is() -> None:
    """One call breaks off, nobody answers any more: nothing further is sent, and what was seen stays."""
    run = Run(
        [SECOND, [(1.2, 1), (0.1, GONE)], SECOND, [(0.1, 1), (9.0, 1)]], due_s=[0.0, 0.0, 0.0, 1.0, 5.0], is_gone=True
    )

    calls = await run.drive()

    assert [call.outcome for call in calls] == [
        Outcome.COMPLETED,
        Outcome.FAILED,
        Outcome.COMPLETED,
        Outcome.INCOMPLETE,
    ]
    assert run.recording.stopped == "the server is gone: connection reset"
    assert [run.recording.asked, run.recording.duration_s] == pytest.approx([5, 1.3])
    assert run.target.num_closed == 4


async def test_a_server_that_answers_is_not_gone() -> None:
    """UNAVAILABLE alone (draining, a replica lost) is a failure like any other."""
    run = Run([[(0.1, GONE)], SECOND], due_s=[0.0, 1.0])

    calls = await run.drive()

    assert [call.outcome for call in calls] == [Outcome.FAILED, Outcome.COMPLETED]
    assert run.recording.stopped is None


async def test_an_interruption_keeps_what_there_is() -> None:
    """A cancelled run is marked, its streams are closed, and the cancellation goes on."""
    run = Run([[(0.5, 1), (99.0, 1)]], due_s=[0.0, 0.0])

    with pytest.raises(asyncio.CancelledError):
        await run.drive(cancel_after_s=2.0)

    assert run.recording.stopped == "interrupted"
    assert [(call.outcome, len(call.frames)) for call in run.recording.calls] == [(Outcome.INCOMPLETE, 1)] * 2
    assert run.target.num_closed == 2
