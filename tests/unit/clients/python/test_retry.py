from collections.abc import Callable, Iterator

import grpc
import pytest
from google.protobuf.message import Message

from pathfox.client import Client, DeadlineExceeded, Delta, Overloaded, PathfoxError, Retry, Unavailable
from pathfox.v1 import generation_pb2 as pb
from pathfox.v1 import model_pb2
from tests.unit.clients.python.scripted_server import Script, fail, retry_info

FAST = Retry(initial_backoff_s=0.001)


def refuse_then(
    times: int, reply: object, code: grpc.StatusCode, *details: Message, trailers: tuple[tuple[str, str], ...] = ()
) -> Callable[[object, grpc.ServicerContext], object]:
    """Fail some calls, then answer."""
    left = [times]

    def answer(_request: object, context: grpc.ServicerContext) -> object:
        if left[0]:
            left[0] -= 1
            fail(context, code, "later", *details, trailers=trailers)
        return reply() if callable(reply) else reply

    return answer


def one_frame() -> Iterator[pb.GenerateResponse]:
    """Stream one delta."""
    yield pb.GenerateResponse(delta=pb.Delta(text="x"))


BUSY = grpc.StatusCode.RESOURCE_EXHAUSTED
AWAY = grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("code", [BUSY, AWAY])
def test_calls_that_change_nothing_are_sent_again(script: Script, code: grpc.StatusCode) -> None:
    """Listing models survives a server that is busy or away for a moment, told when to come back or not."""
    script.answers["ListModels"] = refuse_then(
        2, model_pb2.ListModelsResponse(models=[model_pb2.Model(name="m")]), code
    )

    with Client(script.address, retry=FAST) as client:
        assert client.models()[0].name == "m"
    assert len(script.seen) == 3


@pytest.mark.parametrize("code", [BUSY, AWAY])
def test_a_generation_is_sent_again_when_the_server_says_when(script: Script, code: grpc.StatusCode) -> None:
    """RetryInfo means that nothing was begun; the request, its id included, is the same."""
    script.answers["Generate"] = refuse_then(1, one_frame, code, retry_info(0.01))

    with Client(script.address, retry=FAST) as client:
        (event,) = client.generate(text="x")
    assert isinstance(event, Delta)
    first, second = script.requests("Generate")
    assert first == second


@pytest.mark.parametrize("code", [BUSY, AWAY])
def test_a_generation_is_not_sent_again_on_a_guess(script: Script, code: grpc.StatusCode) -> None:
    """Without RetryInfo it may have begun: a second run might be paid for twice."""
    script.answers["Generate"] = refuse_then(1, one_frame, code)

    with Client(script.address, retry=FAST) as client, pytest.raises((Overloaded, Unavailable)):
        list(client.generate(text="x"))
    assert len(script.seen) == 1


def test_an_idempotency_key_makes_a_guess_safe(script: Script) -> None:
    """With a key the server attaches to the first run."""
    script.answers["Generate"] = refuse_then(1, one_frame, AWAY)

    with Client(script.address, retry=FAST) as client:
        assert len(list(client.generate(text="x", idempotency_key="k"))) == 1
    assert len(script.seen) == 2


def test_nothing_is_sent_again_once_an_answer_has_begun(script: Script) -> None:
    """A stream that breaks after its first frame is not begun anew behind the caller's back."""

    def break_off(_request: object, context: grpc.ServicerContext) -> Iterator[pb.GenerateResponse]:
        yield from one_frame()
        fail(context, AWAY, "gone", retry_info(0.01))

    script.answers["Generate"] = break_off

    with Client(script.address, retry=FAST) as client:
        events = client.generate(text="x", idempotency_key="k")
        assert isinstance(next(events), Delta)
        with pytest.raises(Unavailable):
            next(events)
    assert len(script.seen) == 1


def test_what_steers_the_server_is_never_sent_again(script: Script) -> None:
    """Drain is the caller's to repeat."""
    script.answers["Drain"] = refuse_then(1, None, AWAY, retry_info(0.01))

    with Client(script.address, retry=FAST) as client, pytest.raises(Unavailable):
        client.drain()
    assert len(script.seen) == 1


@pytest.mark.parametrize("code", [grpc.StatusCode.INTERNAL, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.ABORTED])
def test_other_errors_are_final(script: Script, code: grpc.StatusCode) -> None:
    """Only being busy or away passes by itself."""
    script.answers["ListModels"] = refuse_then(1, model_pb2.ListModelsResponse(), code, retry_info(0.01))

    with Client(script.address, retry=FAST) as client, pytest.raises(PathfoxError):
        client.models()
    assert len(script.seen) == 1


def test_attempts_end(script: Script) -> None:
    """The last error is the one that the caller sees."""
    script.answers["ListModels"] = refuse_then(9, None, BUSY, retry_info(0.001))

    with Client(script.address, retry=Retry(max_attempts=4)) as client, pytest.raises(Overloaded):
        client.models()
    assert len(script.seen) == 4


def test_the_deadline_is_not_waited_past(script: Script) -> None:
    """Told to come back after the deadline, the caller hears so at once, not when the deadline has passed."""
    script.answers["ListModels"] = refuse_then(1, None, BUSY, retry_info(5))

    with Client(script.address) as client, pytest.raises(Overloaded) as caught:
        client.models(timeout_s=2)
    assert caught.value.retry_after_s == 5
    assert len(script.seen) == 1


def test_too_long_a_wait_is_the_callers(script: Script) -> None:
    """A server that wants the client back in an hour is not waited for."""
    script.answers["ListModels"] = refuse_then(1, None, BUSY, retry_info(3600))

    with Client(script.address) as client, pytest.raises(Overloaded):
        client.models()


def test_a_negative_pushback_is_obeyed(script: Script) -> None:
    """The server may say: do not come back."""
    script.answers["ListModels"] = refuse_then(1, None, BUSY, trailers=(("grpc-retry-pushback-ms", "-1"),))

    with Client(script.address, retry=FAST) as client, pytest.raises(Overloaded):
        client.models()
    assert len(script.seen) == 1


def test_the_budget_ends_retries_for_all_calls_of_a_client(script: Script) -> None:
    """A server that refuses everything sees each call once, after the first few."""
    script.answers["ListModels"] = refuse_then(1000, None, BUSY, retry_info(0.0001))

    with Client(script.address, retry=FAST) as client:
        for _ in range(20):
            with pytest.raises(Overloaded):
                client.models()
    assert len(script.seen) == 20 + 10


def test_a_deadline_that_has_passed_is_not_sent_again(script: Script) -> None:
    """What is left of the time goes with each sending."""
    script.answers["ListModels"] = refuse_then(1000, None, BUSY, retry_info(0.05))

    patient = Retry(max_attempts=1000)
    with Client(script.address, retry=patient) as client, pytest.raises((Overloaded, DeadlineExceeded)):
        client.models(timeout_s=0.3)
    assert 1 < len(script.seen) < 12
