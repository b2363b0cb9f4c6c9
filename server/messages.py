"""What travels between the rooms: a request, the events that answer it, and the two Protocols where rooms meet.

Knows nothing of proto, replicas, tensors or stores. Everything here is immutable and pickles.
"""

import enum
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol


class Criticality(enum.IntEnum):
    """How much a request matters; larger numbers are shed first. Values are those of the public contract."""

    CRITICAL = 1
    DEFAULT = 2
    BATCH = 3
    SHEDDABLE = 4


class FinishReason(enum.IntEnum):
    """Why a completion ended. Values are those of the public contract."""

    STOP = 1
    LENGTH = 2
    STOP_SEQUENCE = 3
    CANCELLED = 4
    CONTEXT_FULL = 5


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen, fully resolved: no field is left to a default of somebody further down.

    Strings (stop, echo) are absent: the engine knows token ids only.
    """

    seed: int
    """Key of the counter-based generator, 0 .. 2^64 - 1."""
    max_tokens: int
    """0 is allowed here and only here: compute prompt_logprobs and finish."""
    temperature: float = 1.0
    """0 = greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 = all."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    """Counts prompt and output."""
    presence_penalty: float = 0.0
    """Counts output only, as the frequency penalty does."""
    frequency_penalty: float = 0.0
    min_tokens: int = 0
    eos_token_ids: tuple[int, ...] = ()
    """End the completion with STOP; banned before min_tokens. Empty with ignore_eos."""
    stop_token_ids: tuple[int, ...] = ()
    """End the completion with STOP_SEQUENCE; banned before min_tokens."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    """None = none; k = the chosen token's and those of the k most probable."""
    prompt_logprobs: int | None = None
    n: int = 1


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One generation, as a token source sees it: token ids in, token ids out.

    Law 3: a request that was interrupted is sent again with what it has `emitted`, and goes on from there.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    """Never empty."""
    sampling: SamplingParams
    emitted_token_ids: tuple[tuple[int, ...], ...] = ()
    """Per index, what has been sent already; empty for a new request."""
    cache_salt: bytes = b""
    """Tenant's salt of the first chain id; b"" = the salt of public prefixes."""
    criticality: Criticality = Criticality.DEFAULT
    deadline_s: float | None = None
    """On this process's `time.monotonic()` clock; None = none."""
    trace_parent: str | None = None
    """W3C traceparent; context variables do not cross processes."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural log probabilities at one place, of the model's own distribution."""

    token_id: int
    logprob: float
    rank: int
    """1 = the most probable."""
    top: tuple[tuple[int, float], ...] = ()
    """(token id, log probability) of the most probable tokens, in order."""


@dataclass(frozen=True, slots=True)
class Started:
    """The first event: the prompt is in, the first token is next."""

    fingerprint: str
    cached_tokens: int
    """Of the prompt, found in the page pool."""
    restored_tokens: int = 0
    """Of the prompt, fetched from the page store."""
    queued_s: float = 0.0
    prefill_s: float = 0.0
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    """One for each prompt token after the first, when asked for.

    They come with index 0: a continuation with n > 1 whose index 0 had ended brings none.
    """


@dataclass(frozen=True, slots=True)
class TokenDelta:
    """New tokens of one completion. Borders carry no meaning: a slow reader gets many tokens in one delta."""

    index: int
    token_ids: tuple[int, ...]
    """The end-of-turn token is not among them; a matched stop token id is."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """One per token when asked for."""


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of one completion; after the n-th the source ends."""

    index: int
    reason: FinishReason
    completion_tokens: int
    """Counts the end-of-turn token too: it was computed."""
    matched_stop_token_id: int | None = None
    decode_s: float = 0.0


Event = Started | TokenDelta | Finished


class TokenSource(Protocol):
    """Where tokens come from: an engine, a link to one, a router over many, or a script."""

    def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        """Yield `Started`, then deltas, then one `Finished` per index.

        `aclose()` (or cancelling the consumer) cancels the request and frees what it holds within one step.
        May wait as long as the request's deadline allows.

        Raises:
            SourceLost: it can go on elsewhere from prompt + emitted tokens.
            DeadlineExceeded: the request's deadline has passed.
            Overloaded, Unavailable: it was not begun.
        """
        ...


@dataclass(frozen=True, slots=True)
class Load:
    """How busy a token source is, for admission, routing, status and scaling."""

    running_requests: int = 0
    waiting_requests: int = 0
    queued_tokens: int = 0
    """Prompt tokens not yet computed and completion tokens not yet generated, of all accepted requests."""
    used_pages: int = 0
    """Held by sequences."""
    cached_pages: int = 0
    """Closed, held by nobody, ready for reuse."""
    total_pages: int = 0
    prefill_tokens_per_s: float = 0.0
    """Measured; 0 = not yet."""
    decode_tokens_per_s: float = 0.0
    """Measured, all sequences together; 0 = not yet."""
    preemptions: int = 0


@dataclass(frozen=True, slots=True)
class Page:
    """A closed page: immutable, addressed by its chain id, the same bytes in the pool, on disk and in a store."""

    chain_id: bytes
    payload: bytes
    checksum: bytes


class PageSource(Protocol):
    """Where closed pages come from and go to beyond one engine's pool. Losing one costs time, never an answer."""

    async def get(self, chain_ids: Sequence[bytes]) -> list[Page | None]:
        """Fetch pages; None where one is missing, corrupt or foreign."""
        ...

    def offer(self, pages: Sequence[Page]) -> None:
        """Take closed pages to keep, in the background, or drop them."""
        ...


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a served model says of itself."""

    name: str
    version: str
    family: str
    mixer: str
    context_length_tokens: int
    vocabulary_size: int
    num_layers: int
    num_parameters: int
    fingerprint: str
    is_row_invariant: bool
    """The prefix law holds on the path that this model runs on."""
    page_size_tokens: int
    page_bytes: int
    eos_token_ids: tuple[int, ...]
    num_experts: int = 0
    aliases: tuple[str, ...] = ()
    generation_defaults: Mapping[str, float] = field(default_factory=dict)
    """Sampling defaults by field name of the contract: temperature, top_p, top_k, min_p, repetition_penalty."""
