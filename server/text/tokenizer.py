"""Text to token ids and back.

On the request path: the front end turns a prompt into ids here, before the engine sees it, and ids into text after.
Owns the vocabulary and what each token says in bytes. Knows nothing of requests, templates or models.

Built on the `tokenizers` library for encoding. Decoding is our own, from one table of bytes per token: it is then the
same thing whether the ids come all at once or one by one (`detokenizer.py`).
"""

import functools
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import tokenizers

from server.errors import ModelLoadError
from server.text import gguf, lengths, pieces, protection

# The library would share a batch out among threads of its own, and warn whoever forks later. Our batches are one text.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # noqa: TID251 (sets what the library reads; reads nothing)

_SPECIAL_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


class Tokenizer:
    """One model's vocabulary. Immutable; may be used from several threads."""

    def __init__(self, core: tokenizers.Tokenizer, *, special_tokens: Mapping[str, str], path: str) -> None:
        definition = core.to_str()
        parsed = json.loads(definition)
        self._core = core
        self._plain = tokenizers.Tokenizer.from_str(definition)
        self._plain.encode_special_tokens = True
        self._pieces = pieces.read_pieces(core, parsed, path)
        self._bound = lengths.read_bound(parsed, self._pieces.kind)
        self._prefix = _prompt_prefix(core)
        self.special_tokens = dict(special_tokens)
        """Text by role (`bos_token`, `eos_token`, ...), as chat templates want it."""
        self.digest = hashlib.blake2b(definition.encode(), digest_size=16).hexdigest()
        """Equal digests tokenise equally."""

    @classmethod
    def from_file(cls, path: Path) -> "Tokenizer":
        """Read a tokenizer.json, and the names of its special tokens from tokenizer_config.json beside it.

        Raises:
            ModelLoadError: the file is no tokenizer, or is of a kind that cannot be decoded piece by piece.
        """
        try:
            core = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ModelLoadError(str(path), f"cannot be read as a tokenizer: {error}") from error
        core.no_padding()
        core.no_truncation()
        return cls(core, special_tokens=_read_special_tokens(path.with_name("tokenizer_config.json")), path=str(path))

    @classmethod
    def from_gguf_metadata(cls, metadata: Mapping[str, object], *, path: str = "GGUF metadata") -> "Tokenizer":
        """Build the tokenizer that a GGUF file describes under `tokenizer.ggml.`.

        Raises:
            ModelLoadError: the kind or its pre-tokenizer is not known (give a tokenizer.json then), or data is missing.
        """
        core, special_tokens = gguf.read_tokenizer(metadata, path)
        return cls(core, special_tokens=special_tokens, path=path)

    @property
    def kind(self) -> str:
        """How tokens spell text: `byte-level` or `byte-fallback`."""
        return self._pieces.kind

    @property
    def vocabulary_size(self) -> int:
        """One more than the largest token id."""
        return self._pieces.vocabulary_size

    @property
    def longest_token_bytes(self) -> int | None:
        """How much of a text one token takes at most; None where a text may lose any part of itself on the way."""
        return self._bound.longest_token_bytes if self._bound else None

    def least_tokens(self, text: str) -> int:
        """Tell from its length how many tokens a text has at least, `protect`ed or not; much faster than encoding."""
        return self._bound.least_tokens(text.replace(protection.MARK, "")) if self._bound else 0

    def encode(self, text: str, *, allow_special: bool) -> list[int]:
        """Cut a text into token ids, and add nothing to them.

        Args:
            text: Any text.
            allow_special: Read `<|im_end|>` and its like as control tokens; else as the characters that they are.
        """
        core = self._core if allow_special else self._plain
        return _encode(core, text)

    def encode_prompt(self, text: str) -> list[int]:
        """Turn a raw prompt into ids: control tokens are read, and the model's beginning-of-text comes first, once."""
        ids = self.encode(text, allow_special=True)
        return ids if ids[: len(self._prefix)] == self._prefix else [*self._prefix, *ids]

    def protect(self, content: str) -> str:
        """Mark a text so that `encode_protected` reads no control token in it, wherever a template may put it."""
        return self._protection.protect(content)

    def encode_protected(self, rendered: str) -> list[int]:
        """Encode a rendered template whose untrusted parts went through `protect`.

        The template's own control tokens are read; what users wrote is ordinary text. Without a mark in it this is
        `encode(rendered, allow_special=True)`, and so are the ids around a mark (except that control tokens which the
        vocabulary looks for in normalised text are looked for in the text as it is written).
        """
        if protection.MARK not in rendered and not self._pieces.has_normalized_specials:
            return self.encode(rendered, allow_special=True)
        return _encode(self._marked, rendered)

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Turn ids into text. Broken UTF-8 becomes U+FFFD; ids outside the vocabulary say nothing."""
        data = b"".join(self.token_bytes(token_id, skip_special=skip_special) for token_id in ids)
        return self.strip_start(data.decode("utf-8", errors="replace"))

    def token_bytes(self, token_id: int, *, skip_special: bool = True) -> bytes:
        """Return what a token says, as a part of UTF-8 text; nothing for a control token unless asked for."""
        return b"" if skip_special and token_id in self._pieces.special_ids else self._pieces.of(token_id)

    def token_text(self, token_id: int) -> str:
        """Return a token's text where it is text by itself, else nothing."""
        try:
            return self._pieces.of(token_id).decode("utf-8")
        except UnicodeDecodeError:
            return ""

    def strip_start(self, text: str) -> str:
        """Take off what the tokenizer put before the beginning of a text (sentencepiece's space)."""
        return text.removeprefix(" ") if self._pieces.has_dummy_space else text

    @functools.cached_property
    def _protection(self) -> protection.Protection:
        return protection.Protection(self._pieces.special_texts)

    @functools.cached_property
    def _marked(self) -> tokenizers.Tokenizer:
        return protection.marked_tokenizer(self._core)


def _encode(core: tokenizers.Tokenizer, text: str) -> list[int]:
    """Encode one text without holding the interpreter's lock: the library lets go of it for batches only."""
    [encoding] = core.encode_batch_fast([text], add_special_tokens=False)
    ids: list[int] = encoding.ids
    return ids


def _prompt_prefix(core: tokenizers.Tokenizer) -> list[int]:
    """Return the ids that the post-processor puts before a text."""
    plain: list[int] = core.encode("a", add_special_tokens=False).ids
    full: list[int] = core.encode("a", add_special_tokens=True).ids
    for start in range(len(full) - len(plain) + 1):
        if plain and full[start : start + len(plain)] == plain:
            return full[:start]
    return []


def _read_special_tokens(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelLoadError(str(path), f"is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ModelLoadError(str(path), "is not a JSON object")
    found: dict[str, str] = {}
    for name in _SPECIAL_TOKEN_NAMES:
        value = config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            found[name] = text
    return found
