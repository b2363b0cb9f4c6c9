import asyncio
import time
import uuid
from collections.abc import AsyncGenerator

import grpc
import pytest

from pathfox.v1 import generation_pb2 as pb
from server.engine.scripted import Fault, FaultKind
from server.messages import Event, Finished, FinishReason, GenerateRequest, Load, Started, TokenDelta
from tests.fixtures.front_ends import (
    TINY,
    ask,
    failing,
    ids,
    long,
    queued,
    rambling,
    read,
    saying,
    served,
    serving,
    status,
    text_of,
    until,
)


class Stage:
    """A source that goes one step each time it is told to, so that tests know where it is."""

    def __init__(self) -> None:
        self.at_prefill = asyncio.Event()
        self.go = asyncio.Event()
        self.num_open = 0

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        self.num_open += 1
        try:
            self.at_prefill.set()
            await self.go.wait()
            yield Started("stage", 0)
            for _ in range(request.sampling.max_tokens):
                yield TokenDelta(0, tuple(ids("a")))
            yield Finished(0, FinishReason.LENGTH, request.sampling.max_tokens)
        finally:
            self.num_open -= 1


class TestDeadlines:
    """A deadline ends a request wherever it is."""

    async def test_already_past(self) -> None:
        """A call whose time is up does nothing."""
        source = rambling()
        async with serving(served(source)) as world:
            failure = await failing(world.generation.Generate(ask(), timeout=-1))

        assert failure.code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert source.requests == []

    async def test_in_the_queue(self) -> None:
        """A request that waits for room is ended at its deadline; who runs is not touched."""
        async with serving(served(rambling(tokens_per_s=100)), options=TINY) as world:
            first = world.generation.Generate(long(50))
            await first.read()
            running = asyncio.create_task(read(first))
            second = asyncio.create_task(failing(world.generation.Generate(long(), timeout=0.2)))
            failure = await second
            frames = await running

        assert failure.code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert len(text_of(frames)) == 50

    async def test_in_prefill_and_in_mid_stream(self) -> None:
        """Neither a silent source nor a talking one outlives the deadline."""
        for source in (rambling(faults=[Fault(FaultKind.HANG)]), rambling(tokens_per_s=50)):
            async with serving(served(source)) as world:
                began = time.monotonic()
                failure = await failing(world.generation.Generate(long(1000), timeout=0.2))
                await world.settle()

                assert failure.code is grpc.StatusCode.DEADLINE_EXCEEDED
                assert time.monotonic() - began < 5
                assert source.load().running_requests == 0

    async def test_a_call_without_one_gets_the_default(self) -> None:
        """A request cannot live for ever; its status comes with the request's id."""
        source = rambling(faults=[Fault(FaultKind.HANG, after_tokens=2)])
        async with serving(served(source), options={"server.default_deadline_s": 0.2}) as world:
            failure = await failing(world.generation.Generate(long()))

        assert failure.code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert failure.trailers["x-request-id"]

    async def test_one_that_cannot_be_met_is_refused_at_once(self) -> None:
        """By the measured rates the first token would come too late: RESOURCE_EXHAUSTED, and no retry."""
        slow = served(rambling(tokens_per_s=100), load=lambda: Load(queued_tokens=9999, decode_tokens_per_s=1.0))
        async with serving(slow, options=TINY) as world:
            running = world.generation.Generate(long())
            await running.read()
            failure = await failing(world.generation.Generate(long(), timeout=30))
            budget = await failing(world.generation.Generate(long(time_to_first_token_budget_ms=100)))
            running.cancel()

        for each in (failure, budget):
            assert each.code is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert each.details["ErrorInfo"].reason == "DEADLINE_UNMEETABLE"
            assert each.trailers["grpc-retry-pushback-ms"] == "-1"


class TestCancel:
    """A request ends at every phase, and gives back what it held."""

    @pytest.mark.parametrize("how", ["rpc", "disconnect"])
    async def test_in_the_queue(self, how: str) -> None:
        """A waiting request goes; the next one takes its place."""
        request_id = str(uuid.uuid4())
        async with serving(served(rambling(tokens_per_s=200)), options=TINY) as world:
            first = world.generation.Generate(long())
            await first.read()
            running = asyncio.create_task(read(first))
            call = world.generation.Generate(long(request_id=request_id))
            waiting = asyncio.create_task(read(call))
            await queued(world)
            if how == "rpc":
                answer = await world.generation.Cancel(pb.CancelRequest(request_id=request_id))
                frames = await waiting
                assert answer.cancelled
                assert [frame.finished.finish_reason for frame in frames] == [pb.FINISH_REASON_CANCELLED]
                assert frames[0].finished.usage.completion_tokens == 0
            else:
                call.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await waiting
            await queued(world, 0)
            assert len(text_of(await running)) == 98

    @pytest.mark.parametrize("how", ["rpc", "disconnect"])
    async def test_in_prefill(self, how: str) -> None:
        """A source that has said nothing yet is closed."""
        stage, request_id = Stage(), str(uuid.uuid4())
        async with serving(served(stage)) as world:
            call = world.generation.Generate(long(request_id=request_id))
            reading = asyncio.create_task(read(call))
            await stage.at_prefill.wait()
            if how == "rpc":
                await world.generation.Cancel(pb.CancelRequest(request_id=request_id))
                frames = await reading
                assert frames[-1].finished.finish_reason == pb.FINISH_REASON_CANCELLED
            else:
                call.cancel()
            await world.settle()

            assert stage.num_open == 0

    @pytest.mark.parametrize("how", ["rpc", "disconnect"])
    async def test_in_decode(self, how: str) -> None:
        """A stream in the middle ends, with what was counted."""
        source, request_id = rambling(tokens_per_s=300), str(uuid.uuid4())
        async with serving(served(source)) as world:
            request = long(3000, request_id=request_id)
            request.sampling_params.n = 2
            call = world.generation.Generate(request)
            frames = [await call.read() for _ in range(10)]
            if how == "rpc":
                await world.generation.Cancel(pb.CancelRequest(request_id=request_id))
                frames += await read(call)
                ends = [frame for frame in frames if frame.WhichOneof("event") == "finished"]
                assert {end.index for end in ends} == {0, 1}
                for end in ends:
                    assert end.finished.finish_reason == pb.FINISH_REASON_CANCELLED
                    assert end.finished.usage.completion_tokens == end.sequence == len(text_of(frames, end.index)) > 0
            else:
                call.cancel()
            await world.settle()

            assert source.num_cancelled == 1
            assert source.load().running_requests == 0

    async def test_after_the_end_and_of_others(self) -> None:
        """Cancelling what has ended, or never was, is no error and changes nothing."""
        request_id = str(uuid.uuid4())
        async with serving(served(saying("x"))) as world:
            await read(world.generation.Generate(ask(request_id=request_id)))
            assert not (await world.generation.Cancel(pb.CancelRequest(request_id=request_id))).cancelled
            failure = await failing(world.generation.Cancel(pb.CancelRequest(request_id="x")))
            assert failure.code is grpc.StatusCode.INVALID_ARGUMENT

    async def test_an_id_in_use_is_refused(self) -> None:
        """Two requests of one id cannot run at once; a second one after the first can."""
        request = long(3000, request_id=str(uuid.uuid4()).upper())
        async with serving(served(rambling(tokens_per_s=100))) as world:
            call = world.generation.Generate(request)
            await call.read()
            failure = await failing(world.generation.Generate(request))
            assert failure.fields == ["request_id"]
            call.cancel()
            await world.settle()
            again = world.generation.Generate(request)
            await again.read()
            again.cancel()


class TestSlowReaders:
    """A client that does not read holds back nobody."""

    async def test_finds_many_tokens_in_a_frame(self) -> None:
        """What was missed comes coalesced, and complete."""
        async with serving(served(rambling(tokens_per_s=2000))) as world:
            call = world.generation.Generate(long(600))
            first = await call.read()
            await asyncio.sleep(0.6)  # the slowness under test
            frames = [first, *await read(call)]

        assert text_of(frames) == "abc" * 200

    async def test_never_reading_frees_the_engine_and_ends(self) -> None:
        """The source finishes and its room is given back while nobody reads; the deadline ends the call."""
        source = rambling()
        options = {"server.default_deadline_s": 1.0}
        channel_options = [("grpc.http2.lookahead_bytes", 0), ("grpc.http2.bdp_probe", 0)]
        async with serving(served(source), options=options, channel_options=channel_options) as world:
            request = long(4000)
            request.sampling_params.logprobs = 0
            request.return_token_ids = True
            calls = [world.generation.Generate(request) for _ in range(8)]
            admission = world.front_end.generations.admission
            await until(lambda: len(source.requests) == 8 and not admission.bulkheads.running_tokens)
            assert source.load().running_requests == 0
            others = await read(world.generation.Generate(ask(sampling_params=pb.SamplingParams(max_tokens=3))))
            assert text_of(others) == "abc"
            await world.settle()
            for call in calls:
                call.cancel()


async def test_a_storm_of_cancellations_leaks_nothing() -> None:
    """Clients that come and go at every moment leave no slot, no task and no source behind."""
    source = rambling(tokens_per_s=400)
    async with serving(served(source), options={"admission.max_running_tokens": 400}) as world:

        async def one(number: int) -> None:
            call = world.generation.Generate(long(60))
            try:
                async with asyncio.timeout(0.002 * (number % 60)):
                    await read(call)
            except (TimeoutError, grpc.aio.AioRpcError):
                call.cancel()

        async with asyncio.TaskGroup() as tasks:
            for number in range(200):
                tasks.create_task(one(number))
        await world.settle()

        assert source.load().running_requests == 0
        assert (await status(world)).active_requests == 0
