"""Puts one process together: models, engines, front end; starts them in this order and stops them in the other.

This is the composition root of `pathfox serve`: here and nowhere else the rooms learn of each other.
"""

import asyncio
import contextlib
import gc
import signal
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from server.cli.machine import check_machine
from server.config import Config, EngineConfig, GenerationDefault, ModelConfig
from server.engine.engine import Engine
from server.errors import Internal
from server.frontend.models import Models, ServedModel
from server.frontend.server import FrontEnd, check_address, check_files
from server.messages import ModelInfo
from server.model.loader import TextAssets, load_model, read_text_assets
from server.model.loader.bundled import MODEL_NAME, find_bundled_model
from server.model.model import Model
from server.telemetry import configure_logging, observe_step
from server.text.template import ChatTemplate
from server.text.tokenizer import Tokenizer

OnReady = Callable[[str], Awaitable[None]]
"""Called with HOST:PORT once the server serves. The server stops when it raises `asyncio.CancelledError`."""

BUNDLED_GENERATION_DEFAULTS: dict[GenerationDefault, float] = {"temperature": 0.2, "top_p": 0.9}
"""As the model card of SmolLM2-Instruct advises; its GGUF says nothing, and at 1.0 so small a model rambles."""

diagnostics = Console(stderr=True)


async def serve(config: Config, *, on_ready: OnReady | None = None, stop: asyncio.Event | None = None) -> None:
    """Load, serve until SIGINT or SIGTERM (or `stop`), drain, and leave nothing behind.

    Prints `serving on HOST:PORT` once ready. A second signal ends the grace of the drain.

    Raises:
        StartupError: a model, a setting or a port is not usable; names which, and why.
        Internal: an engine's thread died. Whoever supervises this process starts a new one.
    """
    configure_logging(config.telemetry)
    check_address(config.server)
    check_files(config.server)
    check_machine(config.engine)
    stop = stop or asyncio.Event()
    async with contextlib.AsyncExitStack() as running:
        signals = running.enter_context(_stopped_by_signals(stop))
        served = [await start_model(each, config, running) for each in models_of(config)]
        front_end = FrontEnd(config, Models(served))
        port = await front_end.start()
        running.push_async_callback(front_end.stop)
        signals.hurry = front_end.hurry
        address = f"{config.server.host}:{port}"
        start_collecting()
        print(f"serving on {address}", flush=True)
        if on_ready is not None:
            await on_ready(address)
        failed = [each.source.failed for each in served if isinstance(each.source, Engine)]
        await _any_of((stop, *failed))
        has_failed = any(event.is_set() for event in failed)
        await front_end.drain(0 if has_failed else config.server.drain_grace_s)
    if has_failed:
        raise Internal("an engine failed and took the server with it; the log says why")


def start_collecting() -> None:
    """Turn the collector of cycles on, where the start was run without it, for what is made from now on.

    A start makes 400,000 objects, and nearly all of them stay: walking over them again and again takes a quarter of the
    start, and once in a while 0.15 s of a running server (2 cores of Zen 5, November 2026: ops/adr/0007).
    """
    if not gc.isenabled():
        gc.freeze()
        gc.enable()


def models_of(config: Config) -> tuple[ModelConfig, ...]:
    """Return the models to serve: the configured ones, else the bundled one."""
    return config.models or (
        ModelConfig(name=MODEL_NAME, path=find_bundled_model(), generation_defaults=BUNDLED_GENERATION_DEFAULTS),
    )


async def start_model(model_config: ModelConfig, config: Config, running: contextlib.AsyncExitStack) -> ServedModel:
    """Load one model, start its engine, and register the engine's stop."""
    model, assets = await asyncio.to_thread(_load, model_config, config.engine)
    engine = await running.enter_async_context(Engine(model, config.engine, observer=observe_step(model_config.name)))
    return ServedModel(
        info=describe(model, model_config, engine),
        source=engine,
        load=engine.load,
        tokenizer=_tokenizer(model_config, assets),
        template=_template(assets),
    )


def describe(model: Model, config: ModelConfig, engine: Engine) -> ModelInfo:
    """Return what a served model says of itself."""
    spec = model.spec
    return ModelInfo(
        name=config.name,
        version=config.version,
        aliases=config.aliases,
        family=spec.family,
        mixer="+".join(model.mixer_kinds),
        # A page pool that is smaller than the context is what a request must fit into.
        context_length_tokens=engine.max_sequence_tokens,
        vocabulary_size=spec.vocabulary_size,
        num_layers=spec.num_layers,
        num_parameters=model.num_parameters,
        fingerprint=engine.fingerprint,
        is_row_invariant=model.is_row_invariant,
        page_size_tokens=spec.page_size_tokens,
        page_bytes=model.page_bytes,
        eos_token_ids=model.eos_token_ids,
        generation_defaults=dict(model.generation_defaults) | dict(config.generation_defaults),
    )


def _load(config: ModelConfig, engine: EngineConfig) -> tuple[Model, TextAssets]:
    columns = (TextColumn("loading {task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=diagnostics, transient=True, disable=not diagnostics.is_terminal) as bar:
        task = bar.add_task(config.name)
        model = load_model(
            config.path,
            device=engine.device,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
            cache_folder=engine.weight_cache_folder if engine.use_weight_cache else None,
        )
    return model, read_text_assets(config.path)


def _tokenizer(config: ModelConfig, assets: TextAssets) -> Tokenizer | None:
    if assets.tokenizer_json is not None:
        return Tokenizer.from_file(assets.tokenizer_json)
    if assets.gguf_metadata is not None:
        return Tokenizer.from_gguf_metadata(assets.gguf_metadata, path=str(config.path))
    return None


def _template(assets: TextAssets) -> ChatTemplate | None:
    if assets.chat_template is None:
        return None
    return ChatTemplate(assets.chat_template, special_tokens=assets.special_tokens)


@dataclass
class _Signals:
    """The first SIGINT or SIGTERM sets `stop`; each one after it calls `hurry`."""

    stop: asyncio.Event
    hurry: Callable[[], None] = lambda: None

    def arrived(self) -> None:
        if self.stop.is_set():
            self.hurry()
        self.stop.set()


@contextlib.contextmanager
def _stopped_by_signals(stop: asyncio.Event) -> Iterator[_Signals]:
    """Handle signals from the beginning on: a server that is told to stop while it loads stops when it has loaded."""
    loop = asyncio.get_running_loop()
    signals = _Signals(stop)
    numbers = (signal.SIGINT, signal.SIGTERM)
    for number in numbers:
        loop.add_signal_handler(number, signals.arrived)
    try:
        yield signals
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


async def _any_of(events: Iterable[asyncio.Event]) -> None:
    """Wait until one of the events is set."""
    waits = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for each in waits:
            each.cancel()
        await asyncio.gather(*waits, return_exceptions=True)
