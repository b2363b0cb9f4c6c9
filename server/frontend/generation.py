"""One request's life between the wire and a token source.

Two sides meet in a mailbox. The run (a task) tokenises, is admitted, and reads the source; what it holds is given back
when the source ends, however slowly the client reads. The reader (the handler) turns tokens into text and frames.
"""

import asyncio
import contextlib
import hashlib
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from server import budget, telemetry
from server.errors import DeadlineExceeded, Internal
from server.frontend.admission import Admission, Bid
from server.frontend.caller import Caller
from server.frontend.completion import Completion
from server.frontend.mailbox import Mailbox
from server.frontend.requests import (
    ClientRequest,
    DeltaEvent,
    FinishedEvent,
    GenerationEvent,
    SamplingChoices,
    StartedEvent,
    Timings,
    Usage,
)
from server.messages import (
    Finished,
    FinishReason,
    GenerateRequest,
    ModelInfo,
    SamplingParams,
    Started,
    TokenDelta,
)

Resolve = Callable[[SamplingChoices, ModelInfo, int], SamplingParams]


@dataclass(frozen=True, slots=True)
class Order:
    """What a run is to do."""

    request_id: str
    request: ClientRequest
    caller: Caller
    encode: Callable[[], Awaitable[tuple[int, ...]]]
    """Makes the prompt's token ids."""
    decode: Callable[[tuple[int, ...]], Awaitable[str]]
    """Makes the text that `echo` puts first."""
    resolve: Resolve
    """Leaves no sampling parameter open."""
    received_s: float
    deadline_s: float


class Generation:
    """An async iterator of one request's events. Made, run and closed by `Generations`."""

    def __init__(self, order: Order, admission: Admission) -> None:
        self.request_id = order.request_id
        self.model = order.request.model
        self.prompt_token_ids: tuple[int, ...] = ()
        self.params: SamplingParams | None = None
        self.started: Started | None = None
        self.completions: list[Completion] = []
        self.first_token_s: float | None = None
        """On the clock, when the source gave it."""
        self._admitted_s: float | None = None
        self._order = order
        self._admission = admission
        self._mailbox = Mailbox()
        self._ready: deque[GenerationEvent] = deque()
        self._is_cancelled = False
        self._run: asyncio.Task[None] | None = None

    # -- the run ------------------------------------------------------------------------------------------------------

    def begin(self) -> asyncio.Task[None]:
        """Start the run; whoever calls this ends it too."""
        self._run = asyncio.create_task(self._produce(), name=f"generation-{self.request_id}")
        return self._run

    def cancel(self) -> None:
        """End it for the client: the stream closes with CANCELLED and what was counted."""
        self._is_cancelled = True
        self._stop(None)

    def fail(self, error: BaseException) -> None:
        """End it with an error instead of the events that would have come."""
        self._stop(error)

    def _stop(self, error: BaseException | None) -> None:
        self._mailbox.close(error)
        if self._run is not None:
            self._run.cancel()

    async def _produce(self) -> None:
        """Fill the mailbox; every way to end closes it."""
        try:
            async with asyncio.timeout_at(self._order.deadline_s):
                await self._prepare()
                await self._relay()
        except TimeoutError:
            self._mailbox.close(DeadlineExceeded("the deadline has passed"))
        except asyncio.CancelledError:
            self._mailbox.close()
            raise
        except Exception as error:  # noqa: BLE001 the reader raises it, in the task that can answer for it
            self._mailbox.close(error)
        else:
            self._mailbox.close()

    async def _prepare(self) -> None:
        order = self._order
        choices = order.request.choices
        self.prompt_token_ids = await order.encode()
        self.params = order.resolve(choices, self.model.info, len(self.prompt_token_ids))
        echo = await order.decode(self.prompt_token_ids) if choices.echo else ""
        self.completions = [Completion(self.model.tokenizer, choices, echo=echo) for _ in range(choices.n)]

    async def _relay(self) -> None:
        assert self.params is not None, "set by _prepare"
        order, caller, params = self._order, self._order.caller, self.params
        budget_s = order.request.time_to_first_token_budget_s
        bid = Bid(
            tenant=caller.tenant,
            criticality=order.request.criticality,
            prompt_tokens=len(self.prompt_token_ids),
            new_tokens=params.max_tokens * params.n,
            load=self.model.load,
            deadline_s=order.deadline_s,
            first_token_by_s=None if budget_s is None else order.received_s + budget_s,
        )
        request = GenerateRequest(
            request_id=self.request_id,
            prompt_token_ids=self.prompt_token_ids,
            sampling=params,
            cache_salt=cache_salt(caller.tenant),
            criticality=order.request.criticality,
            deadline_s=order.deadline_s,
            trace_parent=caller.trace_parent,
        )
        async with (
            self._admission.admit(bid) as ticket,
            contextlib.aclosing(self.model.source.generate(request)) as events,
        ):
            self._admitted_s = time.monotonic()
            async for event in events:
                if isinstance(event, Started):
                    ticket.refund(event.cached_tokens)
                elif isinstance(event, TokenDelta) and self.first_token_s is None:
                    self.first_token_s = time.monotonic()
                self._mailbox.put(event)

    # -- the reader ---------------------------------------------------------------------------------------------------

    def __aiter__(self) -> "Generation":
        return self

    async def __anext__(self) -> GenerationEvent:
        """Return the next event, coalesced when the reader is slow.

        Raises:
            PathfoxError: what ended the generation instead of its `Finished`.
        """
        while not self._ready:
            if self._is_over:
                raise StopAsyncIteration
            await self._advance()
        return self._ready.popleft()

    @property
    def _is_over(self) -> bool:
        return bool(self.completions) and all(each.end is not None for each in self.completions)

    async def _advance(self) -> None:
        """Translate what has come from the source."""
        events = await self._mailbox.take()
        begun_s = time.perf_counter()
        if not events:
            self._close_early()
        for event in events:
            match event:
                case TokenDelta():
                    self._add_delta(event)
                case Finished():
                    self._add_finished(event)
                case Started():
                    self._add_started(event)
        telemetry.PHASES.add(budget.TEXT, self.model.info.name, time.perf_counter() - begun_s)
        if self._is_over and self._run is not None:
            # Stop strings may have ended every completion before the source did.
            self._run.cancel()

    def _close_early(self) -> None:
        if not self._is_cancelled:
            raise Internal(f"the token source of {self.model.info.name} ended without Finished")
        if not self.completions:
            # Cancelled before there was a prompt.
            self.completions = [Completion(None, SamplingChoices()) for _ in range(self._order.request.choices.n)]
        for index, completion in enumerate(self.completions):
            if completion.end is None:
                self._add_rest(index, completion.cancel())
                self._add_end(index)

    def _add_started(self, event: Started) -> None:
        assert self.params is not None, "set before the source is asked"
        self.started = event
        self._ready.append(
            StartedEvent(
                request_id=self.request_id,
                fingerprint=event.fingerprint,
                model_version=self.model.info.version,
                seed=self.params.seed,
                prompt_tokens=len(self.prompt_token_ids),
                cached_tokens=event.cached_tokens,
                prompt_logprobs=event.prompt_logprobs,
                metadata=self._order.request.metadata,
            )
        )

    def _add_delta(self, event: TokenDelta) -> None:
        completion = self.completions[event.index]
        piece = completion.push(event)
        if piece is None:
            return
        token_ids = piece.token_ids if self._order.request.return_token_ids else ()
        if piece.text or token_ids or piece.logprobs:
            self._ready.append(
                DeltaEvent(self.request_id, event.index, completion.num_tokens, piece.text, token_ids, piece.logprobs)
            )
        if completion.end is not None:
            self._add_end(event.index)

    def _add_finished(self, event: Finished) -> None:
        rest = self.completions[event.index].finish(event)
        if rest is not None:
            self._add_rest(event.index, rest)
            self._add_end(event.index)

    def _add_rest(self, index: int, text: str) -> None:
        if text:
            sequence = self.completions[index].num_tokens
            self._ready.append(DeltaEvent(self.request_id, index, sequence, text, (), ()))

    def _add_end(self, index: int) -> None:
        completion = self.completions[index]
        assert completion.end is not None, "called when it has ended"
        reason = completion.end.reason
        full = len(self.prompt_token_ids) + completion.end.completion_tokens >= self.model.info.context_length_tokens
        if reason is FinishReason.LENGTH and full and self._order.request.choices.max_tokens is None:
            reason = FinishReason.CONTEXT_FULL
        self._ready.append(
            FinishedEvent(
                request_id=self.request_id,
                index=index,
                sequence=completion.num_tokens,
                reason=reason,
                matched_stop=completion.end.matched_stop,
                usage=Usage(
                    prompt_tokens=len(self.prompt_token_ids),
                    completion_tokens=completion.end.completion_tokens,
                    cached_tokens=self.started.cached_tokens if self.started else 0,
                    restored_tokens=self.started.restored_tokens if self.started else 0,
                ),
                timings=self._timings(completion.end.decode_s),
                fingerprint=self.started.fingerprint if self.started else self.model.info.fingerprint,
            )
        )

    def _timings(self, decode_s: float) -> Timings:
        now, received_s = time.monotonic(), self._order.received_s
        waited_s = (self._admitted_s or now) - received_s
        first_token_s = self.first_token_s
        return Timings(
            queued_s=waited_s + (self.started.queued_s if self.started else 0.0),
            prefill_s=self.started.prefill_s if self.started else 0.0,
            # A stop string ends a completion here, so its source never says how long it took.
            decode_s=decode_s or (now - first_token_s if first_token_s is not None else 0.0),
            time_to_first_token_s=first_token_s - received_s if first_token_s is not None else 0.0,
            total_s=now - received_s,
        )

    @property
    def queued_s(self) -> float:
        """How long it waited for its first step, here and in the engine."""
        return self._timings(0.0).queued_s


def cache_salt(tenant: str) -> bytes:
    """Return what keeps a tenant's pages apart, so that nobody learns from timing what others have asked."""
    return hashlib.blake2b(tenant.encode(), digest_size=16, person=b"pathfox-tenant").digest()
