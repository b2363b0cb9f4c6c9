import asyncio
import hashlib
import json
import urllib.request
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
import structlog
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from grpc_reflection.v1alpha import reflection_pb2

from pathfox.v1 import admin_pb2, model_pb2
from pathfox.v1 import generation_pb2 as pb
from server import telemetry
from server.config import ServerConfig
from server.errors import ConfigError, StartupError
from server.frontend.server import check_exposure, read_tls
from server.messages import Load
from tests.fixtures.front_ends import CONTEXT_LENGTH, failing, ids, rambling, read, saying, served, serving, text_of

TOKEN = "tomato"  # noqa: S105 not a secret


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    """Make the metadata of a bearer token."""
    return (("authorization", f"Bearer {token}"),)


@pytest.fixture
def credentials(tmp_path: Path) -> Path:
    """Return a file with an administrator's and two users' tokens."""
    path = tmp_path / "tokens.jsonl"
    entries = [
        {"sha256": hashlib.sha256(b"boss").hexdigest(), "tenant": "ops", "role": "admin"},
        {"blake2b": hashlib.blake2b(TOKEN.encode()).hexdigest(), "tenant": "acme", "role": "user"},
        {"sha256": hashlib.sha256(b"other").hexdigest(), "tenant": "other"},
    ]
    path.write_text("\n".join(json.dumps(entry) for entry in entries))
    return path


def fetch(url: str) -> str:
    """Get a page."""
    with urllib.request.urlopen(url) as page:  # noqa: S310 our own
        text: str = page.read().decode()
        return text


class TestCredentials:
    """Who may call what."""

    async def test_tokens_and_roles(self, credentials: Path) -> None:
        """No token and a bad one are UNAUTHENTICATED, a user's at AdminService PERMISSION_DENIED; probes need none."""
        async with serving(served(saying("x")), options={"server.credentials_file": str(credentials)}) as world:
            request = pb.GenerateRequest(text="x")
            for metadata in ((), bearer("nope"), (("authorization", "Basic x"),)):
                failure = await failing(world.generation.Generate(request, metadata=metadata))
                assert failure.code is grpc.StatusCode.UNAUTHENTICATED
                assert failure.details["ErrorInfo"].domain == "pathfox"
            assert text_of(await read(world.generation.Generate(request, metadata=bearer(TOKEN)))) == "x"
            status = admin_pb2.GetStatusRequest()
            denied = await failing(world.admin.GetStatus(status, metadata=bearer(TOKEN)))
            assert denied.code is grpc.StatusCode.PERMISSION_DENIED
            assert (await world.admin.GetStatus(status, metadata=bearer("boss"))).version
            check = world.channel.unary_unary("/grpc.health.v1.Health/Check")
            assert await check(b"") == b"\x08\x01"

    async def test_the_tenant_comes_from_the_token(self, credentials: Path) -> None:
        """Tenants have salts of their own, and cannot cancel each other's requests."""
        source = rambling(tokens_per_s=100)
        request = pb.GenerateRequest(text="x", request_id="6d482b09-8101-43b7-9de7-b9bb9504bd74")
        async with serving(served(source), options={"server.credentials_file": str(credentials)}) as world:
            mine = world.generation.Generate(request, metadata=bearer(TOKEN))
            theirs = world.generation.Generate(request, metadata=bearer("other"))
            await mine.read()
            await theirs.read()
            cancel = pb.CancelRequest(request_id=request.request_id)
            assert not (await world.generation.Cancel(cancel, metadata=bearer("boss"))).cancelled
            assert (await world.generation.Cancel(cancel, metadata=bearer("other"))).cancelled
            assert (await read(theirs))[-1].finished.finish_reason == pb.FINISH_REASON_CANCELLED
            assert (await mine.read()).delta.text
            mine.cancel()

        assert len({each.cache_salt for each in source.requests}) == 2

    @pytest.mark.parametrize(
        "text",
        ["", "{", '{"sha256": "00", "tenant": "a"}', '{"tenant": "a"}', '{"sha256": "zz", "tenant": "a"}', "[1]", "1"],
    )
    async def test_a_bad_file_stops_the_start(self, tmp_path: Path, text: str) -> None:
        """A file that cannot be used is named."""
        path = tmp_path / "tokens.jsonl"
        path.write_text(text)
        with pytest.raises(ConfigError, match=str(path)):
            async with serving(served(saying("x")), options={"server.credentials_file": str(path)}):
                pass


class TestExposure:
    """Nothing is reachable by accident."""

    @pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])  # noqa: S104 refused
    def test_beyond_loopback_needs_tls_and_credentials(self, host: str) -> None:
        """The refusal names what to set; --insecure and full settings are let through."""
        with pytest.raises(StartupError, match=r"server\.tls_certificate_file.*credentials_file.*--insecure"):
            check_exposure(ServerConfig(host=host))
        check_exposure(ServerConfig(host=host, insecure=True))
        full = {"tls_certificate_file": "c", "tls_key_file": "k", "credentials_file": "f"}
        check_exposure(ServerConfig(host=host, **full))  # type: ignore[arg-type] # pydantic reads paths

    def test_tls_files_must_be_there(self, tmp_path: Path) -> None:
        """A missing or half-set pair is a start-up error with its name."""
        with pytest.raises(StartupError, match="both"):
            read_tls(ServerConfig(tls_key_file=tmp_path / "k"))
        with pytest.raises(StartupError, match="nowhere"):
            read_tls(ServerConfig(tls_key_file=tmp_path / "nowhere", tls_certificate_file=tmp_path / "c"))

    async def test_a_taken_port_is_named(self) -> None:
        """Two servers cannot share a port without knowing."""
        async with serving(served(saying("x"))) as world:
            with pytest.raises(StartupError, match=str(world.front_end.port)):
                async with serving(served(saying("x")), options={"server.port": world.front_end.port}):
                    pass


class TestModels:
    """ModelService."""

    async def test_describes_models(self) -> None:
        """A model's facts, limits, tokenizer and defaults are listed."""
        async with serving(served(saying("x")), served(saying("y"), name="bare", has_text=False)) as world:
            listed = (await world.models.ListModels(model_pb2.ListModelsRequest())).models
            one = (await world.models.GetModel(model_pb2.GetModelRequest(model="m-alias"))).model

        assert [model.name for model in listed] == ["m", "bare"]
        assert one == listed[0]
        assert one.generation_defaults.top_k == 7
        assert one.tokenizer.has_chat_template
        assert not listed[1].HasField("tokenizer")

    async def test_tokenizes_both_ways(self) -> None:
        """Text and messages become the ids that Generate uses, and ids become text again."""
        async with serving(served(saying("x")), served(saying("y"), name="bare", has_text=False)) as world:
            answer = await world.models.Tokenize(model_pb2.TokenizeRequest(text="añ"))
            assert list(answer.token_ids) == ids("añ")
            assert list(answer.tokens) == ["a", "", ""]
            back = await world.models.Detokenize(model_pb2.DetokenizeRequest(token_ids=answer.token_ids))
            assert back.text == "añ"
            message = pb.Messages(messages=[pb.Message(role=pb.ROLE_USER, content="q")])
            templated = await world.models.Tokenize(model_pb2.TokenizeRequest(messages=message))
            text = await world.models.Detokenize(model_pb2.DetokenizeRequest(token_ids=templated.token_ids))
            assert text.text == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
            for request in (model_pb2.TokenizeRequest(), model_pb2.TokenizeRequest(messages=pb.Messages())):
                assert (await failing(world.models.Tokenize(request))).code is grpc.StatusCode.INVALID_ARGUMENT
            wrong = await failing(world.models.Detokenize(model_pb2.DetokenizeRequest(token_ids=[-1])))
            assert wrong.fields == ["token_ids[0]"]
            bare = await failing(world.models.Tokenize(model_pb2.TokenizeRequest(model="bare", text="x")))
            assert bare.code is grpc.StatusCode.FAILED_PRECONDITION

    async def test_bounds_what_one_caller_can_ask(self) -> None:
        """Too many tokens, too many ids and too large a reply are refused by their number, with the limit."""
        limits = {"server.max_message_bytes": 4096}
        huge = pb.TokenIds(ids=[-1] * (5 * CONTEXT_LENGTH))
        async with serving(served(saying("x"))) as world:
            for call, field in (
                (world.models.Tokenize(model_pb2.TokenizeRequest(text="y" * (5 * CONTEXT_LENGTH))), "input"),
                (world.models.Detokenize(model_pb2.DetokenizeRequest(token_ids=huge.ids)), "token_ids"),
                (world.models.Score(model_pb2.ScoreRequest(token_ids=huge)), "input"),
                (world.generation.Generate(pb.GenerateRequest(token_ids=huge)), "input"),
            ):
                failure = await failing(call)
                assert failure.code is grpc.StatusCode.INVALID_ARGUMENT
                assert failure.fields == [field]
                assert str(5 * CONTEXT_LENGTH) in failure.message
        async with serving(served(saying("x")), options=limits) as world:
            most = await world.models.Tokenize(model_pb2.TokenizeRequest(text="y" * 256))
            assert len(most.token_ids) == 256
            over = await failing(world.models.Tokenize(model_pb2.TokenizeRequest(text="y" * 257)))
            assert over.fields == ["input"]
            long = pb.TokenIds(ids=ids("<|im_start|>") * 256)
            marks = await world.models.Detokenize(model_pb2.DetokenizeRequest(token_ids=long.ids))
            assert len(marks.text) == 256 * len("<|im_start|>")
            wide = await failing(world.models.Tokenize(model_pb2.TokenizeRequest(text="<|im_start|>" * 256)))
            assert wide.fields == ["input"]
            assert "bytes" in wide.message

    @pytest.mark.parametrize("name", ["encode", "decode"])
    async def test_text_work_is_bounded_as_that_of_generations(
        self, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Who tokenises counts among the requests that are being prepared."""
        go = asyncio.Event()
        async with serving(served(saying("x")), options={"server.max_preparing_requests": 1}) as world:
            prompts = world.front_end.generations.prompts
            work: Callable[..., Awaitable[Any]] = getattr(prompts, name)
            begun = asyncio.Event()

            async def slowly(*arguments: object, **options: object) -> object:
                begun.set()
                await go.wait()
                return await work(*arguments, **options)

            monkeypatch.setattr(prompts, name, slowly)
            tokenize, text = world.models.Tokenize, model_pb2.TokenizeRequest(text="x")
            detokenize, token_ids = world.models.Detokenize, model_pb2.DetokenizeRequest(token_ids=[1])
            call = tokenize(text) if name == "encode" else detokenize(token_ids)
            await begun.wait()
            try:
                for other in (
                    tokenize(text),
                    detokenize(token_ids),
                    world.generation.Generate(pb.GenerateRequest(text="x")),
                ):
                    failure = await failing(other)
                    assert failure.code is grpc.StatusCode.RESOURCE_EXHAUSTED
                    assert failure.trailers["grpc-retry-pushback-ms"]
            finally:
                go.set()
            await call

    async def test_scores(self) -> None:
        """One log probability for each token after the first; nothing is generated."""
        source = saying("x")
        async with serving(served(source)) as world:
            answer = await world.models.Score(model_pb2.ScoreRequest(text="abcd", top_logprobs=2))
            assert list(answer.token_ids) == ids("abcd")
            assert len(answer.logprobs) == len(answer.tokens) == 3
            assert source.requests[0].sampling.max_tokens == 0
            assert source.requests[0].sampling.prompt_logprobs == 2
            plain = await world.models.Score(model_pb2.ScoreRequest(token_ids=pb.TokenIds(ids=[1, 2])))
            assert (len(plain.logprobs), len(plain.tokens)) == (1, 0)
            for request, field in (
                (model_pb2.ScoreRequest(), "input"),
                (model_pb2.ScoreRequest(text="a"), "input"),
                (model_pb2.ScoreRequest(text="ab", top_logprobs=21), "top_logprobs"),
                (model_pb2.ScoreRequest(text="y" * 5000), "input"),
            ):
                failure = await failing(world.models.Score(request))
                assert failure.fields == [field]


class TestAdmin:
    """AdminService."""

    async def test_status_and_lists(self) -> None:
        """Load, limits and the engines in this process are shown; what there is not is refused or empty."""
        load = Load(running_requests=1, queued_tokens=5, total_pages=9)
        async with serving(served(saying("x"), load=lambda: load)) as world:
            status = await world.admin.GetStatus(admin_pb2.GetStatusRequest())
            assert status.engines[0].queued_tokens == 5
            assert [each.criticality for each in status.bulkheads] == ["CRITICAL", "DEFAULT", "BATCH", "SHEDDABLE"]
            assert not status.is_draining
            replicas = (await world.admin.ListReplicas(admin_pb2.ListReplicasRequest())).replicas
            assert [replica.model_version for replica in replicas] == ["m@1"]
            assert not (await world.admin.ListCircuits(admin_pb2.ListCircuitsRequest())).circuits
            missing = await failing(world.admin.ResetCircuit(admin_pb2.ResetCircuitRequest(name="c")))
            assert missing.code is grpc.StatusCode.NOT_FOUND
            refused = await failing(world.admin.SetTraffic(admin_pb2.SetTrafficRequest()))
            assert refused.code is grpc.StatusCode.UNIMPLEMENTED


class TestObserved:
    """What a call leaves behind."""

    async def test_one_log_line_without_prompt_text(self) -> None:
        """Each call is one INFO line with facts; neither prompt, answer nor metadata values are in it."""
        request = pb.GenerateRequest(text="my secret", metadata={"key": "hidden"})
        async with serving(served(saying("the answer"))) as world:
            with structlog.testing.capture_logs() as lines:
                await read(world.generation.Generate(request, metadata=(("x-request-id", "call-7"),)))
                await failing(world.generation.Generate(pb.GenerateRequest(text="x", request_id="my secret")))
                await world.settle()

        finished = [line for line in lines if line["event"] == telemetry.RPC_FINISHED]
        assert [line["log_level"] for line in finished] == ["info", "info"]
        assert finished[0]["request_id"] == "call-7"
        assert finished[0]["completion_tokens"] == len("the answer")
        assert finished[0]["finish_reasons"] == ["STOP"]
        assert finished[1]["fields"] == ["request_id"]
        assert not any(word in str(lines) for word in ("my secret", "the answer", "hidden"))
        assert {line["event"] for line in lines} <= telemetry.EVENTS

    async def test_request_ids_come_back(self) -> None:
        """A caller's id is returned; one that is no id is replaced; a request's own id stands for a missing one."""
        async with serving(served(saying("x"))) as world:

            async def trailer(request: pb.GenerateRequest, *metadata: tuple[str, str]) -> Any:  # noqa: ANN401
                call = world.generation.GenerateOnce(request, metadata=metadata)
                await call
                return dict(await call.trailing_metadata())["x-request-id"]

            own = "6d482b09-8101-43b7-9de7-b9bb9504bd74"
            plain = pb.GenerateRequest(text="x")
            assert await trailer(plain, ("x-request-id", "mine")) == "mine"
            assert len(await trailer(plain, ("x-request-id", "x" * 500))) == 36
            assert await trailer(pb.GenerateRequest(text="x", request_id=own)) == own

    async def test_a_trace_goes_on(self) -> None:
        """A caller's traceparent reaches the source; nonsense does not."""
        source = saying("x")
        parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
        async with serving(served(source)) as world:
            for value in (parent, "nonsense"):
                metadata = (("traceparent", value),)
                await read(world.generation.Generate(pb.GenerateRequest(text="x"), metadata=metadata))

        assert [each.trace_parent for each in source.requests] == [parent, None]

    async def test_prometheus_reads_metrics(self) -> None:
        """The endpoint shows what dashboards ask for, and goes with the server; the registry keeps no event loop."""
        options = {"telemetry.metrics_port": 0}
        async with serving(served(saying("x"), load=lambda: Load(waiting_requests=3)), options=options) as world:
            await read(world.generation.Generate(pb.GenerateRequest(text="x")))
            await world.settle()
            url = f"http://127.0.0.1:{world.front_end.metrics_port}/metrics"
            text = await asyncio.to_thread(fetch, url)

        left = telemetry.REGISTRY.get_sample_value("pathfox_event_loop_tasks")

        assert 'pathfox_num_requests_waiting{model="m@1"} 3.0' in text
        assert "\npathfox_event_loop_tasks 0.0" not in text
        assert left == 0
        assert "pathfox_time_to_first_token_seconds_bucket" in text
        assert 'pathfox_request_success_total{finished_reason="STOP",model="m"}' in text


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_reflection_alone_is_enough_to_stream(version: str) -> None:
    """A client without stubs learns the contract from the server, and streams tokens with it."""
    async with serving(served(saying("hello"))) as world:
        ask = world.channel.stream_stream(
            f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )

        async def asked(**fields: str) -> Any:  # noqa: ANN401 a message without types
            call = ask(iter([reflection_pb2.ServerReflectionRequest(**fields)]))
            return (await read(call))[0]

        services = [each.name for each in (await asked(list_services="")).list_services_response.service]
        assert "pathfox.v1.GenerationService" in services
        pool = descriptor_pool.DescriptorPool()
        for service in services:
            answer = await asked(file_containing_symbol=service)
            files = [
                descriptor_pb2.FileDescriptorProto.FromString(data)
                for data in answer.file_descriptor_response.file_descriptor_proto
            ]
            assert files, service
            for file in reversed(files):
                pool.Add(file)
        method = pool.FindServiceByName("pathfox.v1.GenerationService").FindMethodByName("Generate")
        request_class = message_factory.GetMessageClass(method.input_type)
        response_class = message_factory.GetMessageClass(method.output_type)
        generate = world.channel.unary_stream(
            f"/{method.containing_service.full_name}/{method.name}",
            request_serializer=request_class.SerializeToString,
            response_deserializer=response_class.FromString,
        )
        frames = await read(generate(request_class(text="hi")))

        assert "".join(frame.delta.text for frame in frames) == "hello"
