"""One of a request's n completions: tokens in, text out, and how it ends.

Owns the detokeniser and the stop matcher of its index, and the count of its tokens. Knows no proto and no source.
"""

from typing import NamedTuple

from server.errors import FailedPrecondition
from server.frontend.requests import SamplingChoices
from server.messages import Finished, FinishReason, TokenDelta, TokenLogprob
from server.text.detokenizer import Detokenizer
from server.text.stop import StopMatcher
from server.text.tokenizer import Tokenizer


class Piece(NamedTuple):
    """What a delta of tokens added."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]


class End(NamedTuple):
    """How a completion ended."""

    reason: FinishReason
    matched_stop: str | int | None
    completion_tokens: int
    decode_s: float


class Completion:
    """Turns one completion's tokens into text and watches for its stop strings.

    Args:
        tokenizer: None: the text stays empty.
        choices: stop strings, and min_tokens before which none of them counts.
        echo: text that goes before the completion's own; stop strings are not looked for in it.

    Raises:
        FailedPrecondition: stop strings for a model that has no tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer | None, choices: SamplingChoices, *, echo: str = "") -> None:
        if tokenizer is None and choices.stop:
            raise FailedPrecondition("the model has no tokenizer, so it has no stop strings; use stop_token_ids")
        self._detokenizer = None if tokenizer is None else Detokenizer(tokenizer)
        self._matcher = StopMatcher(choices.stop) if choices.stop else None
        self._min_tokens = choices.min_tokens
        self._echo = echo
        self.num_tokens = 0
        """Sent, or about to be."""
        self.end: End | None = None

    def push(self, delta: TokenDelta) -> Piece | None:
        """Take new tokens; None when the completion is over and they are to be dropped."""
        if self.end is not None:
            return None
        echo, self._echo = self._echo, ""
        if self._detokenizer is None or self._matcher is None:
            self.num_tokens += len(delta.token_ids)
            text = "" if self._detokenizer is None else self._detokenizer.push(delta.token_ids)
            return Piece(echo + text, delta.token_ids, delta.logprobs)
        texts = [echo]
        for place, token_id in enumerate(delta.token_ids, start=1):
            self.num_tokens += 1
            text = self._detokenizer.push((token_id,))
            if self.num_tokens <= self._min_tokens:
                texts.append(text)
                continue
            result = self._matcher.push(text)
            texts.append(result.text)
            if result.matched is not None:
                # The token that completes a stop string is the completion's last; its text up to the match is sent.
                self.end = End(FinishReason.STOP_SEQUENCE, result.matched, self.num_tokens, 0.0)
                return Piece("".join(texts), delta.token_ids[:place], delta.logprobs[:place])
        return Piece("".join(texts), delta.token_ids, delta.logprobs)

    def finish(self, event: Finished) -> str | None:
        """Take the source's end; return the text that was held back, or None when a stop string ended it before."""
        if self.end is not None:
            return None
        self.end = End(event.reason, event.matched_stop_token_id, event.completion_tokens, event.decode_s)
        return self._rest()

    def cancel(self) -> str:
        """End it where it is; return the text that was held back."""
        self.end = End(FinishReason.CANCELLED, None, self.num_tokens, 0.0)
        return self._rest()

    def _rest(self) -> str:
        echo, self._echo = self._echo, ""
        if self._detokenizer is None:
            return echo
        text = self._detokenizer.finish()
        if self._matcher is None:
            return echo + text
        result = self._matcher.push(text)
        return echo + result.text + ("" if result.matched else self._matcher.finish())
