import time

from hypothesis import given, settings
from hypothesis import strategies as st

from server.text.stop import StopMatcher


def search(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The definition, word for word: the match that is complete first; among those the longest."""
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if stop and text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


def run(pieces: list[str], stops: list[str]) -> tuple[str, str | None]:
    """Push pieces until a match or the end."""
    matcher = StopMatcher(stops)
    sent = ""
    for piece in pieces:
        result = matcher.push(piece)
        sent += result.text
        if result.matched is not None:
            return sent, result.matched
    return sent + matcher.finish(), None


few_letters = st.text(alphabet="abc", max_size=6)


@settings(max_examples=500, deadline=None)
@given(pieces=st.lists(few_letters, max_size=12), stops=st.lists(few_letters, max_size=6))
def test_any_cut_gives_the_result_of_a_search_in_the_whole_text(pieces: list[str], stops: list[str]) -> None:
    """Text and match depend on the text only, never on where it is cut."""
    assert search("".join(pieces), stops) == run(pieces, stops)


@settings(max_examples=300, deadline=None)
@given(pieces=st.lists(few_letters, max_size=12), stops=st.lists(few_letters, min_size=1, max_size=6))
def test_holds_back_only_what_could_still_begin_a_stop(pieces: list[str], stops: list[str]) -> None:
    """What is held back is the longest end of the text that begins a stop string."""
    matcher = StopMatcher(stops)
    text = sent = ""
    for piece in pieces:
        text += piece
        result = matcher.push(piece)
        if result.matched is not None:
            return
        sent += result.text
        held = text[len(sent) :]
        assert text == sent + held
        prefixes = {stop[:length] for stop in stops for length in range(1, len(stop))}
        longest = max((len(each) for each in prefixes if text.endswith(each)), default=0)
        assert len(held) == longest


def test_without_stops_everything_passes() -> None:
    """No stop strings, or only empty ones, hold nothing back."""
    assert StopMatcher([]).push("abc") == ("abc", None)
    assert StopMatcher([""]).push("abc") == ("abc", None)


def test_a_stop_across_pieces() -> None:
    """A stop string that comes in three pieces is found, and none of it is sent."""
    matcher = StopMatcher(["\n\nUser:"])

    assert matcher.push("Hi.\n") == ("Hi.", None)
    assert matcher.push("\nUs") == ("", None)
    assert matcher.push("er: more") == ("", "\n\nUser:")


def test_a_false_start_is_sent_when_it_is_one() -> None:
    """What was held back comes as soon as it cannot become a stop string."""
    matcher = StopMatcher(["<end>"])

    assert matcher.push("a<en") == ("a", None)
    assert matcher.push("try") == ("<entry", None)


def test_the_end_gives_what_is_held() -> None:
    """A text that ends inside of a stop string loses nothing."""
    matcher = StopMatcher(["<end>"])
    matcher.push("a<en")

    assert matcher.finish() == "<en"
    assert matcher.finish() == ""


def test_the_first_complete_match_wins() -> None:
    """A short stop string that is complete ends the text, even if a longer one began before it."""
    assert StopMatcher(["abcdef", "bc"]).push("abcdef") == ("a", "bc")
    assert StopMatcher(["c", "abc"]).push("xabc") == ("x", "abc")


def test_sixteen_long_stops_are_fast() -> None:
    """The most that a request may ask for costs little: 16 x 256 characters on a text that keeps almost matching."""
    stops = ["a" * 255 + chr(ord("b") + number) for number in range(16)]
    start_s = time.perf_counter()
    matcher = StopMatcher(stops)
    for _ in range(1000):
        matcher.push("a" * 20)
    assert matcher.push("b").matched == stops[0]

    assert time.perf_counter() - start_s < 1.0
