"""What each token says, in bytes: the one table behind all decoding.

The library decodes whole id lists; a stream wants each token once, and a code point may be spread over tokens. Both
kinds of vocabulary that language models use can be read as "token = bytes", so that is what is kept:

- byte-level (GPT-2's alphabet): each character of a token stands for one byte;
- byte-fallback (sentencepiece): a token is text with U+2581 for space, or `<0xE4>` for one byte.
"""

import re
from collections.abc import Iterable, Mapping

import tokenizers

from server.errors import ModelLoadError

_SENTENCEPIECE_SPACE = "\u2581"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's characters for bytes: printable ones stand for themselves, the others are moved up to U+0100 and on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    for offset, byte in enumerate(byte for byte in range(256) if byte not in printable):
        alphabet[chr(0x100 + offset)] = byte
    return alphabet


BYTE_ALPHABET: Mapping[str, int] = _byte_alphabet()


class Pieces:
    """Bytes of each token, filled as they are asked for."""

    def __init__(self, core: tokenizers.Tokenizer, *, kind: str, has_dummy_space: bool) -> None:
        added = core.get_added_tokens_decoder()
        self.kind = kind
        self.has_dummy_space = has_dummy_space
        """The first token of a text begins with a space that is not in the text."""
        self.vocabulary_size = max(core.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.special_texts = tuple(token.content for token in added.values() if token.special)
        self.has_normalized_specials = any(token.special and token.normalized for token in added.values())
        """Control tokens are looked for in a text that was changed first (lower case, say)."""
        self._added = {token_id: token.content for token_id, token in added.items()}
        self._core = core
        self._known: dict[int, bytes] = {}

    def of(self, token_id: int) -> bytes:
        """Return a token's bytes; none for an id that is not in the vocabulary."""
        piece = self._known.get(token_id)
        if piece is None:
            piece = self._known[token_id] = self._read(token_id)
        return piece

    def _read(self, token_id: int) -> bytes:
        if not 0 <= token_id < self.vocabulary_size:
            return b""
        token: str | None = self._core.id_to_token(token_id)
        if token is None:
            return b""
        if token_id in self._added:
            return token.encode("utf-8")
        return _byte_level(token) if self.kind == "byte-level" else _byte_fallback(token)


def read_pieces(core: tokenizers.Tokenizer, definition: Mapping[str, object], path: str) -> Pieces:
    """Choose the reading of tokens by the decoder that the tokenizer's definition names.

    Raises:
        ModelLoadError: tokens of that decoder are not pieces of text that can be put in a row.
    """
    steps = list(_decoder_steps(definition.get("decoder")))
    names = {str(step.get("type")) for step in steps}
    if names == {"ByteLevel"}:
        return Pieces(core, kind="byte-level", has_dummy_space=False)
    if names and names <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"} and _spells_spaces(steps):
        return Pieces(core, kind="byte-fallback", has_dummy_space=any(map(_strips_start, steps)))
    shown = ", ".join(sorted(names)) or "none"
    raise ModelLoadError(path, f"its decoder ({shown}) is neither byte-level nor sentencepiece's")


def _byte_level(token: str) -> bytes:
    try:
        return bytes([BYTE_ALPHABET[character] for character in token])
    except KeyError:  # a token of the file that was never spelt in bytes
        return token.encode("utf-8")


def _byte_fallback(token: str) -> bytes:
    match = _BYTE_TOKEN.fullmatch(token)
    return bytes([int(match[1], 16)]) if match else token.replace(_SENTENCEPIECE_SPACE, " ").encode("utf-8")


def _decoder_steps(decoder: object) -> Iterable[Mapping[str, object]]:
    if isinstance(decoder, dict):
        parts = decoder.get("decoders") if decoder.get("type") == "Sequence" else None
        if isinstance(parts, list):
            for part in parts:
                yield from _decoder_steps(part)
        else:
            yield decoder


def _spells_spaces(steps: Iterable[Mapping[str, object]]) -> bool:
    """Tell whether U+2581 is the only thing that is replaced, by a space."""
    for step in steps:
        if step.get("type") == "Replace" and (
            step.get("pattern") != {"String": _SENTENCEPIECE_SPACE} or step.get("content") != " "
        ):
            return False
        if step.get("type") == "Metaspace" and step.get("replacement") != _SENTENCEPIECE_SPACE:
            return False
    return True


def _strips_start(step: Mapping[str, object]) -> bool:
    if step.get("type") == "Strip":
        return step.get("content") == " " and step.get("start") == 1
    return step.get("type") == "Metaspace" and step.get("prepend_scheme") != "never"
