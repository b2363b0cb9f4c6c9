from dataclasses import replace
from pathlib import Path

import pytest

from kernels.backend import Backend, numerics_version, use_backend
from server.model import fingerprint as module
from server.model.fingerprint import UNLAWFUL, fingerprint
from server.model.loader import load_model
from tests.fixtures.tiny_models import make_tiny_gguf, make_tiny_llama


def test_equal_models_have_equal_fingerprints(tmp_path: Path) -> None:
    """Wherever the files lie, and however often it is asked."""
    one = load_model(make_tiny_gguf(tmp_path / "one.gguf"))
    (tmp_path / "folder").mkdir()
    two = load_model(make_tiny_gguf(tmp_path / "folder" / "one.gguf"))

    assert fingerprint(one) == fingerprint(one) == fingerprint(two)


def test_whatever_may_change_bits_changes_the_fingerprint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other weights, another way to compute them, or kernels that their author declares different."""
    model = load_model(make_tiny_llama(tmp_path / "model"))
    with use_backend(Backend.REFERENCE):
        on_reference = load_model(tmp_path / "model")
    seen = {
        fingerprint(model),
        fingerprint(load_model(make_tiny_llama(tmp_path / "weights", seed=1))),
        fingerprint(replace(model, spec=replace(model.spec, page_size_tokens=8))),
        fingerprint(replace(model, network=load_model(make_tiny_llama(tmp_path / "probe", seed=2)).network)),
    }
    monkeypatch.setattr(module, "numerics_version", lambda backend: numerics_version(backend) + 1)
    seen.add(fingerprint(model))

    assert len(seen) == 5
    assert fingerprint(on_reference) not in seen or model.backend is Backend.REFERENCE


def test_a_path_that_breaks_the_law_says_so(tmp_path: Path) -> None:
    """The reference backend is not row-invariant; nobody shall continue a request on it unwarned."""
    with use_backend(Backend.REFERENCE):
        model = load_model(make_tiny_gguf(tmp_path / "tiny.gguf"))

    assert fingerprint(model).startswith(UNLAWFUL)


def test_a_short_context_is_probed_as_far_as_it_goes(tmp_path: Path) -> None:
    """The probe never leaves the table of positions."""
    assert fingerprint(load_model(make_tiny_gguf(tmp_path / "tiny.gguf", context=10)))
