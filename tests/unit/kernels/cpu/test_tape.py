"""Tapes: what they repeat, and what they refuse."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels.backend import Backend, use_backend
from kernels.checks import ShapeError
from kernels.cpu import library
from kernels.cpu.tape import Arena, Tape, TapeRecorder
from kernels.embed import embed
from kernels.linear import LinearWeight, gated_linear, linear, pack, pack_gated
from kernels.paged_attention import paged_attention
from kernels.rms_norm import Norm, rms_norm
from kernels.rope import RopeTable, rotate_and_store
from kernels.weights import Encoding
from tests.fixtures.kernels import CPU, other_isas, placement, random_matrix, random_rows

pytestmark = pytest.mark.usefixtures("needs_cpu_ops")

WIDTH = 64
ELSEWHERE: Tensor = random_rows(2, 3)


class Small:
    """A model of one layer with fixed places for a step's inputs."""

    def __init__(self, num_rows: int, seed: int = 0) -> None:
        self.embedding = self._pack(128, seed)
        self.qkv = self._pack(3 * WIDTH, seed + 1)
        self.gated = pack_gated(
            random_matrix(Encoding.Q4_1, 96, WIDTH, seed), random_matrix(Encoding.Q4_1, 96, WIDTH, seed + 9), device=CPU
        )
        self.down = pack([random_matrix(Encoding.Q4_1, WIDTH, 96, seed)], device=CPU)
        self.norm = Norm(torch.ones(WIDTH), 1e-5)
        angles = torch.rand((64, 16), generator=torch.Generator().manual_seed(seed))
        self.table = RopeTable(cos=angles.cos(), sin=angles.sin(), is_interleaved=False)
        self.keys = torch.zeros((8, 2, 32, 16), dtype=torch.float16)
        self.values = torch.zeros((8, 2, 16, 32), dtype=torch.float16)
        self.rows = placement([1] * num_rows, [1] * num_rows, page_size=16, num_pages=8)
        self.token_ids = torch.arange(num_rows, dtype=torch.int32)
        self.select = torch.tensor([num_rows - 1], dtype=torch.int32)

    def __call__(self) -> Tensor:
        x = embed(self.token_ids, self.embedding)
        qkv = linear(x, self.qkv, norm=self.norm)
        query = rotate_and_store(qkv, self.rows, self.table, self.keys, self.values)
        x = x_mixed = paged_attention(query, self.keys, self.values, self.rows, scale=0.2)
        x = linear(gated_linear(x, self.gated, norm=self.norm), self.down, residual=x_mixed)
        return linear(x, self.embedding, norm=self.norm, select=self.select).float()

    def _pack(self, num_rows: int, seed: int) -> LinearWeight:
        return pack([random_matrix(Encoding.Q4_1, num_rows, WIDTH, seed)], device=CPU)


def taped(recorder: TapeRecorder, compute: Callable[[], Tensor]) -> Tape:
    """Record what must be recordable."""
    _, tape = recorder.record(compute)
    assert recorder.refusal is None
    assert tape is not None
    return tape


def test_a_replay_has_the_bits_of_the_step_on_new_inputs() -> None:
    """New tokens and positions in the same places give what computing gives."""
    small = Small(3)
    tape = taped(TapeRecorder(), small)
    for position in range(1, 20):
        small.token_ids += 3
        small.rows.positions[:2] = position % 16
        replayed = tape.replay().clone()
        assert torch.equal(replayed, small())


def test_recording_gives_the_bits_of_the_step() -> None:
    """The recorded step itself is a step."""
    small = Small(2)
    recorded, _ = TapeRecorder().record(small)
    assert torch.equal(recorded, small())


def test_tapes_share_memory_and_do_not_disturb_each_other() -> None:
    """Tapes of many shapes compute in little more than the largest needs; each still gives its own bits."""
    recorder = TapeRecorder()
    steps = [Small(num_rows, seed=num_rows) for num_rows in range(1, 5)]
    tapes = [taped(recorder, small) for small in steps]
    num_bytes = recorder.num_bytes
    assert num_bytes < 64 * 1024
    tapes += [taped(recorder, small) for small in steps]
    assert recorder.num_bytes == num_bytes
    for _ in range(3):
        for small, tape in zip(steps * 2, tapes, strict=True):
            assert torch.equal(tape.replay().clone(), small())


def test_intermediates_reuse_memory() -> None:
    """A deep step computes in no more memory than a shallow one."""
    small, shallow, deep = Small(2), TapeRecorder(), TapeRecorder()

    def steps(count: int) -> Tensor:
        x = embed(small.token_ids, small.embedding)
        for _ in range(count):
            x = linear(gated_linear(x, small.gated), small.down, residual=x)
        return x

    taped(shallow, lambda: steps(2))
    taped(deep, lambda: steps(50))
    assert deep.num_bytes == shallow.num_bytes


def test_a_view_keeps_its_memory() -> None:
    """Memory is not used again while anything looks at it."""
    arena = Arena()
    view = arena.empty((2, 8))[1:]
    view.fill_(3.0)
    others = [arena.empty((2, 8)).fill_(4.0) for _ in range(3)]
    assert view.tolist() == [[3.0] * 8]
    address = view.data_ptr() - 32
    del view
    assert arena.empty((2, 8)).data_ptr() == address
    assert len({each.data_ptr() for each in others}) == 3


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda x: x + 1, "it calls torch's add"),
        (lambda x: x.mul_(2), "it calls torch's mul_"),
        (lambda x: x[: int(x[0, 0]) or None], "it calls torch's __getitem__"),
        (lambda x: x if x.tolist() else ELSEWHERE, "it calls torch's tolist"),
        (lambda x: torch.from_numpy(x.numpy()), "it calls torch's numpy"),
        (lambda x: x.to(torch.float64).float(), "it calls torch's to"),
        (lambda x: rms_norm(x, Norm(torch.ones(x.size(1)), 1e-5)), "it calls torch's ones"),
        (lambda _: ELSEWHERE, "its result was not made by an op of kernels.cpu"),
    ],
)
def test_refuses_what_is_not_a_call_of_an_op(spoil: Callable[[Tensor], Tensor], reason: str) -> None:
    """Whatever torch computes or tells is not on a tape, so there is none, and the result is right all the same."""
    small, recorder = Small(2), TapeRecorder()
    result, tape = recorder.record(lambda: spoil(small()))
    assert tape is None
    assert recorder.refusal == reason
    assert torch.equal(result, spoil(small()))


def test_refuses_a_step_that_keeps_something() -> None:
    """What a step keeps for the next one would be overwritten by a replay."""
    small, recorder, kept = Small(2), TapeRecorder(), list[Tensor]()

    def compute() -> Tensor:
        kept.append(embed(small.token_ids, small.embedding))
        return small()

    _, tape = recorder.record(compute)
    assert tape is None
    assert recorder.refusal == "it keeps something that it made besides its result"


def test_refuses_an_op_without_a_tape() -> None:
    """An op whose face does not record makes its result elsewhere, which shows."""
    small, recorder = Small(2), TapeRecorder()
    _, tape = recorder.record(lambda: rms_norm(embed(small.token_ids, small.embedding), small.norm))
    assert tape is None
    assert recorder.refusal == "it calls torch's empty_like"


def test_bad_indices_are_reported_as_by_the_op() -> None:
    """A replay raises what the step would raise, and the next replay is as good as ever."""
    small = Small(2)
    tape = taped(TapeRecorder(), small)
    for values, bad in ((small.token_ids, 128), (small.rows.positions, 64), (small.select, 2)):
        good = values.clone()
        values[-1] = bad
        with pytest.raises(ShapeError) as computing:
            small()
        with pytest.raises(ShapeError) as replaying:
            tape.replay()
        assert str(replaying.value) == str(computing.value)
        values.copy_(good)
    assert torch.equal(tape.replay().clone(), small())


def test_an_error_while_recording_is_the_steps_error() -> None:
    """A step that fails is not recorded; the next one is."""
    small, recorder = Small(2), TapeRecorder()
    small.token_ids[0] = -1
    with pytest.raises(ShapeError, match="token id: got -1"):
        recorder.record(small)
    small.token_ids[0] = 1
    assert torch.equal(taped(recorder, small).replay().clone(), small())


def test_two_recorders_do_not_share() -> None:
    """Tapes of two models in one process may alternate."""
    first, second = Small(2, seed=1), Small(2, seed=2)
    one, two = taped(TapeRecorder(), first), taped(TapeRecorder(), second)
    logits = one.replay(), two.replay()
    assert torch.equal(logits[0], first())
    assert torch.equal(logits[1], second())


def test_is_stale_on_another_backend_or_instruction_set() -> None:
    """A tape says that it would not do what the ops now do; threads do not matter."""
    small = Small(2)
    tape = taped(TapeRecorder(), small)
    expected = small()
    with use_backend(Backend.REFERENCE):
        assert not tape.is_current
    for isa in other_isas():
        with library.use_isa(isa):
            assert not tape.is_current
    assert tape.is_current
    before = library.num_threads()
    library.set_num_threads(before + 1)
    assert tape.is_current
    assert torch.equal(tape.replay(), expected)
    library.set_num_threads(before)
