import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathfox.v1 import generation_pb2 as pb
from server.errors import InvalidRequest, NotFound
from server.frontend.models import Models
from server.frontend.requests import SamplingChoices
from server.frontend.sampling import resolve
from server.frontend.wire import read_request
from server.messages import Criticality
from tests.fixtures.front_ends import TOKENIZER, saying, served

MODELS = Models([served(saying("x"))])


def test_unset_is_not_zero() -> None:
    """A field that is not set leaves the choice to the model; one that is set to zero does not."""
    unset = read_request(pb.GenerateRequest(text="x"), MODELS)
    zero = read_request(
        pb.GenerateRequest(text="x", sampling_params=pb.SamplingParams(temperature=0, top_k=0, seed=0, logprobs=0)),
        MODELS,
    )

    assert unset.choices == SamplingChoices()
    assert (zero.choices.temperature, zero.choices.top_k, zero.choices.seed, zero.choices.logprobs) == (0, 0, 0, 0)


def test_every_sampling_parameter_is_read() -> None:
    """No field of the contract is forgotten on the way in."""
    values: dict[str, object] = {
        "temperature": 0.5,
        "top_p": 0.25,
        "top_k": 3,
        "min_p": 0.125,
        "repetition_penalty": 1.5,
        "presence_penalty": -1.0,
        "frequency_penalty": 1.0,
        "seed": 2**64 - 1,
        "max_tokens": 9,
        "min_tokens": 4,
        "stop": ("a", "b"),
        "stop_token_ids": (1, 2),
        "ignore_eos": True,
        "logit_bias": {3: -100.0},
        "logprobs": 20,
        "prompt_logprobs": 1,
        "n": 16,
        "echo": True,
    }
    assert set(values) == {field.name for field in pb.SamplingParams.DESCRIPTOR.fields}

    request = read_request(pb.GenerateRequest(text="x", sampling_params=pb.SamplingParams(**values)), MODELS)  # type: ignore[arg-type]

    assert request.choices == SamplingChoices(**values)  # type: ignore[arg-type]
    params = resolve(request.choices, request.model.info, prompt_tokens=1)
    assert (params.max_tokens, params.n, params.seed, params.eos_token_ids) == (9, 16, 2**64 - 1, ())


def test_ids_have_one_spelling() -> None:
    """The same UUID, however it is written, is the same request."""
    for text in ("6D482B09-8101-43B7-9DE7-B9BB9504BD74", "6d482b09810143b79de7b9bb9504bd74"):
        request = read_request(pb.GenerateRequest(text="x", request_id=text), MODELS)

        assert request.request_id == "6d482b09-8101-43b7-9de7-b9bb9504bd74"


def test_criticality_defaults() -> None:
    """Unspecified is DEFAULT; the others are what they say."""
    for value, meant in ((0, Criticality.DEFAULT), (1, Criticality.CRITICAL), (4, Criticality.SHEDDABLE)):
        assert read_request(pb.GenerateRequest(text="x", criticality=value), MODELS).criticality is meant  # type: ignore[arg-type]


def test_an_unknown_model_comes_before_its_fields() -> None:
    """Without a model there is no vocabulary to check against."""
    with pytest.raises(NotFound):
        read_request(pb.GenerateRequest(model="nope"), MODELS)


def test_an_unspecified_consistency_asks_for_nothing() -> None:
    """Only what needs a store is refused."""
    read_request(pb.GenerateRequest(text="x", consistency=pb.CONSISTENCY_UNSPECIFIED), MODELS)


@given(
    number=st.floats(width=32),
    integer=st.integers(-(2**31), 2**31 - 1),
    text=st.text(max_size=5),
    ids=st.lists(st.integers(-(2**31), 2**31 - 1), max_size=3),
    role=st.integers(-1, 6),
)
def test_any_values_are_read_or_refused(number: float, integer: int, text: str, ids: list[int], role: int) -> None:
    """Whatever the fields hold, the answer is a request within its limits or a refusal that names fields."""
    params = pb.SamplingParams(
        temperature=number,
        top_p=number,
        min_p=number,
        repetition_penalty=number,
        presence_penalty=number,
        frequency_penalty=number,
        top_k=integer,
        max_tokens=integer,
        n=integer,
        logprobs=integer,
        stop=[text],
        stop_token_ids=ids,
        logit_bias=dict.fromkeys(ids, number),
    )
    message = pb.Message(role=role, content=text)  # type: ignore[arg-type]
    asked = pb.GenerateRequest(
        messages=pb.Messages(messages=[message]),
        sampling_params=params,
        criticality=integer,
        metadata={text: text},  # type: ignore[arg-type]
    )
    try:
        request = read_request(asked, MODELS)
    except InvalidRequest:
        return
    choices = request.choices
    assert choices.temperature is not None
    assert math.isfinite(choices.temperature)
    assert choices.temperature >= 0
    assert 1 <= choices.n <= 16
    assert all(0 <= token_id < TOKENIZER.vocabulary_size for token_id in choices.stop_token_ids)
