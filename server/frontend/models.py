"""Which models this front end answers for, and by which names."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from server.errors import FailedPrecondition, NotFound, StartupError
from server.messages import Load, ModelInfo, TokenSource
from server.text.template import ChatTemplate
from server.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model with what serving it needs: where its tokens come from, and how its text becomes tokens."""

    info: ModelInfo
    source: TokenSource
    load: Callable[[], Load]
    """Cheap; called when a request is admitted."""
    tokenizer: Tokenizer | None = None
    """None: token ids in, token ids out."""
    template: ChatTemplate | None = None
    """None: no messages."""

    @property
    def pinned_name(self) -> str:
        """The name that means exactly this version."""
        return f"{self.info.name}@{self.info.version}"

    def need_tokenizer(self) -> Tokenizer:
        """Return the tokenizer, or refuse what needs it.

        Raises:
            FailedPrecondition: the model is served by token ids only.
        """
        if self.tokenizer is None:
            raise FailedPrecondition(f"model {self.info.name} has no tokenizer; send and read token ids")
        return self.tokenizer

    def need_template(self) -> ChatTemplate:
        """Return the chat template, or refuse what needs it.

        Raises:
            FailedPrecondition: the model has none.
        """
        if self.template is None:
            raise FailedPrecondition(f"model {self.info.name} has no chat template; send text or token ids")
        return self.template


class Models:
    """Finds models by name, alias or `name@version`. The first one is the default."""

    def __init__(self, served: Sequence[ServedModel]) -> None:
        if not served:
            raise StartupError("no model to serve; give one with --model NAME=PATH")
        self._served = tuple(served)
        self._by_name: dict[str, ServedModel] = {}
        for model in self._served:
            # Of several versions the first one listed has the bare name.
            self._by_name.setdefault(model.info.name, model)
        for model in self._served:
            for name in (model.pinned_name, *model.info.aliases):
                if name in self._by_name:
                    raise StartupError(f"two models answer to the name {name!r}")
                self._by_name[name] = model

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(self._served)

    def resolve(self, name: str | None) -> ServedModel:
        """Find a model; None means the default one.

        Raises:
            NotFound: names those that there are.
        """
        if not name:
            return self._served[0]
        found = self._by_name.get(name)
        if found is None:
            raise NotFound("model", name, hint="served: " + ", ".join(model.info.name for model in self._served))
        return found
