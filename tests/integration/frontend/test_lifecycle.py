import asyncio
import time
import uuid
from collections.abc import AsyncGenerator

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from pathfox.v1 import admin_pb2
from pathfox.v1 import generation_pb2 as pb
from server.engine.scripted import Fault, FaultKind
from server.messages import Criticality, Event, Finished, FinishReason, GenerateRequest, Load, Started, TokenDelta
from tests.fixtures.front_ends import World, failing, ids, rambling, read, saying, served, serving, text_of, until

TINY = {"admission.max_running_tokens": 100, "admission.default_share": 1.0}
"""Room for one request of 98 new tokens."""


def ask(**fields: object) -> pb.GenerateRequest:
    """Make a request with these fields."""
    return pb.GenerateRequest(text="hi", **fields)


def long(max_tokens: int = 98, **fields: object) -> pb.GenerateRequest:
    """Make a request for so many tokens."""
    return ask(sampling_params=pb.SamplingParams(max_tokens=max_tokens), **fields)


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


async def queued(world: World, number: int = 1) -> None:
    """Wait until so many requests wait for admission."""
    admission = world.front_end.generations.admission
    await until(lambda: sum(admission.num_queued(criticality) for criticality in Criticality) == number)


async def status(world: World) -> admin_pb2.GetStatusResponse:
    """Ask for the status."""
    answer: admin_pb2.GetStatusResponse = await world.admin.GetStatus(admin_pb2.GetStatusRequest())
    return answer


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


class TestDrain:
    """A front end that stops lets go in order."""

    async def test_streams_finish_and_new_ones_are_refused(self) -> None:
        """Health turns first; what runs ends well; what comes is sent elsewhere with a time."""
        async with serving(served(rambling(tokens_per_s=100)), options={"server.drain_grace_s": 20}) as world:
            health = health_pb2_grpc.HealthStub(world.channel)
            running = asyncio.create_task(read(world.generation.Generate(long(40))))
            watch = health.Watch(health_pb2.HealthCheckRequest(service="pathfox.v1.GenerationService"))
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
            await until(lambda: world.front_end.generations.num_alive == 1)
            draining = world.admin.Drain(admin_pb2.DrainRequest())
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
            failure = await failing(world.generation.Generate(long()))
            report = await draining

            assert failure.code is grpc.StatusCode.UNAVAILABLE
            assert failure.details["ErrorInfo"].reason == "DRAINING"
            assert failure.details["RetryInfo"].retry_delay.ToMilliseconds() >= 1000
            assert len(text_of(await running)) == 40
            assert (report.finished_requests, report.ended_requests) == (1, 0)
            assert (await status(world)).is_draining
            again = await world.admin.Drain(admin_pb2.DrainRequest())
            assert again == report

    async def test_what_is_left_after_the_grace_is_ended(self) -> None:
        """Streams that go on too long end with UNAVAILABLE; queued ones too."""
        async with serving(served(rambling(tokens_per_s=20)), options=TINY) as world:
            first = world.generation.Generate(long())
            await first.read()
            running = asyncio.create_task(failing(first))
            waiting = asyncio.create_task(failing(world.generation.Generate(long())))
            await queued(world)
            request = admin_pb2.DrainRequest()
            request.grace.FromMilliseconds(50)
            report = await world.admin.Drain(request)

            for each in (await running, await waiting):
                assert each.code is grpc.StatusCode.UNAVAILABLE
                assert each.details["ErrorInfo"].reason == "DRAINING"
            assert (report.finished_requests, report.ended_requests) == (0, 2)

    async def test_a_drain_outlives_its_caller(self) -> None:
        """Whoever asked for a drain may go; it goes on."""
        async with serving(served(rambling(tokens_per_s=200))) as world:
            running = asyncio.create_task(read(world.generation.Generate(long(40))))
            await until(lambda: world.front_end.generations.num_alive == 1)
            request = admin_pb2.DrainRequest()
            request.grace.FromSeconds(20)
            call = world.admin.Drain(request)
            await until(lambda: world.front_end.generations.is_draining)
            call.cancel()

            assert len(text_of(await running)) == 40
            assert (await world.front_end.drain()).num_finished == 1

    @pytest.mark.parametrize("how", ["hurry", "rpc", "drain", "stop"])
    async def test_a_long_one_can_be_shortened(self, how: str) -> None:
        """A drain that has minutes left ends at once when somebody hurries it, or comes with a shorter grace."""
        async with serving(served(rambling(tokens_per_s=20)), options={"server.drain_grace_s": 600}) as world:
            front_end = world.front_end
            running = asyncio.create_task(failing(world.generation.Generate(long(3000))))
            await until(lambda: front_end.generations.num_alive == 1)
            draining = asyncio.create_task(front_end.drain())
            await until(lambda: front_end.generations.is_draining)
            async with asyncio.timeout(5):
                match how:
                    case "hurry":
                        front_end.hurry()
                    case "rpc":
                        request = admin_pb2.DrainRequest()
                        request.grace.FromSeconds(0)
                        await world.admin.Drain(request)
                    case "drain":
                        await front_end.drain(0.01)
                    case "stop":
                        await front_end.stop(0)
                assert (await draining).num_ended == 1
                assert (await running).code is grpc.StatusCode.UNAVAILABLE

    async def test_a_hurry_before_it_and_a_longer_grace_after_it(self) -> None:
        """Who hurries first has no grace at all; a longer grace does not lengthen a drain."""
        for is_early in (True, False):
            async with serving(served(rambling(tokens_per_s=20))) as world:
                running = asyncio.create_task(failing(world.generation.Generate(long(3000))))
                await until(lambda: world.front_end.generations.num_alive == 1)
                if is_early:
                    world.front_end.hurry()
                async with asyncio.timeout(5):
                    first = asyncio.create_task(world.front_end.drain(600 if is_early else 0.1))
                    await until(lambda: world.front_end.generations.is_draining)
                    assert (await world.front_end.drain(600)) == await first
                    assert (await running).code is grpc.StatusCode.UNAVAILABLE

    async def test_a_stop_beside_another_one_shortens_it(self) -> None:
        """The second call does not close the server under the first one's streams, but ends their grace."""
        async with serving(served(rambling(tokens_per_s=20))) as world:
            running = asyncio.create_task(failing(world.generation.Generate(long(3000))))
            await until(lambda: world.front_end.generations.num_alive == 1)
            stops = [asyncio.create_task(world.front_end.stop(600))]
            await until(lambda: world.front_end.generations.is_draining)
            async with asyncio.timeout(5):
                stops.append(asyncio.create_task(world.front_end.stop(0)))
                await asyncio.gather(*stops)
                failure = await running
            assert failure.code is grpc.StatusCode.UNAVAILABLE
            assert failure.details["ErrorInfo"].reason == "DRAINING"

    async def test_a_negative_grace(self) -> None:
        """A grace below zero is the caller's mistake, and drains nothing."""
        async with serving(served(saying("x"))) as world:
            request = admin_pb2.DrainRequest()
            request.grace.FromMilliseconds(-1)
            failure = await failing(world.admin.Drain(request))
            assert failure.fields == ["grace"]
            assert not world.front_end.generations.is_draining


class TestHealth:
    """grpc.health.v1."""

    async def test_check_and_watch(self) -> None:
        """Known services serve; unknown ones are NOT_FOUND, or watched as unknown; a watch ends with the server."""
        async with serving(served(saying("x"))) as world:
            health = health_pb2_grpc.HealthStub(world.channel)
            for service in ("", "pathfox.v1.GenerationService", "pathfox.v1.ModelService", "pathfox.v1.AdminService"):
                answer = await health.Check(health_pb2.HealthCheckRequest(service=service))
                assert answer.status == health_pb2.HealthCheckResponse.SERVING
            failure = await failing(health.Check(health_pb2.HealthCheckRequest(service="nope")))
            assert failure.code is grpc.StatusCode.NOT_FOUND
            watch = health.Watch(health_pb2.HealthCheckRequest(service="nope"))
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
            overall = health.Watch(health_pb2.HealthCheckRequest())
            assert (await overall.read()).status == health_pb2.HealthCheckResponse.SERVING
            stopping = asyncio.create_task(world.front_end.stop())
            assert (await overall.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
            assert (await failing(overall)).code is grpc.StatusCode.UNAVAILABLE
            await stopping


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
