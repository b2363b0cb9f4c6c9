import asyncio
import math

import grpc
import pytest
import structlog

from pathfox.v1 import generation_pb2 as pb
from pathfox.v1 import model_pb2
from server import telemetry
from server.engine.scripted import Fault, FaultKind
from tests.fixtures.front_ends import (
    CHATML,
    CONTEXT_LENGTH,
    TOKENIZER,
    World,
    failing,
    rambling,
    read,
    saying,
    served,
    serving,
    text_of,
)

INT32_MAX = 2**31 - 1


def params(**values: object) -> pb.GenerateRequest:
    """Make a request with these sampling parameters."""
    return pb.GenerateRequest(text="hi", sampling_params=pb.SamplingParams(**values))


def messages(*pairs: tuple[int, str]) -> pb.GenerateRequest:
    """Make a request of these messages."""
    return pb.GenerateRequest(
        messages=pb.Messages(messages=[pb.Message(role=role, content=content) for role, content in pairs])
    )


BAD_FIELDS: list[tuple[str, pb.GenerateRequest]] = [
    ("input", pb.GenerateRequest()),
    ("text", pb.GenerateRequest(text="")),
    ("messages.messages", messages()),
    ("messages.messages", messages((pb.ROLE_SYSTEM, "only"))),
    ("messages.messages", messages((pb.ROLE_USER, ""))),
    ("messages.messages", messages(*[(99, "")] * 20_000)),
    ("messages.messages[0].role", messages((99, "x"), (pb.ROLE_USER, "y"))),
    ("messages.messages[0].role", messages((pb.ROLE_UNSPECIFIED, "x"), (pb.ROLE_USER, "y"))),
    ("token_ids.ids", pb.GenerateRequest(token_ids=pb.TokenIds())),
    ("token_ids.ids[1]", pb.GenerateRequest(token_ids=pb.TokenIds(ids=[0, TOKENIZER.vocabulary_size]))),
    ("token_ids.ids[0]", pb.GenerateRequest(token_ids=pb.TokenIds(ids=[-1]))),
    ("sampling_params.max_tokens", params(max_tokens=0)),
    ("sampling_params.max_tokens", params(max_tokens=-1)),
    ("sampling_params.max_tokens", params(max_tokens=INT32_MAX)),
    ("sampling_params.temperature", params(temperature=math.nan)),
    ("sampling_params.temperature", params(temperature=math.inf)),
    ("sampling_params.temperature", params(temperature=-0.1)),
    ("sampling_params.temperature", params(temperature=1e30)),
    ("sampling_params.top_p", params(top_p=0.0)),
    ("sampling_params.top_p", params(top_p=1.5)),
    ("sampling_params.top_p", params(top_p=math.nan)),
    ("sampling_params.top_k", params(top_k=-1)),
    ("sampling_params.min_p", params(min_p=-math.inf)),
    ("sampling_params.repetition_penalty", params(repetition_penalty=0.0)),
    ("sampling_params.repetition_penalty", params(repetition_penalty=math.inf)),
    ("sampling_params.repetition_penalty", params(repetition_penalty=math.nan)),
    ("sampling_params.repetition_penalty", params(repetition_penalty=1e-39)),
    ("sampling_params.repetition_penalty", params(repetition_penalty=1e30)),
    ("sampling_params.presence_penalty", params(presence_penalty=2.5)),
    ("sampling_params.frequency_penalty", params(frequency_penalty=math.nan)),
    ("sampling_params.min_tokens", params(min_tokens=11, max_tokens=10)),
    ("sampling_params.stop", params(stop=["x"] * 10_000)),
    ("sampling_params.stop[1]", params(stop=["x", ""])),
    ("sampling_params.stop[0]", params(stop=["x" * 257])),
    ("sampling_params.stop_token_ids[0]", params(stop_token_ids=[1_000_000])),
    ("sampling_params.stop_token_ids", params(stop_token_ids=[1] * 300)),
    ("sampling_params.logit_bias[5]", params(logit_bias={5: math.nan})),
    ("sampling_params.logit_bias[5]", params(logit_bias={5: 101.0})),
    ("sampling_params.logit_bias[-5]", params(logit_bias={-5: 1.0})),
    ("sampling_params.logit_bias", params(logit_bias=dict.fromkeys(range(2000), 1.0))),
    ("sampling_params.logprobs", params(logprobs=21)),
    ("sampling_params.prompt_logprobs", params(prompt_logprobs=-1)),
    ("sampling_params.n", params(n=0)),
    ("sampling_params.n", params(n=17)),
    ("request_id", pb.GenerateRequest(text="x", request_id="not-a-uuid")),
    ("request_id", pb.GenerateRequest(text="x", request_id="")),
    ("criticality", pb.GenerateRequest(text="x", criticality=77)),
    ("consistency", pb.GenerateRequest(text="x", consistency=77)),
    ("time_to_first_token_budget_ms", pb.GenerateRequest(text="x", time_to_first_token_budget_ms=-5)),
    ("idempotency_key", pb.GenerateRequest(text="x", idempotency_key="a b")),
    ("metadata", pb.GenerateRequest(text="x", metadata={str(n): "" for n in range(17)})),
    ("metadata[k]", pb.GenerateRequest(text="x", metadata={"k": "v" * 513})),
]


async def test_each_wrong_field_is_named_and_the_server_goes_on() -> None:
    """Every wrong value gets INVALID_ARGUMENT with its field; afterwards a good request is served."""
    async with serving(served(saying("fine"))) as world:
        for field, request in BAD_FIELDS:
            failure = await failing(world.generation.Generate(request))

            assert failure.code is grpc.StatusCode.INVALID_ARGUMENT, (field, failure)
            assert failure.fields == [field], failure.message
            assert failure.trailers["x-request-id"]
        assert text_of(await read(world.generation.Generate(pb.GenerateRequest(text="x")))) == "fine"


async def test_all_wrong_fields_are_named_at_once() -> None:
    """A client sees all of its mistakes in one answer."""
    request = params(temperature=-1.0, top_p=2.0, n=99, stop=[""] * 3, stop_token_ids=[-1])
    request.text = ""
    async with serving(served(saying("x"))) as world:
        failure = await failing(world.generation.GenerateOnce(request))

    assert set(failure.fields) == {
        "text",
        "sampling_params.temperature",
        "sampling_params.top_p",
        "sampling_params.n",
        "sampling_params.stop[0]",
        "sampling_params.stop[1]",
        "sampling_params.stop[2]",
        "sampling_params.stop_token_ids[0]",
    }


async def test_a_thousand_wrong_fields_still_arrive() -> None:
    """Trailers have a limit; violations are cut to it instead of being lost."""
    request = params(logit_bias=dict.fromkeys(range(1000), 1000.0))
    async with serving(served(saying("x"))) as world:
        failure = await failing(world.generation.Generate(request))

    assert failure.code is grpc.StatusCode.INVALID_ARGUMENT
    assert "more" in failure.details["BadRequest"].field_violations[-1].description


async def test_a_prompt_over_the_context() -> None:
    """The figures that decided are in the details."""
    async with serving(served(saying("x"))) as world:
        failure = await failing(world.generation.Generate(pb.GenerateRequest(text="y" * CONTEXT_LENGTH)))

        assert failure.code is grpc.StatusCode.INVALID_ARGUMENT
        assert failure.details["ErrorInfo"].reason == "CONTEXT_LENGTH"
        assert dict(failure.details["ErrorInfo"].metadata) == {
            "limit": str(CONTEXT_LENGTH),
            "prompt_tokens": str(CONTEXT_LENGTH),
        }
        assert failure.fields == ["input"]


async def test_a_prompt_far_over_the_context_is_not_tokenised(monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot fit however it is cut is refused by its length, and the error says that it is a lower bound."""
    longest = TOKENIZER.longest_token_bytes
    assert longest is not None
    text = "y" * (CONTEXT_LENGTH * longest + 1)
    model = served(saying("x"))
    monkeypatch.setattr(TOKENIZER, "encode", lambda *_args, **_options: pytest.fail("tokenised"))
    async with serving(model) as world:
        for request in (pb.GenerateRequest(text=text), messages((pb.ROLE_USER, text))):
            failure = await failing(world.generation.Generate(request))

            assert failure.code is grpc.StatusCode.INVALID_ARGUMENT
            assert failure.details["ErrorInfo"].reason == "CONTEXT_LENGTH"
            assert int(failure.details["ErrorInfo"].metadata["prompt_tokens"]) > CONTEXT_LENGTH
            assert failure.fields == ["input"]
            assert "at least" in failure.message


async def test_unknown_model() -> None:
    """NOT_FOUND names the resource and those that there are."""
    async with serving(served(saying("x"))) as world:
        failure = await failing(world.generation.Generate(pb.GenerateRequest(text="x", model="nope")))
        other = await failing(world.models.GetModel(model_pb2.GetModelRequest(model="m@9")))

    assert failure.code is other.code is grpc.StatusCode.NOT_FOUND
    assert failure.details["ResourceInfo"].resource_name == "nope"
    assert "served: m" in failure.message


@pytest.mark.parametrize(
    "request_",
    [
        pb.GenerateRequest(text="x", session_id="s"),
        pb.GenerateRequest(text="x", expected_version=0),
        pb.GenerateRequest(text="x", parent_turn_id="t"),
        pb.GenerateRequest(text="x", consistency=pb.CONSISTENCY_AVAILABLE),
        pb.GenerateRequest(text="x", idempotency_key="key"),
    ],
)
async def test_what_needs_a_store_is_refused(request_: pb.GenerateRequest) -> None:
    """A promise that cannot be kept is refused instead of being ignored."""
    async with serving(served(saying("x"))) as world:
        failure = await failing(world.generation.Generate(request_))

    assert failure.code is grpc.StatusCode.UNIMPLEMENTED
    assert "no store" in failure.message


async def test_an_idempotency_key_in_the_metadata_is_refused_too() -> None:
    """The key means the same wherever it is."""
    async with serving(served(saying("x"))) as world:
        call = world.generation.Generate(pb.GenerateRequest(text="x"), metadata=(("idempotency-key", "k"),))

        assert (await failing(call)).code is grpc.StatusCode.UNIMPLEMENTED
        assert (await failing(world.generation.Resume(pb.ResumeRequest()))).code is grpc.StatusCode.UNIMPLEMENTED


async def test_bytes_that_are_no_message() -> None:
    """What cannot be parsed is the caller's mistake, with details, in unary and in streams."""
    async with serving(served(saying("x"))) as world:
        for method in ("Generate", "GenerateOnce", "Chat"):
            path = f"/pathfox.v1.GenerationService/{method}"
            if method == "Chat":
                failure = await failing(world.channel.stream_stream(path)(iter([b"\xff\xff\xff"])))
            elif method == "Generate":
                failure = await failing(world.channel.unary_stream(path)(b"\xff\xff\xff"))
            else:
                failure = await failing(world.channel.unary_unary(path)(b"\xff\xff\xff"))
            assert failure.code is grpc.StatusCode.INVALID_ARGUMENT, failure
        # A string that is not UTF-8: field 3, length 1.
        invalid = await failing(
            world.channel.unary_unary("/pathfox.v1.GenerationService/GenerateOnce")(b"\x1a\x01\xff")
        )
        assert invalid.code is grpc.StatusCode.INVALID_ARGUMENT
        unknown = await failing(world.channel.unary_unary("/pathfox.v1.GenerationService/Nothing")(b""))
        assert unknown.code is grpc.StatusCode.UNIMPLEMENTED


async def test_a_message_of_100_megabytes() -> None:
    """Grpc itself refuses it; the server goes on."""
    async with serving(served(saying("fine"))) as world:
        failure = await failing(world.generation.Generate(pb.GenerateRequest(text="x" * 100_000_000)))

        assert failure.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert text_of(await read(world.generation.Generate(pb.GenerateRequest(text="x")))) == "fine"


async def test_a_thousand_connections_that_send_nothing() -> None:
    """Idle connections cost sockets only; a new one is served beside them."""
    async with serving(served(saying("fine"))) as world:
        writers = []
        for _ in range(1000):
            _, writer = await asyncio.open_connection("127.0.0.1", world.front_end.port)
            writers.append(writer)
        async with grpc.aio.insecure_channel(world.address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            fresh = World(world.front_end, channel)
            assert text_of(await read(fresh.generation.Generate(pb.GenerateRequest(text="x")))) == "fine"
        for writer in writers:
            writer.close()
        await asyncio.gather(*(writer.wait_closed() for writer in writers), return_exceptions=True)


async def test_a_template_that_loops_is_stopped() -> None:
    """A template cannot hold the server: its request fails, others are served meanwhile."""
    looping = CHATML + "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    async with serving(served(saying("x"), template=looping), served(saying("fine"), name="other")) as world:
        stuck = asyncio.create_task(failing(world.generation.Generate(messages((pb.ROLE_USER, "x")))))
        frames = await read(world.generation.Generate(pb.GenerateRequest(text="x", model="other")))
        failure = await stuck

    assert text_of(frames) == "fine"
    assert failure.code is grpc.StatusCode.FAILED_PRECONDITION


async def test_a_bug_says_internal_and_nothing_else() -> None:
    """An unknown exception is INTERNAL with the request's id; its traceback is logged once, and never sent."""
    source = rambling()
    model = served(source)

    def broken(_seed: int, _index: int, position: int) -> int:
        if position == 3:
            raise RuntimeError("the secret word")
        return 65

    source._script = broken
    with structlog.testing.capture_logs() as lines:
        async with serving(model) as world:
            failure = await failing(world.generation.Generate(pb.GenerateRequest(text="x")))

    assert failure.code is grpc.StatusCode.INTERNAL
    assert [line["event"] for line in lines if line.get("exc_info")] == [telemetry.RPC_CRASHED]
    assert failure.details["ErrorInfo"].metadata["request_id"] == failure.trailers["x-request-id"]
    assert "secret" not in str(failure)


async def test_a_lost_source_is_unavailable() -> None:
    """A source that breaks off in mid-stream ends with UNAVAILABLE and a time to come back."""
    source = rambling(faults=[Fault(FaultKind.LOST, after_tokens=3), Fault(FaultKind.REFUSE)])
    async with serving(served(source)) as world:
        lost = await failing(world.generation.Generate(pb.GenerateRequest(text="x")))
        refused = await failing(world.generation.Generate(pb.GenerateRequest(text="x")))

    assert lost.code is grpc.StatusCode.UNAVAILABLE
    assert lost.details["RetryInfo"].retry_delay.ToMilliseconds() >= 1000
    assert refused.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert refused.details["QuotaFailure"].violations[0].subject == "SCRIPT"
