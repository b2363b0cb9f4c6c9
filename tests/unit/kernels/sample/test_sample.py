"""The sampler: both implementations against each other and against what each parameter promises."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import sample as sampler
from kernels.backend import Backend, use_backend
from kernels.checks import ShapeError
from kernels.cpu import isa, library
from kernels.cpu.isa import Isa
from kernels.sample import SampledRows, SamplingRow, SamplingRows, reference

BACKENDS = [Backend.REFERENCE, Backend.CPU]
NEG = -float("inf")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    """Each implementation that runs on a CPU."""
    if request.param is Backend.CPU and not library.is_available():
        pytest.skip("the C++ ops are not available here")
    return Backend(request.param)


def run(backend: Backend, logits: Tensor, rows: list[SamplingRow]) -> SampledRows:
    """Sample on one backend."""
    with use_backend(backend):
        return sampler.sample(logits, SamplingRows.stack(rows))


def choose(backend: Backend, logits: list[float], **parameters: object) -> int:
    """Choose one token from one row."""
    row = dataclasses.replace(SamplingRow(), **parameters)  # type: ignore[arg-type]
    return int(run(backend, torch.tensor([logits]), [row]).token_ids[0])


def choices(backend: Backend, logits: list[float], num_draws: int = 200, **parameters: object) -> set[int]:
    """Collect what many positions choose from the same row."""
    row = dataclasses.replace(SamplingRow(), **parameters)  # type: ignore[arg-type]
    rows = [dataclasses.replace(row, position=position) for position in range(num_draws)]
    return set(run(backend, torch.tensor([logits]).repeat(num_draws, 1), rows).token_ids.tolist())


def rows_of(vocabulary: int) -> st.SearchStrategy[SamplingRow]:
    """Draw a row with any mix of parameters."""
    token_id = st.integers(0, vocabulary - 1)
    token_ids = st.lists(token_id, max_size=12)
    return st.builds(
        SamplingRow,
        temperature=st.sampled_from([0.0, 1e-6, 0.1, 0.7, 1.0, 2.5, 1e30]),
        top_p=st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.05, 1e-9]),
        top_k=st.sampled_from([0, 0, 1, 2, 7, 40, 900, 10**6]),
        min_p=st.sampled_from([0.0, 0.0, 1e-4, 0.1, 0.6, 1.0]),
        repetition_penalty=st.sampled_from([1.0, 1.2, 0.7]),
        presence_penalty=st.sampled_from([0.0, 1.5, -0.5]),
        frequency_penalty=st.sampled_from([0.0, 0.4, -0.3]),
        seed=st.integers(0, 2**64 - 1),
        index=st.integers(0, 2**31 - 1),
        position=st.integers(0, 2**40),
        logprobs=st.sampled_from([-1, 0, 1, 5, 20]),
        prompt_token_ids=token_ids,
        output_token_ids=token_ids,
        logit_bias=st.dictionaries(token_id, st.sampled_from([-100.0, -3.0, 2.5, 100.0]), max_size=5),
        banned_token_ids=token_ids,
    )


def logits_of(num_rows: int, vocabulary: int, seed: int, kind: str) -> Tensor:
    """Make rows that are smooth, full of ties, or partly impossible."""
    logits = torch.randn(num_rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 3
    if kind == "ties":
        return logits.round()
    if kind == "holes":
        return logits.masked_fill(logits < 1, NEG)
    return logits


@settings(max_examples=150)
@given(data=st.data())
def test_cpu_chooses_what_the_reference_chooses(data: st.DataObject) -> None:
    """For any mix of parameters both implementations give the same tokens, ranks and top tokens."""
    if not library.is_available():
        pytest.skip("the C++ ops are not available here")
    vocabulary = data.draw(st.sampled_from([1, 2, 7, 8, 511, 512, 513, 1000, 5000]))
    rows = data.draw(st.lists(rows_of(vocabulary), min_size=1, max_size=5))
    kind = data.draw(st.sampled_from(["smooth", "ties", "holes"]))
    logits = logits_of(len(rows), vocabulary, data.draw(st.integers(0, 2**31)), kind)

    expected, seen = run(Backend.REFERENCE, logits, rows), run(Backend.CPU, logits, rows)

    assert expected.token_ids.tolist() == seen.token_ids.tolist()
    assert expected.ranks.tolist() == seen.ranks.tolist()
    assert expected.top_token_ids.tolist() == seen.top_token_ids.tolist()
    torch.testing.assert_close(seen.logprobs, expected.logprobs, rtol=1e-6, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(seen.top_logprobs, expected.top_logprobs, rtol=1e-6, atol=1e-6, equal_nan=True)


@settings(max_examples=40)
@given(data=st.data())
def test_a_row_does_not_depend_on_its_neighbours(data: st.DataObject) -> None:
    """Alone, or among others in any order, a row gives the same bits."""
    backend = data.draw(st.sampled_from(BACKENDS if library.is_available() else BACKENDS[:1]))
    rows = data.draw(st.lists(rows_of(1000), min_size=2, max_size=6))
    rows = [dataclasses.replace(row, logprobs=3) for row in rows]
    logits = logits_of(len(rows), 1000, data.draw(st.integers(0, 2**31)), "smooth")
    order = data.draw(st.permutations(range(len(rows))))

    together = run(backend, logits[order], [rows[i] for i in order])

    for place, i in enumerate(order):
        alone = run(backend, logits[i : i + 1].clone(), [rows[i]])
        for name in ("token_ids", "logprobs", "ranks", "top_token_ids", "top_logprobs"):
            bits = [getattr(result, name)[at].numpy().tobytes() for result, at in ((together, place), (alone, 0))]
            assert bits[0] == bits[1]


@pytest.mark.usefixtures("needs_cpu_ops")
@pytest.mark.parametrize("other", list(Isa))
def test_every_instruction_set_gives_the_same_bits(other: Isa) -> None:
    """The object of any instruction set of this machine chooses and reports bit for bit what the default one does."""
    if other not in isa.supported():
        pytest.skip(f"this machine has no {other}")
    parameters = [{}, {"temperature": 0.3, "min_p": 0.02}, {"top_p": 0.97}, {"top_k": 700, "top_p": 0.9}]
    rows = [
        dataclasses.replace(SamplingRow(seed=seed, logprobs=8), **parameters[seed % 4])  # type: ignore[arg-type]
        for seed in range(40)
    ]
    logits = logits_of(len(rows), 3001, 11, "smooth")
    default = run(Backend.CPU, logits, rows)

    with library.use_isa(other):
        result = run(Backend.CPU, logits, rows)

    for name in ("token_ids", "logprobs", "ranks", "top_token_ids", "top_logprobs"):
        assert getattr(result, name).numpy().tobytes() == getattr(default, name).numpy().tobytes()


@pytest.mark.parametrize(
    "parameters",
    [{}, {"temperature": 0.5}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.2}, {"top_k": 6, "top_p": 0.9, "min_p": 0.1}],
)
def test_frequencies_follow_the_distribution(backend: Backend, parameters: dict[str, float]) -> None:
    """Over 20,000 positions of one seed the chosen tokens fit the kept, renormalised probabilities (chi-square)."""
    logits = torch.tensor([0.3, -1.0, 2.0, 1.2, -0.4, 0.9, 1.9, -2.5, 0.0, 1.0])
    num_draws = 20_000
    row = dataclasses.replace(SamplingRow(seed=20, index=3), **parameters)  # type: ignore[arg-type]
    rows = [dataclasses.replace(row, position=position) for position in range(num_draws)]

    token_ids = run(backend, logits.repeat(num_draws, 1), rows).token_ids

    expected = _kept_probabilities(logits, row) * num_draws
    counts = torch.bincount(token_ids.long(), minlength=10).double()
    assert counts[expected == 0].sum() == 0
    is_kept = expected > 0
    chi_square = ((counts - expected)[is_kept] ** 2 / expected[is_kept]).sum()
    assert chi_square < 27.9  # 99.9 % quantile at 9 degrees of freedom, more than any of these has


def _kept_probabilities(logits: Tensor, row: SamplingRow) -> Tensor:
    """Say in loops what the parameters mean."""
    probabilities = torch.softmax(logits.double() / row.temperature, dim=0).tolist()
    order = sorted(range(len(probabilities)), key=lambda i: -probabilities[i])[: row.top_k or None]
    total = sum(probabilities[i] for i in order)
    kept, mass = [], 0.0
    for i in order:
        kept.append(i)
        mass += probabilities[i] / total
        if mass >= row.top_p:
            break
    kept = [i for i in kept if probabilities[i] >= row.min_p * probabilities[order[0]]]
    result = torch.zeros(len(probabilities), dtype=torch.float64)
    for i in kept:
        result[i] = probabilities[i]
    return result / result.sum()


def test_greedy_takes_the_lowest_id_of_equal_logits(backend: Backend) -> None:
    """Ties go to the lower id, wherever in the row they stand, and -0 equals 0."""
    far = [0.0] * 2000
    far[700] = far[1999] = 1.0

    assert choose(backend, [1.0, 3.0, 3.0], temperature=0.0) == 1
    assert choose(backend, far, temperature=0.0) == 700
    assert choose(backend, [-1.0, -0.0, 0.0], temperature=0.0) == 1


def test_top_k_keeps_exactly_k_of_equal_logits(backend: Backend) -> None:
    """Of equal logits at the border the lower ids are kept."""
    assert choices(backend, [0.0, 1.0, 0.0, 0.0, 0.0], top_k=3) == {0, 1, 2}
    assert choices(backend, [-1.0, -0.0, 0.0], top_k=1) == {1}


def test_top_p_keeps_the_fewest_tokens_that_reach_it(backend: Backend) -> None:
    """A set that reaches top_p exactly is enough; of equal probabilities the lower ids are kept."""
    assert choices(backend, [0.0] * 4, top_p=0.5) == {0, 1}
    assert choices(backend, [0.0] * 4, top_p=0.51) == {0, 1, 2}


def test_top_p_counts_after_top_k(backend: Backend) -> None:
    """Of four equal tokens, top_k 2 leaves halves, and top_p 0.5 keeps one of them."""
    assert choices(backend, [0.0] * 4, top_k=2, top_p=0.5) == {0}


def test_min_p_is_relative_to_the_largest(backend: Backend) -> None:
    """Half as probable as the best is kept at 0.4, a third is not."""
    logits = torch.tensor([6.0, 3.0, 2.0]).log().tolist()

    assert choices(backend, logits, min_p=0.4) == {0, 1}


@pytest.mark.usefixtures("needs_cpu_ops")
@pytest.mark.parametrize("shift", [0.0, -3e4, 3e4])
def test_min_p_of_a_long_row_skips_nothing_that_it_keeps(shift: float) -> None:
    """Blocks of logits that the C++ op does not read hold no token that the reference keeps."""
    rows = [
        SamplingRow(temperature=temperature, min_p=min_p, position=position)
        for temperature in (0.05, 0.8, 40.0)
        for min_p in (1e-9, 0.02, 0.9)
        for position in range(6)
    ]
    logits = logits_of(1, 20_000, 5, "smooth").repeat(len(rows), 1) + shift

    assert run(Backend.CPU, logits, rows).token_ids.tolist() == run(Backend.REFERENCE, logits, rows).token_ids.tolist()


@pytest.mark.parametrize("parameters", [{"top_p": 1e-9}, {"top_k": 1}, {"min_p": 1.0}, {"temperature": 1e-6}])
def test_one_token_is_always_kept(backend: Backend, parameters: dict[str, float]) -> None:
    """However strict a parameter is, the most probable token remains."""
    assert choices(backend, [0.5, 2.0, 1.0], num_draws=20, **parameters) == {1}


@pytest.mark.parametrize(
    "parameters", [{"min_p": 2.0}, {"min_p": float("nan")}, {"temperature": float("nan")}, {"top_p": -1.0}]
)
@pytest.mark.usefixtures("needs_cpu_ops")
def test_parameters_out_of_range_still_end(parameters: dict[str, float]) -> None:
    """The front end refuses these; should one slip through, the C++ op takes the most probable token."""
    assert choices(Backend.CPU, [0.5, 2.0, 1.0], num_draws=20, **parameters) == {1}


def test_penalties_count_as_documented(backend: Backend) -> None:
    """Repetition counts prompt and output, frequency and presence the output only; bias comes before, bans win."""
    logits = [2.0, 1.9, 1.8, -1.0]

    assert choose(backend, logits, temperature=0.0, repetition_penalty=2.0, prompt_token_ids=[0, 0]) == 1
    assert choose(backend, logits, temperature=0.0, presence_penalty=0.15, output_token_ids=[0, 0]) == 1
    assert choose(backend, logits, temperature=0.0, presence_penalty=0.15, prompt_token_ids=[0, 0]) == 0
    assert choose(backend, logits, temperature=0.0, frequency_penalty=0.06, output_token_ids=[0, 0]) == 1
    assert choose(backend, logits, temperature=0.0, frequency_penalty=0.06, output_token_ids=[0]) == 0
    assert choose(backend, logits, temperature=0.0, logit_bias={3: 4.0}) == 3
    assert choose(backend, logits, temperature=0.0, logit_bias={3: 100.0}, banned_token_ids=[3]) == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 640, 999])
def test_a_poisoned_row_fails_alone(backend: Backend, bad: float, place: int) -> None:
    """A NaN or +inf anywhere in a row gives -1 there and changes no other row."""
    logits = logits_of(3, 1000, 5, "smooth")
    rows = [SamplingRow(seed=seed, logprobs=1, top_p=0.9) for seed in range(3)]
    clean = run(backend, logits, rows)
    logits[1, place] = bad

    result = run(backend, logits, rows)

    assert result.token_ids.tolist() == [clean.token_ids[0], -1, clean.token_ids[2]]
    assert result.ranks[1] == 0
    assert result.logprobs[1].isnan()
    assert result.top_token_ids[1].tolist() == [-1]


def test_a_ban_does_not_hide_a_nan(backend: Backend) -> None:
    """A row is poisoned by a NaN even where the NaN's token is banned."""
    assert choose(backend, [0.0, float("nan"), 1.0], banned_token_ids=[1]) == -1


def test_a_row_with_everything_banned_is_poisoned(backend: Backend) -> None:
    """With nothing left to choose the answer is -1, not an arbitrary token."""
    assert choose(backend, [0.0, 1.0], banned_token_ids=[0, 1]) == -1
    assert choose(backend, [NEG, NEG]) == -1


def test_a_token_of_no_probability_is_never_chosen(backend: Backend) -> None:
    """-inf stays impossible at any temperature."""
    assert choices(backend, [NEG, 0.0, NEG, 0.0, NEG], temperature=1e30) == {1, 3}


def test_seed_index_and_position_each_change_the_draw(backend: Backend) -> None:
    """The random number is a function of the three, and each of them matters, in both halves."""
    varied = [
        {"seed": 1},
        {"seed": 2},
        {"seed": 1 + 2**32},
        {"seed": 1, "index": 1},
        {"seed": 1, "position": 1},
        {"seed": 1, "position": 2**32},
    ]
    rows = [SamplingRow(**parameters) for parameters in varied]  # type: ignore[arg-type]

    token_ids = run(backend, torch.zeros(len(rows), 100_000), rows).token_ids.tolist()

    assert len(set(token_ids)) == len(rows)


def test_score_reports_the_raw_distribution(backend: Backend) -> None:
    """Log probabilities, ranks and top tokens are those of log_softmax."""
    logits = logits_of(4, 3000, 9, "smooth")
    token_ids = torch.tensor([0, 2999, 17, 1234], dtype=torch.int32)
    with use_backend(backend):
        result = sampler.score(logits, token_ids, num_top=4)

    exact = torch.log_softmax(logits.double(), dim=-1)
    chosen = exact.gather(1, token_ids.long()[:, None])
    top = exact.topk(4)
    torch.testing.assert_close(result.logprobs.double(), chosen[:, 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(result.top_logprobs.double(), top.values, rtol=0, atol=1e-5)
    assert result.ranks.tolist() == ((exact > chosen).sum(dim=1) + 1).tolist()
    assert result.top_token_ids.tolist() == top.indices.tolist()
    assert result.token_ids.tolist() == token_ids.tolist()


def test_score_of_an_impossible_token_is_minus_infinity(backend: Backend) -> None:
    """A token without probability has a log probability of -inf and a rank behind all others."""
    with use_backend(backend):
        result = sampler.score(torch.tensor([[0.0, NEG, 1.0]]), torch.tensor([1], dtype=torch.int32), num_top=0)

    assert result.logprobs.tolist() == [NEG]
    assert result.ranks.tolist() == [3]


def test_logprobs_ignore_bias_and_penalties(backend: Backend) -> None:
    """What is reported is the model's own distribution, whatever chose the token."""
    logits = torch.tensor([[1.0, 0.0, 0.0]])
    row = SamplingRow(temperature=0.0, logit_bias={2: 50.0}, logprobs=2)

    result = run(backend, logits, [row])

    assert result.token_ids.tolist() == [2]
    assert result.ranks.tolist() == [3]
    assert result.top_token_ids.tolist() == [[0, 1]]
    torch.testing.assert_close(result.logprobs, torch.log_softmax(logits, dim=1)[:, 2])


def test_answers_are_padded_to_the_widest_row(backend: Backend) -> None:
    """A row that asked for fewer top tokens has -1 and NaN beyond them."""
    result = run(backend, torch.tensor([[0.0, 1.0, 2.0]]).repeat(3, 1), [SamplingRow(logprobs=n) for n in (2, 1, -1)])

    assert result.top_token_ids.tolist() == [[2, 1], [2, -1], [-1, -1]]
    assert result.top_logprobs.isnan().tolist() == [[False, False], [False, True], [True, True]]
    assert result.logprobs.isnan().tolist() == [False, False, True]


def test_no_rows_give_no_tokens(backend: Backend) -> None:
    """A step without logit rows is allowed."""
    assert run(backend, torch.zeros(0, 10), []).token_ids.tolist() == []


def test_ids_outside_the_vocabulary_are_refused() -> None:
    """The C++ op writes at token ids, so they are checked first."""
    if not library.is_available():
        pytest.skip("the C++ ops are not available here")
    with pytest.raises(ShapeError, match="token ids"):
        choose(Backend.CPU, [0.0, 1.0], banned_token_ids=[2])


def test_logits_and_rows_must_fit() -> None:
    """A row count that differs is an error with both numbers."""
    with pytest.raises(ShapeError, match="got 1, want 2"):
        sampler.sample(torch.zeros(2, 4), SamplingRows.stack([SamplingRow()]))


def test_reference_find_poisoned_sees_what_has_no_distribution() -> None:
    """NaN, +inf and nothing but -inf are poison; ordinary rows with some -inf are not."""
    rows = torch.tensor([[0.0, float("nan")], [0.0, float("inf")], [NEG, NEG], [NEG, 0.0]])

    assert reference.find_poisoned(rows).tolist() == [True, True, True, False]
