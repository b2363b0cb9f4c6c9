import asyncio

import pytest

from server.frontend.mailbox import Mailbox
from server.messages import Finished, FinishReason, Started, TokenDelta


async def test_deltas_melt_and_keep_their_order() -> None:
    """A reader that comes late finds one delta for each index, before the index's end."""
    mailbox = Mailbox()
    end = Finished(0, FinishReason.STOP, 2)
    for event in (
        Started("f", 0),
        TokenDelta(0, (1,)),
        TokenDelta(1, (7,)),
        TokenDelta(0, (2,)),
        end,
        TokenDelta(1, (8,)),
    ):
        mailbox.put(event)

    assert await mailbox.take() == [Started("f", 0), TokenDelta(0, (1, 2)), TokenDelta(1, (7, 8)), end]


async def test_an_error_comes_after_what_was_said() -> None:
    """Events before an error are not lost; the first close counts."""
    mailbox = Mailbox()
    mailbox.put(TokenDelta(0, (1,)))
    mailbox.close(ValueError("first"))
    mailbox.close()

    assert await mailbox.take() == [TokenDelta(0, (1,))]
    with pytest.raises(ValueError, match="first"):
        await mailbox.take()


async def test_a_waiting_reader_is_woken() -> None:
    """Taking waits for the next event, and for the end."""
    mailbox = Mailbox()
    taking = asyncio.create_task(mailbox.take())
    await asyncio.sleep(0)
    mailbox.put(TokenDelta(0, (1,)))
    assert await taking == [TokenDelta(0, (1,))]
    taking = asyncio.create_task(mailbox.take())
    await asyncio.sleep(0)
    mailbox.close()

    assert await taking == []
