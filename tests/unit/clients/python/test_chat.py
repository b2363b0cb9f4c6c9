import asyncio
import contextlib
import threading
from collections.abc import Iterator

import grpc
import pytest

from pathfox.client import AsyncClient, Client, Delta, Event, Finished, FinishReason, Internal, InvalidRequest
from pathfox.v1 import generation_pb2 as pb
from tests.unit.clients.python.scripted_server import Script, fail

WAIT_S = 10


class Parrot:
    """Answers each turn with what was said; an answer to "wait" goes on until it is cancelled."""

    def __init__(self) -> None:
        self.actions: list[pb.ChatRequest] = []
        self.was_told_goodbye = False

    def __call__(
        self, requests: Iterator[pb.ChatRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.GenerateResponse]:
        for request in requests:
            self.actions.append(request)
            if request.HasField("cancel_turn"):
                continue
            said = request.open.messages if request.HasField("open") else request.turn
            content = said.messages[-1].content
            if content == "fail":
                fail(context, grpc.StatusCode.INTERNAL, "bug")
            yield pb.GenerateResponse(delta=pb.Delta(text=content))
            if content == "wait":
                self.actions.append(next(requests))
                yield pb.GenerateResponse(finished=pb.Finished(finish_reason=pb.FINISH_REASON_CANCELLED))
            else:
                yield pb.GenerateResponse(finished=pb.Finished(finish_reason=pb.FINISH_REASON_STOP))
        self.was_told_goodbye = context.is_active()

    @property
    def kinds(self) -> list[str | None]:
        """What was sent, in order."""
        return [action.WhichOneof("action") for action in self.actions]


@pytest.fixture
def parrot(script: Script) -> Parrot:
    """A server that can chat."""
    script.answers["Chat"] = Parrot()
    return script.answers["Chat"]


def text_of(events: list[Event]) -> str:
    """Join the text of an answer."""
    return "".join(event.text for event in events if isinstance(event, Delta))


def test_a_conversation_opens_with_its_first_turn(script: Script, parrot: Parrot) -> None:
    """Options and earlier messages go with the first turn; later turns carry only what is said."""
    with Client(script.address) as client, client.chat(messages=[("system", "s")], temperature=0.0) as chat:
        assert text_of(list(chat.send("one"))) == "one"
        assert text_of(list(chat.send([("tool", "t"), ("user", "two")]))) == "two"

    first, second = parrot.actions
    assert [each.content for each in first.open.messages.messages] == ["s", "one"]
    assert first.open.sampling_params.temperature == 0
    assert [each.role for each in second.turn.messages] == [pb.ROLE_TOOL, pb.ROLE_USER]


def test_an_answer_can_be_cut_short(script: Script, parrot: Parrot) -> None:
    """cancel_turn ends the answer in flight; the conversation goes on."""
    with Client(script.address) as client, client.chat() as chat:
        answer = chat.send("wait")
        assert isinstance(next(answer), Delta)
        chat.cancel_turn()
        chat.cancel_turn()
        (finished,) = answer
        assert isinstance(finished, Finished)
        assert finished.reason is FinishReason.CANCELLED
        assert text_of(list(chat.send("go on"))) == "go on"

    assert parrot.kinds == ["open", "cancel_turn", "turn"]


def test_the_next_turn_ends_an_answer_that_was_left(script: Script, parrot: Parrot) -> None:
    """An answer that nobody reads to its end is cancelled; what is left of it is not mistaken for the next."""
    with Client(script.address) as client, client.chat() as chat:
        old = chat.send("wait")
        next(old)
        assert text_of(list(chat.send("next"))) == "next"
        assert list(old) == []

    assert parrot.kinds == ["open", "cancel_turn", "turn"]


def test_breaking_out_of_an_answer_cancels_it(script: Script, parrot: Parrot) -> None:
    """Closing the iterator is enough."""
    with Client(script.address) as client, client.chat() as chat:
        for _ in chat.send("wait"):
            break
        assert text_of(list(chat.send("next"))) == "next"

    assert parrot.kinds == ["open", "cancel_turn", "turn"]


def test_a_failing_turn_raises_a_typed_error(script: Script, parrot: Parrot) -> None:
    """The error ends the conversation, and the next turn says so again."""
    with Client(script.address) as client, client.chat() as chat:
        with pytest.raises(Internal, match="bug"):
            list(chat.send("fail"))
        with pytest.raises(Internal):
            list(chat.send("more"))
    assert parrot.kinds == ["open"]


def test_leaving_ends_the_call(script: Script, parrot: Parrot) -> None:
    """The server's side of the conversation ends, answer in flight or not."""
    with Client(script.address) as client:
        with client.chat() as chat:
            next(chat.send("wait"))
        assert script.ended.wait(WAIT_S)
    assert parrot.kinds[0] == "open"


def test_a_conversation_that_is_over_ends_without_cancelling(script: Script, parrot: Parrot) -> None:
    """The server is told that nothing more comes; its side ends well."""
    with Client(script.address) as client:
        with client.chat() as chat:
            list(chat.send("x"))
        assert parrot.was_told_goodbye
        with client.chat():
            pass  # nothing was ever said


def test_a_chat_begins_with_messages(script: Script) -> None:
    """Raw prompts have no turns."""
    with Client(script.address) as client, pytest.raises(TypeError, match="messages"):
        client.chat(text="x")


def test_a_server_that_hangs_up_ends_the_answer(script: Script) -> None:
    """A call that ends without Finished ends the iteration; the error, if there is one, is the server's."""
    script.answers["Chat"] = lambda _requests, _context: iter(())
    with Client(script.address) as client, client.chat() as chat:
        assert list(chat.send("x")) == []


def test_no_thread_stays_behind(script: Script, parrot: Parrot) -> None:
    """The thread that feeds a conversation ends with it."""
    with Client(script.address) as client, client.chat() as chat:
        list(chat.send("x"))
        feeding = [thread for thread in threading.enumerate() if "consume" in thread.name.lower()]
    for thread in feeding:
        thread.join(WAIT_S)
    assert not any(thread.is_alive() for thread in feeding)
    assert parrot.kinds == ["open"]


class TestAsync:
    """The same conversation, awaited."""

    async def test_turns_cuts_and_leftovers(self, script: Script, parrot: Parrot) -> None:
        """Turns, cancelling, leaving an answer unread, and closing its iterator work as in the blocking client."""
        async with AsyncClient(script.address) as client, client.chat(messages=[("system", "s")]) as chat:
            assert text_of([event async for event in chat.send("one")]) == "one"

            answer = chat.send("wait")
            assert isinstance(await anext(answer), Delta)
            await chat.cancel_turn()
            (finished,) = [event async for event in answer]
            assert isinstance(finished, Finished)
            assert finished.reason is FinishReason.CANCELLED

            async with contextlib.aclosing(chat.send("wait")) as closing:
                await anext(closing)
            left = chat.send("wait")
            await anext(left)
            assert text_of([event async for event in chat.send("next")]) == "next"
            assert [event async for event in left] == []

        assert parrot.kinds == ["open", "turn", "cancel_turn", "turn", "cancel_turn", "turn", "cancel_turn", "turn"]

    async def test_a_failing_turn_raises_a_typed_error(self, script: Script, parrot: Parrot) -> None:
        """The error ends the conversation."""
        async with AsyncClient(script.address) as client, client.chat() as chat:
            with pytest.raises(Internal, match="bug"):
                _ = [event async for event in chat.send("fail")]
            with pytest.raises(Internal):
                _ = [event async for event in chat.send("more")]
        assert parrot.kinds == ["open"]

    async def test_a_refused_conversation(self, script: Script) -> None:
        """A server that refuses at once is heard, however far the writing got."""
        script.answers["Chat"] = lambda _requests, context: fail(context, grpc.StatusCode.INVALID_ARGUMENT, "no")
        async with AsyncClient(script.address) as client, client.chat() as chat:
            with pytest.raises(InvalidRequest, match="no"):
                _ = [event async for event in chat.send("x")]

    async def test_a_conversation_that_is_over_ends_without_cancelling(self, script: Script, parrot: Parrot) -> None:
        """As in the blocking client."""
        async with AsyncClient(script.address) as client:
            async with client.chat() as chat:
                assert text_of([event async for event in chat.send("x")]) == "x"
            assert parrot.was_told_goodbye
            async with client.chat():
                pass  # nothing was ever said

    async def test_leaving_ends_the_call(self, script: Script, parrot: Parrot) -> None:
        """As in the blocking client."""
        async with AsyncClient(script.address) as client:
            async with client.chat() as chat:
                await anext(chat.send("wait"))
            assert await asyncio.to_thread(script.ended.wait, WAIT_S)
        assert parrot.kinds[0] == "open"
