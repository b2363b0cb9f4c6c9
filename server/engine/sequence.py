"""A sequence: one completion of a request inside the engine.

Its state is its token ids, its pages and its slot. Everything else here is a limit that the request set, or is counted
from these. Changed only by the scheduler, on the compute thread.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from server.engine.chain import TokenArray
from server.engine.drafts import Drafter
from server.messages import FinishReason, GenerateRequest, TokenLogprob

NO_SLOT = -1


class Seniority(NamedTuple):
    """Who goes first, and who loses its pages last. The smallest is the most senior."""

    arrival_step: int
    criticality: int
    serial: int
    completion: int
    """Its index in the request."""


@dataclass(slots=True, eq=False)
class Submission:
    """A request as the engine took it in: what its sequences share."""

    request: GenerateRequest
    serial: int
    """Names the request inside this engine; `request_id` is the client's and need not be unique."""
    prompt: TokenArray
    submitted_s: float
    chain_root: bytes = b""
    followers: list["Sequence"] = field(default_factory=list)
    """Sequences that wait until the first one has closed the prompt's pages, which they share."""
    sequences: list["Sequence"] = field(default_factory=list)
    """Those that have not ended."""
    ended_before: list[tuple["Sequence", FinishReason]] = field(default_factory=list)
    """Sequences that an interrupted run had ended already; told after `Started`."""
    scheduled_s: float | None = None
    """When its first row was planned."""
    is_started: bool = False
    """`Started` was sent."""


class Sequence:
    """One completion: `token_ids[:num_tokens]` is prompt + output, and the first `num_computed` are in its pages.

    What lies behind them in `token_ids` is a draft, or nothing.
    """

    __slots__ = (
        "chain_ids",
        "drafter",
        "eos_token_ids",
        "first_token_s",
        "index",
        "max_sequence_tokens",
        "max_tokens",
        "num_cached_tokens",
        "num_closed_pages",
        "num_computed",
        "num_preemptions",
        "num_prompt_tokens",
        "num_tokens",
        "page_ids",
        "prompt_logprobs",
        "seniority",
        "slot",
        "stop_token_ids",
        "submission",
        "token_ids",
    )

    def __init__(self, submission: Submission, index: int, *, seniority: Seniority, max_sequence_tokens: int) -> None:
        sampling = submission.request.sampling
        emitted = submission.request.emitted_token_ids
        output = emitted[index] if index < len(emitted) else ()
        prompt = submission.prompt
        self.submission = submission
        self.index = index
        self.seniority = seniority
        self.num_prompt_tokens = prompt.size
        self.num_tokens = prompt.size + len(output)
        room = min(prompt.size + sampling.max_tokens, max_sequence_tokens)
        self.token_ids: TokenArray = np.empty(max(room, self.num_tokens) + 1, dtype=np.int32)
        self.token_ids[: prompt.size] = prompt
        self.token_ids[prompt.size : self.num_tokens] = output
        self.page_ids: list[int] = []
        self.slot = NO_SLOT
        self.num_computed = 0
        self.num_closed_pages = 0
        self.chain_ids: list[bytes] = []
        """Of its whole pages, as far as anybody has asked."""
        self.max_tokens = sampling.max_tokens
        self.max_sequence_tokens = max_sequence_tokens
        self.eos_token_ids = frozenset(sampling.eos_token_ids)
        self.stop_token_ids = frozenset(sampling.stop_token_ids)
        wants_prompt_logprobs = index == 0 and sampling.prompt_logprobs is not None
        self.prompt_logprobs: list[TokenLogprob] | None = [] if wants_prompt_logprobs else None
        self.drafter: Drafter | None = None
        """Guesses at its next tokens, once somebody asked for it. Not state: without it the answer is the same."""
        self.num_cached_tokens = 0
        self.num_preemptions = 0
        self.first_token_s: float | None = None

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated, those of an interrupted run included."""
        return self.num_tokens - self.num_prompt_tokens

    @property
    def num_remaining(self) -> int:
        """Rows to compute before the next token can be sampled."""
        return self.num_tokens - self.num_computed

    @property
    def num_backlog_tokens(self) -> int:
        """Tokens not yet computed or generated."""
        return self.num_remaining + max(self.num_free_tokens, 0)

    @property
    def num_free_tokens(self) -> int:
        """Tokens that may follow before a limit ends the sequence."""
        return min(self.max_tokens - self.num_output_tokens, self.max_sequence_tokens - self.num_tokens)

    @property
    def known_tokens(self) -> TokenArray:
        """Return a view of prompt + output."""
        return self.token_ids[: self.num_tokens]

    @property
    def first_needed_position(self) -> int:
        """Position of the first row whose logits are wanted; pages at or after it must be computed, not found."""
        reported = self.prompt_logprobs
        if reported is not None and len(reported) < self.num_prompt_tokens - 1:
            return len(reported)
        return self.num_tokens - 1

    def accept(self, token_id: int) -> FinishReason | None:
        """Append a sampled token; return why the sequence ends with it, or None."""
        self.token_ids[self.num_tokens] = token_id
        self.num_tokens += 1
        if token_id in self.eos_token_ids:
            return FinishReason.STOP
        if token_id in self.stop_token_ids:
            return FinishReason.STOP_SEQUENCE
        return self.limit_reached()

    def ends_with(self, token_id: int) -> bool:
        """Whether this token ends the sequence, whatever its limits."""
        return token_id in self.eos_token_ids or token_id in self.stop_token_ids

    def limit_reached(self) -> FinishReason | None:
        """Return which limit leaves no room for another token, or None."""
        if self.num_output_tokens >= self.max_tokens:
            return FinishReason.LENGTH
        if self.num_tokens >= self.max_sequence_tokens:
            return FinishReason.CONTEXT_FULL
        return None

    def finished_before(self) -> FinishReason | None:
        """Return why an interrupted run had ended already, or None.

        The end-of-turn token is never among emitted tokens: it is sampled again.
        """
        if not self.num_output_tokens:
            return None
        if int(self.token_ids[self.num_tokens - 1]) in self.stop_token_ids:
            return FinishReason.STOP_SEQUENCE
        return self.limit_reached()
