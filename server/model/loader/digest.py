"""One digest for the files that fix a model's mathematics: part of its fingerprint."""

import mmap
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

CHUNK_BYTES = 1 << 24
"""Large, so that hashing leaves the interpreter alone: it runs beside the packing of weights."""


def digest_of(files: Sequence[Path]) -> bytes:
    """Hash the names and contents of files, BLAKE2b-256. The order of the arguments does not matter."""
    whole = blake2b(digest_size=32)
    for file in sorted(files, key=lambda each: each.name):
        whole.update(blake2b(file.name.encode(), digest_size=32).digest())
        whole.update(_content_digest(file))
    return whole.digest()


def _content_digest(file: Path) -> bytes:
    content = blake2b(digest_size=32)
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for start in range(0, len(data), CHUNK_BYTES):
            content.update(data[start : start + CHUNK_BYTES])
    return content.digest()
