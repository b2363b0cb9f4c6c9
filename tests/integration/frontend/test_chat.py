import asyncio
from collections.abc import Awaitable, Callable, Sequence

import grpc
import pytest

from pathfox.v1 import generation_pb2 as pb
from server.engine.scripted import ScriptedSource
from tests.fixtures.front_ends import TOKENIZER, Failure, failing, ids, rambling, saying, served, serving, text_of

USER, SYSTEM = pb.ROLE_USER, pb.ROLE_SYSTEM


def opening(*messages: tuple[pb.Role, str], **fields: object) -> pb.ChatRequest:
    """Make the action that opens a conversation."""
    said = pb.Messages(messages=[pb.Message(role=role, content=content) for role, content in messages])
    return pb.ChatRequest(open=pb.GenerateRequest(messages=said, **fields))


def turn(text: str) -> pb.ChatRequest:
    """Make the action of one user message."""
    return pb.ChatRequest(turn=pb.Messages(messages=[pb.Message(role=USER, content=text)]))


async def answer(call: grpc.aio.StreamStreamCall) -> list[pb.GenerateResponse]:
    """Read up to the end of one answer."""
    frames = []
    while True:
        frames.append(await call.read())
        if frames[-1] is grpc.aio.EOF or frames[-1].WhichOneof("event") == "finished":
            return frames


def prompts(source: ScriptedSource) -> list[str]:
    """Return the text of every prompt that came."""
    return [TOKENIZER.decode(each.prompt_token_ids, skip_special=False) for each in source.requests]


async def test_a_conversation_goes_on_from_its_exact_ids() -> None:
    """Each turn's prompt begins with all ids of the turns before, as they were sampled."""
    source = saying("yes <|im_end|>"[:4])
    async with serving(served(source)) as world:
        call = world.generation.Chat()
        await call.write(opening((SYSTEM, "be"), (USER, "one")))
        first = await answer(call)
        await call.write(turn("two"))
        second = await answer(call)
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF
        assert await call.code() is grpc.StatusCode.OK

    assert text_of(first) == text_of(second) == "yes "
    one, two = (each.prompt_token_ids for each in source.requests)
    assert two[: len(one)] == one
    assert two[len(one) :][: len(ids("yes "))] == tuple(ids("yes "))
    assert prompts(source)[1] == (
        "<|im_start|>system\nbe<|im_end|>\n<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n"
        "yes <|im_end|>\n<|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\n"
    )


async def test_it_may_open_with_a_system_message_or_a_text() -> None:
    """A system message alone waits for the first turn; a text is one user message."""
    source = saying("x")
    async with serving(served(source)) as world:
        quiet = world.generation.Chat()
        await quiet.write(opening((SYSTEM, "be")))
        await quiet.write(turn("one"))
        await answer(quiet)
        spoken = world.generation.Chat()
        await spoken.write(pb.ChatRequest(open=pb.GenerateRequest(text="hello")))
        await answer(spoken)
        for call in (quiet, spoken):
            await call.done_writing()

    assert prompts(source)[0].startswith("<|im_start|>system\nbe<|im_end|>\n<|im_start|>user\none")
    assert prompts(source)[1] == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"


async def test_cancel_turn_ends_the_answer_and_keeps_it() -> None:
    """A cancelled answer ends with CANCELLED, stays in the conversation, and is closed when the next turn comes."""
    source = rambling(tokens_per_s=300)
    async with serving(served(source)) as world:
        call = world.generation.Chat()
        await call.write(opening((USER, "one")))
        frames = [await call.read() for _ in range(6)]
        await call.write(pb.ChatRequest(cancel_turn=pb.CancelTurn()))
        frames += await answer(call)
        assert frames[-1].finished.finish_reason == pb.FINISH_REASON_CANCELLED
        await call.write(turn("two"))
        await call.read()
        call.cancel()
        await world.settle()

    said = text_of(frames)
    assert said
    assert f"<|im_start|>assistant\n{said}<|im_end|>\n<|im_start|>user\ntwo" in prompts(source)[1]


@pytest.mark.parametrize("is_first", [True, False])
async def test_a_turn_cancelled_while_it_is_encoded_keeps_the_ids(
    is_first: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It stays said, with an empty answer, and the next turn goes on from the exact ids of what came before it."""
    said = "y<|im_start|>es"
    source = saying(said)  # a control token, of which the answer's text shows nothing
    begun, go = asyncio.Event(), asyncio.Event()
    async with serving(served(source)) as world:
        texts = world.front_end.generations.prompts
        name = "encode" if is_first else "encode_turn"
        encode: Callable[..., Awaitable[tuple[int, ...]]] = getattr(texts, name)

        async def slowly(*arguments: object, **named: object) -> tuple[int, ...]:
            begun.set()
            await go.wait()
            return await encode(*arguments, **named)

        call = world.generation.Chat()
        await call.write(opening((SYSTEM, "be")))
        if not is_first:
            await call.write(turn("one"))
            await answer(call)
        monkeypatch.setattr(texts, name, slowly)
        await call.write(turn("two"))
        await begun.wait()
        await call.write(pb.ChatRequest(cancel_turn=pb.CancelTurn()))
        frames = await answer(call)
        go.set()
        await call.write(turn("three"))
        await answer(call)
        await call.done_writing()

    assert [frame.finished.finish_reason for frame in frames] == [pb.FINISH_REASON_CANCELLED]
    assert prompts(source)[-1].endswith(
        "<|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n"
        "<|im_start|>user\nthree<|im_end|>\n<|im_start|>assistant\n"
    )
    if not is_first:
        known = (*source.requests[0].prompt_token_ids, *ids(said))
        assert source.requests[1].prompt_token_ids[: len(known)] == known


@pytest.mark.parametrize(
    ("actions", "field"),
    [
        ([turn("x")], "action"),
        ([pb.ChatRequest()], "action"),
        ([opening((USER, "x")), opening((USER, "y"))], "action"),
        ([opening((USER, "x")), turn("too early")], "turn"),
        ([opening((SYSTEM, "be")), pb.ChatRequest(turn=pb.Messages())], "turn.messages"),
        ([pb.ChatRequest(open=pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1])))], "input"),
        ([opening((USER, "x"), sampling_params=pb.SamplingParams(n=2))], "sampling_params.n"),
        ([opening((USER, "x"), sampling_params=pb.SamplingParams(echo=True))], "sampling_params.echo"),
        ([opening((77, "x"))], "messages.messages[0].role"),
    ],
)
async def test_what_does_not_belong_ends_it(actions: Sequence[pb.ChatRequest], field: str) -> None:
    """A wrong action ends the conversation with the field's name, and what ran is freed."""
    async with serving(served(rambling(tokens_per_s=50))) as world:
        call = world.generation.Chat()
        for action in actions:
            await call.write(action)
        failure = await failing(call)

        assert failure.code is grpc.StatusCode.INVALID_ARGUMENT
        assert field in failure.fields


async def test_a_drain_ends_a_conversation_between_turns() -> None:
    """An idle conversation does not hold up a drain, and learns why it ends."""
    async with serving(served(saying("x"))) as world:
        call = world.generation.Chat()
        await call.write(opening((USER, "one")))
        await answer(call)
        async with asyncio.timeout(5):
            await world.front_end.drain()
            failure: Failure = await failing(call)

        assert failure.code is grpc.StatusCode.UNAVAILABLE
        assert failure.details["ErrorInfo"].reason == "DRAINING"


async def test_a_template_that_rewrites_turns_is_refused() -> None:
    """What was said must stay what it was; a template that changes it cannot hold a conversation."""
    rewriting = (
        "{% for m in messages %}{% if loop.last or m.role == 'user' %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    async with serving(served(saying("x"), template=rewriting)) as world:
        call = world.generation.Chat()
        await call.write(opening((USER, "one")))
        await answer(call)
        await call.write(turn("two"))
        failure = await failing(call)

        assert failure.code is grpc.StatusCode.FAILED_PRECONDITION
