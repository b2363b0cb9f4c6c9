"""A target that speaks the Open Inference Protocol v2 as Triton streams it: text in, pieces of text out.

A model says itself which inputs it takes; of those we know we send all that it has. So the vLLM backend (sampling
parameters as one JSON text) and TensorRT-LLM's models (a tensor for each) are one case.
"""

import itertools
import json
import struct
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field

from pathfox.foreign import inference_pb2 as pb
from pathfox.foreign import inference_pb2_grpc
from server.cli.bench.connection import ASK_TIMEOUT_S, Connection, grpc_errors_as_failures
from server.cli.bench.recording import Usage
from server.cli.bench.target import Ask, CallFailed, Codec, Heard, Served

TEXT, NUM_INPUT, NUM_OUTPUT = "text_output", "num_input_tokens", "num_output_tokens"
CONTENTS = {
    "BOOL": "bool_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "BYTES": "bytes_contents",
}
"""Where a tensor's values stand, by its type."""
INTEGERS = {"INT32": "i", "INT64": "q", "UINT32": "I", "UINT64": "Q"}
"""How raw values are packed, little endian."""
SEED_MASK = (1 << 31) - 1

Tensor = bool | int | float | bytes


@dataclass(slots=True)
class _Progress:
    """What one stream has brought so far."""

    num_tokens: int = 0
    prompt_tokens: int = 0
    pieces: list[bytes] = field(default_factory=list)


class OipTarget:
    """Calls `inference.GRPCInferenceService`. Lengths are the server's where it counts, else the tokenizer's."""

    def __init__(self, connection: Connection, *, tokenizer: Codec, model: str | None = None) -> None:
        self._metadata = connection.metadata
        self._tokenizer = tokenizer
        self._model = model
        self._card = pb.ModelMetadataResponse()
        self._stubs = [inference_pb2_grpc.GRPCInferenceServiceStub(channel) for channel in connection.channels]
        self._next_stub = itertools.cycle(self._stubs)

    async def served(self) -> Served:
        """Ask for the inputs and outputs of the model, or of the first one that is ready."""
        with grpc_errors_as_failures():
            if self._model is None:
                index = await self._stubs[0].RepositoryIndex(
                    pb.RepositoryIndexRequest(ready=True), timeout=ASK_TIMEOUT_S, metadata=self._metadata
                )
                if not index.models:
                    raise CallFailed("NOT_FOUND", "no model is ready")
                self._model = index.models[0].name
            request = pb.ModelMetadataRequest(name=self._model)
            self._card = await self._stubs[0].ModelMetadata(request, timeout=ASK_TIMEOUT_S, metadata=self._metadata)
        missing = {"text_input"} - {each.name for each in self._card.inputs}
        missing |= {TEXT} - {each.name for each in self._card.outputs}
        if missing:
            raise CallFailed("NOT_FOUND", f"{self._model} has no {' and no '.join(sorted(missing))}")
        return Served(self._model, self._tokenizer.vocabulary_size, context_length_tokens=0)

    async def tokens_of(self, text: str) -> list[int]:
        """Tokenise here."""
        return self._tokenizer.encode(text, allow_special=False)

    async def answer(self, ask: Ask, *, timeout_s: float) -> AsyncIterator[Heard]:
        """Stream one generation, one request to a stream."""
        prompt = self._tokenizer.decode(ask.prompt)
        request = self._request(ask, prompt)
        heard = _Progress()
        stream = next(self._next_stub).ModelStreamInfer(iter([request]), timeout=timeout_s, metadata=self._metadata)
        try:
            with grpc_errors_as_failures():
                async for message in stream:
                    if message.error_message:
                        raise CallFailed("STREAM_ERROR", message.error_message)
                    text = _take(message.infer_response, heard)
                    yield Heard(heard.num_tokens, text)
        finally:
            stream.cancel()
        yield Heard(heard.num_tokens, usage=self._usage(prompt, heard))

    def _request(self, ask: Ask, prompt: str) -> pb.ModelInferRequest:
        values = _values(ask, prompt)
        inputs = [_tensor(each, values[each.name]) for each in self._card.inputs if each.name in values]
        known = {TEXT, NUM_INPUT, NUM_OUTPUT}
        outputs = [
            pb.ModelInferRequest.InferRequestedOutputTensor(name=each.name)
            for each in self._card.outputs
            if each.name in known
        ]
        return pb.ModelInferRequest(model_name=self._card.name, inputs=inputs, outputs=outputs)

    def _usage(self, prompt: str, heard: _Progress) -> Usage:
        has_count = any(each.name == NUM_OUTPUT for each in self._card.outputs)
        text = b"".join(heard.pieces).decode(errors="replace")
        return Usage(
            heard.prompt_tokens or len(self._tokenizer.encode(prompt, allow_special=False)),
            heard.num_tokens if has_count else len(self._tokenizer.encode(text, allow_special=False)),
        )


def _values(ask: Ask, prompt: str) -> Mapping[str, Tensor]:
    """Return the value of every input that we know, by its name."""
    seed = ask.seed & SEED_MASK
    sampling = {
        "temperature": ask.temperature,
        "max_tokens": ask.max_tokens,
        "seed": seed,
        "ignore_eos": ask.ignore_eos,
    }
    values: dict[str, Tensor] = {
        "text_input": prompt.encode(),
        "stream": True,
        "exclude_input_in_output": True,
        f"return_{NUM_INPUT}": True,
        f"return_{NUM_OUTPUT}": True,
        "sampling_parameters": json.dumps(sampling).encode(),
        "max_tokens": ask.max_tokens,
        "seed": seed,
        "random_seed": seed,
    }
    if ask.ignore_eos:
        values |= {"min_tokens": ask.max_tokens, "min_length": ask.max_tokens}
    if ask.temperature > 0:  # without one TensorRT-LLM takes the most probable token
        values["temperature"] = ask.temperature
    return values


def _tensor(card: pb.ModelMetadataResponse.TensorMetadata, value: Tensor) -> pb.ModelInferRequest.InferInputTensor:
    """Make a tensor of one value, of the type and the number of dimensions that the model wants.

    Raises:
        CallFailed: it wants another type.
    """
    try:
        contents = pb.InferTensorContents(**{CONTENTS[card.datatype]: [value]})  # type: ignore[arg-type] # by the type's name
    except (KeyError, TypeError, ValueError):
        raise CallFailed("INPUT_TYPE", f"{card.name} is {card.datatype}, which cannot be {value!r}") from None
    return pb.ModelInferRequest.InferInputTensor(
        name=card.name, datatype=card.datatype, shape=[1] * len(card.shape), contents=contents
    )


def _take(response: pb.ModelInferResponse, heard: _Progress) -> str:
    """Add what a message brought; return its text. A message with text and no count is one token."""
    piece, count = b"", None
    for place, output in enumerate(response.outputs):
        raw = response.raw_output_contents[place] if response.raw_output_contents else None
        match output.name:
            case "text_output":
                piece = b"".join(_texts(raw) if raw is not None else output.contents.bytes_contents)
            case "num_output_tokens":
                count = sum(_integers(output, raw))
            case "num_input_tokens":
                heard.prompt_tokens = sum(_integers(output, raw))
    heard.pieces.append(piece)
    heard.num_tokens += bool(piece) if count is None else count
    return piece.decode(errors="replace")


def _texts(raw: bytes) -> list[bytes]:
    """Cut raw BYTES: each has its length before it."""
    texts, at = [], 0
    while at < len(raw):
        (length,) = struct.unpack_from("<I", raw, at)
        texts.append(raw[at + 4 : at + 4 + length])
        at += 4 + length
    return texts


def _integers(output: pb.ModelInferResponse.InferOutputTensor, raw: bytes | None) -> list[int]:
    if raw is None:
        return list(getattr(output.contents, CONTENTS[output.datatype]))
    try:
        return [each for (each,) in struct.iter_unpack(f"<{INTEGERS[output.datatype]}", raw)]
    except (KeyError, struct.error):
        raise CallFailed("OUTPUT_TYPE", f"{output.name}: {len(raw)} bytes are no {output.datatype} numbers") from None
