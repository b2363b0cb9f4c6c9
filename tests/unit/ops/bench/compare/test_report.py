import pytest

from ops.bench.compare.goals import BETTER_DTYPE, LLAMA_BEST, OURS, TRANSFORMERS, goals
from ops.bench.compare.report import Result, as_json, as_markdown
from ops.bench.compare.rounds import Sample

FACTS = {
    "command": "compare",
    "begun": "then",
    "ended": "now",
    "threads": 2,
    "machine": {"processor": "abacus"},
    "versions": {OURS: {"pathfox": "1"}},
}


def samples(contender: str, *rates: float, measure: str = "8 streams", others: float = 0.0) -> list[Sample]:
    """One sample a round."""
    return [Sample(contender, measure, number, rate, others, tries=1) for number, rate in enumerate(rates, 1)]


def test_a_ratio_is_of_medians_and_its_reach_of_single_rounds() -> None:
    """One odd round moves the reach and not the ratio."""
    result = Result(FACTS, samples(OURS, 300, 300, 900) + samples(LLAMA_BEST, 100, 100, 100))
    ratio = result.ratio(LLAMA_BEST, "8 streams")
    assert (ratio.value, ratio.low, ratio.high) == (3.0, 3.0, 9.0)


@pytest.mark.parametrize(("rate", "verdict"), [(1.01, "pass"), (0.99, "MISS")])
def test_the_verdict_follows_from_the_goal(rate: float, verdict: str) -> None:
    """Just above the goal passes, just below misses."""
    least = goals()[LLAMA_BEST]["8 streams"]
    result = Result(FACTS, samples(OURS, 100 * least * rate) + samples(LLAMA_BEST, 100))
    assert result.ratio(LLAMA_BEST, "8 streams").verdict == verdict


def test_disturbed_samples_count_only_where_nothing_else_is_there() -> None:
    """A clean round outweighs any number of disturbed ones; alone they are shown with a mark."""
    disturbed = samples(OURS, 10, 10, others=0.5)
    assert Result(FACTS, disturbed).spread(OURS, "8 streams").is_disturbed
    mixed = Result(FACTS, disturbed + samples(OURS, 100)).spread(OURS, "8 streams")
    assert (mixed.median, mixed.is_disturbed) == (100, False)


def test_the_better_dtype_is_chosen_for_each_measure() -> None:
    """Transformers is judged by whichever dtype is faster there."""
    bf16, fp32 = TRANSFORMERS.values()
    taken = [
        *samples(OURS, 100),
        *samples(OURS, 100, measure="1 stream"),
        *samples(bf16, 50),
        *samples(bf16, 10, measure="1 stream"),
        *samples(fp32, 25),
        *samples(fp32, 20, measure="1 stream"),
    ]
    result = Result(FACTS, taken)
    assert result.rivals == [BETTER_DTYPE]
    assert [result.ratio(BETTER_DTYPE, each).value for each in result.measures] == [2, 5]


def test_page_and_json_tell_the_same() -> None:
    """Both show the ratio, its goal and the verdict."""
    result = Result(FACTS, samples(OURS, 300) + samples(LLAMA_BEST, 100))
    assert "| 3.00x (>= " in as_markdown(result, "picture.png")
    ratios = as_json(result)["ratios"]
    assert isinstance(ratios, dict)
    assert ratios[LLAMA_BEST]["8 streams"]["value"] == 3.0


def test_without_us_there_is_nothing_to_compare_with() -> None:
    """`--only` may leave us out: rates are shown, ratios are not."""
    assert Result(FACTS, samples(LLAMA_BEST, 100)).rivals == []
