"""`pathfox generate`: one answer, streamed into the terminal."""

from typing import Annotated

import typer
from rich.console import Console

from pathfox.client import ChatMessage, Client, Delta, Finished, PathfoxError
from pathfox.client import GenerateOptions as Options
from server.cli.terminal import LiveAnswer, fail

EXAMPLES = (
    'Examples:\n\n  pathfox generate "What is the capital of France?"\n\n'
    '  pathfox generate --raw "Once upon a time" --max-tokens 100 --temperature 0.8 --seed 7'
)
DEFAULT_ADDRESS = "127.0.0.1:50051"
DEFAULT_SYSTEM = "You are a helpful assistant."

AddressOption = Annotated[str, typer.Option(help="HOST:PORT of a server.")]
TokenOption = Annotated[
    str | None, typer.Option(envvar="PATHFOX_TOKEN", help="Bearer token, where the server wants one.")
]
TlsOption = Annotated[bool, typer.Option("--tls", help="Encrypt; trust the usual authorities.")]
SystemOption = Annotated[str, typer.Option(help="The system message; empty for the template's own.")]
ModelOption = Annotated[str | None, typer.Option(help="Name, alias or name@version.")]


def opening(system: str) -> list[ChatMessage]:
    """Return what a conversation begins with."""
    return [("system", system)] if system else []


def generate(
    prompt: Annotated[str, typer.Argument(help="What to ask.")],
    address: AddressOption = DEFAULT_ADDRESS,
    model: ModelOption = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, max=2**31 - 1, help="At most so many new tokens.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 = always the most probable token.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Smallest set of tokens with this probability.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=2**64 - 1, help="Same seed, same tokens.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; repeatable.")] = None,
    system: SystemOption = DEFAULT_SYSTEM,
    token: TokenOption = None,
    *,
    tls: TlsOption = False,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is; no chat template.")] = False,
) -> None:
    """Ask once and show the answer as it comes."""
    console = Console()
    options = Options()
    if raw:
        options["text"] = prompt
    else:
        options["messages"] = [*opening(system), ("user", prompt)]
    for name, value in (
        ("model", model),
        ("max_tokens", max_tokens),
        ("temperature", temperature),
        ("top_p", top_p),
        ("seed", seed),
        ("stop", stop),
    ):
        if value is not None:
            options[name] = value  # type: ignore[literal-required] # the option's name is the field's
    try:
        with (
            Client(address, token=token, tls=tls) as client,
            client.generate(**options) as events,
            LiveAnswer(console) as answer,
        ):
            for event in events:
                match event:
                    case Delta():
                        answer.add(event.text, num_tokens=event.sequence)
                    case Finished():
                        answer.finished(event.reason)
    except PathfoxError as error:
        fail(error)
