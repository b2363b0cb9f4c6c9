from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc.aio
import pytest

from pathfox.foreign import vllm_engine_pb2 as pb
from pathfox.foreign import vllm_engine_pb2_grpc
from server.cli.bench.connection import connect
from server.cli.bench.recording import Usage
from server.cli.bench.target import Ask, CallFailed, Heard, Served
from server.cli.bench.vllm import VllmTarget
from server.errors import ConfigError
from tests.fixtures.front_ends import TOKENIZER

ASK = Ask(prompt=[5, 6, 7], max_tokens=4, temperature=0.5, seed=(1 << 62) + 9, ignore_eos=True)
CHUNKS = ([11], [12, 13], [14])


class Engine(vllm_engine_pb2_grpc.VllmEngineServicer):
    """Answers every request with three chunks, as vLLM's servicer does; fails when told to."""

    def __init__(self) -> None:
        self.requests: list[pb.GenerateRequest] = []
        self.is_broken = False

    async def GetModelInfo(  # noqa: N802 the proto's name
        self, _request: pb.GetModelInfoRequest, _context: object
    ) -> pb.GetModelInfoResponse:
        return pb.GetModelInfoResponse(model_path="/models/x", max_context_length=2048, vocab_size=1000)

    async def Generate(  # noqa: N802 the proto's name
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext[pb.GenerateRequest, pb.GenerateResponse]
    ) -> AsyncIterator[pb.GenerateResponse]:
        self.requests.append(request)
        for chunk in CHUNKS:
            yield pb.GenerateResponse(chunk=pb.GenerateStreamChunk(token_ids=chunk))
            if self.is_broken:
                await context.abort(grpc.StatusCode.INTERNAL, "engine died")
        complete = pb.GenerateComplete(prompt_tokens=3, completion_tokens=4, cached_tokens=2)
        yield pb.GenerateResponse(complete=complete)


@asynccontextmanager
async def engine() -> AsyncIterator[tuple[Engine, str]]:
    """Serve it on a free port."""
    server, servicer = grpc.aio.server(), Engine()
    vllm_engine_pb2_grpc.add_VllmEngineServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield servicer, f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


async def test_chunks_are_counted_and_the_last_message_has_the_usage() -> None:
    """Counts run on over chunks; a chunk of several tokens is one message."""
    async with engine() as (servicer, address), connect(address) as connection:
        target = VllmTarget(connection)
        served = await target.served()
        heard = [each async for each in target.answer(ASK, timeout_s=10)]

    assert served == Served("/models/x", 1000, 2048)
    assert heard == [Heard(1), Heard(3), Heard(4), Heard(4, usage=Usage(3, 4, 2))]
    (request,) = servicer.requests
    assert list(request.tokenized.input_ids) == [5, 6, 7]
    assert (request.stream, bool(request.request_id)) == (True, True)
    sampling = request.sampling_params
    assert (sampling.max_tokens, sampling.temperature, sampling.seed, sampling.ignore_eos) == (4, 0.5, 9, True)


async def test_a_broken_stream_is_a_failure() -> None:
    """What had come stays, the status is the server's."""
    async with engine() as (servicer, address), connect(address) as connection:
        servicer.is_broken = True
        stream = VllmTarget(connection).answer(ASK, timeout_s=10)
        first = await anext(stream)
        with pytest.raises(CallFailed, match="INTERNAL: engine died"):
            await anext(stream)

    assert first == Heard(1)


async def test_text_needs_a_tokenizer() -> None:
    """The service has no call to tokenise: it is done here, or refused with what is missing."""
    async with connect("127.0.0.1:1") as connection:
        assert await VllmTarget(connection, tokenizer=TOKENIZER).tokens_of("ab") == TOKENIZER.encode(
            "ab", allow_special=False
        )
        with pytest.raises(ConfigError, match=r"--tokenizer: got none, want the model's tokenizer\.json"):
            await VllmTarget(connection).tokens_of("ab")
