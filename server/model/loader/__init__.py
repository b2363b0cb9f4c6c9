"""From files to a model: a GGUF file, or a Hugging Face folder with config.json and *.safetensors."""

import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import structlog
import torch

from kernels.checks import ShapeError
from kernels.cpu.packed import use_store
from server.errors import ModelLoadError
from server.model.checkpoint import Checkpoint, Facts, Layout, Progress
from server.model.families import family_of
from server.model.loader.digest import digest_of
from server.model.loader.generation import read_config_generation, read_gguf_generation
from server.model.loader.gguf import GgufFile
from server.model.loader.safetensors import SafetensorsFolder, read_json
from server.model.loader.weight_cache import WeightCache
from server.model.model import Model

log = structlog.get_logger(__name__)

CONFIG = "config.json"


def load_model(
    path: Path, *, device: str = "cpu", progress: Progress | None = None, cache_folder: Path | None = None
) -> Model:
    """Load a model from a .gguf file or a Hugging Face folder.

    Args:
        path: The file or folder.
        device: A torch device; the weights are packed for its backend.
        progress: Called with (weights read, weights in all), from this thread.
        cache_folder: Where packed weights are kept for the next start; None = they are packed at every start.

    Raises:
        ModelLoadError: It is no model that this server can run; names the file and, in one line, the reason.
    """
    started = time.monotonic()
    source = _open(path, progress)
    cache = None if cache_folder is None else WeightCache(cache_folder, source.files)
    try:
        model = _build(source, torch.device(device), cache)
    except ShapeError as error:
        raise ModelLoadError(str(path), str(error)) from error
    if cache is not None:
        cache.save(model.weights_digest)
    is_kept = cache is not None and cache.gave_all
    taken_s = round(time.monotonic() - started, 3)
    log.info("weights_loaded", path=str(path), origin="weight cache" if is_kept else "model files", duration_s=taken_s)
    return model


def _build(source: "_Source", device: torch.device, cache: WeightCache | None) -> Model:
    checkpoint = source.checkpoint
    family = family_of(checkpoint, source.architecture)
    spec = family.read_spec(checkpoint)
    kept = None if cache is None else cache.weights_digest
    with ThreadPoolExecutor(max_workers=1) as thread, use_store(cache):
        digest = thread.submit(lambda: kept or digest_of(source.files))
        network = family.build(spec, checkpoint, device)
        return Model(
            spec=spec,
            network=network,
            device=device,
            num_parameters=checkpoint.num_parameters,
            weights_digest=digest.result(),
            eos_token_ids=source.eos_token_ids,
            generation_defaults=source.generation_defaults,
        )


@dataclass(frozen=True, slots=True)
class TextAssets:
    """What `server.text` needs of a model's files. A tokenizer comes from tokenizer.json or from GGUF metadata."""

    tokenizer_json: Path | None
    gguf_metadata: Mapping[str, object] | None
    chat_template: str | None
    special_tokens: Mapping[str, str]
    """bos_token, eos_token ... as a template may name them."""


def read_text_assets(path: Path) -> TextAssets:
    """Read what tokenising and templates need. A tokenizer.json beside a GGUF file is used before its metadata.

    Raises:
        ModelLoadError: The files cannot be read.
    """
    _require_present(path)
    if path.is_dir():
        return _read_folder_text(path)
    metadata = GgufFile.open(path).metadata
    beside = path.with_name("tokenizer.json")
    template = metadata.get("tokenizer.chat_template")
    return TextAssets(
        tokenizer_json=beside if beside.is_file() else None,
        gguf_metadata=metadata,
        chat_template=template if isinstance(template, str) else None,
        special_tokens=_gguf_special_tokens(metadata),
    )


@dataclass(frozen=True, slots=True)
class _Source:
    """An opened model, and what its format says beside its weights."""

    checkpoint: Checkpoint
    architecture: str
    files: tuple[Path, ...]
    """All that fixes the mathematics."""
    eos_token_ids: tuple[int, ...]
    generation_defaults: Mapping[str, float]


def _open(path: Path, progress: Progress | None) -> _Source:
    _require_present(path)
    return _open_folder(path, progress) if path.is_dir() else _open_gguf(path, progress)


def _require_present(path: Path) -> None:
    if not path.exists():
        raise ModelLoadError(str(path), "no such file or folder")


def _open_gguf(path: Path, progress: Progress | None) -> _Source:
    file = GgufFile.open(path)
    facts = Facts(path, file.metadata)
    architecture = facts.text("general.architecture")
    facts.require("split.count", one_of=[0, 1])
    eos_token_ids, defaults = read_gguf_generation(facts)
    own = Facts(path, file.metadata, prefix=f"{architecture}.")
    return _Source(Checkpoint(path, Layout.GGUF, own, file, progress), architecture, (path,), eos_token_ids, defaults)


def _open_folder(path: Path, progress: Progress | None) -> _Source:
    if not (path / CONFIG).is_file():
        raise ModelLoadError(str(path), f"no {CONFIG} in this folder")
    config = read_json(path / CONFIG)
    facts = Facts(path / CONFIG, config)
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or len(architectures) != 1 or not isinstance(architectures[0], str):
        raise facts.wrong("architectures", "a list of one name")
    weights = SafetensorsFolder.open(path)
    generation = path / "generation_config.json"
    eos_token_ids, defaults = read_config_generation(
        facts, Facts(generation, read_json(generation) if generation.is_file() else {})
    )
    checkpoint = Checkpoint(path, Layout.HUGGING_FACE, facts, weights, progress)
    return _Source(checkpoint, architectures[0], (path / CONFIG, *weights.shards), eos_token_ids, defaults)


def _read_folder_text(path: Path) -> TextAssets:
    tokenizer, config, template_file = (
        path / name for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    )
    settings = read_json(config) if config.is_file() else {}
    template = template_file.read_text(encoding="utf-8") if template_file.is_file() else settings.get("chat_template")
    if isinstance(template, list):  # several by name
        by_name = {each.get("name"): each.get("template") for each in template if isinstance(each, dict)}
        template = by_name.get("default")
    return TextAssets(
        tokenizer_json=tokenizer if tokenizer.is_file() else None,
        gguf_metadata=None,
        chat_template=template if isinstance(template, str) else None,
        special_tokens=_config_special_tokens(settings),
    )


def _config_special_tokens(settings: Mapping[str, object]) -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in settings.items():
        text = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(text, str):
            found[key] = text
    return found


def _gguf_special_tokens(metadata: Mapping[str, object]) -> dict[str, str]:
    tokens = metadata.get("tokenizer.ggml.tokens")
    found: dict[str, str] = {}
    for name, key in (("bos_token", "bos"), ("eos_token", "eos"), ("unk_token", "unknown"), ("pad_token", "padding")):
        index = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(tokens, list) and isinstance(index, int) and 0 <= index < len(tokens):
            found[name] = str(tokens[index])
    return found
