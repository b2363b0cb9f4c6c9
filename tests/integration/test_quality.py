"""The default model on the default path, judged by another implementation of the same weights."""

from functools import cache
from pathlib import Path

import pytest

from server.model.loader import load_model, read_text_assets
from server.model.loader.bundled import find_bundled_model
from server.model.model import Model
from server.text.tokenizer import Tokenizer
from tests.fixtures.forward import greedy, logits_of
from tests.fixtures.quality import TEXT, perplexity

MAX_DEVIATION = 0.005
QUESTION = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"

pytestmark = pytest.mark.usefixtures("needs_smollm2")


@pytest.fixture(scope="module")
def file() -> Path:
    """Where the default model lies."""
    return find_bundled_model()


@pytest.fixture(scope="module")
def model(file: Path) -> Model:
    """The default model on the default backend."""
    return load_model(file)


@cache
def tokenizer_of(file: Path) -> Tokenizer:
    """Make the tokenizer that the file describes."""
    metadata = read_text_assets(file).gguf_metadata
    assert metadata is not None
    return Tokenizer.from_gguf_metadata(metadata)


def test_it_knows_the_capital_of_france(model: Model, file: Path) -> None:
    """A greedy answer to a plain question is a sentence that is true."""
    tokenizer = tokenizer_of(file)

    answer = tokenizer.decode(greedy(model, tokenizer.encode(QUESTION, allow_special=True), 24))

    assert "The capital of France is Paris" in answer


@pytest.mark.usefixtures("needs_transformers")
@pytest.mark.timeout(120)
def test_perplexity_is_that_of_transformers_in_float32(model: Model, file: Path) -> None:
    """Activations of 8 bits and pages of float16 cost less than half a per cent of perplexity on a fixed text."""
    from tests.fixtures.transformers_llama import TransformersLlama  # noqa: PLC0415 - transformers is optional

    token_ids = tokenizer_of(file).encode(TEXT.read_text(encoding="utf-8"), allow_special=False)
    assert len(token_ids) > 300
    wanted = perplexity(TransformersLlama(file).logits(token_ids), token_ids)

    seen = perplexity(logits_of(model, token_ids, [100, 100, 100, len(token_ids) - 300]), token_ids)

    assert abs(seen / wanted - 1) < MAX_DEVIATION, (seen, wanted)
