import asyncio

import grpc
import pytest

from pathfox.v1 import generation_pb2 as pb
from server.engine.scripted import ScriptedSource
from tests.fixtures.front_ends import (
    CONTEXT_LENGTH,
    TOKENIZER,
    failing,
    ids,
    rambling,
    read,
    saying,
    served,
    serving,
    text_of,
)

HELLO = "Hello, wörld! 🦊"


def ask(text: str = "hi", **params: object) -> pb.GenerateRequest:
    """Make a request of a text with these sampling parameters."""
    return pb.GenerateRequest(text=text, sampling_params=pb.SamplingParams(**params))


async def test_streams_started_deltas_finished() -> None:
    """A stream is one Started, deltas whose text and ids add up, and one Finished with usage."""
    source = saying(HELLO, tokens_per_s=2000)
    async with serving(served(source)) as world:
        request = ask(seed=7)
        request.return_token_ids = True
        request.metadata["k"] = "v"
        call = world.generation.Generate(request)
        frames = await read(call)

        assert frames[0].started.prompt_tokens == 2
        assert frames[0].started.seed == 7
        assert dict(frames[0].started.metadata) == {"k": "v"}
        assert text_of(frames) == HELLO
        assert [token for frame in frames for token in frame.delta.token_ids] == ids(HELLO)
        assert frames[-1].finished.finish_reason == pb.FINISH_REASON_STOP
        assert frames[-1].finished.usage.completion_tokens == len(ids(HELLO)) + 1
        assert frames[-1].sequence == len(ids(HELLO))
        sequences = [frame.sequence for frame in frames]
        assert sequences == sorted(sequences)
        assert dict(await call.trailing_metadata())["x-request-id"] == frames[0].request_id


async def test_unset_parameters_are_the_models_defaults() -> None:
    """Unset = the model's generation defaults; an unset seed is drawn and reported; max_tokens fits the room."""
    source = saying("x")
    async with serving(served(source)) as world:
        first = await read(world.generation.Generate(ask()))
        second = await read(world.generation.Generate(ask()))
        await read(world.generation.Generate(ask("y" * (CONTEXT_LENGTH - 10))))

    asked = source.requests[0].sampling
    assert (asked.temperature, asked.top_k, asked.top_p) == (0.5, 7, 1.0)
    assert asked.max_tokens == 1024
    assert asked.eos_token_ids == tuple(ids("<|im_end|>"))
    assert first[0].started.seed == asked.seed != second[0].started.seed
    assert source.requests[2].sampling.max_tokens == 10


async def test_messages_go_through_the_chat_template() -> None:
    """Messages become the template's text; what users write ends no turn."""
    source = saying("x")
    async with serving(served(source)) as world:
        messages = pb.Messages(
            messages=[
                pb.Message(role=pb.ROLE_SYSTEM, content="be"),
                pb.Message(role=pb.ROLE_USER, content="a<|im_end|>b"),
            ]
        )
        await read(world.generation.Generate(pb.GenerateRequest(messages=messages)))

    prompt = source.requests[0].prompt_token_ids
    assert TOKENIZER.decode(prompt, skip_special=False) == (
        "<|im_start|>system\nbe<|im_end|>\n<|im_start|>user\na<|im_end|>b<|im_end|>\n<|im_start|>assistant\n"
    )
    assert prompt.count(ids("<|im_end|>")[0]) == 2


async def test_once_gives_what_the_stream_gives() -> None:
    """GenerateOnce answers with every choice of the same request, and usage of all."""
    async with serving(served(rambling())) as world:
        request = ask(n=3, max_tokens=5, logprobs=0)
        request.return_token_ids = True
        answer = await world.generation.GenerateOnce(request)

    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert {choice.text for choice in answer.choices} == {"abcab"}
    assert all(len(choice.logprobs) == 5 == len(choice.token_ids) for choice in answer.choices)
    assert {choice.finish_reason for choice in answer.choices} == {pb.FINISH_REASON_LENGTH}
    assert answer.usage.completion_tokens == 15
    assert answer.usage.prompt_tokens == 2


async def test_a_stop_string_ends_the_request_at_its_token() -> None:
    """The text before the match is the last; the token that completes it is counted; the source is cancelled."""
    source = rambling()
    async with serving(served(source)) as world:
        request = ask(stop=["ca", "nowhere"], max_tokens=1000)
        request.return_token_ids = True
        frames = await read(world.generation.Generate(request))
        await world.settle()

        finished = frames[-1].finished
        assert text_of(frames) == "ab"
        assert finished.finish_reason == pb.FINISH_REASON_STOP_SEQUENCE
        assert finished.matched_stop.text == "ca"
        assert finished.usage.completion_tokens == 4
        assert [token for frame in frames for token in frame.delta.token_ids] == ids("abca")
        assert source.num_cancelled == 1


async def test_no_stop_string_counts_before_min_tokens() -> None:
    """min_tokens holds off stop strings too."""
    async with serving(served(rambling())) as world:
        frames = await read(world.generation.Generate(ask(stop=["b"], min_tokens=4, max_tokens=100)))

    assert text_of(frames) == "abca"
    assert frames[-1].finished.usage.completion_tokens == 5


async def test_stop_strings_end_each_completion_by_itself() -> None:
    """With n > 1 one completion's match leaves the others running."""
    letters = ids("ab")

    def script(_seed: int, index: int, position: int) -> int:
        return letters[0] if index == 1 or position < 3 else letters[1]

    async with serving(served(ScriptedSource(script))) as world:
        frames = await read(world.generation.Generate(ask(n=2, stop=["b"], max_tokens=8)))

    assert (text_of(frames, 0), text_of(frames, 1)) == ("aaa", "aaaaaaaa")
    ends = {frame.index: frame.finished for frame in frames if frame.WhichOneof("event") == "finished"}
    assert ends[0].finish_reason == pb.FINISH_REASON_STOP_SEQUENCE
    assert ends[1].finish_reason == pb.FINISH_REASON_LENGTH


async def test_a_stop_token_is_reported() -> None:
    """A stop token id ends with STOP_SEQUENCE and says which one."""
    async with serving(served(rambling())) as world:
        frames = await read(world.generation.Generate(ask(stop_token_ids=ids("c"))))

    assert frames[-1].finished.matched_stop.token_id == ids("c")[0]
    assert text_of(frames) == "abc"


async def test_echo_puts_the_prompt_first() -> None:
    """Echo is text of the first delta, counted as prompt only."""
    async with serving(served(saying("you"))) as world:
        frames = await read(world.generation.Generate(ask("me and ", echo=True)))
        empty = await world.generation.GenerateOnce(ask("me", echo=True, stop=["you"]))

    assert text_of(frames) == "me and you"
    assert frames[-1].sequence == 3
    assert empty.choices[0].text == "me"


async def test_a_full_context_says_so() -> None:
    """With max_tokens unset, a completion that fills the context ends with CONTEXT_FULL."""
    async with serving(served(rambling())) as world:
        filled = await read(world.generation.Generate(ask("y" * (CONTEXT_LENGTH - 5))))
        asked = await read(world.generation.Generate(ask("y" * (CONTEXT_LENGTH - 5), max_tokens=5)))

    assert filled[-1].finished.finish_reason == pb.FINISH_REASON_CONTEXT_FULL
    assert asked[-1].finished.finish_reason == pb.FINISH_REASON_LENGTH


async def test_a_code_point_is_never_split() -> None:
    """Each frame is whole text, though the tokens are bytes that come one by one."""
    async with serving(served(saying("🦊" * 20, tokens_per_s=3000))) as world:
        frames = await read(world.generation.Generate(ask()))

    assert text_of(frames) == "🦊" * 20


async def test_token_ids_need_no_tokenizer() -> None:
    """A model without a tokenizer takes and gives token ids, and refuses text."""
    async with serving(served(saying("ok"), has_text=False)) as world:
        request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1, 2]), return_token_ids=True)
        frames = await read(world.generation.Generate(request))
        failure = await failing(world.generation.Generate(ask()))

    assert [token for frame in frames for token in frame.delta.token_ids] == ids("ok")
    assert failure.code is grpc.StatusCode.FAILED_PRECONDITION


async def test_many_streams_at_once_do_not_mix() -> None:
    """A hundred concurrent streams each get their own text."""
    async with serving(served(rambling(tokens_per_s=500))) as world:

        async def one(number: int) -> None:
            frames = await read(world.generation.Generate(ask(f"{number}", max_tokens=10 + number % 7)))
            assert text_of(frames) == ("abc" * 10)[: 10 + number % 7]

        async with asyncio.TaskGroup() as tasks:
            for number in range(100):
                tasks.create_task(one(number))
        await world.settle()
        status = world.front_end.generations.num_finished

    assert status == 100


@pytest.mark.parametrize("name", ["m", "m-alias", "m@1"])
async def test_models_have_names(name: str) -> None:
    """A model answers to its name, its aliases and its pinned version."""
    async with serving(served(saying("x")), served(saying("y"), name="other")) as world:
        request = ask()
        request.model = name

        assert text_of(await read(world.generation.Generate(request))) == "x"
        request.model = "other"
        assert text_of(await read(world.generation.Generate(request))) == "y"


async def test_compressed_answers() -> None:
    """With compression on, and asked for by the client, answers are the same."""
    async with serving(served(saying("z" * 300)), options={"server.compression": "gzip"}) as world:
        assert text_of(await read(world.generation.Generate(ask(), compression=grpc.Compression.Gzip))) == "z" * 300
