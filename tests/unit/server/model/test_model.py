from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.backend import Backend, use_backend
from server.model.loader import load_model
from server.model.model import Model
from tests.fixtures.forward import Playground, Row, greedy, logits_of, rows_of
from tests.fixtures.tiny_models import make_tiny_gguf, make_tiny_llama

TOKEN_IDS = [1, *range(40, 90), 7, 7, 7, 2]

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Encoded as SmolLM2 is: Q4_1, and Q8_0 for the embedding."""
    file = tmp_path_factory.mktemp("model") / "tiny.gguf"
    return load_model(make_tiny_gguf(file, embedding_encoding="q8_0"))


def transformers_logits(folder: Path, token_ids: Sequence[int]) -> torch.Tensor:
    """Run the same folder through Hugging Face transformers in float32."""
    from transformers import LlamaForCausalLM  # noqa: PLC0415 - optional, and slow to import

    reference = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        logits: torch.Tensor = reference(torch.tensor([list(token_ids)])).logits[0]
    return logits


@pytest.mark.usefixtures("needs_transformers")
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="tied"),
        pytest.param({"tie": False}, id="untied"),
        pytest.param({"kv_heads": 4}, id="multi-head"),
        pytest.param({"kv_heads": 1, "heads": 8, "head_size": 32}, id="heads-wider-than-hidden"),
        pytest.param({"attention_bias": True}, id="biases"),
        pytest.param({"rope_scaling": {"type": "linear", "factor": 4.0}}, id="rope-linear"),
        pytest.param({"rope_scaling": LLAMA3}, id="rope-llama3"),
        pytest.param({"config": {"rope_theta": None, "rope_parameters": {"rope_theta": 500.0}}}, id="rope-parameters"),
    ],
)
def test_logits_are_those_of_transformers(tmp_path: Path, changes: dict[str, object]) -> None:
    """A folder gives the logits of Hugging Face transformers in float32; float16 pages cost a little, nothing else."""
    folder = make_tiny_llama(tmp_path / "folder", seed=3, **changes)
    wanted = transformers_logits(folder, TOKEN_IDS)

    with use_backend(Backend.REFERENCE):
        exact = logits_of(load_model(folder), TOKEN_IDS, page_dtype=torch.float32)
    served = logits_of(load_model(folder), TOKEN_IDS)

    torch.testing.assert_close(exact, wanted, atol=1e-4, rtol=0)  # float32 throughout
    torch.testing.assert_close(served, wanted, atol=4e-2, rtol=0)  # float16 pages; the logits' deviation is 2


@pytest.mark.parametrize("encoding", ["f32", "f16", "bf16", "q4_0", "q4_1", "q8_0"])
def test_a_gguf_gives_the_logits_of_a_folder_with_the_same_weights(tmp_path: Path, encoding: str) -> None:
    """GGUF's order of channels and its quantised blocks change nothing: the folder holds the dequantised weights."""
    file, folder = tmp_path / "tiny.gguf", tmp_path / "folder"
    make_tiny_gguf(file, encoding=encoding)
    make_tiny_llama(folder, as_stored_in=encoding)
    with use_backend(Backend.REFERENCE):
        wanted = logits_of(load_model(folder), TOKEN_IDS, page_dtype=torch.float32)
        exact = logits_of(load_model(file), TOKEN_IDS, page_dtype=torch.float32)

    served = logits_of(load_model(file), TOKEN_IDS)

    torch.testing.assert_close(exact, wanted, atol=1e-4, rtol=0)  # float32 throughout
    # float16 pages; the CPU backend's activations have 8 bits where weights are quantised; the logits' deviation is 2
    assert (served - wanted).std() < (0.12 if encoding.startswith("q") else 0.005)


def require_lawful(model: Model) -> None:
    """Skip where the prefix law is not promised."""
    if not model.is_row_invariant:
        pytest.skip(f"the {model.backend} backend is not row-invariant")


@settings(max_examples=25)
@given(data=st.data())
def test_chunks_and_neighbours_do_not_change_a_bit(model: Model, data: st.DataObject) -> None:
    """Prefill in any chunks, beside any other sequence, gives the bits of token-by-token decode."""
    require_lawful(model)
    alone = logits_of(model, TOKEN_IDS, [1] * len(TOKEN_IDS))
    playground = Playground(model, num_slots=2, max_tokens=64)
    other = data.draw(st.lists(st.integers(0, 319), min_size=60, max_size=60), label="neighbour")
    parts, start, other_start = [], 0, 0
    while start < len(TOKEN_IDS):
        stop = start + data.draw(st.integers(1, len(TOKEN_IDS) - start), label="chunk")
        other_stop = other_start + data.draw(st.integers(0, len(other) - other_start), label="neighbour's chunk")
        mine: list[Row] = rows_of(0, TOKEN_IDS[start:stop], start=start)
        theirs = rows_of(1, other[other_start:other_stop], start=other_start)
        is_first = data.draw(st.booleans(), label="first")
        rows, offset = (mine + theirs, 0) if is_first else (theirs + mine, len(theirs))
        parts.append(playground.run(rows, range(offset, offset + len(mine))))
        start, other_start = stop, other_stop

    assert torch.equal(torch.cat(parts), alone)


def test_no_logit_rows_give_no_logits(model: Model) -> None:
    """A step in which nothing is sampled still writes its rows, and returns `[0, V]`."""
    playground = Playground(model, num_slots=1)

    logits = playground.run(rows_of(0, TOKEN_IDS[:-1]), [])
    after = playground.run(rows_of(0, TOKEN_IDS[-1:], start=len(TOKEN_IDS) - 1))

    assert logits.shape == (0, model.spec.vocabulary_size)
    torch.testing.assert_close(after, logits_of(model, TOKEN_IDS)[-1:], atol=1e-3, rtol=0)


def test_facts_of_a_model(model: Model) -> None:
    """A model knows its parameters, and what a page costs, over all layers."""
    spec = model.spec

    assert model.num_parameters == 320 * 64 + 2 * (64 * (64 + 2 * 32 + 64) + 3 * 64 * 96 + 2 * 64) + 64
    assert model.page_bytes == 2 * 2 * (2 * 16 * 16) * 2  # layers, keys and values, heads x channels x tokens, bytes
    assert (spec.family, model.mixer_kinds, spec.context_length_tokens) == ("llama", ("rope",), 512)
    assert model.tail_fields == ((), ())


def test_a_model_runs_on_the_backend_it_was_loaded_for(tmp_path: Path) -> None:
    """The caller's context, which a compute thread does not inherit, decides at loading only."""
    file = make_tiny_gguf(tmp_path / "tiny.gguf")

    with use_backend(Backend.REFERENCE):
        model = load_model(file)

    assert model.backend is Backend.REFERENCE
    assert logits_of(model, TOKEN_IDS).shape == (len(TOKEN_IDS), 320)


def test_greedy_text_of_a_tiny_model_is_the_same_twice(model: Model) -> None:
    """Nothing in a model changes by running it."""
    assert greedy(model, TOKEN_IDS, 20) == greedy(model, TOKEN_IDS, 20)
