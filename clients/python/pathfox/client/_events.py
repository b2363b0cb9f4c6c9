"""What a generation says, as immutable values: the frames of a stream, or the whole at once."""

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from google.protobuf.duration_pb2 import Duration

from pathfox.v1 import generation_pb2 as pb


class FinishReason(enum.StrEnum):
    """Why a completion ended."""

    STOP = "stop"
    """The model ended its answer."""
    LENGTH = "length"
    STOP_SEQUENCE = "stop_sequence"
    """At a stop string or stop token id of the request; see `matched_stop`."""
    CANCELLED = "cancelled"
    CONTEXT_FULL = "context_full"
    UNKNOWN = "unknown"
    """A reason that is newer than this client."""


class Durability(enum.StrEnum):
    """Where the outcome is kept."""

    NONE = "none"
    LOCAL = "local"
    QUORUM = "quorum"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """How probable the model found a token, by its own distribution."""

    token_id: int
    logprob: float
    """Natural logarithm."""
    rank: int
    """1 = the most probable."""
    top: tuple[tuple[int, float], ...]
    """(token id, log probability) of the most probable tokens, as many as were asked for."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens that were counted."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    """Of the prompt, that did not have to be computed."""
    restored_tokens: int
    """Of the prompt, that were fetched from the page store."""


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the time went, as the server saw it."""

    queued_s: float
    prefill_s: float
    decode_s: float
    time_to_first_token_s: float
    total_s: float


@dataclass(frozen=True, slots=True)
class _Frame:
    request_id: str
    index: int
    """Which of the `n` completions."""
    sequence: int
    """Completion tokens of this index up to here: what `resume` goes on from."""


@dataclass(frozen=True, slots=True)
class Started(_Frame):
    """The prompt is in."""

    fingerprint: str
    """The compute class: equal fingerprints give equal bits."""
    model_version: str
    seed: int
    """Yours, or the one that was drawn: send it again to get the same tokens."""
    prompt_tokens: int
    cached_tokens: int
    session_version: int | None
    turn_id: str | None
    replayed: bool
    """This stream replays a finished run."""
    dedup: bool
    """This stream is attached to a run that another call began."""
    prompt_logprobs: tuple[TokenLogprob, ...]
    metadata: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Delta(_Frame):
    """What is new; never cumulative, and with borders that carry no meaning."""

    text: str
    token_ids: tuple[int, ...]
    """With `return_token_ids`."""
    logprobs: tuple[TokenLogprob, ...]
    """With `logprobs`."""


@dataclass(frozen=True, slots=True)
class Finished(_Frame):
    """The end of one completion."""

    reason: FinishReason
    matched_stop: str | int | None
    """The stop string or stop token id that ended it."""
    usage: Usage
    timings: Timings
    fingerprint: str
    durability: Durability
    session_version: int | None


@dataclass(frozen=True, slots=True)
class Interrupted(_Frame):
    """The stream was cut behind the server and goes on elsewhere; nothing is lost or repeated."""

    reason: str


Event = Started | Delta | Finished | Interrupted


@dataclass(frozen=True, slots=True)
class Choice:
    """One whole completion."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    reason: FinishReason
    matched_stop: str | int | None


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole generation."""

    request_id: str
    choices: tuple[Choice, ...]
    usage: Usage
    timings: Timings
    seed: int
    fingerprint: str
    model_version: str
    durability: Durability
    session_version: int | None
    turn_id: str | None
    prompt_logprobs: tuple[TokenLogprob, ...]
    metadata: Mapping[str, str]

    @property
    def text(self) -> str:
        """The text of the first choice."""
        return self.choices[0].text


def read_event(frame: pb.GenerateResponse) -> Event | None:
    """Translate a frame; None for a kind that is newer than this client."""
    place = (frame.request_id, frame.index, frame.sequence)
    match frame.WhichOneof("event"):
        case "started":
            return _started(place, frame.started)
        case "delta":
            delta = frame.delta
            return Delta(*place, delta.text, tuple(delta.token_ids), _logprobs(delta.logprobs))
        case "finished":
            return _finished(place, frame.finished)
        case "interrupted":
            return Interrupted(*place, frame.interrupted.reason)
        case _:
            return None


def read_completion(reply: pb.GenerateOnceResponse) -> Completion:
    """Translate a whole generation."""
    return Completion(
        request_id=reply.request_id,
        choices=tuple(_choice(each) for each in sorted(reply.choices, key=lambda choice: choice.index)),
        usage=_usage(reply.usage),
        timings=_timings(reply.timings),
        seed=reply.seed,
        fingerprint=reply.fingerprint,
        model_version=reply.model_version,
        durability=_durability(reply.durability),
        session_version=reply.session_version if reply.HasField("session_version") else None,
        turn_id=reply.turn_id if reply.HasField("turn_id") else None,
        prompt_logprobs=_logprobs(reply.prompt_logprobs),
        metadata=dict(reply.metadata),
    )


def _started(place: tuple[str, int, int], started: pb.Started) -> Started:
    return Started(
        *place,
        fingerprint=started.fingerprint,
        model_version=started.model_version,
        seed=started.seed,
        prompt_tokens=started.prompt_tokens,
        cached_tokens=started.cached_tokens,
        session_version=started.session_version if started.HasField("session_version") else None,
        turn_id=started.turn_id if started.HasField("turn_id") else None,
        replayed=started.replayed,
        dedup=started.dedup,
        prompt_logprobs=_logprobs(started.prompt_logprobs),
        metadata=dict(started.metadata),
    )


def _finished(place: tuple[str, int, int], finished: pb.Finished) -> Finished:
    return Finished(
        *place,
        reason=_reason(finished.finish_reason),
        matched_stop=_matched(finished.matched_stop),
        usage=_usage(finished.usage),
        timings=_timings(finished.timings),
        fingerprint=finished.fingerprint,
        durability=_durability(finished.durability),
        session_version=finished.session_version if finished.HasField("session_version") else None,
    )


def _choice(choice: pb.Choice) -> Choice:
    return Choice(
        index=choice.index,
        text=choice.text,
        token_ids=tuple(choice.token_ids),
        logprobs=_logprobs(choice.logprobs),
        reason=_reason(choice.finish_reason),
        matched_stop=_matched(choice.matched_stop),
    )


def _reason(number: pb.FinishReason.ValueType) -> FinishReason:
    name = pb.FinishReason.Name(number) if number in pb.FinishReason.values() else ""
    return FinishReason.__members__.get(name.removeprefix("FINISH_REASON_"), FinishReason.UNKNOWN)


def _durability(number: pb.Durability.ValueType) -> Durability:
    name = pb.Durability.Name(number) if number in pb.Durability.values() else ""
    return Durability.__members__.get(name.removeprefix("DURABILITY_"), Durability.UNKNOWN)


def _matched(stop: pb.MatchedStop) -> str | int | None:
    match stop.WhichOneof("match"):
        case "text":
            return stop.text
        case "token_id":
            return stop.token_id
        case _:
            return None


def _logprobs(tokens: Iterable[pb.TokenLogprob]) -> tuple[TokenLogprob, ...]:
    return tuple(
        TokenLogprob(each.token_id, each.logprob, each.rank, tuple((top.token_id, top.logprob) for top in each.top))
        for each in tokens
    )


def _usage(usage: pb.Usage) -> Usage:
    return Usage(usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens, usage.restored_tokens)


def _timings(timings: pb.Timings) -> Timings:
    return Timings(
        queued_s=_seconds(timings.queued),
        prefill_s=_seconds(timings.prefill),
        decode_s=_seconds(timings.decode),
        time_to_first_token_s=_seconds(timings.time_to_first_token),
        total_s=_seconds(timings.total),
    )


def _seconds(duration: Duration) -> float:
    return duration.ToMicroseconds() / 1e6
