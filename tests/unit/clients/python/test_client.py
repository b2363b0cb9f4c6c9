import asyncio
import inspect
import uuid
from collections.abc import Callable, Iterator

import grpc
import pytest
from google.rpc import error_details_pb2

import pathfox.client
from pathfox.client import (
    AsyncClient,
    Cancelled,
    Client,
    Conflict,
    ContextLengthExceeded,
    DeadlineExceeded,
    Delta,
    Event,
    Finished,
    FinishReason,
    IdempotencyMismatch,
    Internal,
    InvalidRequest,
    NotFound,
    NotSupported,
    Overloaded,
    PathfoxError,
    PermissionDenied,
    Retry,
    Started,
    Unauthenticated,
    Unavailable,
    Violation,
)
from pathfox.v1 import admin_pb2, model_pb2
from pathfox.v1 import generation_pb2 as pb
from tests.unit.clients.python.scripted_server import METHODS, WAIT_S, Script, endless, fail, retry_info


class Blocking:
    """Does a thing with the blocking client."""

    def __init__(self, address: str, **options: object) -> None:
        self._make: Callable[[], Client] = lambda: Client(address, **options)

    def ask(self, method: str, *args: object, **kwargs: object) -> object:
        """Make one call."""
        with self._make() as client:
            return getattr(client, method)(*args, **kwargs)

    def events(self, method: str = "generate", *args: object, **kwargs: object) -> list[Event]:
        """Collect a stream."""
        with self._make() as client, getattr(client, method)(*args, **kwargs) as events:
            return list(events)


class Asyncio:
    """Does the same with the asyncio client."""

    def __init__(self, address: str, **options: object) -> None:
        self._make: Callable[[], AsyncClient] = lambda: AsyncClient(address, **options)

    def ask(self, method: str, *args: object, **kwargs: object) -> object:
        """Make one call."""

        async def run() -> object:
            async with self._make() as client:
                return await getattr(client, method)(*args, **kwargs)

        return asyncio.run(run())

    def events(self, method: str = "generate", *args: object, **kwargs: object) -> list[Event]:
        """Collect a stream."""

        async def run() -> list[Event]:
            async with self._make() as client, getattr(client, method)(*args, **kwargs) as events:
                return [event async for event in events]

        return asyncio.run(run())


Kind = type[Blocking] | type[Asyncio]
both = pytest.mark.parametrize("kind", [Blocking, Asyncio])


def frame(**event: object) -> pb.GenerateResponse:
    """Write a frame of index 0."""
    return pb.GenerateResponse(request_id="r", sequence=2, **event)


ANSWER = [
    frame(started=pb.Started(fingerprint="f", seed=7, prompt_tokens=3, metadata={"a": "b"})),
    frame(delta=pb.Delta(text="Pa", token_ids=[5])),
    frame(
        delta=pb.Delta(
            text="ris",
            token_ids=[6],
            logprobs=[pb.TokenLogprob(token_id=6, logprob=-0.5, rank=1, top=[pb.TopLogprob(token_id=6, logprob=-0.5)])],
        )
    ),
    frame(
        finished=pb.Finished(
            finish_reason=pb.FINISH_REASON_STOP_SEQUENCE,
            matched_stop=pb.MatchedStop(text="\n"),
            usage=pb.Usage(prompt_tokens=3, completion_tokens=2),
            durability=pb.DURABILITY_NONE,
        )
    ),
]


def answer(_request: object, _context: grpc.ServicerContext) -> Iterator[pb.GenerateResponse]:
    """Stream ANSWER."""
    yield from ANSWER


@both
def test_a_generation_is_a_stream_of_typed_events(script: Script, kind: Kind) -> None:
    """Frames become values; text, ids, logprobs and the end are where they belong."""
    script.answers["Generate"] = answer

    started, first, second, finished = kind(script.address).events(text="The capital of France is")

    assert isinstance(started, Started)
    assert (started.seed, started.fingerprint, started.metadata) == (7, "f", {"a": "b"})
    assert started.session_version is None
    assert isinstance(first, Delta)
    assert isinstance(second, Delta)
    assert first.text + second.text == "Paris"
    assert second.logprobs[0].top == ((6, -0.5),)
    assert isinstance(finished, Finished)
    assert (finished.reason, finished.matched_stop) == (FinishReason.STOP_SEQUENCE, "\n")
    assert finished.usage.completion_tokens == 2


@both
def test_options_travel_as_the_contract_names_them(script: Script, kind: Kind) -> None:
    """Sampling options go to sampling_params, others to the request; what is not given is not set."""
    kind(script.address).events(
        messages=[("system", "s"), ("user", "u")],
        model="m",
        temperature=0.0,
        stop=["a"],
        logit_bias={3: 1.5},
        n=2,
        criticality="batch",
        consistency="available",
        metadata={"k": "v"},
        session_id="s1",
        expected_version=0,
    )

    (request,) = script.requests("Generate")
    assert isinstance(request, pb.GenerateRequest)
    assert uuid.UUID(request.request_id)
    request.request_id = ""
    assert request == pb.GenerateRequest(
        request_id="",
        model="m",
        messages=pb.Messages(
            messages=[pb.Message(role=pb.ROLE_SYSTEM, content="s"), pb.Message(role=pb.ROLE_USER, content="u")]
        ),
        sampling_params=pb.SamplingParams(temperature=0.0, stop=["a"], logit_bias={3: 1.5}, n=2),
        criticality=pb.CRITICALITY_BATCH,
        consistency=pb.CONSISTENCY_AVAILABLE,
        metadata={"k": "v"},
        session_id="s1",
        expected_version=0,
    )


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"text": "a", "token_ids": [1]}, TypeError),
        ({"text": "a", "no_such_option": 1}, TypeError),
        ({"text": 1}, TypeError),
        ({"text": "a", "seed": -1}, ValueError),
        ({"text": "a", "criticality": "urgent"}, ValueError),
        ({"messages": [("robot", "a")]}, ValueError),
    ],
)
def test_options_that_fit_no_field_never_leave(
    script: Script, options: dict[str, object], error: type[Exception]
) -> None:
    """A mistake in calling the client is Python's own error, at the call."""
    with Client(script.address) as client, pytest.raises(error):
        client.generate(**options)  # type: ignore[arg-type]
    assert not script.seen


@both
def test_a_whole_generation_at_once(script: Script, kind: Kind) -> None:
    """generate_once gives choices in order, and the text of the first at hand."""
    script.answers["GenerateOnce"] = lambda _request, _context: pb.GenerateOnceResponse(
        request_id="r",
        seed=9,
        choices=[
            pb.Choice(index=1, text="b", finish_reason=pb.FINISH_REASON_LENGTH),
            pb.Choice(index=0, text="a", finish_reason=pb.FINISH_REASON_STOP, matched_stop=pb.MatchedStop(token_id=4)),
        ],
    )

    completion = kind(script.address).ask("generate_once", token_ids=[1, 2], n=2)

    assert isinstance(completion, pathfox.client.Completion)
    assert completion.text == "a"
    assert [choice.reason for choice in completion.choices] == [FinishReason.STOP, FinishReason.LENGTH]
    assert completion.choices[0].matched_stop == 4


def test_only_the_text(script: Script) -> None:
    """texts() leaves out everything else, in both kinds."""
    script.answers["Generate"] = answer

    async def collect() -> list[str]:
        async with AsyncClient(script.address) as client:
            return [text async for text in client.generate(text="x").texts()]

    with Client(script.address) as client:
        assert list(client.generate(text="x").texts()) == ["Pa", "ris"]
    assert asyncio.run(collect()) == ["Pa", "ris"]


def test_what_a_newer_server_says_does_not_break_an_old_client(script: Script) -> None:
    """Unknown events are left out, unknown reasons are UNKNOWN."""
    script.answers["Generate"] = lambda _request, _context: iter(
        [pb.GenerateResponse(), frame(finished=pb.Finished(finish_reason=99, durability=98))]  # type: ignore[arg-type]
    )

    (finished,) = Blocking(script.address).events(text="x")

    assert isinstance(finished, Finished)
    assert (finished.reason, finished.durability) == (FinishReason.UNKNOWN, pathfox.client.Durability.UNKNOWN)


def every_call() -> dict[str, tuple[tuple[object, ...], dict[str, object]]]:
    """Arguments for each method of a client that makes one unary call."""
    return {
        "generate_once": ((), {"text": "x"}),
        "cancel": (("r",), {}),
        "models": ((), {}),
        "model": (("m",), {}),
        "tokenize": ((), {"text": "x"}),
        "detokenize": (([1],), {}),
        "score": ((), {"token_ids": [1, 2], "criticality": "batch", "top_logprobs": 1}),
        "status": ((), {}),
        "drain": ((), {"grace_s": 1.5}),
        "set_traffic": (("m", {"m@1": 100}), {}),
        "replicas": ((), {}),
        "circuits": ((), {}),
        "reset_circuit": (("c",), {}),
    }


@both
def test_every_rpc_of_the_contract_has_a_method(script: Script, kind: Kind) -> None:
    """Nothing in the contract is out of a client's reach."""
    for name, (args, kwargs) in every_call().items():
        kind(script.address).ask(name, *args, **kwargs)
    kind(script.address).events("generate", text="x")
    kind(script.address).events("resume", "r", after={0: 4})
    with Client(script.address) as client, client.chat() as chat:
        list(chat.send("x"))

    assert {path for path, _ in script.seen} == set(METHODS)
    (resumed,) = script.requests("Resume")
    assert resumed == pb.ResumeRequest(request_id="r", cursors=[pb.ResumeCursor(index=0, after_sequence=4)])
    (drained,) = script.requests("Drain")
    assert isinstance(drained, admin_pb2.DrainRequest)
    assert drained.grace.ToMilliseconds() == 1500
    (scored,) = script.requests("Score")
    assert isinstance(scored, model_pb2.ScoreRequest)
    assert scored.criticality == pb.CRITICALITY_BATCH


def test_both_clients_have_the_same_methods_with_the_same_arguments() -> None:
    """The asyncio client is the blocking one, awaited."""

    def face(kind: type[object]) -> dict[str, list[str]]:
        found = inspect.getmembers(kind, inspect.isfunction)
        return {name: list(inspect.signature(method).parameters) for name, method in found if name[0] != "_"}

    assert face(Client) == face(AsyncClient)


def test_public_names_are_exactly_those_listed() -> None:
    """What is importable is what is promised."""
    public = {
        name for name, value in vars(pathfox.client).items() if not name.startswith("_") and not inspect.ismodule(value)
    }

    assert public == set(pathfox.client.__all__)
    assert len(pathfox.client.__all__) == len(public)


@both
def test_the_token_goes_with_every_call(script: Script, kind: Kind) -> None:
    """Unary calls and streams carry the bearer token."""
    tool = kind(script.address, token="s3cret")  # noqa: S106 (of this test)
    tool.ask("models")
    tool.events(text="x")

    assert [each.get("authorization") for each in script.metadata] == ["Bearer s3cret"] * 2


def detail_cases() -> dict[str, tuple[grpc.StatusCode, list[object], type[PathfoxError]]]:
    """Status code and details -> error."""
    info = error_details_pb2.ErrorInfo
    code = grpc.StatusCode
    return {
        "invalid": (code.INVALID_ARGUMENT, [info(reason="INVALID_REQUEST")], InvalidRequest),
        "context": (code.INVALID_ARGUMENT, [info(reason="CONTEXT_LENGTH")], ContextLengthExceeded),
        "idempotency": (code.INVALID_ARGUMENT, [info(reason="IDEMPOTENCY_MISMATCH")], IdempotencyMismatch),
        "not found": (code.NOT_FOUND, [], NotFound),
        "precondition": (code.FAILED_PRECONDITION, [], pathfox.client.FailedPrecondition),
        "conflict": (code.ABORTED, [info(metadata={"current_version": "4"})], Conflict),
        "unauthenticated": (code.UNAUTHENTICATED, [], Unauthenticated),
        "denied": (code.PERMISSION_DENIED, [], PermissionDenied),
        "overloaded": (code.RESOURCE_EXHAUSTED, [], Overloaded),
        "unavailable": (code.UNAVAILABLE, [], Unavailable),
        "deadline": (code.DEADLINE_EXCEEDED, [], DeadlineExceeded),
        "cancelled": (code.CANCELLED, [], Cancelled),
        "unsupported": (code.UNIMPLEMENTED, [], NotSupported),
        "internal": (code.INTERNAL, [], Internal),
        "unknown": (code.UNKNOWN, [], Internal),
        "misleading reason": (code.INTERNAL, [info(reason="CONTEXT_LENGTH")], Internal),
    }


@both
@pytest.mark.parametrize("case", detail_cases())
def test_each_status_is_an_error_of_its_own(script: Script, kind: Kind, case: str) -> None:
    """Code and details choose the class; code, message and request id stay at hand."""
    code, details, error = detail_cases()[case]
    script.answers["GenerateOnce"] = script.answers["Generate"] = lambda _request, context: fail(
        context,
        code,
        "why",
        *details,  # type: ignore[arg-type]
    )
    tool = kind(script.address, retry=Retry(max_attempts=1))

    for call in (lambda: tool.ask("generate_once", text="x"), lambda: tool.events(text="x")):
        with pytest.raises(error) as caught:
            call()
        assert type(caught.value) is error
        assert (caught.value.code, caught.value.message, caught.value.request_id) == (code, "why", "call-1")


def failure_with(script: Script, code: grpc.StatusCode, *details: object) -> PathfoxError:
    """Return the error that a client makes of a status."""
    script.answers["Generate"] = lambda _request, context: fail(context, code, "why", *details)  # type: ignore[arg-type]
    with pytest.raises(PathfoxError) as caught:
        Blocking(script.address, retry=Retry(max_attempts=1)).events(text="x")
    return caught.value


def test_errors_carry_the_facts_of_their_details(script: Script) -> None:
    """Fields, limits, names, versions and times are attributes."""
    fields = [error_details_pb2.BadRequest.FieldViolation(field="sampling_params.top_p", description="got 2")]
    context = error_details_pb2.ErrorInfo(reason="CONTEXT_LENGTH", metadata={"limit": "8", "prompt_tokens": "9"})
    resource = error_details_pb2.ResourceInfo(resource_type="model", resource_name="x")
    version = error_details_pb2.ErrorInfo(reason="CONFLICT", metadata={"current_version": "4"})

    invalid = failure_with(
        script, grpc.StatusCode.INVALID_ARGUMENT, error_details_pb2.BadRequest(field_violations=fields), context
    )
    missing = failure_with(script, grpc.StatusCode.NOT_FOUND, resource)
    conflict = failure_with(script, grpc.StatusCode.ABORTED, version)
    overloaded = failure_with(script, grpc.StatusCode.RESOURCE_EXHAUSTED, retry_info(2.5))

    assert isinstance(invalid, ContextLengthExceeded)
    assert invalid.violations == (Violation("sampling_params.top_p", "got 2"),)
    assert (invalid.limit, invalid.prompt_tokens) == (8, 9)
    assert isinstance(missing, NotFound)
    assert (missing.resource, missing.name) == ("model", "x")
    assert isinstance(conflict, Conflict)
    assert conflict.current_version == 4
    assert isinstance(overloaded, Overloaded)
    assert overloaded.retry_after_s == 2.5


@both
def test_nobody_listening_is_unavailable(kind: Kind) -> None:
    """A connection that cannot be made is the same error as a server that says so."""
    with pytest.raises(Unavailable) as caught:
        kind("127.0.0.1:1", retry=Retry(max_attempts=1)).ask("models")
    assert (caught.value.retry_after_s, caught.value.request_id) == (None, "")


@both
def test_the_deadline_ends_a_stream(script: Script, kind: Kind) -> None:
    """timeout_s holds in mid-stream too."""
    script.answers["Generate"] = endless

    with pytest.raises(DeadlineExceeded):
        kind(script.address).events(text="x", timeout_s=0.3)
    assert script.ended.wait(WAIT_S)
