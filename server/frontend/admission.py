"""Who may start now, who waits, and who is told when to come back.

A request is priced in tokens: uncached prompt + max new tokens x completions. Running requests hold their price; the
sum is bounded. Each criticality class may start only while the sum stays below its share, so that what a lower class
cannot take is left for higher ones, while higher ones take whatever is free. That sheds load from the bottom.

Waiting is bounded in number (per class) and in time (deadline, time-to-first-token budget, configuration). Who could
not start in time, by the measured rates, is refused at once. Inside a class tenants take turns by the tokens that they
were given. Knows tokens, tenants and time; knows no requests, models or engines. Used on the event loop only.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from server import telemetry
from server.config import AdmissionConfig
from server.errors import DeadlineExceeded, DeadlineUnmeetable, Overloaded
from server.messages import Criticality, Load

MIN_RETRY_S = 1.0
MAX_RETRY_S = 300.0
"""Shorter and longer forecasts are guesses."""


@dataclass(frozen=True, slots=True)
class Bid:
    """What a request asks for, and how long it can wait."""

    tenant: str
    criticality: Criticality
    prompt_tokens: int
    """Of the prompt, as far as they are not known to be cached."""
    new_tokens: int
    """max_tokens x n."""
    load: Callable[[], Load]
    """Of the source that would serve it, for forecasts."""
    deadline_s: float | None = None
    """On the clock; no waiting beyond it."""
    first_token_by_s: float | None = None
    """On the clock; refused at once when the first token is not expected by then."""

    @property
    def tokens(self) -> int:
        """What it holds while it runs."""
        return self.prompt_tokens + self.new_tokens


class Ticket:
    """A running request's hold on the capacity."""

    def __init__(self, bulkheads: "Bulkheads", bid: Bid) -> None:
        self._bulkheads = bulkheads
        self._bid = bid
        self._held = bid.tokens

    def refund(self, cached_tokens: int) -> None:
        """Give back what the engine found in its pages instead of computing it. To be called once at most."""
        self._give_back(min(cached_tokens, self._bid.prompt_tokens, self._held))

    def release(self) -> None:
        """Give back all that is held; a second call gives back nothing."""
        self._give_back(self._held)

    def _give_back(self, tokens: int) -> None:
        self._held -= tokens
        if tokens:
            self._bulkheads.take(self._bid.tenant, self._bid.criticality, -tokens)


class Bulkheads:
    """How many tokens each tenant and class hold, and what each may add."""

    def __init__(self, config: AdmissionConfig, on_free: Callable[[], None]) -> None:
        self.ceilings = {
            Criticality.CRITICAL: config.max_running_tokens,
            Criticality.DEFAULT: int(config.max_running_tokens * config.default_share),
            Criticality.BATCH: int(config.max_running_tokens * config.batch_share),
            Criticality.SHEDDABLE: int(config.max_running_tokens * config.sheddable_share),
        }
        self.tenant_ceiling = int(config.max_running_tokens * config.max_tenant_share)
        self.by_class = dict.fromkeys(Criticality, 0)
        self.by_tenant: dict[str, int] = {}
        self._on_free = on_free

    @property
    def running_tokens(self) -> int:
        """What all running requests hold."""
        return sum(self.by_class.values())

    def tenant_excess(self, bid: Bid) -> int:
        """Return how many tokens the tenant must give back before it may have so many more."""
        return self.by_tenant.get(bid.tenant, 0) + bid.tokens - self.tenant_ceiling

    def tenant_fits(self, bid: Bid) -> bool:
        """Tell whether the tenant may have so many more. One request always fits: its size is the model's business."""
        return self.tenant_excess(bid) <= 0 or bid.tenant not in self.by_tenant

    def excess(self, bid: Bid, ahead: int = 0) -> int:
        """Return how many tokens must be given back before so many more fit, after what is ahead."""
        return self.running_tokens + ahead + bid.tokens - self.ceilings[bid.criticality]

    def class_fits(self, bid: Bid) -> bool:
        """Tell whether the sum stays below the class's share; alone, a request always fits."""
        return self.excess(bid) <= 0 or self.running_tokens == 0

    def take(self, tenant: str, criticality: Criticality, tokens: int) -> None:
        """Add to what is held; a negative number gives back, and lets others in."""
        self.by_class[criticality] += tokens
        held = self.by_tenant.pop(tenant, 0) + tokens
        if held:
            self.by_tenant[tenant] = held
        telemetry.BULKHEAD_INFLIGHT.labels(criticality.name).set(self.by_class[criticality])
        if tokens < 0:
            self._on_free()


@dataclass(slots=True)
class _Waiter:
    bid: Bid
    granted: asyncio.Future[None]


@dataclass(slots=True)
class _ClassQueue:
    """Waiting requests of one class: first come first served for a tenant, by tokens given between tenants."""

    waiting: dict[str, deque[_Waiter]] = field(default_factory=dict)
    served: dict[str, int] = field(default_factory=dict)
    """Virtual time of each tenant: the tokens it was given, counted from when it came."""
    clock: int = 0
    """Virtual time of whom was served last: where a tenant begins that comes anew."""
    tokens: int = 0
    """What all waiting requests ask for."""

    def __len__(self) -> int:
        return sum(len(line) for line in self.waiting.values())

    def add(self, waiter: _Waiter) -> None:
        tenant = waiter.bid.tenant
        if tenant not in self.waiting:
            self.waiting[tenant] = deque()
            self.served[tenant] = max(self.served.get(tenant, 0), self.clock)
        self.waiting[tenant].append(waiter)
        self.tokens += waiter.bid.tokens

    def remove(self, waiter: _Waiter) -> None:
        line = self.waiting[waiter.bid.tenant]
        line.remove(waiter)
        self.tokens -= waiter.bid.tokens
        if not line:
            del self.waiting[waiter.bid.tenant]
        if not self.waiting:
            # Nobody waits, nobody is owed anything.
            self.served.clear()
            self.clock = 0

    def serve(self, waiter: _Waiter) -> None:
        tenant = waiter.bid.tenant
        self.clock = self.served[tenant]
        self.served[tenant] += waiter.bid.tokens
        self.remove(waiter)

    def heads(self) -> list[_Waiter]:
        """Return the first of each tenant that still waits, who was given least first."""
        firsts = (
            next((waiter for waiter in self.waiting[tenant] if not waiter.granted.done()), None)
            for tenant in sorted(self.waiting, key=self.served.__getitem__)
        )
        return [waiter for waiter in firsts if waiter is not None]


class Admission:
    """Bulkheads with bounded, fair queues before them.

    Args:
        config: the limits.
        clock: what deadlines are measured on; `time.monotonic`, which is also the event loop's.
    """

    def __init__(self, config: AdmissionConfig, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._config = config
        self._clock = clock
        self._queues = {criticality: _ClassQueue() for criticality in Criticality}
        self.bulkheads = Bulkheads(config, self._grant)
        self._prompt_tokens = 0
        """Of all running requests, as is the next one: what the source's queue is made of."""
        self._new_tokens = 0

    def num_queued(self, criticality: Criticality) -> int:
        """Return how many requests of a class wait."""
        return len(self._queues[criticality])

    @asynccontextmanager
    async def admit(self, bid: Bid) -> AsyncIterator[Ticket]:
        """Wait for room, hold it for the body, give it back once.

        Raises:
            Overloaded: the queue is full, or the wait was too long; says when to come back.
            DeadlineUnmeetable: by the measured rates it could not start in time.
            DeadlineExceeded: the deadline passed while it waited.
        """
        now = self._clock()
        if bid.deadline_s is not None and now >= bid.deadline_s:
            raise DeadlineExceeded("the deadline had passed before the request was admitted")
        is_free = self._may_start(bid)
        self._refuse_hopeless(bid, now, wait_s=0.0 if is_free else self._forecast_s(bid))
        if is_free:
            self.bulkheads.take(bid.tenant, bid.criticality, bid.tokens)
        else:
            await self._wait(bid, now)
        ticket = Ticket(self.bulkheads, bid)
        self._prompt_tokens += bid.prompt_tokens
        self._new_tokens += bid.new_tokens
        try:
            yield ticket
        finally:
            ticket.release()
            self._prompt_tokens -= bid.prompt_tokens
            self._new_tokens -= bid.new_tokens

    async def _wait(self, bid: Bid, now: float) -> None:
        queue = self._queues[bid.criticality]
        if len(queue) >= self._config.max_queued_requests:
            raise self._rejection(
                bid, "queue_full", f"{len(queue)} {bid.criticality.name} requests are waiting already"
            )
        waiter = _Waiter(bid, asyncio.get_running_loop().create_future())
        queue.add(waiter)
        self._show(bid.criticality)
        limits = [limit - now for limit in (bid.deadline_s, bid.first_token_by_s) if limit is not None]
        patience_s = min(self._config.max_wait_s, *limits, math.inf)
        try:
            async with asyncio.timeout(patience_s):
                await waiter.granted
        except TimeoutError:
            self._leave(waiter)
            if bid.deadline_s is not None and self._clock() >= bid.deadline_s:
                raise DeadlineExceeded("the deadline passed while the request waited for admission") from None
            raise self._rejection(bid, "waited_too_long", f"no room within {patience_s:.1f} s") from None
        except asyncio.CancelledError:
            self._leave(waiter)
            raise

    def _leave(self, waiter: _Waiter) -> None:
        """Take out a waiter that gave up; if it was let in at that very moment, give its room back."""
        bid = waiter.bid
        if waiter.granted.done() and not waiter.granted.cancelled():
            self.bulkheads.take(bid.tenant, bid.criticality, -bid.tokens)
        else:
            self._queues[bid.criticality].remove(waiter)
            self._show(bid.criticality)
            self._grant()

    def _may_start(self, bid: Bid) -> bool:
        """Tell whether there is room now and nobody with an older right to it waits."""
        if not (self.bulkheads.tenant_fits(bid) and self.bulkheads.class_fits(bid)):
            return False
        return not any(
            head.bid.tenant == bid.tenant or self.bulkheads.tenant_fits(head.bid)
            for criticality, queue in self._queues.items()
            if criticality <= bid.criticality
            for head in queue.heads()
        )

    def _grant(self) -> None:
        """Let in whoever is next while there is room: classes from the top, tenants in turn."""
        for criticality, queue in self._queues.items():
            while waiter := self._next(queue):
                if not self.bulkheads.class_fits(waiter.bid):
                    # The first in line waits for enough room; smaller ones behind would starve it.
                    return
                queue.serve(waiter)
                self.bulkheads.take(waiter.bid.tenant, criticality, waiter.bid.tokens)
                waiter.granted.set_result(None)
                self._show(criticality)

    def _next(self, queue: _ClassQueue) -> _Waiter | None:
        """Find who is next, passing over tenants that hold their share already."""
        return next((head for head in queue.heads() if self.bulkheads.tenant_fits(head.bid)), None)

    def _forecast_s(self, bid: Bid) -> float:
        """Return in how many seconds there should be room, by the backlog and the rates that were measured.

        Reservations are worst cases, so never more is waited for than the source says is left to compute.
        """
        load = bid.load()
        ahead = sum(queue.tokens for criticality, queue in self._queues.items() if criticality <= bid.criticality)
        missing = max(self.bulkheads.excess(bid, ahead), self.bulkheads.tenant_excess(bid), 0)
        rate = load.decode_tokens_per_s or load.prefill_tokens_per_s
        return min(missing, load.queued_tokens + ahead) / rate if rate else 0.0

    def _refuse_hopeless(self, bid: Bid, now: float, *, wait_s: float) -> None:
        load = bid.load()
        rate = load.prefill_tokens_per_s
        wait_s += self._wait_in_source_s(load)
        expected_s = wait_s + (bid.prompt_tokens / rate if rate else 0.0)
        for limit, subject in ((bid.first_token_by_s, "time_to_first_token_budget"), (bid.deadline_s, "deadline")):
            if limit is not None and now + expected_s > limit:
                telemetry.REJECTIONS.labels(bid.criticality.name, subject).inc()
                asked_s = max(limit - now, 0)
                raise DeadlineUnmeetable(
                    f"the first token is expected in {expected_s:.2f} s and was asked for within {asked_s:.2f} s",
                    retry_after_s=max(wait_s, MIN_RETRY_S),
                    subject=subject,
                )

    def _wait_in_source_s(self, load: Load) -> float:
        """Return how long the source itself lets a request wait behind those that have no slot yet.

        Running ones are taken to be half done. Prompts and outputs are partly computed in the same steps, so the sum of
        both is up to twice too long: on a guess that is too short requests would be let in and served in vain.
        """
        if not (load.waiting_requests and load.prefill_tokens_per_s and load.decode_tokens_per_s):
            return 0.0
        ahead = load.queued_tokens * load.waiting_requests / (load.waiting_requests + load.running_requests / 2)
        all_s = self._prompt_tokens / load.prefill_tokens_per_s + self._new_tokens / load.decode_tokens_per_s
        return ahead * all_s / max(self._prompt_tokens + self._new_tokens, 1)

    def _rejection(self, bid: Bid, reason: str, message: str) -> Overloaded:
        telemetry.REJECTIONS.labels(bid.criticality.name, reason).inc()
        is_tenants_own = self.bulkheads.class_fits(bid) and not self.bulkheads.tenant_fits(bid)
        return Overloaded(
            message,
            retry_after_s=min(max(self._forecast_s(bid), MIN_RETRY_S), MAX_RETRY_S),
            subject=f"tenant:{bid.tenant}" if is_tenants_own else f"class:{bid.criticality.name}",
        )

    def _show(self, criticality: Criticality) -> None:
        telemetry.BULKHEAD_QUEUED.labels(criticality.name).set(len(self._queues[criticality]))
