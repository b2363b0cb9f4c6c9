"""`pathfox chat`: a conversation in the terminal, over one live call."""

import contextlib

from rich.console import Console

from pathfox.client import Chat, Client, Delta, Finished, PathfoxError
from pathfox.client import GenerateOptions as Options
from server.cli.generate import (
    DEFAULT_ADDRESS,
    DEFAULT_SYSTEM,
    AddressOption,
    ModelOption,
    SystemOption,
    TlsOption,
    TokenOption,
    opening,
)
from server.cli.terminal import LiveAnswer, fail

EXAMPLES = "Examples:\n\n  pathfox chat\n\n  pathfox chat --address 127.0.0.1:50051 --model smollm2-135m-instruct"
GREETING = "[dim]Ctrl-C ends an answer, Ctrl-D the conversation.[/dim]"


def chat(
    address: AddressOption = DEFAULT_ADDRESS,
    model: ModelOption = None,
    system: SystemOption = DEFAULT_SYSTEM,
    token: TokenOption = None,
    *,
    tls: TlsOption = False,
) -> None:
    """Talk with a model; the server remembers the conversation as long as this lasts."""
    console = Console()
    options = Options(messages=opening(system))
    if model:
        options["model"] = model
    try:
        with Client(address, token=token, tls=tls) as client, client.chat(**options) as conversation:
            console.print(GREETING)
            with contextlib.suppress(EOFError):
                while True:
                    said = console.input("\n[bold cyan]you[/bold cyan] ").strip()
                    if said:
                        answer(console, conversation, said)
    except PathfoxError as error:
        fail(error)


def answer(console: Console, conversation: Chat, said: str) -> None:
    """Say something and show the answer as it comes; Ctrl-C ends the answer and keeps the conversation."""
    with LiveAnswer(console) as shown:
        try:
            for event in conversation.send(said):
                match event:
                    case Delta():
                        shown.add(event.text, num_tokens=event.sequence)
                    case Finished():
                        shown.finished(event.reason)
        except KeyboardInterrupt:
            conversation.cancel_turn()
