"""Choices of a client and defaults of a model become parameters that leave nothing open."""

import secrets

from server.errors import ContextLengthExceeded
from server.frontend.requests import DEFAULT_MAX_TOKENS, SamplingChoices
from server.messages import ModelInfo, SamplingParams


def resolve(choices: SamplingChoices, info: ModelInfo, prompt_tokens: int) -> SamplingParams:
    """Fill in what the client left open.

    Raises:
        ContextLengthExceeded: prompt and max_tokens do not fit the model's context together.
    """
    room = info.context_length_tokens - prompt_tokens
    max_tokens = min(DEFAULT_MAX_TOKENS, room) if choices.max_tokens is None else choices.max_tokens
    if room < 1 or max_tokens > room:
        raise ContextLengthExceeded(
            prompt_tokens=prompt_tokens, max_tokens=max(max_tokens, 1), limit=info.context_length_tokens
        )

    def pick(name: str, chosen: float | None, otherwise: float) -> float:
        return chosen if chosen is not None else info.generation_defaults.get(name, otherwise)

    return SamplingParams(
        seed=secrets.randbits(64) if choices.seed is None else choices.seed,
        max_tokens=max_tokens,
        temperature=pick("temperature", choices.temperature, 1.0),
        top_p=pick("top_p", choices.top_p, 1.0),
        top_k=int(pick("top_k", choices.top_k, 0)),
        min_p=pick("min_p", choices.min_p, 0.0),
        repetition_penalty=pick("repetition_penalty", choices.repetition_penalty, 1.0),
        presence_penalty=choices.presence_penalty or 0.0,
        frequency_penalty=choices.frequency_penalty or 0.0,
        # The room may be less than an unset max_tokens promised.
        min_tokens=min(choices.min_tokens, max_tokens),
        eos_token_ids=() if choices.ignore_eos else info.eos_token_ids,
        stop_token_ids=choices.stop_token_ids,
        logit_bias=choices.logit_bias,
        logprobs=choices.logprobs,
        prompt_logprobs=choices.prompt_logprobs,
        n=choices.n,
    )


def resolve_score(choices: SamplingChoices, info: ModelInfo, prompt_tokens: int) -> SamplingParams:
    """Make the parameters that compute prompt_logprobs and generate nothing.

    Raises:
        ContextLengthExceeded: the text does not fit the model's context.
    """
    if prompt_tokens > info.context_length_tokens:
        raise ContextLengthExceeded(prompt_tokens=prompt_tokens, max_tokens=0, limit=info.context_length_tokens)
    return SamplingParams(seed=0, max_tokens=0, temperature=0.0, prompt_logprobs=choices.prompt_logprobs)
