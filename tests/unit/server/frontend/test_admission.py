import asyncio
import random
import selectors
from collections.abc import Coroutine
from typing import TypeVar

import pytest

from server.config import AdmissionConfig
from server.errors import DeadlineExceeded, DeadlineUnmeetable, Overloaded
from server.frontend.admission import Admission, Bid
from server.messages import Criticality, Load

T = TypeVar("T")


class VirtualSelector(selectors.SelectSelector):
    """Instead of waiting, moves its loop's clock."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready and timeout:
            self.now += timeout
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop in which hours pass in no time."""

    def __init__(self) -> None:
        self.selector = VirtualSelector()
        super().__init__(self.selector)

    def time(self) -> float:
        return self.selector.now


def run(main: Coroutine[object, object, T]) -> T:
    """Run to the end in virtual time."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)


class World:
    """An admission on the running loop's clock, and a record of who was let in when."""

    def __init__(self, load: Load | None = None, **config: float) -> None:
        self.loop = asyncio.get_running_loop()
        self.load = load or Load()
        self.admission = Admission(AdmissionConfig(**config), clock=self.loop.time)  # type: ignore[arg-type]
        self.log: list[tuple[float, str]] = []

    async def request(
        self,
        name: str,
        *,
        tokens: int = 10,
        hold_s: float = 1.0,
        tenant: str = "t",
        criticality: Criticality = Criticality.CRITICAL,
        deadline_s: float | None = None,
        first_token_by_s: float | None = None,
    ) -> None:
        bid = Bid(
            tenant=tenant,
            criticality=criticality,
            prompt_tokens=0,
            new_tokens=tokens,
            load=lambda: self.load,
            deadline_s=deadline_s,
            first_token_by_s=first_token_by_s,
        )
        async with self.admission.admit(bid):
            self.log.append((self.loop.time(), name))
            await asyncio.sleep(hold_s)

    def assert_empty(self) -> None:
        assert self.admission.bulkheads.running_tokens == 0
        assert self.admission.bulkheads.by_tenant == {}
        assert all(self.admission.num_queued(criticality) == 0 for criticality in Criticality)


def test_requests_wait_for_room_in_order() -> None:
    """Who comes when it is full waits until tokens are given back, first come first served."""

    async def scenario() -> None:
        world = World(max_running_tokens=20)
        async with asyncio.TaskGroup() as tasks:
            for name in "abcd":
                tasks.create_task(world.request(name))

        assert world.log == [(0.0, "a"), (0.0, "b"), (1.0, "c"), (1.0, "d")]
        world.assert_empty()

    run(scenario())


def test_a_small_request_does_not_overtake_a_large_one() -> None:
    """The first in line is not starved by smaller ones that would fit."""

    async def scenario() -> None:
        world = World(max_running_tokens=20)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(world.request("running", tokens=15))
            tasks.create_task(world.request("large", tokens=20))
            tasks.create_task(world.request("small", tokens=1))

        assert [name for _, name in world.log] == ["running", "large", "small"]

    run(scenario())


def test_a_request_over_the_capacity_runs_alone() -> None:
    """What never fits beside others is let in when nobody else runs."""

    async def scenario() -> None:
        world = World(max_running_tokens=10)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(world.request("small"))
            tasks.create_task(world.request("huge", tokens=1000))

        assert world.log == [(0.0, "small"), (1.0, "huge")]

    run(scenario())


def test_lower_classes_leave_room_for_higher_ones() -> None:
    """A lower class stops at its share; a higher one takes all that is free, and goes first when there is a queue."""

    async def scenario() -> None:
        world = World(max_running_tokens=100, sheddable_share=0.5)
        async with asyncio.TaskGroup() as tasks:
            for name in ("s1", "s2", "s3"):
                tasks.create_task(world.request(name, tokens=25, criticality=Criticality.SHEDDABLE))
            await asyncio.sleep(0)
            for name in ("c1", "c2", "c3"):
                tasks.create_task(world.request(name, tokens=25))

        assert [name for at, name in world.log if at == 0.0] == ["s1", "s2", "c1", "c2"]
        assert [name for _, name in world.log[4:]] == ["c3", "s3"]

    run(scenario())


def test_tenants_take_turns_by_tokens() -> None:
    """A tenant with a hundred requests does not delay another's few: turns go by the tokens that were given."""

    async def scenario() -> None:
        world = World(max_running_tokens=10)
        async with asyncio.TaskGroup() as tasks:
            for number in range(20):
                tasks.create_task(world.request(f"storm{number}", tenant="storm"))
            await asyncio.sleep(0.5)
            for number in range(3):
                tasks.create_task(world.request(f"calm{number}", tenant="calm"))

        order = [name for _, name in world.log]
        assert order.index("calm2") <= 7
        world.assert_empty()

    run(scenario())


def test_a_tenant_stops_at_its_cap_and_others_pass() -> None:
    """A tenant that holds its share waits for itself; others are let in past it."""

    async def scenario() -> None:
        world = World(max_running_tokens=40, max_tenant_share=0.5)
        async with asyncio.TaskGroup() as tasks:
            for name in ("a1", "a2", "a3"):
                tasks.create_task(world.request(name, tenant="a"))
            tasks.create_task(world.request("b1", tenant="b"))

        assert world.log == [(0.0, "a1"), (0.0, "a2"), (0.0, "b1"), (1.0, "a3")]

    run(scenario())


def test_a_full_queue_refuses_with_a_computed_time() -> None:
    """The time to come back is the backlog over the measured rate."""

    async def scenario() -> None:
        world = World(
            Load(queued_tokens=10_000, decode_tokens_per_s=10.0), max_running_tokens=100, max_queued_requests=1
        )
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(world.request("running", tokens=100))
            tasks.create_task(world.request("waiting", tokens=100))
            await asyncio.sleep(0)
            with pytest.raises(Overloaded) as caught:
                await world.request("refused", tokens=100)

        assert caught.value.retry_after_s == pytest.approx(20.0)
        assert caught.value.subject == "class:CRITICAL"

    run(scenario())


def test_an_unmeetable_deadline_is_refused_at_once() -> None:
    """Who would be let in only after the deadline or the budget is told so without waiting."""

    async def scenario() -> None:
        world = World(Load(queued_tokens=10_000, decode_tokens_per_s=10.0), max_running_tokens=100)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(world.request("running", tokens=100))
            await asyncio.sleep(0)
            with pytest.raises(DeadlineUnmeetable) as caught:
                await world.request("late", tokens=100, deadline_s=world.loop.time() + 5)
            assert caught.value.subject == "deadline"
            with pytest.raises(DeadlineUnmeetable) as caught:
                await world.request("late", tokens=100, first_token_by_s=world.loop.time() + 5)
            assert caught.value.subject == "time_to_first_token_budget"
            assert world.loop.time() == 0.0

    run(scenario())


def test_waits_end_with_the_deadline_or_the_limit() -> None:
    """Without measured rates nobody is refused on a guess; the wait ends at the deadline or at max_wait_s."""

    async def scenario() -> None:
        world = World(max_running_tokens=10, max_wait_s=3.0)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(world.request("running", hold_s=100))
            await asyncio.sleep(0)
            with pytest.raises(DeadlineExceeded):
                await world.request("due", deadline_s=2.0)
            assert world.loop.time() == pytest.approx(2.0)
            with pytest.raises(Overloaded) as caught:
                await world.request("patient")
            assert world.loop.time() == pytest.approx(5.0)
            assert caught.value.retry_after_s == 1.0
        world.assert_empty()

    run(scenario())


def test_a_past_deadline_is_never_admitted() -> None:
    """Even with room, a request whose time is up does not start."""

    async def scenario() -> None:
        world = World()
        await asyncio.sleep(1)
        with pytest.raises(DeadlineExceeded):
            await world.request("late", deadline_s=0.5)

    run(scenario())


def test_refund_and_release_give_back_once() -> None:
    """Cached tokens are given back when known, the rest at the end, nothing twice."""

    async def scenario() -> None:
        world = World(max_running_tokens=100)
        bid = Bid("t", Criticality.DEFAULT, prompt_tokens=50, new_tokens=30, load=Load)
        async with world.admission.admit(bid) as ticket:
            assert world.admission.bulkheads.running_tokens == 80
            ticket.refund(48)
            assert world.admission.bulkheads.running_tokens == 32
            ticket.release()
            assert world.admission.bulkheads.running_tokens == 0
        world.assert_empty()

    run(scenario())


@pytest.mark.parametrize("seed", range(30))
def test_nothing_leaks_under_random_cancellation(seed: int) -> None:
    """Whatever is cancelled, and when, all tokens come back and all who waited are let in or gone."""

    async def scenario() -> None:
        dice = random.Random(seed)
        world = World(max_running_tokens=50, max_tenant_share=0.6, max_wait_s=20.0, max_queued_requests=20)
        tasks = []
        for number in range(60):
            tasks.append(
                asyncio.create_task(
                    world.request(
                        str(number),
                        tokens=dice.randint(1, 60),
                        hold_s=dice.uniform(0, 3),
                        tenant=dice.choice("abc"),
                        criticality=dice.choice(list(Criticality)),
                        deadline_s=world.loop.time() + dice.uniform(0, 10) if dice.random() < 0.3 else None,
                    )
                )
            )
            if dice.random() < 0.5:
                await asyncio.sleep(dice.choice([0, dice.uniform(0, 1)]))
            if dice.random() < 0.4:
                dice.choice(tasks).cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)

        assert {type(result) for result in results} <= {
            type(None),
            asyncio.CancelledError,
            Overloaded,
            DeadlineExceeded,
        }
        world.assert_empty()

    run(scenario())


def test_a_queue_inside_the_source_counts() -> None:
    """With room in the bulkheads, a budget that the source's own queue will exceed is refused all the same."""

    async def scenario() -> None:
        busy = Load(
            running_requests=2,
            waiting_requests=4,
            queued_tokens=500,
            prefill_tokens_per_s=1000.0,
            decode_tokens_per_s=10.0,
        )
        world = World(busy, max_running_tokens=1000)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(world.request("running", tokens=100))
            await asyncio.sleep(0)
            with pytest.raises(DeadlineUnmeetable) as caught:
                await world.request("late", first_token_by_s=world.loop.time() + 39)
            assert caught.value.retry_after_s == pytest.approx(40.0)
            await world.request("patient", first_token_by_s=world.loop.time() + 41)
        world.assert_empty()

    run(scenario())
