"""The Llama family: RMS norms, rotary attention with grouped heads, a gated feed-forward network in every layer.

Only names and configuration stand here; the mathematics is in `mixers.rope` and `ffn.dense`.
"""

from dataclasses import dataclass, fields

import torch

from kernels.linear import LinearWeight, pack, pack_gated
from kernels.rms_norm import Norm
from kernels.rope import RopeTable
from kernels.weights import EncodedMatrix
from server.errors import ModelLoadError
from server.model.checkpoint import Checkpoint, Facts, Layout
from server.model.family import Family
from server.model.ffn.dense import GatedFeedForward
from server.model.mixers.rope import RopeAttention, tabulate
from server.model.model import Layer, Network
from server.model.spec import AttentionSpec, ModelSpec, RopeScaling, RopeScalingKind, RopeSpec

MAX_CONTEXT_TOKENS = 1 << 20
"""A longer context would need a larger table of rotations than is sensible; so far only corrupt files asked for one."""

ROPE_FACTORS = "rope_freqs.weight"
"""GGUF's form of the `llama3` scaling: a divisor for each frequency."""


@dataclass(frozen=True, slots=True)
class Names:
    """What one layout calls the weights; `.weight` and `.bias` follow."""

    embedding: str
    final_norm: str
    head: str
    layer: str
    attention_norm: str
    query: str
    key: str
    value: str
    output: str
    ffn_norm: str
    gate: str
    up: str
    down: str

    def of_layer(self, index: int) -> "Names":
        """Return the names with the layer's prefix before those of its parts."""
        outer = ("embedding", "final_norm", "head", "layer")
        prefix = self.layer.format(index)
        parts = {each.name: getattr(self, each.name) for each in fields(self)}
        return Names(**{name: value if name in outer else prefix + value for name, value in parts.items()})


NAMES = {
    Layout.HUGGING_FACE: Names(
        embedding="model.embed_tokens",
        final_norm="model.norm",
        head="lm_head",
        layer="model.layers.{}.",
        attention_norm="input_layernorm",
        query="self_attn.q_proj",
        key="self_attn.k_proj",
        value="self_attn.v_proj",
        output="self_attn.o_proj",
        ffn_norm="post_attention_layernorm",
        gate="mlp.gate_proj",
        up="mlp.up_proj",
        down="mlp.down_proj",
    ),
    Layout.GGUF: Names(
        embedding="token_embd",
        final_norm="output_norm",
        head="output",
        layer="blk.{}.",
        attention_norm="attn_norm",
        query="attn_q",
        key="attn_k",
        value="attn_v",
        output="attn_output",
        ffn_norm="ffn_norm",
        gate="ffn_gate",
        up="ffn_up",
        down="ffn_down",
    ),
}


def read_spec(checkpoint: Checkpoint) -> ModelSpec:
    """Read the configuration of either layout.

    Raises:
        ModelLoadError: A key is missing, malformed, or asks for mathematics that this family does not have.
    """
    spec = _read_gguf(checkpoint) if checkpoint.layout is Layout.GGUF else _read_config(checkpoint.facts)
    attention = spec.attention
    for what, value, divisor in (
        ("attention heads", attention.num_heads, attention.num_kv_heads),
        ("head size", attention.head_size, 2),
    ):
        if value % divisor:
            raise ModelLoadError(str(checkpoint.path), f"{what}: got {value}, want a multiple of {divisor}")
    if spec.context_length_tokens > MAX_CONTEXT_TOKENS:
        seen = spec.context_length_tokens
        raise ModelLoadError(str(checkpoint.path), f"context length: got {seen}, want at most {MAX_CONTEXT_TOKENS}")
    return spec


def build(spec: ModelSpec, checkpoint: Checkpoint, device: torch.device) -> Network:
    """Read and pack all weights.

    Raises:
        ModelLoadError: A tensor is missing, of a wrong shape, of an unreadable type, or left over.
    """
    return _Builder(spec, checkpoint, device).build()


FAMILY = Family(
    name="llama",
    architectures={Layout.HUGGING_FACE: "LlamaForCausalLM", Layout.GGUF: "llama"},
    read_spec=read_spec,
    build=build,
)


def _read_config(facts: Facts) -> ModelSpec:
    facts.require("hidden_act", one_of=["silu"])
    facts.require("mlp_bias", one_of=[False])
    facts.require("rope_interleaved", one_of=[False])
    facts.require("partial_rotary_factor", one_of=[1])
    facts.require("sliding_window")
    facts.require("quantization_config")
    num_heads, hidden_size = facts.integer("num_attention_heads"), facts.integer("hidden_size")
    if not facts.has("head_dim") and hidden_size % num_heads:
        raise facts.wrong("hidden_size", f"a multiple of num_attention_heads, {num_heads}")
    return ModelSpec(
        family="llama",
        vocabulary_size=facts.integer("vocab_size"),
        hidden_size=hidden_size,
        num_layers=facts.integer("num_hidden_layers"),
        context_length_tokens=facts.integer("max_position_embeddings"),
        norm_epsilon=facts.number("rms_norm_eps", 1e-6),
        attention=AttentionSpec(
            num_heads=num_heads,
            num_kv_heads=facts.integer("num_key_value_heads", num_heads),
            head_size=facts.integer("head_dim", hidden_size // num_heads),
            has_bias=facts.flag("attention_bias", default=False),
            rope=_read_rope(facts),
        ),
        ffn_size=facts.integer("intermediate_size"),
        tie_embeddings=facts.flag("tie_word_embeddings", default=False),
    )


def _read_rope(facts: Facts) -> RopeSpec:
    section = facts.section("rope_parameters" if facts.has("rope_parameters") else "rope_scaling")
    theta = section.number("rope_theta", facts.number("rope_theta", 10_000.0))
    section.require("partial_rotary_factor", one_of=[1])
    key = "rope_type" if section.has("rope_type") else "type"
    match section.text(key, "default"):
        case "default":
            scaling = RopeScaling()
        case "linear":
            scaling = RopeScaling(RopeScalingKind.LINEAR, factor=section.number("factor"))
        case "llama3":
            scaling = RopeScaling(
                RopeScalingKind.LLAMA3,
                factor=section.number("factor"),
                low_freq_factor=section.number("low_freq_factor"),
                high_freq_factor=section.number("high_freq_factor"),
                original_max_position_embeddings=section.integer("original_max_position_embeddings"),
            )
            if scaling.high_freq_factor <= scaling.low_freq_factor:
                raise section.wrong("high_freq_factor", f"more than low_freq_factor, {scaling.low_freq_factor}")
        case _:
            raise section.wrong(key, "'default', 'linear' or 'llama3'")
    return RopeSpec(theta=theta, is_interleaved=False, scaling=scaling)


def _read_gguf(checkpoint: Checkpoint) -> ModelSpec:
    facts, names = checkpoint.facts, NAMES[Layout.GGUF]
    # Mixtral, too, calls itself llama here; Granite's factors would go unnoticed.
    for key in ("expert_count", "attention.sliding_window", "logit_scale", "embedding_scale", "residual_scale"):
        facts.require(key, one_of=[0])
    facts.require("rope.scale_linear", one_of=[1.0])
    num_heads, hidden_size = facts.integer("attention.head_count"), facts.integer("embedding_length")
    head_size = facts.integer("attention.key_length", max(1, hidden_size // num_heads))
    facts.require("attention.value_length", one_of=[head_size])
    facts.require("rope.dimension_count", one_of=[head_size])
    facts.require("rope.scaling.type", one_of=["none", "linear"])
    scaling = RopeScaling()
    if facts.text("rope.scaling.type", "none") == "linear":
        scaling = RopeScaling(RopeScalingKind.LINEAR, factor=facts.number("rope.scaling.factor"))
    return ModelSpec(
        family="llama",
        vocabulary_size=checkpoint.num_rows(names.embedding + ".weight"),
        hidden_size=hidden_size,
        num_layers=facts.integer("block_count"),
        context_length_tokens=facts.integer("context_length"),
        norm_epsilon=facts.number("attention.layer_norm_rms_epsilon"),
        attention=AttentionSpec(
            num_heads=num_heads,
            num_kv_heads=facts.integer("attention.head_count_kv", num_heads),
            head_size=head_size,
            has_bias=checkpoint.has(names.of_layer(0).query + ".bias"),
            rope=RopeSpec(theta=facts.number("rope.freq_base", 10_000.0), is_interleaved=True, scaling=scaling),
        ),
        ffn_size=facts.integer("feed_forward_length"),
        tie_embeddings=not checkpoint.has(names.head + ".weight"),
    )


@dataclass(frozen=True, slots=True)
class _Builder:
    spec: ModelSpec
    checkpoint: Checkpoint
    device: torch.device

    def build(self) -> Network:
        spec, names = self.spec, NAMES[self.checkpoint.layout]
        table = self._rope_table()
        embedding = pack([self._matrix(names.embedding, spec.vocabulary_size, spec.hidden_size)], device=self.device)
        layers = tuple(self._layer(names.of_layer(index), table) for index in range(spec.num_layers))
        final_norm = self._norm(names.final_norm)
        head = embedding
        if not spec.tie_embeddings:
            head = pack([self._matrix(names.head, spec.vocabulary_size, spec.hidden_size)], device=self.device)
        tied = (f"{names.head}.weight",) if spec.tie_embeddings else ()
        self.checkpoint.require_all_read(ignored=("*.rotary_emb.inv_freq", *tied))
        return Network(embedding, layers, final_norm, head)

    def _layer(self, names: Names, table: RopeTable) -> Layer:
        spec, attention = self.spec, self.spec.attention
        inner = attention.num_heads * attention.head_size
        mixer = RopeAttention(
            attention,
            spec.page_size_tokens,
            norm=self._norm(names.attention_norm),
            qkv=self._qkv(names),
            output=self._linear([names.output], [spec.hidden_size], inner, has_bias=attention.has_bias),
            table=table,
        )
        gate_up = (self._matrix(name, spec.ffn_size, spec.hidden_size) for name in (names.gate, names.up))
        ffn = GatedFeedForward(
            norm=self._norm(names.ffn_norm),
            gate_up=pack_gated(*gate_up, device=self.device),
            down=self._linear([names.down], [spec.hidden_size], spec.ffn_size),
        )
        return Layer(mixer, ffn)

    def _qkv(self, names: Names) -> LinearWeight:
        attention = self.spec.attention
        query, key = attention.num_heads * attention.head_size, attention.num_kv_heads * attention.head_size
        parts, sizes = [names.query, names.key, names.value], [query, key, key]
        return self._linear(parts, sizes, self.spec.hidden_size, has_bias=attention.has_bias)

    def _linear(self, names: list[str], sizes: list[int], num_columns: int, *, has_bias: bool = False) -> LinearWeight:
        matrices = [self._matrix(name, size, num_columns) for name, size in zip(names, sizes, strict=True)]
        bias = None
        if has_bias:
            parts = zip(names, sizes, strict=True)
            bias = torch.cat([self.checkpoint.vector(f"{name}.bias", size) for name, size in parts])
        return pack(matrices, device=self.device, bias=bias)

    def _matrix(self, name: str, num_rows: int, num_columns: int) -> EncodedMatrix:
        return self.checkpoint.matrix(f"{name}.weight", num_rows, num_columns)

    def _norm(self, name: str) -> Norm:
        weight = self.checkpoint.vector(f"{name}.weight", self.spec.hidden_size)
        return Norm(weight.to(self.device), self.spec.norm_epsilon)

    def _rope_table(self) -> RopeTable:
        attention = self.spec.attention
        frequencies = attention.rope.frequencies(attention.head_size)
        if self.checkpoint.layout is Layout.GGUF and self.checkpoint.has(ROPE_FACTORS):
            frequencies = frequencies / self.checkpoint.vector(ROPE_FACTORS, attention.head_size // 2).double()
        return tabulate(attention.rope, frequencies, self.spec.context_length_tokens, self.device)
