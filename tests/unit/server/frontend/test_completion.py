import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.errors import FailedPrecondition
from server.frontend.completion import Completion
from server.frontend.requests import SamplingChoices
from server.messages import Finished, FinishReason, TokenDelta, TokenLogprob
from tests.fixtures.front_ends import TOKENIZER, ids


def run(choices: SamplingChoices, deltas: list[list[int]]) -> tuple[str, list[int], Completion]:
    """Push deltas until the completion ends, then the source's end."""
    completion = Completion(TOKENIZER, choices)
    text, token_ids = "", []
    for delta in deltas:
        piece = completion.push(TokenDelta(0, tuple(delta)))
        if piece is not None:
            text += piece.text
            token_ids += piece.token_ids
    text += completion.finish(Finished(0, FinishReason.LENGTH, sum(map(len, deltas)))) or ""
    return text, token_ids, completion


@given(
    text=st.text(alphabet="abé🦊", max_size=30),
    stops=st.lists(st.text(alphabet="abé🦊", min_size=1, max_size=3), max_size=3),
    cuts=st.lists(st.integers(1, 7), max_size=40),
    min_tokens=st.integers(0, 10),
)
def test_the_answer_does_not_depend_on_the_deltas(
    text: str, stops: list[str], cuts: list[int], min_tokens: int
) -> None:
    """However tokens are coalesced, text, ids, count and end are those of one token at a time."""
    token_ids = ids(text)
    chunks, rest = [], token_ids
    for cut in cuts:
        chunks.append(rest[:cut])
        rest = rest[cut:]
    chunks.append(rest)
    choices = SamplingChoices(stop=tuple(stops), min_tokens=min_tokens)

    whole = run(choices, [[each] for each in token_ids])
    cut_up = run(choices, chunks)

    assert whole[:2] == cut_up[:2]
    assert whole[2].end == cut_up[2].end
    assert whole[2].num_tokens == cut_up[2].num_tokens
    if not stops:
        assert whole[0] == text


def test_logprobs_end_with_the_stop() -> None:
    """Tokens after the one that completes a stop string are dropped with their log probabilities."""
    completion = Completion(TOKENIZER, SamplingChoices(stop=("b",)))
    logprobs = tuple(TokenLogprob(token_id, -1.0, 1) for token_id in ids("abc"))

    piece = completion.push(TokenDelta(0, tuple(ids("abc")), logprobs))

    assert piece is not None
    assert (piece.text, piece.token_ids, piece.logprobs) == ("a", tuple(ids("ab")), logprobs[:2])
    assert completion.push(TokenDelta(0, tuple(ids("d")))) is None


def test_a_stop_that_never_came_is_sent() -> None:
    """Text that was held back as the beginning of a stop string is part of the answer."""
    assert run(SamplingChoices(stop=("abX",)), [ids("zab")])[0] == "zab"


def test_stop_strings_need_text() -> None:
    """Without a tokenizer there is no text to look for them in."""
    with pytest.raises(FailedPrecondition):
        Completion(None, SamplingChoices(stop=("x",)))
