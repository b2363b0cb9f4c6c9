import json
from pathlib import Path

import pytest

from server.errors import ModelLoadError
from server.model.loader import load_model, read_text_assets
from server.model.loader.bundled import find_bundled_model
from tests.fixtures.tiny_models import CHAT_TEMPLATE, make_tiny_gguf, make_tiny_llama


def test_progress_runs_from_the_first_weight_to_the_last(tmp_path: Path) -> None:
    """It rises, and ends with all weights read."""
    calls: list[tuple[int, int]] = []

    model = load_model(make_tiny_gguf(tmp_path / "tiny.gguf"), progress=lambda done, total: calls.append((done, total)))

    assert calls == sorted(calls)
    assert len(calls) == 20
    assert calls[-1] == (model.num_parameters, model.num_parameters)


def test_a_folder_says_how_it_wants_to_be_sampled(tmp_path: Path) -> None:
    """generation_config.json gives defaults and all ids that end a turn; what it leaves out is neutral."""
    model = load_model(make_tiny_llama(tmp_path))

    assert model.eos_token_ids == (2, 0)
    assert model.generation_defaults == {
        "temperature": 0.6,
        "top_p": 1.0,
        "top_k": 20,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
    }


def test_a_folder_without_generation_config_falls_back_on_its_configuration(tmp_path: Path) -> None:
    """config.json names the end of a turn, too."""
    (make_tiny_llama(tmp_path) / "generation_config.json").unlink()

    model = load_model(tmp_path)

    assert model.eos_token_ids == (2,)
    assert model.generation_defaults["temperature"] == 1.0


def test_a_gguf_says_how_it_wants_to_be_sampled(tmp_path: Path) -> None:
    """general.sampling.* gives defaults; end of text, of turn and of message end a turn, each once."""
    metadata = {"general.sampling.temp": 0.25, "general.sampling.top_k": 7, "tokenizer.ggml.eot_token_id": 0}
    model = load_model(make_tiny_gguf(tmp_path / "t.gguf", metadata=metadata | {"tokenizer.ggml.eom_token_id": 2}))

    assert model.eos_token_ids == (2, 0)
    assert model.generation_defaults["temperature"] == 0.25
    assert model.generation_defaults["top_k"] == 7
    assert model.generation_defaults["top_p"] == 1.0


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"temperature": -1}, "temperature: got -1, want a number, not negative"),
        ({"top_p": "all"}, "top_p: got 'all', want a number, not negative"),
        ({"eos_token_id": [2, "x"]}, "eos_token_id: got [2, 'x'], want a token id or a list of token ids"),
    ],
)
def test_spoiled_generation_defaults_are_refused(tmp_path: Path, value: dict[str, object], reason: str) -> None:
    """A default that no request could ask for is a mistake in the file."""
    file = make_tiny_llama(tmp_path) / "generation_config.json"
    file.write_text(json.dumps(value))

    with pytest.raises(ModelLoadError) as caught:
        load_model(tmp_path)

    assert (caught.value.path, caught.value.problem) == (str(file), reason)


def test_the_digest_is_that_of_the_contents(tmp_path: Path) -> None:
    """Equal files have equal digests wherever they lie; one other weight, or one other key, is another digest."""
    one = load_model(make_tiny_llama(tmp_path / "one", shards=3))
    same = load_model(make_tiny_llama(tmp_path / "same", shards=3))
    other_weights = load_model(make_tiny_llama(tmp_path / "weights", shards=3, seed=1))
    other_config = load_model(make_tiny_llama(tmp_path / "config", shards=3, config={"rms_norm_eps": 1e-4}))

    assert one.weights_digest == same.weights_digest
    assert len({one.weights_digest, other_weights.weights_digest, other_config.weights_digest}) == 3


def test_text_assets_of_a_folder(tmp_path: Path) -> None:
    """A folder gives its tokenizer.json, its template and its special tokens."""
    assets = read_text_assets(make_tiny_llama(tmp_path))

    assert assets.tokenizer_json == tmp_path / "tokenizer.json"
    assert assets.gguf_metadata is None
    assert assets.chat_template == CHAT_TEMPLATE
    assert assets.special_tokens == {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}


def test_a_template_file_goes_before_tokenizer_config(tmp_path: Path) -> None:
    """chat_template.jinja is the newer place; the older one may hold several templates by name."""
    make_tiny_llama(tmp_path)
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    token = {"content": "<s>", "special": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named, "bos_token": token}))
    by_name = read_text_assets(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("file")

    assert by_name.chat_template == "d"
    assert by_name.special_tokens == {"bos_token": "<s>"}
    assert read_text_assets(tmp_path).chat_template == "file"


def test_text_assets_of_a_gguf(tmp_path: Path) -> None:
    """A GGUF file gives its metadata; a tokenizer.json beside it is offered, too."""
    file = make_tiny_gguf(tmp_path / "tiny.gguf")
    alone = read_text_assets(file)
    (tmp_path / "tokenizer.json").write_text("{}")

    assert alone.tokenizer_json is None
    assert alone.gguf_metadata is not None
    assert alone.gguf_metadata["tokenizer.ggml.model"] == "gpt2"
    assert alone.chat_template == CHAT_TEMPLATE
    assert alone.special_tokens == {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    assert read_text_assets(file).tokenizer_json == tmp_path / "tokenizer.json"


def test_text_assets_of_nothing_are_refused(tmp_path: Path) -> None:
    """A wrong path is an error that names it."""
    with pytest.raises(ModelLoadError, match="no such file or folder"):
        read_text_assets(tmp_path / "missing")


@pytest.mark.usefixtures("needs_smollm2")
def test_the_bundled_model_is_found_without_importing_its_package() -> None:
    """The package wants llama.cpp; only its file is wanted here."""
    assert find_bundled_model().name == "SmolLM2-135M-Instruct.Q4_1.gguf"


def test_a_missing_bundle_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the package is not installed, the error says so."""
    monkeypatch.setattr("server.model.loader.bundled.PACKAGE", "no_such_package")

    with pytest.raises(ModelLoadError, match="not installed"):
        find_bundled_model()
