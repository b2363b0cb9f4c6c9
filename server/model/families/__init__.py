"""Families of models: what maps a published configuration and its names of weights to a spec, mixers and networks.

A new family is one module here with one `Family`, and one line in `FAMILIES`.
"""

from server.errors import ModelLoadError
from server.model.checkpoint import Checkpoint, Layout
from server.model.families import llama
from server.model.family import Family

FAMILIES: tuple[Family, ...] = (llama.FAMILY,)


def family_of(checkpoint: Checkpoint, architecture: str) -> Family:
    """Find the family that builds an architecture.

    Raises:
        ModelLoadError: None does.
    """
    known = {
        family.architectures[checkpoint.layout]: family
        for family in FAMILIES
        if checkpoint.layout in family.architectures
    }
    if architecture in known:
        return known[architecture]
    key = "general.architecture" if checkpoint.layout is Layout.GGUF else "architectures"
    raise ModelLoadError(str(checkpoint.path), f"{key}: got {architecture!r}, want {' or '.join(map(repr, known))}")
