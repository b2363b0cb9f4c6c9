import json
from pathlib import Path

import pytest
import torch

from kernels.weights import Encoding
from server.errors import ModelLoadError
from server.model.loader import load_model
from server.model.loader.safetensors import SafetensorsFolder
from tests.fixtures.forward import logits_of
from tests.fixtures.tiny_models import make_tiny_llama

TOKEN_IDS = [1, 30, 31, 32, 33]
SECOND_SHARD = "model-00002-of-00003.safetensors"
INDEX = "model.safetensors.index.json"


def error_of(folder: Path) -> ModelLoadError:
    """Return the error with which a folder is refused."""
    with pytest.raises(ModelLoadError) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)
    return caught.value


def test_shards_make_the_same_model_as_one_file(tmp_path: Path) -> None:
    """With the index, without it, or in one file: the same weights, the same bits."""
    whole = load_model(make_tiny_llama(tmp_path / "whole"))
    sharded = load_model(make_tiny_llama(tmp_path / "sharded", shards=3))
    (make_tiny_llama(tmp_path / "bare", shards=3) / INDEX).unlink()
    bare = load_model(tmp_path / "bare")

    wanted = logits_of(whole, TOKEN_IDS)
    assert torch.equal(logits_of(sharded, TOKEN_IDS), wanted)
    assert torch.equal(logits_of(bare, TOKEN_IDS), wanted)
    assert whole.num_parameters == sharded.num_parameters


@pytest.mark.parametrize(("dtype", "encoding"), [("float32", "f32"), ("float16", "f16"), ("bfloat16", "bf16")])
def test_floats_keep_their_type(tmp_path: Path, dtype: str, encoding: str) -> None:
    """Matrices are kept as they are on disk."""
    folder = SafetensorsFolder.open(make_tiny_llama(tmp_path, dtype=dtype))

    assert folder.matrix("model.layers.0.mlp.up_proj.weight").encoding is Encoding(encoding)
    assert folder.vector("model.norm.weight").dtype is torch.float32


def test_a_folder_without_a_configuration_is_refused(tmp_path: Path) -> None:
    """An empty folder is no model."""
    assert error_of(tmp_path).problem == "no config.json in this folder"


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    """A configuration alone is no model."""
    (make_tiny_llama(tmp_path) / "model.safetensors").unlink()

    assert error_of(tmp_path).problem == "no *.safetensors in this folder"


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    """The error's path is the file that should be there."""
    (make_tiny_llama(tmp_path, shards=3) / SECOND_SHARD).unlink()

    error = error_of(tmp_path)

    assert (error.path, error.problem) == (str(tmp_path / SECOND_SHARD), "this shard is missing")


@pytest.mark.parametrize("size", [0, 5, 100, 20_000])
def test_a_truncated_file_is_refused(tmp_path: Path, size: int) -> None:
    """Cut in its header or in its data, it is not a whole file."""
    file = make_tiny_llama(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])

    error = error_of(tmp_path)

    assert error.path == str(file)
    assert error.problem.startswith("not a whole safetensors file")


def test_an_index_that_promises_a_tensor_elsewhere_is_refused(tmp_path: Path) -> None:
    """What the index says and what the shards hold must agree."""
    index = make_tiny_llama(tmp_path, shards=3) / INDEX
    value = json.loads(index.read_text())
    value["weight_map"]["model.extra.weight"] = SECOND_SHARD
    index.write_text(json.dumps(value))

    error = error_of(tmp_path)

    assert error.path == str(tmp_path / SECOND_SHARD)
    assert "model.extra.weight" in error.problem


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/hostname", 7])
def test_an_index_does_not_reach_outside_its_folder(tmp_path: Path, name: object) -> None:
    """Names of shards are names, not paths."""
    index = make_tiny_llama(tmp_path, shards=3) / INDEX
    value = json.loads(index.read_text())
    value["weight_map"]["model.norm.weight"] = name
    index.write_text(json.dumps(value))

    assert "weight_map.model.norm.weight" in error_of(tmp_path).problem


@pytest.mark.parametrize("content", ["{", "[1]", "null", '{"weight_map": 3}', "\xff", "[" * 100_000])
def test_a_spoiled_index_is_refused(tmp_path: Path, content: str) -> None:
    """It must be a JSON object with a weight_map."""
    index = make_tiny_llama(tmp_path, shards=3) / INDEX
    index.write_bytes(content.encode("latin-1"))

    assert error_of(tmp_path).path == str(index)


def test_weights_of_another_type_are_refused(tmp_path: Path) -> None:
    """A matrix of float64 is refused by its name."""
    make_tiny_llama(tmp_path, dtype="float64")

    assert "got type float64, want float32, float16 or bfloat16" in error_of(tmp_path).problem
