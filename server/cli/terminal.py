"""What an answer looks like in a terminal: text as it comes, and how fast it comes. Knows nothing of servers."""

import time
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

REFRESH_PER_S = 12


class LiveAnswer:
    """Shows one streamed answer with live tokens per second and time to first token.

    On a terminal the figures stand under the growing text; elsewhere text is written as it comes and the figures follow it.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._begun = time.perf_counter()
        self._first: float | None = None
        self._last = self._begun
        self._num_tokens = 0
        self._text = Text()
        self._live = Live(console=console, refresh_per_second=REFRESH_PER_S, vertical_overflow="visible")

    def __enter__(self) -> "LiveAnswer":
        if self._console.is_terminal:
            self._live.__enter__()
        return self

    def add(self, text: str, *, num_tokens: int) -> None:
        """Show more text. `num_tokens` counts all of this answer's tokens so far."""
        self._last = time.perf_counter()
        if self._first is None:
            self._first = self._last
        self._num_tokens = num_tokens
        if self._console.is_terminal:
            self._text.append(text)
            self._live.update(Group(self._text, Text(self.figures(), style="dim")))
        else:
            self._console.out(text, end="", highlight=False)

    def figures(self) -> str:
        """Return tokens, tokens per second after the first, and time to first token, as one line."""
        if self._first is None:
            return "waiting for the first token"
        line = f"{self._num_tokens} tokens"
        if self._num_tokens > 1 and self._last > self._first:
            line += f" · {(self._num_tokens - 1) / (self._last - self._first):.0f} tok/s"
        return line + f" · first token after {(self._first - self._begun) * 1e3:.0f} ms"

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._console.is_terminal:
            self._live.__exit__(kind, error, traceback)
        elif error is None:
            self._console.out(f"\n[{self.figures()}]", highlight=False)
