"""Steps that repeat: what is replayed, and that nobody sees it."""

from collections.abc import Sequence

import pytest
import torch
from structlog.testing import capture_logs
from torch import Tensor

from kernels.cpu import library
from server.engine.plan import Sample
from server.engine.repeats import MAX_ROWS
from server.messages import SamplingParams
from server.model.ffn import FeedForward
from server.model.loader import load_model
from server.model.model import Model
from tests.fixtures.fake_model import FakeModel
from tests.fixtures.kernels import other_isas
from tests.fixtures.stepping import Stepping
from tests.fixtures.tiny_models import make_tiny_gguf

pytestmark = pytest.mark.usefixtures("needs_compiler")

GREEDY = SamplingParams(seed=0, max_tokens=24, temperature=0.0)
PROMPTS = [[7, 8, 9], [20, 21, 22, 23, 24], list(range(40, 60))]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A model whose steps are recordable."""
    return load_model(make_tiny_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf"))


def run(stepping: Stepping, prompts: Sequence[Sequence[int]] = PROMPTS) -> list[list[int]]:
    """Generate from prompts together; return their tokens."""
    serials = [stepping.submit(prompt, GREEDY) for prompt in prompts]
    stepping.run()
    assert not stepping.errors
    return [stepping.tokens[serial, 0] for serial in serials]


def plainly(model: Model, prompts: Sequence[Sequence[int]] = PROMPTS) -> list[list[int]]:
    """Generate without any recording."""
    stepping = Stepping(model)
    stepping.core.runner.repeats.stop("to compare")
    tokens = run(stepping, prompts)
    assert stepping.core.runner.repeats.num_replayed == 0
    return tokens


def test_familiar_steps_are_replayed(model: Model) -> None:
    """All but the first two decode steps of a size are replayed, and give the tokens that computing gives."""
    stepping = Stepping(model)
    assert run(stepping) == plainly(model)
    assert stepping.core.runner.repeats.num_replayed == GREEDY.max_tokens - 3


def test_logits_last_until_the_next_step(model: Model) -> None:
    """Whoever reads a step's logits before the next one reads the right ones."""
    seen: list[Tensor] = []

    def observe(_: Sequence[Sample], logits: Tensor) -> None:
        seen.append(logits.clone())

    run(Stepping(model, logits_observer=observe))
    taped = list(seen)
    seen.clear()
    stepping = Stepping(model, logits_observer=observe)
    stepping.core.runner.repeats.stop("to compare")
    run(stepping)
    assert all(torch.equal(one, other) for one, other in zip(taped, seen, strict=True))


def test_sizes_come_and_go(model: Model) -> None:
    """Answers that begin and end on the way change the size of steps; memory is bounded and tokens stay right."""
    stepping = Stepping(model)
    first = run(stepping)
    num_bytes = stepping.core.runner.repeats.num_bytes
    for count in (1, 2, 3, 1, 2, 3):
        assert run(stepping, PROMPTS[:count]) == first[:count]
    assert stepping.core.runner.repeats.num_sizes == len(PROMPTS)
    assert stepping.core.runner.repeats.num_bytes <= 2 * num_bytes


def test_long_steps_and_steps_that_read_prompts_are_computed(model: Model) -> None:
    """Only what decode steps look like is worth a recording."""
    stepping = Stepping(model)
    assert stepping.core.runner.repeats.find(MAX_ROWS, MAX_ROWS) is not None
    assert stepping.core.runner.repeats.find(MAX_ROWS + 1, MAX_ROWS + 1) is None
    assert stepping.core.runner.repeats.find(3, 1) is None
    assert stepping.core.runner.repeats.find(3, 0) is None


def test_two_engines_alternate(model: Model) -> None:
    """Engines on one model, each with pages and recordings of its own, do not disturb each other."""
    expected = plainly(model)
    one, two = Stepping(model), Stepping(model)
    for prompt in PROMPTS:
        one.submit(prompt, GREEDY)
        two.submit(list(reversed(prompt)), GREEDY)
    while one.core.scheduler.has_work or two.core.scheduler.has_work:
        for stepping in (one, two):
            if stepping.core.scheduler.has_work:
                stepping.step()
    assert [one.tokens[serial, 0] for serial in (1, 2, 3)] == expected
    assert one.core.runner.repeats.num_replayed == two.core.runner.repeats.num_replayed > 0


def test_another_instruction_set_is_recorded_anew(model: Model) -> None:
    """A switch in the middle of an answer replays nothing that was recorded before."""
    expected = plainly(model)
    for isa in other_isas():
        stepping = Stepping(model)
        serials = [stepping.submit(prompt, GREEDY) for prompt in PROMPTS]
        for _ in range(8):
            stepping.step()
        before = stepping.core.runner.repeats.num_replayed
        with library.use_isa(isa):
            stepping.step()
            stepping.step()
            assert stepping.core.runner.repeats.num_replayed == before
            stepping.step()
            assert stepping.core.runner.repeats.num_replayed == before + 1
        stepping.run()
        assert [stepping.tokens[serial, 0] for serial in serials] == expected


def test_a_model_that_computes_with_torch_is_left_alone(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """One call of torch among the layers: no recording, the same tokens, one line in the log."""
    forward = type(model.layers[0].ffn).forward
    monkeypatch.setattr(type(model.layers[0].ffn), "forward", lambda self, x: forward(self, x) + 0.0)
    stepping = Stepping(model)
    with capture_logs() as logs:
        tokens = run(stepping)
    assert tokens == plainly(model)
    assert stepping.core.runner.repeats.num_replayed == 0
    assert [each["reason"] for each in logs if each["event"] == "steps_not_recordable"] == ["it calls torch's add"]


def test_a_computation_that_nobody_sees_is_found_by_comparing(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """NumPy in memory that it shares with a tensor escapes the recording; the comparison does not."""
    forward = type(model.layers[0].ffn).forward
    norm = model.network.final_norm.weight.numpy()
    before = float(norm[0])

    def disturb(self: FeedForward, x: Tensor) -> Tensor:
        norm[0] += 0.5
        return forward(self, x)

    monkeypatch.setattr(type(model.layers[0].ffn), "forward", disturb)
    stepping = Stepping(model)
    with capture_logs() as logs:
        run(stepping)
    norm[0] = before
    assert stepping.core.runner.repeats.num_replayed == 0
    assert any("differs" in each.get("reason", "") for each in logs)


def test_a_model_without_kernels_is_left_alone() -> None:
    """A model that computes elsewhere runs every step once."""
    model = FakeModel()
    stepping = Stepping(model)
    run(stepping, [[1, 2, 3]])
    assert stepping.core.runner.repeats.num_replayed == 0
    assert len(model.num_rows) == len(stepping.reports)
