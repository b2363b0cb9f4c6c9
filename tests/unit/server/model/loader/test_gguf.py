import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from kernels.weights import Encoding
from server.errors import ModelLoadError
from server.model.loader import load_model
from server.model.loader.gguf import GgufFile
from tests.fixtures.tiny_models import make_tiny_gguf

VALUE_TYPE_STRING, VALUE_TYPE_ARRAY, VALUE_TYPE_UINT8 = 8, 9, 0
HUGE = 2**63


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A good file; tests spoil it."""
    return make_tiny_gguf(tmp_path / "tiny.gguf")


def problem_of(path: Path) -> str:
    """Return the reason for which a path is refused."""
    with pytest.raises(ModelLoadError) as caught:
        load_model(path)
    assert caught.value.path == str(path)
    assert "\n" not in str(caught.value)
    return caught.value.problem


def test_tensors_and_metadata_are_read_back(file: Path) -> None:
    """Numbers, strings, lists and tensors come out as they went in."""
    opened = GgufFile.open(file)

    assert opened.metadata["llama.block_count"] == 2
    assert opened.metadata["tokenizer.ggml.add_bos_token"] is False
    assert opened.metadata["llama.rope.freq_base"] == pytest.approx(10_000.0)
    assert opened.metadata["tokenizer.ggml.tokens"][:2] == ["<|endoftext|>", "<|im_start|>"]
    assert opened.shapes["blk.1.ffn_down.weight"] == (64, 96)


@pytest.mark.parametrize("encoding", ["f32", "f16", "bf16", "q4_0", "q4_1", "q8_0"])
def test_encodings_that_ops_read_are_kept(tmp_path: Path, encoding: str) -> None:
    """These matrices are not copied, let alone decoded."""
    matrix = GgufFile.open(make_tiny_gguf(tmp_path / "tiny.gguf", encoding=encoding)).matrix("blk.0.ffn_up.weight")

    assert matrix.encoding is Encoding(encoding)
    assert (matrix.num_rows, matrix.num_columns) == (96, 64)


@pytest.mark.parametrize(("kind", "bytes_per_block"), [("q4_k", 144), ("q6_k", 210), ("q2_k", 84), ("iq4_xs", 136)])
def test_other_quantised_types_become_bf16(tmp_path: Path, kind: str, bytes_per_block: int) -> None:
    """K-quants and their like are decoded once, at load, to the numbers that the format defines."""
    import gguf  # noqa: PLC0415 - the other side of the comparison

    blocks = np.random.default_rng(0).integers(0, 0x3C, size=(256, bytes_per_block), dtype=np.uint8)
    file = make_tiny_gguf(tmp_path / "tiny.gguf", hidden=256, ffn=256, blocks={"blk.0.ffn_up.weight": (kind, blocks)})

    matrix = GgufFile.open(file).matrix("blk.0.ffn_up.weight")

    wanted = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind.upper()])
    assert matrix.encoding is Encoding.BF16
    torch.testing.assert_close(matrix.data, torch.from_numpy(wanted).bfloat16(), atol=0, rtol=0)
    load_model(file)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    """A wrong path is an error that names it."""
    assert problem_of(tmp_path / "missing.gguf") == "no such file or folder"


@pytest.mark.parametrize("content", [b"", b"GG", b"GGUF", b"not a model at all, but longer than a header"])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    """A file of another kind, however short, is no GGUF file."""
    path = tmp_path / "other.gguf"
    path.write_bytes(content)

    assert any(words in problem_of(path) for words in ("not a GGUF file", "truncated"))


def test_a_file_cut_anywhere_is_refused(file: Path, tmp_path: Path) -> None:
    """Whether the cut is in the metadata, the list of tensors or the weights, it is found at once."""
    content = file.read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in [*range(4, 2000, 37), len(content) // 2, len(content) - 1000]:
        cut.write_bytes(content[:size])

        assert "truncated" in problem_of(cut), size


def test_a_corrupt_file_is_refused_or_read_but_never_hangs(file: Path, tmp_path: Path) -> None:
    """Whichever byte of the head is changed, the answer is a model or a one-line error, at small cost."""
    content = bytearray(file.read_bytes())
    random = np.random.default_rng(0)
    spoiled = tmp_path / "spoiled.gguf"
    tracemalloc.start()
    for _ in range(300):
        changed = bytearray(content)
        changed[random.integers(0, 9000)] = random.integers(0, 256)
        spoiled.write_bytes(changed)
        try:
            GgufFile.open(spoiled)
        except ModelLoadError as error:
            assert "\n" not in str(error)  # noqa: PT017 - either outcome is right
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert peak < 20 * len(content) + 5_000_000


def with_metadata(value: bytes, *, num_tensors: int = 0, num_values: int = 1) -> bytes:
    """Return a head whose only value is as given."""
    key = struct.pack("<Q", 1) + b"k"
    return b"GGUF" + struct.pack("<IQQ", 3, num_tensors, num_values) + key + value


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(with_metadata(struct.pack("<IQ", VALUE_TYPE_STRING, HUGE)), id="string length"),
        pytest.param(with_metadata(struct.pack("<IIQ", VALUE_TYPE_ARRAY, VALUE_TYPE_UINT8, HUGE)), id="array length"),
        pytest.param(with_metadata(struct.pack("<IIQ", VALUE_TYPE_ARRAY, VALUE_TYPE_STRING, HUGE)), id="strings"),
        pytest.param(with_metadata(struct.pack("<IIQ", VALUE_TYPE_ARRAY, 9, 1) * 99), id="nesting"),
        pytest.param(with_metadata(struct.pack("<I", 77)), id="value type"),
        pytest.param(with_metadata(b"", num_values=HUGE), id="number of values"),
        pytest.param(with_metadata(b"\0\0\0\0\7", num_tensors=HUGE), id="number of tensors"),
    ],
)
def test_lengths_are_checked_before_they_are_believed(tmp_path: Path, content: bytes) -> None:
    """A length of 2^63 costs nothing."""
    path = tmp_path / "corrupt.gguf"
    path.write_bytes(content)

    assert "corrupt" in problem_of(path)


def spoil(file: Path, old: bytes, new: bytes) -> None:
    """Replace the first place where some bytes stand."""
    content = file.read_bytes()
    assert old in content
    file.write_bytes(content.replace(old, new, 1))


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (lambda file: spoil(file, b"GGUF\3\0\0\0", b"GGUF\4\0\0\0"), "GGUF version: got 4, want 2 or 3, little-endian"),
        (lambda file: spoil(file, b"GGUF\3\0\0\0", b"GGUF\0\0\0\3"), "little-endian"),
        (lambda file: spoil(file, b"llama.block_count", b"llama.block_c\xff\xfent"), "not UTF-8"),
        (lambda file: spoil(file, b"blk.1.ffn_up.weight", b"blk.0.ffn_up.weight"), "blk.0.ffn_up.weight: stands twice"),
        (
            lambda file: spoil(
                file,
                b"blk.1.ffn_up.weight" + struct.pack("<IQ", 2, 64),
                b"blk.1.ffn_up.weight" + struct.pack("<IQ", 2, 63),
            ),
            "blk.1.ffn_up.weight has shape (96, 63), want a multiple of 32",
        ),
        (
            lambda file: spoil(
                file, b"blk.1.ffn_up.weight" + struct.pack("<I", 2), b"blk.1.ffn_up.weight" + struct.pack("<I", 9)
            ),
            "blk.1.ffn_up.weight has 9 dimensions",
        ),
    ],
)
def test_a_spoiled_head_is_named(file: Path, change: Callable[[Path], None], wanted: str) -> None:
    """The reason says which value or tensor is wrong, and what would be right."""
    change(file)

    assert wanted in problem_of(file)


def test_a_tensor_in_a_type_that_nothing_reads_is_refused(tmp_path: Path) -> None:
    """A matrix of integers is no weight."""
    blocks = np.zeros((96, 64), dtype=np.uint8)
    file = make_tiny_gguf(tmp_path / "tiny.gguf", blocks={"blk.0.ffn_up.weight": ("i8", blocks)})

    assert problem_of(file) == "tensor blk.0.ffn_up.weight: nothing here reads type I8"


def test_one_part_of_a_split_model_is_refused(tmp_path: Path) -> None:
    """A part of several files would be a model with missing tensors; the reason says it is a part."""
    file = make_tiny_gguf(tmp_path / "tiny.gguf", metadata={"split.count": 3})

    assert problem_of(file) == "split.count: got 3, want 0 or 1"
