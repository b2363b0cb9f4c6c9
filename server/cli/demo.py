"""`make run`: a server, and its first answer in the same terminal, through gRPC like anybody else's."""

import asyncio

from rich.console import Console

from pathfox.client import AsyncClient, Delta
from server.cli.generate import DEFAULT_SYSTEM, opening
from server.cli.serve import serve
from server.cli.terminal import LiveAnswer
from server.config import Config

MAX_TOKENS = 200


async def demo(config: Config, prompt: str, *, is_oneshot: bool) -> None:
    """Serve, stream one answer, and go on serving unless it is a one-shot.

    Raises:
        StartupError: as `serve`.
    """
    console = Console()
    stop = asyncio.Event()

    async def show(address: str) -> None:
        await stream_answer(console, address, prompt)
        if is_oneshot:
            stop.set()
        else:
            print_ways_to_call(console, address)

    await serve(config, on_ready=show, stop=stop)


async def stream_answer(console: Console, address: str, prompt: str) -> None:
    """Ask once, greedily, and show the answer as it comes."""
    console.print(f"\n[bold]{prompt}[/bold]\n", highlight=False)
    async with AsyncClient(address) as client:
        with LiveAnswer(console) as answer:
            async for event in client.generate(
                messages=[*opening(DEFAULT_SYSTEM), ("user", prompt)], temperature=0, max_tokens=MAX_TOKENS
            ):
                if isinstance(event, Delta):
                    answer.add(event.text, num_tokens=event.sequence)


def print_ways_to_call(console: Console, address: str) -> None:
    """Print commands that a newcomer can paste."""
    console.print(
        f"""
[bold]It goes on serving on {address}[/bold] (Ctrl-C stops it). From another terminal:

  .venv/bin/pathfox chat --address {address}
  .venv/bin/pathfox generate --address {address} "Name three rivers."

  grpcurl -plaintext -d '{{"messages": {{"messages": [{{"role": "ROLE_USER", "content": "Hello!"}}]}}}}' \\
      {address} pathfox.v1.GenerationService/Generate

  .venv/bin/python -c '
from pathfox.client import Client
with Client("{address}") as client:
    print(client.generate_once(text="The sea is").text)'
""",
        highlight=False,
        soft_wrap=True,
    )
