"""What an answer looks like in a terminal: its text as it comes, and how fast. Knows nothing of a server's inside."""

import sys
import time
from types import TracebackType
from typing import NoReturn, Self

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from pathfox.client import FinishReason, PathfoxError

EXIT_FAILED = 1
REFRESH_PER_S = 12


def fail(error: PathfoxError) -> NoReturn:
    """Print why a call failed, one line, and end with exit code 1."""
    print(f"pathfox: {error}", file=sys.stderr)
    raise typer.Exit(EXIT_FAILED) from None


class LiveAnswer:
    """Shows one streamed answer with live tokens per second and time to first token.

    On a terminal the figures stand under the growing text; elsewhere they follow it.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._begun = time.perf_counter()
        self._first: float | None = None
        self._last = self._begun
        self._num_tokens = 0
        self._ending = ""
        self._text = Text()
        self._live = Live(console=console, refresh_per_second=REFRESH_PER_S, vertical_overflow="visible")

    def __enter__(self) -> Self:
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
            self._draw()
        else:
            self._console.out(text, end="", highlight=False)

    def finished(self, reason: FinishReason) -> None:
        """Say why the answer ended, where that is not simply its end."""
        if reason is not FinishReason.STOP:
            self._ending = f" · ended by {reason}"
            if self._console.is_terminal:
                self._draw()

    def figures(self) -> str:
        """Return tokens, tokens per second after the first, and time to first token, as one line."""
        if self._first is None:
            return "waiting for the first token"
        line = f"{self._num_tokens} tokens"
        if self._num_tokens > 1 and self._last > self._first:
            line += f" · {(self._num_tokens - 1) / (self._last - self._first):.0f} tok/s"
        return line + f" · first token after {(self._first - self._begun) * 1e3:.0f} ms{self._ending}"

    def _draw(self) -> None:
        self._live.update(Group(self._text, Text(self.figures(), style="dim")))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._live.__exit__(kind, error, traceback)
        elif error is None:
            self._console.out(f"\n[{self.figures()}]", highlight=False)
