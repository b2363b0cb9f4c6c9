"""How many tokens a text has at least, told from its length: so that one which cannot fit is refused unread.

A token covers at most so many bytes of a text. That is a bound only if nothing of a text gets lost on the way to the
tokens, so it is given only for tokenizers all of whose steps are known to lose nothing; the rest have none.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from server.text.pieces import BYTE_ALPHABET

_LOSSLESS = frozenset(("ByteLevel", "Digits", "Metaspace", "Punctuation", "Split"))
_BYTE_TOKENS = frozenset(f"<0x{byte:02X}>" for byte in range(256))


@dataclass(frozen=True, slots=True)
class LengthBound:
    """What is needed to tell a text's least number of tokens."""

    longest_token_bytes: int
    unspelt: bytes = b""
    """Bytes that the vocabulary lacks: they are dropped, or a run of them is one token, so they do not count."""

    def least_tokens(self, text: str) -> int:
        """Return how many tokens a text has at least."""
        data = text.encode("utf-8", errors="ignore")
        counted = len(data.translate(None, self.unspelt)) if self.unspelt else len(data)
        return -(-counted // self.longest_token_bytes)


def read_bound(definition: Mapping[str, object], kind: str) -> LengthBound | None:
    """Find the bound of a tokenizer of a kind (`byte-level`, `byte-fallback`); None if it may lose text."""
    vocabulary = _vocabulary(definition.get("model"), kind)
    added = definition.get("added_tokens")
    normalizers = list(_steps(definition.get("normalizer"), "normalizers"))
    splitters = list(_steps(definition.get("pre_tokenizer"), "pretokenizers"))
    if vocabulary is None or not all(map(_never_shrinks, normalizers)) or not all(map(_keeps_all, splitters)):
        return None
    if not isinstance(added, list) or any(token["lstrip"] or token["rstrip"] for token in added):
        return None  # a token takes in any number of spaces
    longest = max((len(token["content"].encode()) for token in added), default=1)
    if kind == "byte-fallback":
        # As they are spelt: U+2581 may stand for a space, and for itself.
        return LengthBound(max(longest, *(len(token.encode()) for token in vocabulary)))
    if not any(step.get("type") == "ByteLevel" for step in splitters):
        return None
    unspelt = bytes(byte for character, byte in BYTE_ALPHABET.items() if character not in vocabulary)
    return LengthBound(max(longest, max(map(len, vocabulary), default=1)), unspelt)


def _vocabulary(model: object, kind: str) -> Mapping[str, int] | None:
    """Return the tokens of a model that spells all that it can; None for one that has a token for the unknown."""
    vocabulary = model.get("vocab") if isinstance(model, dict) and model.get("type") == "BPE" else None
    if not isinstance(model, dict) or not isinstance(vocabulary, dict):
        return None
    if kind == "byte-fallback" and not (model.get("byte_fallback") and vocabulary.keys() >= _BYTE_TOKENS):
        return None
    return vocabulary


def _steps(step: object, parts: str) -> Iterable[Mapping[str, object]]:
    if isinstance(step, dict):
        if step.get("type") == "Sequence":
            for part in step.get(parts, ()):
                yield from _steps(part, parts)
        else:
            yield step


def _never_shrinks(step: Mapping[str, object]) -> bool:
    if step.get("type") == "Prepend":
        return True
    pattern, content = step.get("pattern"), step.get("content")
    old = pattern.get("String") if isinstance(pattern, dict) else None
    if step.get("type") != "Replace" or not isinstance(old, str) or not isinstance(content, str):
        return False
    return len(content.encode()) >= len(old.encode())


def _keeps_all(step: Mapping[str, object]) -> bool:
    return step.get("type") in _LOSSLESS and step.get("behavior") != "Removed"
