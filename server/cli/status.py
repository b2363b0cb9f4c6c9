"""`pathfox status`: what a server does now, once or live."""

import contextlib
import time
from typing import Annotated

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table

from pathfox.client import Client, PathfoxError
from pathfox.v1 import admin_pb2
from server.cli.generate import DEFAULT_ADDRESS, AddressOption, TlsOption, TokenOption
from server.cli.terminal import fail

EXAMPLES = "Examples:\n\n  pathfox status\n\n  pathfox status --watch"
REFRESH_S = 0.5


def status(
    address: AddressOption = DEFAULT_ADDRESS,
    token: TokenOption = None,
    *,
    tls: TlsOption = False,
    watch: Annotated[bool, typer.Option("--watch", help="Refresh until Ctrl-C.")] = False,
) -> None:
    """Show engines, load and admission of a server (needs the admin role)."""
    console = Console()
    try:
        with Client(address, token=token, tls=tls) as client:
            if not watch:
                console.print(draw(client.status()))
                return
            with Live(draw(client.status()), console=console) as live, contextlib.suppress(KeyboardInterrupt):
                while True:
                    time.sleep(REFRESH_S)
                    live.update(draw(client.status()))
    except PathfoxError as error:
        fail(error)


def draw(seen: admin_pb2.GetStatusResponse) -> RenderableType:
    """Draw one table of engines and one of bulkheads."""
    state = "draining" if seen.is_draining else "serving"
    title = f"pathfox {seen.version}, {state}, up {seen.uptime.seconds} s, {seen.active_requests} active"
    engines = Table(
        "model",
        "running",
        "waiting",
        "queued tokens",
        "pages used / cached / all",
        "prefill tok/s",
        "decode tok/s",
        title=title,
    )
    for engine in seen.engines:
        pages = f"{engine.used_pages} / {engine.cached_pages} / {engine.total_pages}"
        rates = (f"{engine.prefill_tokens_per_second:.0f}", f"{engine.decode_tokens_per_second:.0f}")
        counts = (str(engine.running_requests), str(engine.waiting_requests), str(engine.queued_tokens))
        engines.add_row(engine.model, *counts, pages, *rates)
    bulkheads = Table("class", "running tokens", "limit", "queued", "limit")
    for each in seen.bulkheads:
        bulkheads.add_row(
            each.criticality,
            *(
                str(n)
                for n in (each.running_tokens, each.max_running_tokens, each.queued_requests, each.max_queued_requests)
            ),
        )
    return Group(engines, bulkheads)
