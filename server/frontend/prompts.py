"""What a client wrote becomes the token ids of a prompt, off the event loop where that takes long.

Between `wire.py` and admission. Owns a few threads; knows tokenizers and templates through the served model only.
"""

import asyncio
import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from server.errors import FailedPrecondition
from server.frontend.models import ServedModel
from server.frontend.requests import Prompt
from server.text.prompt import encode_messages, encode_text, refuse_too_long
from server.text.template import ChatMessage, is_prefix_stable

T = TypeVar("T")

MAX_INLINE_CHARACTERS = 2048
"""Longer texts go to a thread: at 1 to 2 microseconds a character this is where a hop costs less than a stall."""


class Prompts:
    """Tokenises. Threads end with `close`."""

    def __init__(self, num_threads: int) -> None:
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="text")

    def close(self) -> None:
        """Let the threads end; what they are at is finished and forgotten."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def encode(self, model: ServedModel, prompt: Prompt, *, most_tokens: int | None = None) -> tuple[int, ...]:
        """Make a prompt's token ids.

        Args:
            model: whose tokenizer it is.
            prompt: as the client gave it.
            most_tokens: a text that has more of them however it is cut is not worth cutting; None: the context.

        Raises:
            ContextLengthExceeded: its length alone says that it has too many tokens.
            FailedPrecondition: the model has no tokenizer or no template for this, or its template fails.
            InvalidRequest: the template refuses the conversation.
        """
        most = model.info.context_length_tokens if most_tokens is None else most_tokens
        match prompt:
            case None:
                return ()
            case str():
                tokenizer = model.need_tokenizer()
                return tuple(await self._run(len(prompt), lambda: encode_text(tokenizer, prompt, most_tokens=most)))
            case (ChatMessage(), *_):
                messages = [each for each in prompt if isinstance(each, ChatMessage)]
                tokenizer, template = model.need_tokenizer(), model.need_template()
                # Whatever its input's size, a template may use all the work that it is allowed: never on the loop.
                return tuple(
                    await self._run(None, lambda: encode_messages(tokenizer, template, messages, most_tokens=most))
                )
        return tuple(each for each in prompt if isinstance(each, int))

    async def encode_turn(
        self, model: ServedModel, history: Sequence[ChatMessage], new: Sequence[ChatMessage]
    ) -> tuple[int, ...]:
        """Make the token ids that follow an answer: its end of turn, the new messages, the next answer's beginning.

        Args:
            model: whose template it is.
            history: all messages before the answer.
            new: those after it.

        Raises:
            ContextLengthExceeded: the new messages alone are too long, by their length.
            FailedPrecondition: the template rewrites earlier turns, so that what was said cannot be kept as it was.
        """
        tokenizer, template = model.need_tokenizer(), model.need_template()
        # The answer's own ids stay as they were sampled; a mark stands for them, and what comes after it is encoded.
        mark = f"answer-{secrets.token_hex(8)}"

        def encode() -> list[int]:
            if not is_prefix_stable(template):
                raise FailedPrecondition(f"the chat template of {model.info.name} rewrites earlier turns; use Generate")
            messages = [ChatMessage(each.role, tokenizer.protect(each.content)) for each in (*history, *new)]
            messages.insert(len(history), ChatMessage("assistant", mark))
            rendered = template.render(messages)
            _, _, after = rendered.partition(mark)
            refuse_too_long(tokenizer, after, model.info.context_length_tokens)
            return tokenizer.encode_protected(after)

        return tuple(await self._run(None, encode))

    async def spell(self, model: ServedModel, token_ids: Sequence[int]) -> list[str]:
        """Return the text of each token, where it is text by itself."""
        tokenizer = model.need_tokenizer()
        return await self._run(len(token_ids), lambda: [tokenizer.token_text(each) for each in token_ids])

    async def decode(self, model: ServedModel, token_ids: Sequence[int]) -> str:
        """Turn token ids into text."""
        tokenizer = model.need_tokenizer()
        return await self._run(len(token_ids), lambda: tokenizer.decode(token_ids, skip_special=False))

    async def _run(self, size: int | None, work: Callable[[], T]) -> T:
        if size is not None and size <= MAX_INLINE_CHARACTERS:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)
