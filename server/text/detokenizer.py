"""Token ids to text, as they come.

On the request path: one for each completion, between the token source and the stop matcher. Owns at most the bytes of
one unfinished code point. Each token is looked at once, so a completion costs time linear in its length.
"""

import codecs
from collections.abc import Iterable

from server.text.tokenizer import Tokenizer


class Detokenizer:
    """Turns one completion's ids into valid text; a code point is never split.

    What it gives in all is `tokenizer.decode(ids)`, however the ids are cut.

    Args:
        tokenizer: The model's vocabulary.
        is_start: The first id begins a text (an echo of the prompt) instead of going on from a prompt: the space that
            sentencepiece puts before a text is taken off.
        skip_special: Say nothing for control tokens.
    """

    def __init__(self, tokenizer: Tokenizer, *, is_start: bool = False, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._is_start = is_start
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_ids: Iterable[int]) -> str:
        """Take the next ids and return the text that is now whole."""
        token_bytes = self._tokenizer.token_bytes
        data = b"".join([token_bytes(token_id, skip_special=self._skip_special) for token_id in token_ids])
        return self._emit(self._utf8.decode(data))

    def finish(self) -> str:
        """Return what is pending: U+FFFD for a code point that was never completed."""
        return self._emit(self._utf8.decode(b"", final=True))

    def _emit(self, text: str) -> str:
        if text and self._is_start:
            self._is_start = False
            return self._tokenizer.strip_start(text)
        return text
