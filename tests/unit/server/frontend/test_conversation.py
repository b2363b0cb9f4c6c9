from collections.abc import AsyncIterator

import pytest

from pathfox.v1 import generation_pb2 as pb
from server.config import AdmissionConfig, ServerConfig
from server.errors import InvalidRequest
from server.frontend.admission import Admission
from server.frontend.caller import Caller
from server.frontend.conversation import Conversation
from server.frontend.generations import Generations
from server.frontend.models import Models
from server.frontend.prompts import Prompts
from server.frontend.requests import FinishedEvent
from server.messages import FinishReason
from tests.fixtures.front_ends import saying, served

SOURCE_TEXT = "yes"


@pytest.fixture
async def conversation() -> AsyncIterator[Conversation]:
    """A conversation without a wire."""
    prompts = Prompts(1)
    generations = Generations(ServerConfig(), Admission(AdmissionConfig()), prompts)
    models = Models([served(saying(SOURCE_TEXT))])
    yield Conversation(models, generations, Caller(method="Chat", received_s=0.0, request_id="r"))
    prompts.close()


async def sending(*actions: pb.ChatRequest) -> AsyncIterator[pb.ChatRequest]:
    """Send actions all at once, as a client may."""
    for action in actions:
        yield action


OPEN = pb.ChatRequest(open=pb.GenerateRequest(text="hi"))
CANCEL = pb.ChatRequest(cancel_turn=pb.CancelTurn())
TURN = pb.ChatRequest(turn=pb.Messages(messages=[pb.Message(role=pb.ROLE_USER, content="more")]))


async def test_a_cancel_that_comes_before_the_answer_begins_ends_it(conversation: Conversation) -> None:
    """Turn and cancel_turn in one breath: the answer ends with CANCELLED, and the one after it is whole."""
    await conversation.read(sending(OPEN, CANCEL))
    first = [event async for event in conversation.answers()]
    await conversation.read(sending(TURN))
    second = [event async for event in conversation.answers()]

    ends = [event.reason for event in (*first, *second) if isinstance(event, FinishedEvent)]
    assert ends == [FinishReason.CANCELLED, FinishReason.STOP]


async def test_a_cancel_between_turns_cancels_nothing(conversation: Conversation) -> None:
    """A cancel that comes when no answer is due is not kept for the next one."""
    await conversation.read(sending(OPEN))
    assert [event async for event in conversation.answers()]
    await conversation.read(sending(CANCEL, TURN))
    events = [event async for event in conversation.answers()]

    assert [event.reason for event in events if isinstance(event, FinishedEvent)] == [FinishReason.STOP]


async def test_a_wrong_action_ends_it_before_the_answer_begins(conversation: Conversation) -> None:
    """What is wrong is said at once, not after an answer that nobody waits for."""
    await conversation.read(sending(OPEN, TURN))
    with pytest.raises(InvalidRequest, match="turn"):
        await anext(conversation.answers())
