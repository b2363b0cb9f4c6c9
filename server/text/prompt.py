"""What a request says to the token ids of its prompt: where template and tokenizer meet.

Raw `text` is the caller's own prompt: control tokens in it are read, as everywhere in the field. The contents of
`messages` are not: what somebody wrote into a conversation can never end a turn or begin another. See `protection.py`.
"""

from collections.abc import Sequence

from server.errors import ContextLengthExceeded
from server.text.template import ChatMessage, ChatTemplate
from server.text.tokenizer import Tokenizer


def encode_text(tokenizer: Tokenizer, text: str, *, most_tokens: int | None = None) -> list[int]:
    """Encode a raw prompt: control tokens are read, and the model's beginning-of-text comes first.

    Raises:
        ContextLengthExceeded: as `refuse_too_long`.
    """
    refuse_too_long(tokenizer, text, most_tokens)
    return tokenizer.encode_prompt(text)


def encode_messages(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Sequence[ChatMessage],
    *,
    add_generation_prompt: bool = True,
    most_tokens: int | None = None,
) -> list[int]:
    """Encode a conversation. Contents that hold no control token give the ids of the rendered text.

    Raises:
        InvalidRequest, FailedPrecondition: as `ChatTemplate.render`.
        ContextLengthExceeded: as `refuse_too_long`.
    """
    guarded = [ChatMessage(each.role, tokenizer.protect(each.content)) for each in messages]
    rendered = template.render(guarded, add_generation_prompt=add_generation_prompt)
    # Only now: a template may leave out or trim what it is given.
    refuse_too_long(tokenizer, rendered, most_tokens)
    return tokenizer.encode_protected(rendered)


def refuse_too_long(tokenizer: Tokenizer, text: str, most_tokens: int | None) -> None:
    """Spare the work of encoding a text that is too long in any case. Most that are too long are found later.

    Raises:
        ContextLengthExceeded: it has more tokens than allowed, however it is cut; says how many at least.
    """
    if most_tokens is None:
        return
    least = tokenizer.least_tokens(text)
    if least > most_tokens:
        raise ContextLengthExceeded(prompt_tokens=least, max_tokens=0, limit=most_tokens, is_least=True)
