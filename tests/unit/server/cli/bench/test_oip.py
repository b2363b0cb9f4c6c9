import json
import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio
import pytest

from pathfox.foreign import inference_pb2 as pb
from pathfox.foreign import inference_pb2_grpc
from server.cli.bench.connection import connect
from server.cli.bench.oip import OipTarget
from server.cli.bench.recording import Usage
from server.cli.bench.target import Ask, CallFailed, Heard, Served
from tests.fixtures.front_ends import TOKENIZER, ids

Card = tuple[str, str, list[int]]

VLLM_INPUTS: list[Card] = [
    ("text_input", "BYTES", [1]),
    ("image", "BYTES", [-1]),
    ("stream", "BOOL", [1]),
    ("sampling_parameters", "BYTES", [1]),
    ("exclude_input_in_output", "BOOL", [1]),
    ("return_num_input_tokens", "BOOL", [1]),
    ("return_num_output_tokens", "BOOL", [1]),
]
VLLM_OUTPUTS: list[Card] = [
    ("text_output", "BYTES", [-1]),
    ("finish_reason", "BYTES", [-1]),
    ("num_input_tokens", "UINT32", [1]),
    ("num_output_tokens", "UINT32", [-1]),
]
TENSORRT_INPUTS: list[Card] = [
    ("text_input", "BYTES", [-1, 1]),
    ("max_tokens", "INT32", [-1, 1]),
    ("stream", "BOOL", [-1, 1]),
    ("temperature", "FP32", [-1, 1]),
    ("min_length", "INT32", [-1, 1]),
]
TENSORRT_OUTPUTS: list[Card] = [("text_output", "BYTES", [-1, -1])]
ASK = Ask(prompt=ids("hello"), max_tokens=4, temperature=0.0, seed=9, ignore_eos=True)


class Triton(inference_pb2_grpc.GRPCInferenceServiceServicer):
    """A Triton with one model, whose streams bring the given outputs as Triton packs them."""

    def __init__(self, inputs: Sequence[Card], outputs: Sequence[Card], messages: Sequence[dict[str, bytes]]) -> None:
        self._card = pb.ModelMetadataResponse(
            name="llm",
            inputs=[pb.ModelMetadataResponse.TensorMetadata(name=n, datatype=d, shape=s) for n, d, s in inputs],
            outputs=[pb.ModelMetadataResponse.TensorMetadata(name=n, datatype=d, shape=s) for n, d, s in outputs],
        )
        self._types = {name: datatype for name, datatype, _ in outputs}
        self._messages = messages
        self.error = ""
        self.requests: list[pb.ModelInferRequest] = []

    async def RepositoryIndex(  # noqa: N802 the proto's name
        self, request: pb.RepositoryIndexRequest, _context: object
    ) -> pb.RepositoryIndexResponse:
        assert request.ready
        return pb.RepositoryIndexResponse(models=[pb.RepositoryIndexResponse.ModelIndex(name="llm")])

    async def ModelMetadata(  # noqa: N802 the proto's name
        self, request: pb.ModelMetadataRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.ModelMetadataResponse:
        if request.name != "llm":
            await context.abort(grpc.StatusCode.NOT_FOUND, f"unknown model {request.name}")
        return self._card

    async def ModelStreamInfer(  # noqa: N802 the proto's name
        self, request_iterator: AsyncIterator[pb.ModelInferRequest], _context: object
    ) -> AsyncIterator[pb.ModelStreamInferResponse]:
        async for request in request_iterator:
            self.requests.append(request)
            for message in self._messages:
                response = pb.ModelInferResponse(
                    outputs=[
                        pb.ModelInferResponse.InferOutputTensor(name=name, datatype=self._types[name], shape=[1])
                        for name in message
                    ],
                    raw_output_contents=list(message.values()),
                )
                yield pb.ModelStreamInferResponse(infer_response=response)
            if self.error:
                yield pb.ModelStreamInferResponse(error_message=self.error)


@asynccontextmanager
async def serving(triton: Triton) -> AsyncIterator[str]:
    """Serve it on a free port."""
    server = grpc.aio.server()
    inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(triton, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


def text(piece: str) -> bytes:
    """Pack one BYTES value."""
    return struct.pack("<I", len(piece.encode())) + piece.encode()


def vllm_backend() -> Triton:
    """One that counts tokens: three messages, the second of two tokens, the last without text."""
    return Triton(
        VLLM_INPUTS,
        VLLM_OUTPUTS,
        [
            {"text_output": text(piece), "num_input_tokens": struct.pack("<I", 7), "num_output_tokens": count}
            for piece, count in (("a", b"\1\0\0\0"), ("bc", b"\2\0\0\0"), ("", b"\1\0\0\0"))
        ],
    )


async def listen(triton: Triton, model: str | None = None) -> tuple[Served, list[Heard]]:
    """Ask once."""
    async with serving(triton) as address, connect(address) as connection:
        target = OipTarget(connection, tokenizer=TOKENIZER, model=model)
        served = await target.served()
        return served, [each async for each in target.answer(ASK, timeout_s=10)]


def sent(request: pb.ModelInferRequest) -> dict[str, tuple[list[int], Any]]:
    """Return shape and value of each input."""
    return {
        each.name: (list(each.shape), next(value[0] for _, value in each.contents.ListFields()))
        for each in request.inputs
    }


async def test_a_backend_that_counts_is_believed() -> None:
    """Lengths are the server's: of each message, and of the prompt."""
    served, heard = await listen(triton := vllm_backend())

    assert served == Served("llm", TOKENIZER.vocabulary_size, 0)
    assert heard == [Heard(1, "a"), Heard(3, "bc"), Heard(4, ""), Heard(4, usage=Usage(7, 4))]
    (request,) = triton.requests
    inputs = sent(request)
    assert inputs["text_input"] == ([1], b"hello")
    assert inputs["stream"] == ([1], True)
    sampling = json.loads(inputs["sampling_parameters"][1])
    assert sampling == {"temperature": 0.0, "max_tokens": 4, "seed": 9, "ignore_eos": True}
    assert "image" not in inputs
    assert [each.name for each in request.outputs] == ["text_output", "num_input_tokens", "num_output_tokens"]


async def test_a_backend_that_does_not_count_is_counted_here() -> None:
    """Each message with text is one token while it streams; at the end the text is tokenised."""
    triton = Triton(TENSORRT_INPUTS, TENSORRT_OUTPUTS, [{"text_output": text(piece)} for piece in ("ab", "", "c")])

    _, heard = await listen(triton)

    assert heard == [Heard(1, "ab"), Heard(1, ""), Heard(2, "c"), Heard(2, usage=Usage(5, 3))]
    inputs = sent(triton.requests[0])
    assert inputs["max_tokens"] == ([1, 1], 4)
    assert inputs["min_length"] == ([1, 1], 4)
    assert "temperature" not in inputs


async def test_an_error_in_the_stream_is_a_failure() -> None:
    """Triton reports some errors as messages of a stream that ends well."""
    triton = vllm_backend()
    triton.error = "out of memory"

    with pytest.raises(CallFailed, match="STREAM_ERROR: out of memory"):
        await listen(triton)


async def test_types_that_do_not_fit_are_failures() -> None:
    """A model that wants or gives something else under a known name fails its request, not the run."""
    wants = Triton([*VLLM_INPUTS[:1], ("max_tokens", "BYTES", [1])], VLLM_OUTPUTS, [])
    gives = Triton(VLLM_INPUTS, VLLM_OUTPUTS, [{"text_output": text("a"), "num_output_tokens": b"12345"}])

    with pytest.raises(CallFailed, match="INPUT_TYPE: max_tokens is BYTES, which cannot be 4"):
        await listen(wants)
    with pytest.raises(CallFailed, match="OUTPUT_TYPE: num_output_tokens: 5 bytes are no UINT32 numbers"):
        await listen(gives)


@pytest.mark.parametrize(
    ("inputs", "model", "complaint"),
    [(VLLM_INPUTS, "other", "unknown model other"), (VLLM_INPUTS[1:], None, "llm has no text_input")],
)
async def test_a_model_that_is_not_there_or_takes_no_text_is_named(
    inputs: list[Card], model: str | None, complaint: str
) -> None:
    """Before the load."""
    with pytest.raises(CallFailed, match=f"NOT_FOUND: {complaint}"):
        await listen(Triton(inputs, VLLM_OUTPUTS, []), model)
