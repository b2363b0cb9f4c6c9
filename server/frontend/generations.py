"""All requests that are alive in this front end: starts them, finds them, ends them, writes down how they went."""

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

from opentelemetry import trace

from server import telemetry
from server.config import ServerConfig
from server.errors import InvalidRequest, Overloaded, Unavailable
from server.frontend import sampling
from server.frontend.admission import Admission
from server.frontend.caller import Caller
from server.frontend.generation import Generation, Order, Resolve
from server.frontend.prompts import Prompts
from server.frontend.requests import ClientRequest

T = TypeVar("T")
Encode = Callable[[], Awaitable[tuple[int, ...]]]


class Generations:
    """Runs generations and accounts for them.

    Args:
        config: deadlines and limits.
        admission: who may start.
        prompts: makes token ids.
        emits_legacy: add span attributes that dashboards made for other servers read.
    """

    def __init__(
        self, config: ServerConfig, admission: Admission, prompts: Prompts, *, emits_legacy: bool = False
    ) -> None:
        self.admission = admission
        self.prompts = prompts
        self.num_finished = 0
        self.num_ended = 0
        """Ended by a drain."""
        self._config = config
        self._emits_legacy = emits_legacy
        self._alive: dict[tuple[str, str], Generation] = {}
        self._num_preparing = 0
        self._drain = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def num_alive(self) -> int:
        """Requests whose streams are open."""
        return len(self._alive)

    @property
    def is_draining(self) -> bool:
        """Whether new requests are refused."""
        return self._drain.is_set()

    async def draining(self) -> None:
        """Wait until a drain begins."""
        await self._drain.wait()

    def begin_drain(self) -> None:
        """Refuse new requests from now on."""
        self._drain.set()

    async def wait_idle(self) -> None:
        """Wait until no request is alive. May wait as long as the longest deadline; bound it."""
        await self._idle.wait()

    def end_all(self) -> None:
        """End what is still alive with UNAVAILABLE."""
        for generation in self._alive.values():
            self.num_ended += 1
            generation.fail(draining())

    def cancel(self, tenant: str, request_id: str) -> bool:
        """End a tenant's request with CANCELLED; False when none of that id is alive."""
        generation = self._alive.get((tenant, request_id))
        if generation is not None:
            generation.cancel()
        return generation is not None

    @contextlib.asynccontextmanager
    async def start(
        self,
        request: ClientRequest,
        caller: Caller,
        *,
        encode: Encode | None = None,
        resolve: Resolve = sampling.resolve,
        received_s: float | None = None,
    ) -> AsyncIterator[Generation]:
        """Run a request for as long as the body reads it; leaving the body ends it and frees what it holds.

        Args:
            request: what to do.
            caller: for whom.
            encode: makes the prompt's token ids; None = from the request's own prompt.
            resolve: fills in sampling parameters.
            received_s: when its time began to count; None = with the call.

        Raises:
            Unavailable: draining.
            Overloaded: too many requests are being prepared.
            InvalidRequest: the request's id is in use.
        """
        received_s = caller.received_s if received_s is None else received_s
        request_id = self._claim_id(request, caller)
        prepare = encode or (lambda: self.prompts.encode(request.model, request.prompt))
        limit_s = time.monotonic() + self._config.default_deadline_s
        order = Order(
            request_id=request_id,
            request=request,
            caller=caller,
            encode=lambda: self.bounded(prepare),
            decode=lambda token_ids: self.prompts.decode(request.model, token_ids),
            resolve=resolve,
            received_s=received_s,
            deadline_s=limit_s if caller.deadline_s is None else caller.deadline_s,
        )
        generation = Generation(order, self.admission)
        self._alive[caller.tenant, request_id] = generation
        self._idle.clear()
        # A TaskGroup would wrap what the body raises into a group, and cancel the body in the middle of a write.
        run = generation.begin()
        try:
            yield generation
            self.num_finished += 1
        finally:
            run.cancel()
            try:
                await asyncio.wait([run])
            finally:
                # A call may be cancelled once more while it waits.
                del self._alive[caller.tenant, request_id]
                if not self._alive:
                    self._idle.set()
                self._account(generation, caller, received_s)

    def _claim_id(self, request: ClientRequest, caller: Caller) -> str:
        if self.is_draining:
            raise draining()
        if request.request_id is not None:
            if (caller.tenant, request.request_id) in self._alive:
                raise InvalidRequest.of("request_id", seen=request.request_id, limit="an id that is not in use")
            caller.adopt(request.request_id)
            return request.request_id
        with contextlib.suppress(ValueError):
            request_id = str(uuid.UUID(caller.request_id))
            if (caller.tenant, request_id) not in self._alive:
                return request_id
        return str(uuid.uuid4())

    async def bounded(self, prepare: Callable[[], Awaitable[T]]) -> T:
        """Do a request's text work, of which only so much may be going on or waiting for a thread.

        Raises:
            Overloaded: that much is.
        """
        if self._num_preparing >= self._config.max_preparing_requests:
            raise Overloaded(
                f"{self._num_preparing} requests are being tokenised already", retry_after_s=1.0, subject="preparing"
            )
        self._num_preparing += 1
        try:
            return await prepare()
        finally:
            self._num_preparing -= 1

    def _account(self, generation: Generation, caller: Caller, received_s: float) -> None:
        """Write down how a request went, for the log line, the metrics and the span of its call."""
        model = generation.model.info.name
        ends = [completion.end for completion in generation.completions if completion.end is not None]
        reasons = [end.reason.name for end in ends]
        num_tokens = sum(completion.num_tokens for completion in generation.completions)
        first_token_s = generation.first_token_s
        facts = caller.facts
        facts["model"] = generation.model.pinned_name
        facts["generation_id"] = generation.request_id
        facts["prompt_tokens"] = len(generation.prompt_token_ids)
        facts["completion_tokens"] = num_tokens
        facts["finish_reasons"] = reasons
        facts["queued_s"] = round(generation.queued_s, 6)
        for reason in reasons:
            telemetry.REQUESTS_FINISHED.labels(model, reason).inc()
        telemetry.REQUEST_LATENCY.labels(model).observe(time.monotonic() - received_s)
        telemetry.GENERATION_TOKENS.labels(model).inc(num_tokens)
        if (started := generation.started) is not None:
            facts["cached_tokens"] = started.cached_tokens
            telemetry.PROMPT_TOKENS.labels(model).inc(len(generation.prompt_token_ids))
            telemetry.CACHED_TOKENS.labels(model).inc(started.cached_tokens)
            telemetry.QUEUE_TIME.labels(model).observe(generation.queued_s)
            telemetry.PREFILL_TIME.labels(model).observe(started.prefill_s)
        if first_token_s is not None:
            facts["time_to_first_token_s"] = round(first_token_s - received_s, 6)
            decode_s = time.monotonic() - first_token_s
            telemetry.TIME_TO_FIRST_TOKEN.labels(model).observe(first_token_s - received_s)
            telemetry.DECODE_TIME.labels(model).observe(decode_s)
            if num_tokens > 1:
                telemetry.TIME_PER_OUTPUT_TOKEN.labels(model).observe(decode_s / (num_tokens - 1))
        if caller.span.is_recording():
            self._describe(caller.span, generation, reasons, num_tokens, received_s)

    def _describe(
        self, span: trace.Span, generation: Generation, reasons: list[str], num_tokens: int, received_s: float
    ) -> None:
        """Put the attributes of the GenAI conventions on a span."""
        info = generation.model.info
        span.set_attribute(telemetry.GEN_AI_OPERATION, "text_completion")
        span.set_attribute(telemetry.GEN_AI_PROVIDER, "pathfox")
        span.set_attribute(telemetry.GEN_AI_REQUEST_MODEL, info.name)
        span.set_attribute(telemetry.GEN_AI_RESPONSE_MODEL, generation.model.pinned_name)
        span.set_attribute(telemetry.GEN_AI_RESPONSE_ID, generation.request_id)
        span.set_attribute(telemetry.GEN_AI_FINISH_REASONS, [reason.lower() for reason in reasons])
        span.set_attribute(telemetry.GEN_AI_INPUT_TOKENS, len(generation.prompt_token_ids))
        span.set_attribute(telemetry.GEN_AI_OUTPUT_TOKENS, num_tokens)
        if (started := generation.started) is not None:
            span.set_attribute(telemetry.GEN_AI_CACHED_TOKENS, started.cached_tokens)
        if (params := generation.params) is not None:
            span.set_attribute(telemetry.GEN_AI_MAX_TOKENS, params.max_tokens)
            span.set_attribute(telemetry.GEN_AI_TEMPERATURE, params.temperature)
            span.set_attribute(telemetry.GEN_AI_TOP_P, params.top_p)
            span.set_attribute(telemetry.GEN_AI_TOP_K, params.top_k)
            span.set_attribute(telemetry.GEN_AI_CHOICES, params.n)
            # OpenTelemetry's integers are signed.
            span.set_attribute(telemetry.GEN_AI_SEED, str(params.seed))
        if generation.first_token_s is not None:
            first_token_s = generation.first_token_s - received_s
            span.set_attribute(telemetry.GEN_AI_TIME_TO_FIRST_CHUNK, first_token_s)
            if self._emits_legacy:
                span.set_attribute(telemetry.GEN_AI_LEGACY_FIRST_TOKEN, first_token_s)
        if self._emits_legacy:
            span.set_attribute(telemetry.GEN_AI_LEGACY_QUEUE, generation.queued_s)
            span.set_attribute(telemetry.GEN_AI_LEGACY_TOTAL, time.monotonic() - received_s)


def draining() -> Unavailable:
    """Say that this front end is going away."""
    return Unavailable("this front end is draining; another one will serve you", retry_after_s=1.0, subject="DRAINING")
