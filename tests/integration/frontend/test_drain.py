import asyncio

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from pathfox.v1 import admin_pb2
from tests.fixtures.front_ends import (
    TINY,
    failing,
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
