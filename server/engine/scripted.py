"""A token source without an engine: tokens from a script or a pure function, at a set rate, with faults on request.

Shipped for tests and benchmarks of whatever consumes a `TokenSource`. Keeps the whole contract: continuation, endings,
deadline, cancellation.
"""

import asyncio
import enum
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from dataclasses import dataclass

from server.engine.intake import check_request
from server.errors import DeadlineExceeded, Overloaded, SourceLost
from server.messages import (
    Event,
    Finished,
    FinishReason,
    GenerateRequest,
    Load,
    SamplingParams,
    Started,
    TokenDelta,
    TokenLogprob,
)

TokenFunction = Callable[[int, int, int], int]
"""(seed, index, position in the completion) -> token id."""


class FaultKind(enum.Enum):
    """What goes wrong in a call of `generate`."""

    REFUSE = "refuse"
    """Raise `Overloaded` before the first event."""
    LOST = "lost"
    """Raise `SourceLost`."""
    HANG = "hang"
    """Say nothing more, until the deadline or for ever."""


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault of one call."""

    kind: FaultKind
    after_tokens: int = 0
    """Of all completions together, in this call."""


class ScriptedSource:
    """Yields what it was told to.

    Args:
        script: token ids that every completion gives, ending with STOP after the last; or a function without an end.
        tokens_per_s: of each completion; None = as fast as the reader.
        faults: one for each call of `generate`, in order; None, or no more of them = no fault.
        fingerprint: reported in `Started`.
        vocabulary_size: token ids are below it.
        context_length_tokens: prompt + output of a completion.
    """

    def __init__(
        self,
        script: Sequence[int] | TokenFunction,
        *,
        tokens_per_s: float | None = None,
        faults: Iterable[Fault | None] = (),
        fingerprint: str = "scripted",
        vocabulary_size: int = 1 << 20,
        context_length_tokens: int = 1 << 20,
    ) -> None:
        self.fingerprint = fingerprint
        self.requests: list[GenerateRequest] = []
        """Every request that came, in order."""
        self.num_cancelled = 0
        """Calls that were closed before their end."""
        self._script = script
        self._tokens_per_s = tokens_per_s
        self._faults = iter(faults)
        self._vocabulary_size = vocabulary_size
        self._context_length_tokens = context_length_tokens
        self._num_running = 0

    def load(self) -> Load:
        """Return how many requests are being answered."""
        return Load(running_requests=self._num_running, decode_tokens_per_s=self._tokens_per_s or 0.0)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        """Answer a request; see `TokenSource`."""
        self.requests.append(request)
        check_request(
            request,
            vocabulary_size=self._vocabulary_size,
            max_tokens=self._context_length_tokens,
            now_s=time.monotonic(),
        )
        fault = next(self._faults, None)
        if fault is not None and fault.kind is FaultKind.REFUSE:
            raise Overloaded("refused, as the script says", retry_after_s=1.0, subject="SCRIPT")
        self._num_running += 1
        is_cancelled = True
        try:
            async for event in self._events(request, fault):
                yield event
            is_cancelled = False
        except (SourceLost, DeadlineExceeded):
            is_cancelled = False
            raise
        finally:
            self._num_running -= 1
            self.num_cancelled += is_cancelled

    async def _events(self, request: GenerateRequest, fault: Fault | None) -> AsyncGenerator[Event, None]:
        sampling = request.sampling
        emitted = [*request.emitted_token_ids, *[()] * (sampling.n - len(request.emitted_token_ids))]
        outputs = [list(each) for each in emitted]
        yield Started(fingerprint=self.fingerprint, cached_tokens=0, prompt_logprobs=_score_prompt(request))
        is_open = [True] * sampling.n
        for index, output in enumerate(outputs):
            if (output or not sampling.max_tokens) and (reason := self._ending(request, output)) is not None:
                is_open[index] = False
                yield _finished(index, output, reason)
        num_tokens = 0
        while any(is_open):
            await self._pace(request)
            for index in (each for each in range(sampling.n) if is_open[each]):
                if fault is not None and num_tokens == fault.after_tokens:
                    await self._break(request, fault)
                token_id = self._token(sampling, index, len(outputs[index]))
                if token_id is None or token_id in sampling.eos_token_ids:
                    is_open[index] = False
                    yield Finished(index, FinishReason.STOP, len(outputs[index]) + 1)
                    continue
                num_tokens += 1
                outputs[index].append(token_id)
                logprobs = () if sampling.logprobs is None else (TokenLogprob(token_id, 0.0, 1),)
                yield TokenDelta(index, (token_id,), logprobs)
                if (reason := self._ending(request, outputs[index])) is not None:
                    is_open[index] = False
                    yield _finished(index, outputs[index], reason)

    def _token(self, sampling: SamplingParams, index: int, position: int) -> int | None:
        if callable(self._script):
            token_id = self._script(sampling.seed, index, position)
            endings = {*sampling.eos_token_ids, *sampling.stop_token_ids}
            while position < sampling.min_tokens and token_id in endings:
                token_id = (token_id + 1) % self._vocabulary_size
            return token_id
        return self._script[position] if position < len(self._script) else None

    def _ending(self, request: GenerateRequest, output: Sequence[int]) -> FinishReason | None:
        sampling = request.sampling
        if output and output[-1] in sampling.stop_token_ids:
            return FinishReason.STOP_SEQUENCE
        if len(output) >= sampling.max_tokens:
            return FinishReason.LENGTH
        if len(request.prompt_token_ids) + len(output) >= self._context_length_tokens:
            return FinishReason.CONTEXT_FULL
        return None

    async def _pace(self, request: GenerateRequest) -> None:
        """Wait for the next token's time, if the deadline is not before it."""
        await self._sleep(request, 1.0 / self._tokens_per_s if self._tokens_per_s else 0.0)

    async def _break(self, request: GenerateRequest, fault: Fault) -> None:
        if fault.kind is FaultKind.LOST:
            raise SourceLost("lost, as the script says")
        await self._sleep(request, None)

    async def _sleep(self, request: GenerateRequest, duration_s: float | None) -> None:
        """Sleep, for ever if the duration is None, but not beyond the deadline."""
        left_s = None if request.deadline_s is None else request.deadline_s - time.monotonic()
        try:
            async with asyncio.timeout(left_s):
                await (asyncio.get_running_loop().create_future() if duration_s is None else asyncio.sleep(duration_s))
        except TimeoutError:
            raise DeadlineExceeded("the request's deadline has passed") from None


def _score_prompt(request: GenerateRequest) -> tuple[TokenLogprob, ...]:
    if request.sampling.prompt_logprobs is None:
        return ()
    return tuple(TokenLogprob(token_id, 0.0, 1) for token_id in request.prompt_token_ids[1:])


def _finished(index: int, output: Sequence[int], reason: FinishReason) -> Finished:
    matched = output[-1] if reason is FinishReason.STOP_SEQUENCE else None
    return Finished(index, reason, len(output), matched_stop_token_id=matched)
