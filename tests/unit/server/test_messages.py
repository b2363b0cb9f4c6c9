import pickle

import pytest

from server import messages

EXAMPLES: list[object] = [
    messages.SamplingParams(seed=2**64 - 1, max_tokens=0, logit_bias={1: 0.5}),
    messages.GenerateRequest("r", (1, 2), messages.SamplingParams(seed=1, max_tokens=2), emitted_token_ids=((3,),)),
    messages.Started("f", 0, prompt_logprobs=(messages.TokenLogprob(1, -0.5, 1, ((1, -0.5),)),)),
    messages.TokenDelta(0, (1,)),
    messages.Finished(0, messages.FinishReason.STOP, 1),
    messages.Load(),
    messages.Page(b"c", b"p", b"s"),
]


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_messages_pickle_and_do_not_change(message: object) -> None:
    """What travels between rooms may travel between processes, and is nobody's to change."""
    assert pickle.loads(pickle.dumps(message)) == message  # noqa: S301 our own bytes
    with pytest.raises((AttributeError, TypeError)):
        message.anything = 1  # type: ignore[attr-defined]
