"""What a server looks like to the load: asks go in, tokens come out, whatever protocol it speaks."""

import enum
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from server.cli.bench.recording import Outcome, Usage


class ProtocolName(enum.StrEnum):
    """What a server may speak."""

    PATHFOX = "pathfox"
    VLLM = "vllm"
    """vLLM's engine service."""
    OIP = "oip"
    """The Open Inference Protocol v2, as Triton streams it."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One request, in no protocol."""

    prompt: Sequence[int]
    """Token ids."""
    max_tokens: int
    temperature: float
    seed: int
    """At most 63 bits; a protocol that has fewer takes the lowest."""
    ignore_eos: bool


class Codec(Protocol):
    """What turns text into tokens and back: `server.text.tokenizer.Tokenizer`, which costs its import only if asked."""

    @property
    def vocabulary_size(self) -> int:
        """Token ids are below it."""
        ...

    def encode(self, text: str, *, allow_special: bool) -> list[int]:
        """Cut a text into tokens."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Join tokens to a text."""
        ...


class Heard(NamedTuple):
    """One message of an answer."""

    num_tokens: int
    """Output tokens up to its end."""
    text: str = ""
    """What is new; empty where the protocol sends token ids only."""
    usage: Usage | None = None
    """By the server's count, where this message has it."""


class Served(NamedTuple):
    """A model, as its server describes it."""

    name: str
    vocabulary_size: int
    """0 = the server does not say."""
    context_length_tokens: int
    """0 = the server does not say."""


class CallFailed(Exception):
    """A call ended without an answer, or without the rest of it."""

    def __init__(self, status: str, message: str, *, is_refusal: bool = False) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status
        self.message = message
        self.outcome = Outcome.REJECTED if is_refusal else Outcome.FAILED


class Target(Protocol):
    """A server and the protocol that it speaks."""

    async def served(self) -> Served:
        """Ask what is served.

        Raises:
            CallFailed: nobody answers in time, or there is no such model.
        """
        ...

    async def tokens_of(self, text: str) -> list[int]:
        """Tokenise a text.

        Raises:
            CallFailed: the server cannot.
            ConfigError: the protocol cannot, and no tokenizer was given.
        """
        ...

    def answer(self, ask: Ask, *, timeout_s: float) -> AsyncIterator[Heard]:
        """Send a request and yield its answer message by message; ends when the answer is whole.

        Raises:
            CallFailed: it was refused, or broke off.
        """
        ...
