"""What the front end's modules say to each other: a checked client request in, events of one generation out.

`wire.py` builds and writes these; nothing here knows proto.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from server.frontend.models import ServedModel
from server.messages import Criticality, FinishReason, TokenLogprob
from server.text.template import ChatMessage

DEFAULT_MAX_TOKENS = 1024
MAX_N = 16
MAX_LOGPROBS = 20
MAX_MESSAGES = 16_384
"""The event loop reads them one by one."""
MAX_TEMPERATURE = 100.0
"""Here all but the widest logits are as good as equal already."""
MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY = 0.01, 100.0
"""A logit is multiplied or divided by it, and must stay finite."""
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_STOP_TOKEN_IDS = 256
MAX_LOGIT_BIASES = 1024
MAX_LOGIT_BIAS = 100.0
MAX_METADATA = 16
MAX_METADATA_KEY_CHARACTERS = 64
MAX_METADATA_VALUE_CHARACTERS = 512


@dataclass(frozen=True, slots=True)
class SamplingChoices:
    """What the client chose of `sampling_params`; None = not chosen."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    n: int = 1
    echo: bool = False


Prompt = str | tuple[ChatMessage, ...] | tuple[int, ...] | None
"""Text, messages, token ids; None = none given, which only `Chat` allows when it opens."""


@dataclass(frozen=True, slots=True)
class ClientRequest:
    """One request, every field checked against the contract and the model."""

    model: ServedModel
    prompt: Prompt
    choices: SamplingChoices
    request_id: str | None = None
    criticality: Criticality = Criticality.DEFAULT
    time_to_first_token_budget_s: float | None = None
    return_token_ids: bool = False
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Usage:
    """What a generation counted."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    restored_tokens: int


@dataclass(frozen=True, slots=True)
class Timings:
    """Where a generation's time went, in seconds."""

    queued_s: float
    prefill_s: float
    decode_s: float
    time_to_first_token_s: float
    total_s: float


@dataclass(frozen=True, slots=True)
class StartedEvent:
    """The prompt is in."""

    request_id: str
    fingerprint: str
    model_version: str
    seed: int
    prompt_tokens: int
    cached_tokens: int
    prompt_logprobs: tuple[TokenLogprob, ...]
    metadata: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class DeltaEvent:
    """New text and tokens of one completion."""

    request_id: str
    index: int
    sequence: int
    """Completion tokens of this index up to the end of this event."""
    text: str
    token_ids: tuple[int, ...]
    """Empty unless the client asked for them."""
    logprobs: tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True)
class FinishedEvent:
    """The end of one completion."""

    request_id: str
    index: int
    sequence: int
    reason: FinishReason
    matched_stop: str | int | None
    """The stop string or the stop token id."""
    usage: Usage
    timings: Timings
    fingerprint: str


GenerationEvent = StartedEvent | DeltaEvent | FinishedEvent
