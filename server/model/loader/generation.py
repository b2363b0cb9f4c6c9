"""How a model wants to be sampled, and which tokens end its turns, as its files say."""

from collections.abc import Mapping

from server.model.checkpoint import Facts

NEUTRAL: Mapping[str, float] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
}
"""The model's own distribution, where its files ask for nothing else."""

GGUF_KEYS: Mapping[str, str] = {
    "temperature": "general.sampling.temp",
    "top_p": "general.sampling.top_p",
    "top_k": "general.sampling.top_k",
    "min_p": "general.sampling.min_p",
    "repetition_penalty": "general.sampling.penalty_repeat",
}
GGUF_END_KEYS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")


def read_gguf_generation(facts: Facts) -> tuple[tuple[int, ...], dict[str, float]]:
    """Return the ids that end a turn and the generation defaults of a GGUF file."""
    ends = dict.fromkeys(token_id for key in GGUF_END_KEYS for token_id in facts.token_ids(key))
    return tuple(ends), {name: facts.share(key, NEUTRAL[name]) for name, key in GGUF_KEYS.items()}


def read_config_generation(config: Facts, generation: Facts) -> tuple[tuple[int, ...], dict[str, float]]:
    """Return the same of a folder; for the ids generation_config.json goes before config.json."""
    ends = generation.token_ids("eos_token_id") or config.token_ids("eos_token_id")
    return ends, {name: generation.share(name, default) for name, default in NEUTRAL.items()}
