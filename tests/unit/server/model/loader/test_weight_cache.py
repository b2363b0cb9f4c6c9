import os
import resource
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from structlog.testing import capture_logs

from kernels.backend import Backend, use_backend
from server.errors import ModelLoadError
from server.model.fingerprint import fingerprint
from server.model.loader import load_model, weight_cache
from server.model.loader.gguf import GgufFile
from server.model.model import Model
from tests.fixtures.tiny_models import make_tiny_gguf, make_tiny_llama

pytestmark = pytest.mark.usefixtures("needs_compiler")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A model."""
    return make_tiny_gguf(tmp_path / "tiny.gguf")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where nothing is kept yet."""
    return tmp_path / "cache" / "weights"


def load(path: Path, folder: Path) -> tuple[Model, list[str]]:
    """Load through a cache; return what was logged, too: events, and where the weights came from."""
    with capture_logs() as logs:
        model = load_model(path, cache_folder=folder)
    return model, [each.get("origin", each["event"]) for each in logs]


def kept(folder: Path) -> Path:
    """Return the one kept file."""
    (only,) = folder.iterdir()
    return only


@pytest.mark.parametrize("is_gguf", [True, False])
def test_a_second_load_gives_the_same_model_from_the_cache(tmp_path: Path, folder: Path, *, is_gguf: bool) -> None:
    """The first load keeps, the second reads and writes nothing, and no bit tells which of them a model came from."""
    if is_gguf:
        path = make_tiny_gguf(tmp_path / "tiny.gguf", tie=False, embedding_encoding="q8_0")
    else:
        path = make_tiny_llama(tmp_path / "tiny", shards=3, attention_bias=True, dtype="bfloat16")
    first, first_logs = load(path, folder)
    written = kept(folder).stat()
    second, second_logs = load(path, folder)

    assert first_logs == ["weight_cache_written", "model files"]
    assert second_logs == ["weight cache"]
    assert kept(folder).stat() == written
    assert fingerprint(first) == fingerprint(second) == fingerprint(load_model(path))


def test_kept_weights_are_mapped(file: Path, folder: Path) -> None:
    """They stand in the file's own pages, which all processes of a machine share, and outlive the file's name."""
    load(file, folder)
    model, _ = load(file, folder)
    path = kept(folder)
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path))]
    path.unlink()

    assert mapped
    assert model.network.embedding.dequantised().isfinite().all()


def test_contents_are_not_read_again(file: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second load takes the digest of the model's files from the cache: hashing them costs a second per gigabyte."""
    first, _ = load(file, folder)
    monkeypatch.setattr("server.model.loader.digest_of", lambda _: pytest.fail("hashed again"))
    second, _ = load(file, folder)

    assert first.weights_digest == second.weights_digest


def test_what_must_be_decoded_is_decoded_once(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """K-quants become bf16 by much work, which a second load does not do again."""
    blocks = np.random.default_rng(0).integers(0, 0x3C, size=(256, 144), dtype=np.uint8)
    file = make_tiny_gguf(tmp_path / "k.gguf", hidden=256, ffn=256, blocks={"blk.0.ffn_up.weight": ("q4_k", blocks)})
    load(file, folder)
    monkeypatch.setattr(GgufFile, "_as_bf16", lambda *_: pytest.fail("decoded again"))

    assert load(file, folder)[1] == ["weight cache"]


def test_only_the_digest_is_kept_for_other_backends(file: Path, folder: Path) -> None:
    """What is not packed for a CPU comes from the model's files, and what a CPU packed later is kept beside it."""
    with use_backend(Backend.REFERENCE):
        first, second = load(file, folder), load(file, folder)
    on_cpu = load(file, folder)

    assert [logs for _, logs in (first, second)] == [["weight_cache_written", "model files"], ["model files"]]
    assert on_cpu[1] == ["weight_cache_written", "model files"]
    assert first[0].weights_digest == second[0].weights_digest == on_cpu[0].weights_digest


def flip(at: float) -> Callable[[bytes], bytes]:
    """Return what changes one bit at a share of the file."""

    def spoil(data: bytes) -> bytes:
        index = int(at * len(data))
        return data[:index] + bytes([data[index] ^ 1]) + data[index + 1 :]

    return spoil


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda _: b"", id="empty"),
        pytest.param(lambda _: b"GGUF" * 1000, id="foreign"),
        pytest.param(lambda data: data[:10], id="cut in its magic"),
        pytest.param(lambda data: data[:1000], id="cut in its header"),
        pytest.param(lambda data: data[:-64], id="cut at its end"),
        pytest.param(lambda data: data + bytes(64), id="too long"),
        pytest.param(flip(0.0), id="bit in its magic"),
        pytest.param(flip(0.0001), id="bit in its prefix"),
        pytest.param(flip(0.01), id="bit in its header"),
        pytest.param(flip(0.5), id="bit in its weights"),
        pytest.param(flip(0.99), id="bit in its last weights"),
        pytest.param(lambda data: data[:-20_000] + bytes(20_000), id="hole"),
    ],
)
def test_a_spoiled_file_costs_time_only(file: Path, folder: Path, spoil: Callable[[bytes], bytes]) -> None:
    """It is named in one warning and made anew: nobody computes with what is in it."""
    good, _ = load(file, folder)
    path = kept(folder)
    path.write_bytes(spoil(path.read_bytes()))

    model, logs = load(file, folder)
    again, later_logs = load(file, folder)

    assert logs == ["weight_cache_unusable", "weight_cache_written", "model files"]
    assert later_logs == ["weight cache"]
    assert fingerprint(good) == fingerprint(model) == fingerprint(again)


def test_a_changed_model_replaces_what_was_kept(file: Path, folder: Path) -> None:
    """One file is kept per model path; another content there, of the same size, is another model."""
    old, _ = load(file, folder)
    make_tiny_gguf(file, seed=1)
    new, logs = load(file, folder)

    assert logs == ["weight_cache_outdated", "weight_cache_written", "model files"]
    assert kept(folder)
    assert old.weights_digest != new.weights_digest
    assert fingerprint(new) == fingerprint(load_model(file))


def test_a_model_that_changes_while_it_is_read_is_not_kept(
    file: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its packed weights and its digest may belong to different contents."""
    monkeypatch.setattr("server.model.loader.digest_of", lambda files: os.utime(files[0], (1, 1)) or bytes(32))
    _, logs = load(file, folder)

    assert logs == ["weight_cache_not_written", "model files"]
    assert not folder.exists()


def test_another_layout_is_packed_anew(file: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that place packed numbers elsewhere never see old ones, whether they are newer or older."""
    load(file, folder)
    monkeypatch.setattr(weight_cache, "PACKED_LAYOUT_VERSION", 1_000)

    assert load(file, folder)[1] == ["weight_cache_outdated", "weight_cache_written", "model files"]
    assert load(file, folder)[1] == ["weight cache"]


def test_a_folder_that_cannot_be_written_is_done_without(file: Path, tmp_path: Path) -> None:
    """A model is served all the same; one warning says why its next start will be no faster."""
    (tmp_path / "taken").write_text("a file where the folder should be")
    model, logs = load(file, tmp_path / "taken" / "weights")

    assert logs == ["weight_cache_unusable", "weight_cache_not_written", "model files"]
    assert fingerprint(model) == fingerprint(load_model(file))


def test_a_full_disk_leaves_no_half_file(file: Path, folder: Path) -> None:
    """Writing stops in the middle, is logged, and what was begun is removed."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
    try:
        _, logs = load(file, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    assert logs == ["weight_cache_not_written", "model files"]
    assert list(folder.iterdir()) == []


def test_the_last_of_a_disk_is_not_taken(file: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are kept where half of the free space is enough for them."""
    num_bytes = load(file, folder)[0].network.embedding.num_bytes
    kept(folder).unlink()
    monkeypatch.setattr(weight_cache.shutil, "disk_usage", lambda _: SimpleNamespace(free=2 * num_bytes))

    assert load(file, folder)[1] == ["weight_cache_not_written", "model files"]
    assert list(folder.iterdir()) == []


def test_starts_may_race(file: Path, folder: Path) -> None:
    """Loads at once, of which each may write and read, all give the same model and leave one whole file."""
    with ThreadPoolExecutor(max_workers=4) as threads:
        models = list(threads.map(lambda _: load_model(file, cache_folder=folder), range(8)))

    assert len({fingerprint(each) for each in models}) == 1
    assert load(file, folder)[1] == ["weight cache"]
    assert kept(folder)


def test_leftovers_are_swept(tmp_path: Path, folder: Path) -> None:
    """What is kept of models that are gone, and what a killed process left, goes; nobody else's file does."""
    gone, there = make_tiny_gguf(tmp_path / "gone.gguf"), make_tiny_gguf(tmp_path / "there.gguf", seed=1)
    load(gone, folder)
    gone.unlink()
    foreign, old, new = (folder / name for name in ("foreign.weights", "old.unfinished", "new.unfinished"))
    for each in (foreign, old, new):
        each.write_text("x")
    hours_ago_s = time.time() - 2 * weight_cache.UNFINISHED_LIFE_S
    os.utime(old, (hours_ago_s, hours_ago_s))

    load(there, folder)

    left = {each.name for each in folder.iterdir()}
    assert len(left) == 3
    assert {"foreign.weights", "new.unfinished"} < left
    assert load(there, folder)[1] == ["weight cache"]


def test_a_model_that_is_refused_is_not_kept(tmp_path: Path, folder: Path) -> None:
    """Nothing is written for a file that this server cannot run."""
    file = make_tiny_gguf(tmp_path / "tiny.gguf", tensors={"blk.1.ffn_down.weight": None})
    with pytest.raises(ModelLoadError):
        load_model(file, cache_folder=folder)

    assert not folder.exists()
