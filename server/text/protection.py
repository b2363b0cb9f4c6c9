"""Keeps control tokens out of what users write.

A chat template joins its own control tokens with the contents of messages; once joined, a content that says
`<|im_end|>` cannot be told from the template. So each content is marked before it is rendered: a noncharacter is put
inside (or, for a control token that would only be completed by the template's text, beside) everything that could be
read as a control token. The tokenizer looks for control tokens while the marks are there and takes the marks out
before anything else: the ids are those of the ordinary encoding, except that contents never hold a control token.

A control token of a single character cannot be split by a mark and is not guarded against.
"""

import re
from collections.abc import Collection

import tokenizers
from tokenizers import AddedToken, Regex, normalizers

MARK = "\ufdd0"
"""A Unicode noncharacter. One that a user sends is followed by `_ESCAPE` while it travels."""
_ESCAPE = "\ufdd1"


class Protection:
    """Marks texts against one vocabulary's control tokens."""

    def __init__(self, special_texts: Collection[str]) -> None:
        self._specials = tuple(text for text in special_texts if text)
        starts = {text[:end] for text in self._specials for end in range(1, len(text))}
        ends = {text[start:] for text in self._specials for start in range(1, len(text))}
        self._starts = frozenset(starts)
        self._ends = frozenset(ends)
        self._longest = max(map(len, self._specials), default=0)
        self._begins = re.compile(f"(?={_alternatives(self._specials)})(.)", re.DOTALL) if self._specials else None

    def protect(self, content: str) -> str:
        """Mark whatever in a content could be read as, or become a part of, a control token."""
        if self._begins is None:
            return content
        core = content.strip()
        marked = self._begins.sub(rf"\1{MARK}", core.replace(MARK, MARK + _ESCAPE))
        if self._completes(core):
            marked = MARK + marked
        if self._opens(core):
            marked += MARK
        # Templates trim, so marks stand inside of the space around.
        start = len(content) - len(content.lstrip())
        return content[:start].replace(MARK, MARK + _ESCAPE) + marked + content[start + len(core) :]

    def _opens(self, core: str) -> bool:
        return any(core[-length:] in self._starts for length in range(1, min(self._longest, len(core) + 1)))

    def _completes(self, core: str) -> bool:
        if any(core[:length] in self._ends for length in range(1, min(self._longest, len(core) + 1))):
            return True
        return 0 < len(core) < self._longest and any(core in special for special in self._specials)


def marked_tokenizer(core: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Copy a tokenizer so that it reads control tokens first and then takes out marks."""
    copy = tokenizers.Tokenizer.from_str(core.to_str())
    # Tokens that are sought in the normalised text would be found again once the marks are gone.
    copy.add_special_tokens(
        [
            AddedToken(
                token.content,
                single_word=token.single_word,
                lstrip=token.lstrip,
                rstrip=token.rstrip,
                normalized=False,
                special=True,
            )
            for token in copy.get_added_tokens_decoder().values()
            if token.special and token.normalized
        ]
    )
    unmark = [
        normalizers.Replace(Regex(f"{MARK}(?!{_ESCAPE})"), ""),
        normalizers.Replace(MARK + _ESCAPE, MARK),
    ]
    copy.normalizer = normalizers.Sequence([*unmark, *([core.normalizer] if core.normalizer else [])])
    return copy


def _alternatives(words: Collection[str]) -> str:
    """Write words as one expression that shares their beginnings, so that a thousand of them cost little."""
    groups: dict[str, list[str]] = {}
    for word in words:
        groups.setdefault(word[:1], []).append(word[1:])
    if set(groups) == {""}:
        return ""
    options = [re.escape(first) + _alternatives(rest) for first, rest in groups.items() if first]
    return f"(?:{'|'.join(options)})" + ("?" if "" in groups else "")
