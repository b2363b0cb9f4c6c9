import itertools
import time

import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from server.text.detokenizer import Detokenizer
from server.text.tokenizer import Tokenizer

# SmolLM2's vocabulary lacks six control characters and the bytes of planes that Unicode has not assigned.
spelt = st.text(
    st.characters(max_codepoint=0x3FFFF, exclude_categories=["Cs"], exclude_characters="\x04\x06\x13\x14\x16\x1d"),
    max_size=60,
)

_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def sentencepiece() -> Tokenizer:
    """Bytes 0 .. 255, then a space, a word and a word that begins with a space."""
    vocabulary = {token: token_id for token_id, token in enumerate([*_BYTES, "▁", "a", "▁ab"])}
    core = tokenizers.Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(core, special_tokens={}, path="test")


SENTENCEPIECE = sentencepiece()


def push_in_chunks(detokenizer: Detokenizer, ids: list[int], cuts: list[int]) -> list[str]:
    """Push ids cut at some places, and finish."""
    borders = sorted({0, len(ids), *(cut % (len(ids) + 1) for cut in cuts)})
    pieces = [detokenizer.push(ids[start:end]) for start, end in itertools.pairwise(borders)]
    return [*pieces, detokenizer.finish()]


@settings(max_examples=200, deadline=None)
@given(text=spelt, cuts=st.lists(st.integers(0, 1000), max_size=20))
def test_any_chunking_gives_the_whole_text(smollm: Tokenizer, text: str, cuts: list[int]) -> None:
    """However the ids are cut, the pieces put together are the text, and each is valid."""
    pieces = push_in_chunks(Detokenizer(smollm), smollm.encode(text, allow_special=False), cuts)

    assert text == "".join(pieces)
    assert all(piece.encode("utf-8") is not None for piece in pieces)


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(-5, 49200), max_size=40), cuts=st.lists(st.integers(0, 1000), max_size=20))
def test_any_ids_give_what_decoding_all_at_once_gives(smollm: Tokenizer, ids: list[int], cuts: list[int]) -> None:
    """Ids that a model may emit, broken code points and control tokens among them, decode the same in any chunks."""
    assert smollm.decode(ids) == "".join(push_in_chunks(Detokenizer(smollm), ids, cuts))


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 258), max_size=40), cuts=st.lists(st.integers(0, 1000), max_size=20))
def test_byte_fallback_in_any_chunks(ids: list[int], cuts: list[int]) -> None:
    """Sentencepiece's bytes and its space before a text follow the same rule."""
    pieces = push_in_chunks(Detokenizer(SENTENCEPIECE, is_start=True), ids, cuts)

    assert SENTENCEPIECE.decode(ids) == "".join(pieces)


def test_emoji_and_cjk_come_when_they_are_whole(smollm: Tokenizer) -> None:
    """A code point over several tokens is held back until its last one; nothing is replaced."""
    text = "👨‍👩‍👧‍👦 龘𠜎"
    detokenizer = Detokenizer(smollm)
    ids = smollm.encode(text, allow_special=False)

    pieces = [detokenizer.push([token_id]) for token_id in ids]

    assert "" in pieces
    assert text == "".join(pieces)
    assert detokenizer.finish() == ""


def test_an_unfinished_code_point_is_replaced_at_the_end(smollm: Tokenizer) -> None:
    """What never became a code point is U+FFFD, once."""
    detokenizer = Detokenizer(smollm)

    assert detokenizer.push(smollm.encode("a𐍈", allow_special=False)[:-1]) == "a"
    assert detokenizer.finish() == "\ufffd"


def test_broken_bytes_do_not_hold_back_what_follows() -> None:
    """A byte that can begin nothing is replaced at once."""
    detokenizer = Detokenizer(SENTENCEPIECE)

    assert detokenizer.push([0xFF, 257]) == "\ufffda"
    assert detokenizer.push([0xE4, 0xB8]) == ""
    assert detokenizer.push([257]) == "\ufffda"


def test_a_continuation_keeps_its_leading_space() -> None:
    """Only the beginning of a text has a space that is not its own; an answer that goes on from a prompt has not."""
    assert Detokenizer(SENTENCEPIECE).push([258]) == " ab"
    assert Detokenizer(SENTENCEPIECE, is_start=True).push([258]) == "ab"


def test_control_tokens_can_be_shown(smollm: Tokenizer) -> None:
    """They are hidden unless asked for."""
    assert Detokenizer(smollm).push([1, 2]) == ""
    assert Detokenizer(smollm, skip_special=False).push([1, 2]) == "<|im_start|><|im_end|>"


def test_time_is_linear_in_length(smollm: Tokenizer) -> None:
    """A token late in a long completion costs what an early one costs."""
    ids = smollm.encode("the quick brown fox " * 10, allow_special=False)
    detokenizer = Detokenizer(smollm)

    def time_once() -> float:
        start_s = time.perf_counter()
        for _ in range(20):
            for token_id in ids:
                detokenizer.push([token_id])
        return time.perf_counter() - start_s

    early_s = min(time_once() for _ in range(5))
    for _ in range(50):
        time_once()
    late_s = min(time_once() for _ in range(5))

    assert late_s < 5 * early_s
