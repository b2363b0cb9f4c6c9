"""Proto out: events of a generation become frames, descriptions of models become messages."""

import time
from collections.abc import Iterable

from google.protobuf.duration_pb2 import Duration

from pathfox.v1 import admin_pb2, model_pb2
from pathfox.v1 import generation_pb2 as pb
from server import budget, telemetry
from server.frontend.models import ServedModel
from server.frontend.requests import (
    MAX_LOGPROBS,
    MAX_N,
    MAX_STOPS,
    DeltaEvent,
    FinishedEvent,
    GenerationEvent,
    StartedEvent,
    Timings,
    Usage,
)
from server.messages import TokenLogprob


def write_event(event: GenerationEvent) -> pb.GenerateResponse:
    """Write one frame of a stream."""
    begun_s = time.perf_counter()
    frame = _write_event(event)
    telemetry.PHASES.add(budget.FRAME, "", time.perf_counter() - begun_s)
    return frame


def _write_event(event: GenerationEvent) -> pb.GenerateResponse:
    match event:
        case DeltaEvent():
            delta = pb.Delta(text=event.text, token_ids=event.token_ids, logprobs=_write_logprobs(event.logprobs))
            return pb.GenerateResponse(
                request_id=event.request_id, index=event.index, sequence=event.sequence, delta=delta
            )
        case StartedEvent():
            return pb.GenerateResponse(request_id=event.request_id, started=_write_started(event))
        case FinishedEvent():
            return pb.GenerateResponse(
                request_id=event.request_id,
                index=event.index,
                sequence=event.sequence,
                finished=pb.Finished(
                    finish_reason=pb.FinishReason.ValueType(event.reason),
                    matched_stop=_write_matched_stop(event.matched_stop),
                    usage=_write_usage(event.usage),
                    durability=pb.DURABILITY_NONE,
                    fingerprint=event.fingerprint,
                    timings=_write_timings(event.timings),
                ),
            )


class Collected:
    """Gathers the events of a generation into the one answer of `GenerateOnce`."""

    def __init__(self) -> None:
        self._answer = pb.GenerateOnceResponse(durability=pb.DURABILITY_NONE)
        self._choices: dict[int, pb.Choice] = {}
        self._texts: dict[int, list[str]] = {}

    def add(self, event: GenerationEvent) -> None:
        """Take the next event."""
        self._answer.request_id = event.request_id
        match event:
            case StartedEvent():
                self._answer.seed = event.seed
                self._answer.fingerprint = event.fingerprint
                self._answer.model_version = event.model_version
                self._answer.prompt_logprobs.extend(_write_logprobs(event.prompt_logprobs))
                self._answer.metadata.update(event.metadata)
            case DeltaEvent():
                choice = self._choice(event.index)
                choice.token_ids.extend(event.token_ids)
                choice.logprobs.extend(_write_logprobs(event.logprobs))
                self._texts[event.index].append(event.text)
            case FinishedEvent():
                choice = self._choice(event.index)
                choice.finish_reason = pb.FinishReason.ValueType(event.reason)
                if (matched := _write_matched_stop(event.matched_stop)) is not None:
                    choice.matched_stop.CopyFrom(matched)
                self._add_usage(event.usage)
                self._answer.timings.CopyFrom(_write_timings(event.timings))

    def answer(self) -> pb.GenerateOnceResponse:
        """Return the answer, choices in order of their index."""
        for index in sorted(self._choices):
            choice = self._choices[index]
            choice.text = "".join(self._texts[index])
            self._answer.choices.append(choice)
        return self._answer

    def _choice(self, index: int) -> pb.Choice:
        if index not in self._choices:
            self._choices[index] = pb.Choice(index=index)
            self._texts[index] = []
        return self._choices[index]

    def _add_usage(self, usage: Usage) -> None:
        """Add up what each completion cost; they share the prompt."""
        completion_tokens = self._answer.usage.completion_tokens + usage.completion_tokens
        self._answer.usage.CopyFrom(_write_usage(usage))
        self._answer.usage.completion_tokens = completion_tokens


def write_model(model: ServedModel, *, max_message_bytes: int) -> model_pb2.Model:
    """Describe a model to clients."""
    info = model.info
    defaults = info.generation_defaults
    described = model_pb2.Model(
        name=info.name,
        version=info.version,
        aliases=info.aliases,
        family=info.family,
        context_length_tokens=info.context_length_tokens,
        mixer=info.mixer,
        num_layers=info.num_layers,
        num_experts=info.num_experts,
        num_parameters=info.num_parameters,
        fingerprint=info.fingerprint,
        is_row_invariant=info.is_row_invariant,
        page_size_tokens=info.page_size_tokens,
        page_bytes=info.page_bytes,
        limits=model_pb2.ModelLimits(
            max_prompt_tokens=info.context_length_tokens - 1,
            max_tokens=info.context_length_tokens - 1,
            max_n=MAX_N,
            max_logprobs=MAX_LOGPROBS,
            max_stop=MAX_STOPS,
            max_message_bytes=max_message_bytes,
        ),
    )
    for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
        if name in defaults:
            setattr(described.generation_defaults, name, defaults[name])
    if "top_k" in defaults:
        described.generation_defaults.top_k = int(defaults["top_k"])
    if model.tokenizer is not None:
        described.tokenizer.CopyFrom(
            model_pb2.TokenizerInfo(
                kind=model.tokenizer.kind,
                digest=model.tokenizer.digest,
                vocabulary_size=model.tokenizer.vocabulary_size,
                has_chat_template=model.template is not None,
            )
        )
    return described


def write_engine(model: ServedModel) -> admin_pb2.EngineStatus:
    """Describe the load behind a model."""
    load = model.load()
    return admin_pb2.EngineStatus(
        model=model.pinned_name,
        fingerprint=model.info.fingerprint,
        running_requests=load.running_requests,
        waiting_requests=load.waiting_requests,
        queued_tokens=load.queued_tokens,
        used_pages=load.used_pages,
        cached_pages=load.cached_pages,
        total_pages=load.total_pages,
        prefill_tokens_per_second=load.prefill_tokens_per_s,
        decode_tokens_per_second=load.decode_tokens_per_s,
        preemptions=load.preemptions,
    )


def write_score(token_ids: Iterable[int], scored: StartedEvent, *, num_top: int) -> model_pb2.ScoreResponse:
    """Write how probable each token after the first is."""
    return model_pb2.ScoreResponse(
        token_ids=token_ids,
        logprobs=[each.logprob for each in scored.prompt_logprobs],
        tokens=_write_logprobs(scored.prompt_logprobs) if num_top else (),
        fingerprint=scored.fingerprint,
    )


def duration(seconds: float) -> Duration:
    """Write seconds."""
    written = Duration()
    written.FromNanoseconds(round(seconds * 1e9))
    return written


def _write_started(event: StartedEvent) -> pb.Started:
    return pb.Started(
        fingerprint=event.fingerprint,
        model_version=event.model_version,
        seed=event.seed,
        prompt_tokens=event.prompt_tokens,
        cached_tokens=event.cached_tokens,
        prompt_logprobs=_write_logprobs(event.prompt_logprobs),
        metadata=event.metadata,
    )


def _write_logprobs(logprobs: Iterable[TokenLogprob]) -> list[pb.TokenLogprob]:
    return [
        pb.TokenLogprob(
            token_id=each.token_id,
            logprob=each.logprob,
            rank=each.rank,
            top=[pb.TopLogprob(token_id=token_id, logprob=logprob) for token_id, logprob in each.top],
        )
        for each in logprobs
    ]


def _write_matched_stop(matched: str | int | None) -> pb.MatchedStop | None:
    match matched:
        case None:
            return None
        case str():
            return pb.MatchedStop(text=matched)
        case int():
            return pb.MatchedStop(token_id=matched)


def _write_usage(usage: Usage) -> pb.Usage:
    return pb.Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_tokens=usage.cached_tokens,
        restored_tokens=usage.restored_tokens,
    )


def _write_timings(timings: Timings) -> pb.Timings:
    return pb.Timings(
        queued=duration(timings.queued_s),
        prefill=duration(timings.prefill_s),
        decode=duration(timings.decode_s),
        time_to_first_token=duration(timings.time_to_first_token_s),
        total=duration(timings.total_s),
    )
