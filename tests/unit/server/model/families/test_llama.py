from pathlib import Path

import pytest
import torch

from server.errors import ModelLoadError
from server.model.loader import load_model
from server.model.spec import RopeScalingKind
from tests.fixtures.forward import logits_of
from tests.fixtures.tiny_models import make_tiny_gguf, make_tiny_llama

TOKEN_IDS = [1, *range(40, 100)]
UP = "model.layers.1.mlp.up_proj.weight"


def refused(path: Path) -> str:
    """Return the reason for which a model is refused."""
    with pytest.raises(ModelLoadError) as caught:
        load_model(path)
    assert "\n" not in str(caught.value)
    return caught.value.problem


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, "architectures: got 'MixtralForCausalLM', want 'LlamaForCausalLM'"),
        ({"architectures": None}, "architectures: got nothing, want a list of one name"),
        ({"hidden_size": None}, "hidden_size: got nothing, want a positive integer"),
        ({"hidden_size": "64"}, "hidden_size: got '64', want a positive integer"),
        ({"num_hidden_layers": -1}, "num_hidden_layers: got -1, want a positive integer"),
        ({"rms_norm_eps": 0}, "rms_norm_eps: got 0, want a positive number"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings: got 'yes', want true or false"),
        ({"hidden_act": "gelu"}, "hidden_act: got 'gelu', want 'silu'"),
        ({"mlp_bias": True}, "mlp_bias: got True, want False"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: got 0.5, want 1"),
        ({"sliding_window": 4096}, "sliding_window: got 4096, want absent"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: got {'bits': 4}, want absent"),
        ({"num_key_value_heads": 3}, "attention heads: got 4, want a multiple of 3"),
        ({"head_dim": 15}, "head size: got 15, want a multiple of 2"),
        (
            {"head_dim": None, "num_attention_heads": 3},
            "hidden_size: got 64, want a multiple of num_attention_heads, 3",
        ),
        ({"max_position_embeddings": 2**31}, "context length: got 2147483648, want at most 1048576"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            "rope_scaling.rope_type: got 'yarn', want 'default', 'linear' or 'llama3'",
        ),
        (
            {"rope_scaling": {"type": "dynamic"}},
            "rope_scaling.type: got 'dynamic', want 'default', 'linear' or 'llama3'",
        ),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor: got nothing, want a positive number"),
        ({"rope_parameters": {"rope_theta": "x"}}, "rope_parameters.rope_theta: got 'x', want a positive number"),
        ({"rope_scaling": 3}, "rope_scaling: got 3, want an object"),
    ],
)
def test_a_configuration_that_is_not_understood_is_refused_by_key(
    tmp_path: Path, config: dict[str, object], reason: str
) -> None:
    """A key that is missing, malformed or asks for other mathematics is named, with what would be right."""
    assert refused(make_tiny_llama(tmp_path, config=config)) == reason


@pytest.mark.parametrize("content", ["{", "[]", "", '"config"'])
def test_a_configuration_that_is_not_json_is_refused(tmp_path: Path, content: str) -> None:
    """It must be a JSON object."""
    (make_tiny_llama(tmp_path) / "config.json").write_text(content)

    assert any(words in refused(tmp_path) for words in ("not JSON", "want an object"))


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    """The reason names it."""
    assert refused(make_tiny_llama(tmp_path, tensors={UP: None})) == f"tensor {UP}: missing"


def test_a_wrong_shape_is_named(tmp_path: Path) -> None:
    """The reason names the tensor, the shape seen and the shape wanted."""
    folder = make_tiny_llama(tmp_path, tensors={UP: torch.zeros(96, 32)})

    assert refused(folder) == f"tensor {UP}: got shape (96, 32), want (96, 64)"


def test_a_tensor_that_is_left_over_is_refused(tmp_path: Path) -> None:
    """A weight that this family does not know would be mathematics left out."""
    extra = {f"model.layers.{layer}.self_attn.q_norm.weight": torch.ones(16) for layer in range(2)}

    reason = refused(make_tiny_llama(tmp_path, tensors=extra))

    assert reason == "tensor model.layers.0.self_attn.q_norm.weight and 1 more: unknown to this family of models"


def test_tensors_that_carry_nothing_are_passed_over(tmp_path: Path) -> None:
    """Old checkpoints store rotation frequencies, and some a copy of the tied head."""
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8), "lm_head.weight": torch.zeros(320, 64)}

    plain = load_model(make_tiny_llama(tmp_path / "plain"))
    other = load_model(make_tiny_llama(tmp_path / "other", tensors=extra))

    assert torch.equal(logits_of(plain, TOKEN_IDS), logits_of(other, TOKEN_IDS))


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ({"llama.expert_count": 8}, "llama.expert_count: got 8, want 0"),
        ({"llama.embedding_length": None}, "llama.embedding_length: got nothing, want a positive integer"),
        ({"llama.attention.value_length": 8}, "llama.attention.value_length: got 8, want 16"),
        ({"llama.rope.dimension_count": 8}, "llama.rope.dimension_count: got 8, want 16"),
        ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type: got 'yarn', want 'none' or 'linear'"),
        ({"llama.block_count": 3}, "tensor blk.2.attn_norm.weight: missing"),
        ({"llama.block_count": 1}, "tensor blk.1.attn_k.weight and 8 more: unknown to this family of models"),
        (
            {"tokenizer.ggml.eos_token_id": "x"},
            "tokenizer.ggml.eos_token_id: got 'x', want a token id or a list of token ids",
        ),
    ],
)
def test_gguf_metadata_that_is_not_understood_is_refused_by_key(
    tmp_path: Path, metadata: dict[str, str | float | None], reason: str
) -> None:
    """As for a folder."""
    assert refused(make_tiny_gguf(tmp_path / "tiny.gguf", metadata=metadata)) == reason


def test_a_gguf_of_another_architecture_is_refused(tmp_path: Path) -> None:
    """The reason names the architecture."""
    file = make_tiny_gguf(tmp_path / "tiny.gguf", architecture="mamba")

    assert refused(file) == "general.architecture: got 'mamba', want 'llama'"


def test_gguf_biases_and_untied_heads_are_read(tmp_path: Path) -> None:
    """What a GGUF file leaves to its list of tensors is found there."""
    model = load_model(make_tiny_gguf(tmp_path / "tiny.gguf", attention_bias=True, tie=False, encoding="f32"))
    folder = load_model(make_tiny_llama(tmp_path / "folder", attention_bias=True, tie=False))

    assert model.spec.attention.has_bias
    assert not model.spec.tie_embeddings
    torch.testing.assert_close(logits_of(model, TOKEN_IDS), logits_of(folder, TOKEN_IDS), atol=4e-2, rtol=0)


def test_gguf_rope_factors_are_llama3_scaling(tmp_path: Path) -> None:
    """A divisor for each frequency, as converters write it, equals the scaling that config.json describes."""
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    folder = load_model(
        make_tiny_llama(tmp_path / "folder", rope_scaling=scaling | {"original_max_position_embeddings": 32})
    )
    rope = folder.spec.attention.rope
    plain = rope.theta ** -(torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    factors = (plain / rope.frequencies(16)).float()

    model = load_model(make_tiny_gguf(tmp_path / "tiny.gguf", encoding="f32", tensors={"rope_freqs.weight": factors}))

    assert rope.scaling.kind is RopeScalingKind.LLAMA3
    assert factors.min() == 1
    assert factors.max() == 8
    torch.testing.assert_close(logits_of(model, TOKEN_IDS), logits_of(folder, TOKEN_IDS), atol=4e-2, rtol=0)


def test_gguf_linear_scaling_is_read(tmp_path: Path) -> None:
    """It divides every frequency by the factor."""
    metadata = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}

    model = load_model(make_tiny_gguf(tmp_path / "tiny.gguf", metadata=metadata))

    assert model.spec.attention.rope.frequencies(16)[0] == 0.25
