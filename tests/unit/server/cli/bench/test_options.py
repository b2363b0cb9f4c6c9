import math
import pathlib

import pytest

from server.cli.bench.options import (
    LIMITS,
    MAX_REQUESTS,
    NOT_PROFILED,
    check_numbers,
    check_profile,
    num_requests,
    read_text,
)
from server.errors import ConfigError

GOOD = dict.fromkeys(LIMITS, None) | {"rate": math.inf}


@pytest.mark.parametrize(
    ("asked", "count"),
    [
        ((7, 60.0, 5.0, None), 7),
        ((None, None, math.inf, None), 32),
        ((None, 60.0, math.inf, None), MAX_REQUESTS),
        ((None, 60.0, 5.0, None), 300),
        ((None, 60.0, 5.0, 15.0), 547),
        ((None, 0.01, 5.0, None), 1),
        ((None, 1e6, 1e6, None), MAX_REQUESTS),
    ],
)
def test_a_duration_says_how_many_requests_there_are(
    asked: tuple[int | None, float | None, float, float | None], count: int
) -> None:
    """Where their number is not given: by the mean rate; in a closed loop more than any server answers in that time."""
    assert num_requests(*asked) == count


@pytest.mark.parametrize("name", LIMITS)
def test_every_number_has_limits(name: str) -> None:
    """Both ends are allowed, nothing beyond them is, nor what is no number."""
    low, high = LIMITS[name]
    base = GOOD | {"rate": 1.0}

    for value in (low, high):
        if name != "rate" or math.isfinite(value):
            check_numbers(base | {name: value})
    for value in (low - 0.01, math.nan, *([high + 1] if math.isfinite(high) else [])):
        with pytest.raises(ConfigError, match=f"^--{name.replace('_', '-')}: got .*, want "):
            check_numbers(base | {name: value})


def test_a_ramp_needs_a_rate_to_begin_with() -> None:
    """A closed loop has none."""
    with pytest.raises(ConfigError, match="--ramp-to: got no --rate"):
        check_numbers(GOOD | {"ramp_to": 4.0})


@pytest.mark.parametrize(
    ("name", "value"),
    [("concurrency", 8), ("rate", 2.0), ("warmup", 1), ("json", pathlib.Path("a_b")), ("detailed", True)],
)
def test_a_profile_takes_nothing_in_vain(name: str, value: object) -> None:
    """What would not be done is refused; without a profile it is fine, and so is a profile without it."""
    unset = dict.fromkeys(NOT_PROFILED, None) | {"rate": math.inf, "warmup": 0, "detailed": False}
    check_profile({**unset, "profile": None, name: value})
    check_profile({**unset, "profile": pathlib.Path("x")})

    with pytest.raises(ConfigError, match=f"^--{name}: got {value}, want none beside --profile$"):
        check_profile({**unset, "profile": pathlib.Path("x"), name: value})


def test_a_file_without_text_is_refused(tmp_path: pathlib.Path) -> None:
    """Bytes that are no text are left out; what remains must not be empty."""
    path = tmp_path / "x"
    path.write_bytes(b"ab\xff c")
    assert read_text(path) == "ab c"

    path.write_bytes(b"\xff \n")
    with pytest.raises(ConfigError, match="has no text"):
        read_text(path)
