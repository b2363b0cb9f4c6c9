"""Commands and their options. What a command does stands in the module of its name."""

import asyncio
import contextlib
import functools
import gc
import importlib.metadata
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, ParamSpec

import typer

from server.cli import chat, generate, status
from server.cli.bench import command as bench
from server.config import Config, Setting, load_config
from server.errors import ConfigError, Internal, StartupError

EXIT_CANNOT_START = 2
EXIT_FAILED = 1
EXIT_INTERRUPTED = 130
Arguments = ParamSpec("Arguments")

app = typer.Typer(
    name="pathfox",
    help="A gRPC server for large language models whose conversations outlive every process that serves them.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def pathfox(
    *, version: Annotated[bool, typer.Option("--version", help="Say which version this is.", is_eager=True)] = False
) -> None:
    """Serve large language models over gRPC; talk with them."""
    if version:
        print(importlib.metadata.version("pathfox-server"))
        raise typer.Exit


app.command(epilog=generate.EXAMPLES)(generate.generate)
app.command(epilog=chat.EXAMPLES)(chat.chat)
app.command(epilog=status.EXAMPLES)(status.status)


def starts_or_says_why(command: Callable[Arguments, None]) -> Callable[Arguments, None]:
    """Let a command that cannot start end with one line on stderr and exit code 2, never a traceback."""

    @functools.wraps(command)
    def run(*arguments: Arguments.args, **options: Arguments.kwargs) -> None:
        try:
            command(*arguments, **options)
        except StartupError as error:
            print(f"pathfox: {error}", file=sys.stderr)
            raise typer.Exit(EXIT_CANNOT_START) from None
        except Internal as error:
            print(f"pathfox: {error}", file=sys.stderr)
            raise typer.Exit(EXIT_FAILED) from None
        except KeyboardInterrupt:
            raise typer.Exit(EXIT_INTERRUPTED) from None

    return run


app.command(epilog=bench.EXAMPLES)(starts_or_says_why(bench.bench))

ModelOption = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        metavar="NAME=PATH",
        help="A GGUF file or a Hugging Face folder; repeatable, the first is the default. Unset: SmolLM2-135M.",
    ),
]
ConfigOption = Annotated[
    Path | None, typer.Option("--config", help="A TOML file; see server/config.py for every setting.")
]
HostOption = Annotated[
    str | None, typer.Option(help="Where to listen; beyond loopback only with TLS and credentials. Default 127.0.0.1.")
]
PortOption = Annotated[int | None, typer.Option(help="0 takes a free one. Default 50051.")]
ThreadsOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Threads of the CPU ops, at most the processors there are. Unset: the cores that this process may use.",
    ),
]


@app.command(
    epilog="Examples:\n\n  pathfox serve\n\n  pathfox serve --model tiny=models/tiny.gguf --port 0\n\n"
    "  PATHFOX__ENGINE__MAX_NUM_SEQS=8 pathfox serve --config pathfox.toml"
)
@starts_or_says_why
def serve(
    model: ModelOption = None,
    host: HostOption = None,
    port: PortOption = None,
    config: ConfigOption = None,
    threads: ThreadsOption = None,
    *,
    in_process: Annotated[
        bool, typer.Option("--in-process", help="Front end and engine in one process; for now the only way.")
    ] = True,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Listen beyond loopback without TLS and credentials.")
    ] = False,
    credentials: Annotated[Path | None, typer.Option(help="Hashed bearer tokens with tenant and role.")] = None,
    tls_certificate: Annotated[Path | None, typer.Option(help="PEM chain.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM private key.")] = None,
    metrics_port: Annotated[int | None, typer.Option(help="Prometheus endpoint; off unless set.")] = None,
    no_weight_cache: Annotated[
        bool, typer.Option("--no-weight-cache", help="Pack the weights anew, and keep nothing for the next start.")
    ] = False,
    speculation: Annotated[
        bool | None, typer.Option(help="Guess repeating tokens, check several in a step; same answers. Default on.")
    ] = None,
) -> None:
    """Serve models over gRPC until SIGINT or SIGTERM; prints `serving on HOST:PORT` once ready."""
    del in_process  # one process is what there is
    options: dict[str, Setting] = {
        "server.host": host,
        "server.port": port,
        "server.insecure": insecure or None,
        "server.credentials_file": str(credentials) if credentials else None,
        "server.tls_certificate_file": str(tls_certificate) if tls_certificate else None,
        "server.tls_key_file": str(tls_key) if tls_key else None,
        "engine.num_threads": threads,
        "engine.use_weight_cache": False if no_weight_cache else None,
        "engine.speculation": speculation,
        "telemetry.metrics_port": metrics_port,
        "models": [_named_path(each) for each in model] if model else None,
    }
    _serve(_configured(config, options))


@app.command(epilog="Examples:\n\n  pathfox demo\n\n  pathfox demo --prompt 'Tell me a story.' --oneshot")
@starts_or_says_why
def demo(
    prompt: Annotated[str, typer.Option(help="What to ask first.")] = "What is the capital of France?",
    port: PortOption = None,
    *,
    oneshot: Annotated[bool, typer.Option("--oneshot", help="Stop after the answer.")] = False,
) -> None:
    """Serve, stream a first answer into the terminal, then keep serving and say how to call it."""
    options: dict[str, Setting] = {"server.port": port, "telemetry.log_level": "warning"}
    _demo(_configured(None, options), prompt, is_oneshot=oneshot)


def _serve(config: Config) -> None:
    with _collecting_later():
        from server.cli.serve import serve as serve_until_stopped  # noqa: PLC0415 torch takes a second, and only servers need it

        asyncio.run(serve_until_stopped(config))


def _demo(config: Config, prompt: str, *, is_oneshot: bool) -> None:
    with _collecting_later():
        from server.cli.demo import demo as show  # noqa: PLC0415 as _serve

        asyncio.run(show(config, prompt, is_oneshot=is_oneshot))


@contextlib.contextmanager
def _collecting_later() -> Iterator[None]:
    """Leave the collector of cycles off until the server is up; see `start_collecting` there."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _configured(path: Path | None, options: dict[str, Setting]) -> Config:
    return load_config(path, options={name: value for name, value in options.items() if value is not None})


def _named_path(text: str) -> dict[str, Setting]:
    name, separator, path = text.partition("=")
    if not (name and separator and path):
        raise ConfigError(f"--model: got {text!r}, want NAME=PATH")
    return {"name": name, "path": path}
