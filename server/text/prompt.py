"""What a request says to the token ids of its prompt: where template and tokenizer meet.

Raw `text` is the caller's own prompt: control tokens in it are read, as everywhere in the field. The contents of
`messages` are not: what somebody wrote into a conversation can never end a turn or begin another. See `protection.py`.
"""

from collections.abc import Sequence

from server.text.template import ChatMessage, ChatTemplate
from server.text.tokenizer import Tokenizer


def encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """Encode a raw prompt: control tokens are read, and the model's beginning-of-text comes first."""
    return tokenizer.encode_prompt(text)


def encode_messages(
    tokenizer: Tokenizer, template: ChatTemplate, messages: Sequence[ChatMessage], *, add_generation_prompt: bool = True
) -> list[int]:
    """Encode a conversation. Contents that hold no control token give the ids of the rendered text.

    Raises:
        InvalidRequest, FailedPrecondition: as `ChatTemplate.render`.
    """
    guarded = [ChatMessage(each.role, tokenizer.protect(each.content)) for each in messages]
    return tokenizer.encode_protected(template.render(guarded, add_generation_prompt=add_generation_prompt))
