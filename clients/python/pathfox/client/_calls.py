"""Every RPC of the contract as a value: which method, which request, how its answer is read, what repeating it means.

Here lies all that a blocking and an asyncio client have in common; what they do with a call is in `_sync.py` and
`_async.py`. Nothing here does I/O.
"""

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypedDict, TypeVar, get_args

from google.protobuf.message import Message as ProtoMessage

from pathfox.client._events import Completion, Event, read_completion, read_event
from pathfox.client._retry import Repeat
from pathfox.v1 import admin_pb2, model_pb2
from pathfox.v1 import generation_pb2 as pb

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = get_args(Role)
Criticality = Literal["critical", "default", "batch", "sheddable"]
Consistency = Literal["strong", "available"]
ChatMessage = tuple[Role, str]
"""(role, content)."""


class CallOptions(TypedDict, total=False):
    """What any call takes."""

    timeout_s: float | None
    """Time for the whole call, repeated sendings included; None = no limit."""


class GenerateOptions(CallOptions, total=False):
    """What a generation takes: one of `text`, `messages` and `token_ids`, and what differs from the server's defaults.

    Names, meanings and limits are those of `GenerateRequest` and `SamplingParams` in the contract.
    """

    text: str
    messages: Sequence[ChatMessage]
    token_ids: Sequence[int]

    model: str
    request_id: str
    """A UUID; chosen by the client if you do not, so that a call can be cancelled before its first frame."""
    session_id: str
    expected_version: int
    parent_turn_id: str
    consistency: Consistency
    idempotency_key: str
    criticality: Criticality
    time_to_first_token_budget_ms: int
    return_token_ids: bool
    metadata: Mapping[str, str]

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int
    max_tokens: int
    min_tokens: int
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    logit_bias: Mapping[int, float]
    logprobs: int
    prompt_logprobs: int
    n: int
    echo: bool


class TokenizeOptions(CallOptions, total=False):
    """What to tokenize: `text` or `messages`."""

    text: str
    messages: Sequence[ChatMessage]
    model: str


class ScoreOptions(CallOptions, total=False):
    """What to score: `text` or `token_ids`."""

    text: str
    token_ids: Sequence[int]
    model: str
    top_logprobs: int
    criticality: Criticality


_INPUTS = ("text", "messages", "token_ids")
_OPTIONS = frozenset(GenerateOptions.__annotations__)
_SAMPLING_FIELDS = frozenset(pb.SamplingParams.DESCRIPTOR.fields_by_name)
_SAME_FIELDS = frozenset(pb.GenerateRequest.DESCRIPTOR.fields_by_name) - {
    "messages",
    "token_ids",
    "criticality",
    "consistency",
}

ReplyT = TypeVar("ReplyT", bound=ProtoMessage)
ResultT = TypeVar("ResultT")


@dataclass(frozen=True, slots=True)
class Call(Generic[ReplyT, ResultT]):
    """One call, not yet sent."""

    method: str
    request: ProtoMessage
    reply: type[ReplyT]
    read: Callable[[ReplyT], ResultT]
    repeat: Repeat
    timeout_s: float | None
    request_id: str = ""
    """Of a generation."""


GENERATE = "/pathfox.v1.GenerationService/Generate"
GENERATE_ONCE = "/pathfox.v1.GenerationService/GenerateOnce"
CHAT = "/pathfox.v1.GenerationService/Chat"
RESUME = "/pathfox.v1.GenerationService/Resume"
CANCEL = "/pathfox.v1.GenerationService/Cancel"
_MODEL = "/pathfox.v1.ModelService/"
_ADMIN = "/pathfox.v1.AdminService/"


def generate_request(options: GenerateOptions) -> pb.GenerateRequest:
    """Write a generation's options as the contract's message.

    Raises:
        TypeError: an option is not known, has a value of the wrong type, or more than one input is given.
        ValueError: a value does not fit its field in the contract (a negative seed, say) or is not one of its names.
    """
    _one_input(options, _INPUTS)
    given = {name: value for name, value in options.items() if value is not None}
    if unknown := given.keys() - _OPTIONS:
        raise TypeError(f"unknown option {', '.join(sorted(unknown))}")
    request = pb.GenerateRequest(
        # The contract and the options share their names, so what remains of them fits.
        **{name: value for name, value in given.items() if name in _SAME_FIELDS}  # type: ignore[arg-type]
    )
    if not request.request_id:
        request.request_id = str(uuid.uuid4())
    if "messages" in options:
        request.messages.CopyFrom(write_messages(options["messages"]))
    if "token_ids" in options:
        request.token_ids.CopyFrom(pb.TokenIds(ids=options["token_ids"]))
    if "criticality" in options:
        request.criticality = _criticality(options["criticality"])
    if "consistency" in options:
        request.consistency = pb.Consistency.Value(f"CONSISTENCY_{options['consistency']}".upper())
    sampling = {name: value for name, value in given.items() if name in _SAMPLING_FIELDS}
    if sampling:
        request.sampling_params.CopyFrom(_write_sampling(sampling))
    return request


def _write_sampling(given: Mapping[str, object]) -> pb.SamplingParams:
    params = pb.SamplingParams()
    for name, value in given.items():
        try:
            params.MergeFrom(pb.SamplingParams(**{name: value}))  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from None
    return params


def write_messages(given: Sequence[ChatMessage]) -> pb.Messages:
    """Write messages as the contract's."""
    for role, _ in given:
        if role not in ROLES:
            raise ValueError(f"messages: got role {role!r}, want one of {', '.join(ROLES)}")
    return pb.Messages(
        messages=[pb.Message(role=pb.Role.Value(f"ROLE_{role}".upper()), content=content) for role, content in given]
    )


def generate(options: GenerateOptions) -> Call[pb.GenerateResponse, Event | None]:
    """Stream a generation."""
    request = generate_request(options)
    return Call(
        GENERATE,
        request,
        pb.GenerateResponse,
        read_event,
        _repeat(options),
        options.get("timeout_s"),
        request.request_id,
    )


def generate_once(options: GenerateOptions) -> Call[pb.GenerateOnceResponse, Completion]:
    """Generate and answer once."""
    request = generate_request(options)
    reply = pb.GenerateOnceResponse
    return Call(GENERATE_ONCE, request, reply, read_completion, _repeat(options), options.get("timeout_s"))


def resume(request_id: str, after: Mapping[int, int], options: CallOptions) -> Call[pb.GenerateResponse, Event | None]:
    """Go on with a durable stream."""
    cursors = [pb.ResumeCursor(index=index, after_sequence=sequence) for index, sequence in after.items()]
    request = pb.ResumeRequest(request_id=request_id, cursors=cursors)
    return Call(RESUME, request, pb.GenerateResponse, read_event, Repeat.SAFE, options.get("timeout_s"), request_id)


def cancel(request_id: str, options: CallOptions) -> Call[pb.CancelResponse, bool]:
    """End a request."""
    request = pb.CancelRequest(request_id=request_id)
    return _safe(CANCEL, request, pb.CancelResponse, lambda reply: reply.cancelled, options)


def models(options: CallOptions) -> Call[model_pb2.ListModelsResponse, tuple[model_pb2.Model, ...]]:
    """List the models that are served."""
    request, reply = model_pb2.ListModelsRequest(), model_pb2.ListModelsResponse
    return _safe(_MODEL + "ListModels", request, reply, lambda listed: tuple(listed.models), options)


def model(name: str | None, options: CallOptions) -> Call[model_pb2.GetModelResponse, model_pb2.Model]:
    """Describe one model."""
    request, reply = model_pb2.GetModelRequest(model=name), model_pb2.GetModelResponse
    return _safe(_MODEL + "GetModel", request, reply, lambda found: found.model, options)


def tokenize(options: TokenizeOptions) -> Call[model_pb2.TokenizeResponse, model_pb2.TokenizeResponse]:
    """Turn text or messages into token ids."""
    _one_input(options, ("text", "messages"))
    request = model_pb2.TokenizeRequest(model=options.get("model"))
    if "text" in options:
        request.text = options["text"]
    if "messages" in options:
        request.messages.CopyFrom(write_messages(options["messages"]))
    return _safe(_MODEL + "Tokenize", request, model_pb2.TokenizeResponse, _itself, options)


def detokenize(
    token_ids: Sequence[int], model: str | None, options: CallOptions
) -> Call[model_pb2.DetokenizeResponse, str]:
    """Turn token ids into text."""
    request = model_pb2.DetokenizeRequest(model=model, token_ids=token_ids)
    return _safe(_MODEL + "Detokenize", request, model_pb2.DetokenizeResponse, lambda reply: reply.text, options)


def score(options: ScoreOptions) -> Call[model_pb2.ScoreResponse, model_pb2.ScoreResponse]:
    """Ask how probable a text is."""
    _one_input(options, ("text", "token_ids"))
    request = model_pb2.ScoreRequest(model=options.get("model"), top_logprobs=options.get("top_logprobs"))
    if "text" in options:
        request.text = options["text"]
    if "token_ids" in options:
        request.token_ids.CopyFrom(pb.TokenIds(ids=options["token_ids"]))
    if "criticality" in options:
        request.criticality = _criticality(options["criticality"])
    return _safe(_MODEL + "Score", request, model_pb2.ScoreResponse, _itself, options)


def status(options: CallOptions) -> Call[admin_pb2.GetStatusResponse, admin_pb2.GetStatusResponse]:
    """Ask for load, limits and health."""
    return _safe(_ADMIN + "GetStatus", admin_pb2.GetStatusRequest(), admin_pb2.GetStatusResponse, _itself, options)


def drain(grace_s: float | None, options: CallOptions) -> Call[admin_pb2.DrainResponse, admin_pb2.DrainResponse]:
    """Make the server stop accepting and finish what it has."""
    request = admin_pb2.DrainRequest()
    if grace_s is not None:
        request.grace.FromMicroseconds(round(grace_s * 1e6))
    return _once(_ADMIN + "Drain", request, admin_pb2.DrainResponse, _itself, options)


def set_traffic(
    model: str, weights_percent: Mapping[str, int], options: CallOptions
) -> Call[admin_pb2.SetTrafficResponse, dict[str, int]]:
    """Set how new requests are spread over the versions of a model."""
    weights = [
        admin_pb2.TrafficWeight(model_version=version, weight_percent=weight)
        for version, weight in weights_percent.items()
    ]
    request = admin_pb2.SetTrafficRequest(model=model, weights=weights)
    return _once(_ADMIN + "SetTraffic", request, admin_pb2.SetTrafficResponse, _read_weights, options)


def replicas(options: CallOptions) -> Call[admin_pb2.ListReplicasResponse, tuple[admin_pb2.Replica, ...]]:
    """List the replicas behind the front end."""
    request, reply = admin_pb2.ListReplicasRequest(), admin_pb2.ListReplicasResponse
    return _safe(_ADMIN + "ListReplicas", request, reply, lambda listed: tuple(listed.replicas), options)


def circuits(options: CallOptions) -> Call[admin_pb2.ListCircuitsResponse, tuple[admin_pb2.Circuit, ...]]:
    """List the circuit breakers of the front end."""
    request, reply = admin_pb2.ListCircuitsRequest(), admin_pb2.ListCircuitsResponse
    return _safe(_ADMIN + "ListCircuits", request, reply, lambda listed: tuple(listed.circuits), options)


def reset_circuit(name: str, options: CallOptions) -> Call[admin_pb2.ResetCircuitResponse, admin_pb2.Circuit]:
    """Close a circuit breaker by hand."""
    request, reply = admin_pb2.ResetCircuitRequest(name=name), admin_pb2.ResetCircuitResponse
    return _once(_ADMIN + "ResetCircuit", request, reply, lambda found: found.circuit, options)


def _repeat(options: GenerateOptions) -> Repeat:
    return Repeat.SAFE if options.get("idempotency_key") else Repeat.IF_INVITED


def _safe(
    method: str, request: ProtoMessage, reply: type[ReplyT], read: Callable[[ReplyT], ResultT], options: CallOptions
) -> Call[ReplyT, ResultT]:
    return Call(method, request, reply, read, Repeat.SAFE, options.get("timeout_s"))


def _once(
    method: str, request: ProtoMessage, reply: type[ReplyT], read: Callable[[ReplyT], ResultT], options: CallOptions
) -> Call[ReplyT, ResultT]:
    return Call(method, request, reply, read, Repeat.NEVER, options.get("timeout_s"))


def _itself(reply: ReplyT) -> ReplyT:
    return reply


def _read_weights(reply: admin_pb2.SetTrafficResponse) -> dict[str, int]:
    return {each.model_version: each.weight_percent for each in reply.weights}


def _criticality(name: Criticality) -> pb.Criticality.ValueType:
    return pb.Criticality.Value(f"CRITICALITY_{name}".upper())


def _one_input(options: Mapping[str, object], names: Sequence[str]) -> None:
    given = [name for name in names if name in options]
    if len(given) > 1:
        raise TypeError(f"give one of {', '.join(names)}, not {' and '.join(given)}")
