"""Chat messages to the text that a model was trained to continue.

On the request path: before the tokenizer, when the input is messages. Owns one compiled template. Knows nothing of
tokens. Follows the conventions of Hugging Face chat templates (names, trimmed blocks, `tojson`, `raise_exception`,
`strftime_now`); `bounds.py` keeps a template from doing more than that.
"""

import datetime as dt
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, NoReturn

from jinja2 import TemplateSyntaxError

from server.errors import FailedPrecondition, InvalidRequest, ModelLoadError
from server.text.bounds import BoundedEnvironment, Budget, WorkLimitError, spending


class ChatMessage(NamedTuple):
    """One message of a conversation."""

    role: str
    """`system`, `user`, `assistant` or `tool`."""
    content: str


class ChatTemplate:
    """One model's chat template. Immutable; may be used from several threads.

    Args:
        source: Jinja source.
        special_tokens: Text by role, for example `bos_token`; templates write them.
        now: Clock behind `strftime_now`.

    Raises:
        ModelLoadError: the source is no template.
    """

    def __init__(
        self,
        source: str,
        *,
        special_tokens: Mapping[str, str] | None = None,
        now: Callable[[], dt.datetime] = lambda: dt.datetime.now().astimezone(),
    ) -> None:
        environment = BoundedEnvironment()
        environment.add_filter("tojson", _to_json)
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda pattern: now().strftime(pattern)
        try:
            with spending(Budget()):
                self._template = environment.from_string(source)
        except TemplateSyntaxError as error:
            raise ModelLoadError("chat template", f"line {error.lineno}: {error.message}") from error
        except (RecursionError, WorkLimitError) as error:
            raise ModelLoadError("chat template", f"is not reasonable: {error}") from error
        self._special_tokens = dict(special_tokens or {})

    def render(self, messages: Sequence[ChatMessage], *, add_generation_prompt: bool = True) -> str:
        """Write a conversation as the model reads it.

        Args:
            messages: The conversation so far, in order.
            add_generation_prompt: End with the beginning of the assistant's answer.

        Raises:
            InvalidRequest: the template refuses this conversation (say, two user messages in a row).
            FailedPrecondition: the template itself fails, or was stopped because it does too much.
        """
        budget = Budget(
            num_messages=len(messages), message_weight=sum(len(each.role) + len(each.content) for each in messages)
        )
        values = {
            **self._special_tokens,
            "messages": [each._asdict() for each in messages],
            "add_generation_prompt": add_generation_prompt,
            "tools": None,
            "documents": None,
        }
        try:
            with spending(budget):
                return self._template.render(values)
        except _RefusedError as error:
            roles = ", ".join(each.role for each in messages)
            raise InvalidRequest.of("messages", seen=roles, limit=f"what the template takes: {error}") from error
        except WorkLimitError as error:
            raise FailedPrecondition(
                f"the model's chat template was stopped: {error}; send text or token_ids instead"
            ) from error
        except Exception as error:  # a template may fail in any way that Python can
            raise FailedPrecondition(f"the model's chat template failed: {error or type(error).__name__}") from error


_PROBE = (
    ChatMessage("user", "One, two,\n\nthree?"),
    ChatMessage("assistant", "<think>\nhm\n</think>\n\nFour."),
    ChatMessage("user", " Five? "),
    ChatMessage("assistant", "Six.\n"),
    ChatMessage("user", "Seven?"),
)


def is_prefix_stable(template: ChatTemplate) -> bool:
    """Tell whether a conversation that goes on begins with what it was: the condition for keeping it as token ids.

    Templates that rewrite earlier turns (drop a thought, move the system message) are not.
    """
    try:
        texts = [
            template.render(_PROBE[:length], add_generation_prompt=_PROBE[length - 1].role == "user")
            for length in range(1, len(_PROBE) + 1)
        ]
    except (InvalidRequest, FailedPrecondition):
        return False
    return all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))


class _RefusedError(Exception):
    """What a template raised on purpose."""


def _raise_exception(message: object) -> NoReturn:
    raise _RefusedError(str(message))


def _to_json(
    value: object,
    *,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    if indent is not None and not 0 <= indent <= 16:
        raise WorkLimitError("it indents JSON too far")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
