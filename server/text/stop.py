"""Stop strings in a stream of text.

On the request path: after the detokeniser, before the client. Owns the text that could still turn out to begin a stop
string: never more than the longest one less one character. Knows nothing of tokens.

All stop strings are walked at once, by the automaton of Aho and Corasick ("Efficient string matching", 1975): a
character costs the same for one stop string and for sixteen.
"""

from collections import deque
from collections.abc import Iterable
from typing import NamedTuple


class StopResult(NamedTuple):
    """What a piece of text led to."""

    text: str
    """Safe to send: no stop string begins in it."""
    matched: str | None
    """The stop string that ended the completion; nothing after it is looked at."""


class _State:
    """A prefix of some stop strings, reached when the text ends with it."""

    __slots__ = ("depth", "fallback", "match", "next")

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.next: dict[str, _State] = {}
        self.fallback: _State | None = None
        """The longest shorter prefix that the text ends with too; None at the root."""
        self.match: str | None = None
        """The longest stop string that the text ends with."""


class StopMatcher:
    """Finds the stop string that is complete first; of those that are complete at the same character, the longest.

    The answer does not depend on how the text is cut into pieces.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._root = _automaton([stop for stop in stops if stop])
        self._state = self._root
        self._held = ""

    def push(self, text: str) -> StopResult:
        """Take the next piece of text. After a match, call no more."""
        if not self._root.next:
            return StopResult(text, None)
        state = self._state
        for end, character in enumerate(text, start=len(self._held) + 1):
            state = _step(state, character)
            if state.match is not None:
                whole = self._held + text
                self._held = ""
                return StopResult(whole[: end - len(state.match)], state.match)
        self._state = state
        whole = self._held + text
        safe = len(whole) - state.depth
        self._held = whole[safe:]
        return StopResult(whole[:safe], None)

    def finish(self) -> str:
        """Return what was held back: the text ended before it became a stop string."""
        held, self._held, self._state = self._held, "", self._root
        return held


def _step(state: _State, character: str) -> _State:
    while True:
        following = state.next.get(character)
        if following is not None:
            return following
        if state.fallback is None:
            return state
        state = state.fallback


def _automaton(stops: Iterable[str]) -> _State:
    root = _State(0)
    for stop in stops:
        state = root
        for character in stop:
            state = state.next.setdefault(character, _State(state.depth + 1))
        state.match = stop
    queue = deque(root.next.values())
    for state in queue:
        state.fallback = root
    while queue:
        state = queue.popleft()
        for character, following in state.next.items():
            following.fallback = _step(state.fallback or root, character)
            following.match = following.match or following.fallback.match
            queue.append(following)
    return root
