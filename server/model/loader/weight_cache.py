"""Packed weights in a file of the user's cache, so that a second start maps what the first one packed and hashed.

One file per model path. It says which source files it was made from (path, size, time of change, inode): with another
identity, another layout of the packing, or a byte that is not as written, it is made anew. It is moved into place when
whole, so that processes may start at once, and never written to again, so that all of them share its pages.
Nothing here is fatal: without a usable file a model is packed in memory.

    magic | bytes of the header, its CRC-32 | header: JSON | sections, each at a multiple of 64 bytes
"""

import contextlib
import mmap
import os
import shutil
import struct
import tempfile
import time
import zlib
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO

import structlog
import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError
from torch import Tensor

from kernels.cpu.packed import PACKED_LAYOUT_VERSION, Fill, new_blocks

log = structlog.get_logger(__name__)

MAGIC = b"PATHFOX\x01"
"""The last byte is the version of this format."""
SUFFIX, UNFINISHED = ".weights", ".unfinished"
ALIGNMENT_BYTES = 64
UNFINISHED_LIFE_S = 3600
"""Nobody writes one file for so long: an older one was left by a process that was killed."""
MIN_FREE_SIZES = 2
"""Free space on the disk, in sizes of the file: a cache must not take the last of it from what is not one."""
PREFIX = struct.Struct("<8sII")


class _Stored(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SourceFile(_Stored):
    """A file as it stood when it was read. Whoever changes a file and sets all of this back is believed."""

    path: str
    num_bytes: int
    changed_ns: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> "SourceFile":
        """Look at a file."""
        seen = path.stat()
        return cls(path=str(path.resolve()), num_bytes=seen.st_size, changed_ns=seen.st_mtime_ns, inode=seen.st_ino)


class Section(_Stored):
    """One packed part."""

    key: str
    num_bytes: NonNegativeInt
    crc: int


class Header(_Stored):
    """What a file says of itself."""

    layout: int
    sources: tuple[SourceFile, ...]
    weights_digest: str = Field(pattern="^[0-9a-f]{64}$")
    """Of the sources' names and contents, hexadecimal."""
    sections: tuple[Section, ...]
    """In the order of the file."""


class WeightCache:
    """The kept parts of one model: a `PackedStore` that hands out what is whole, and keeps what was not there.

    Args:
        folder: of all kept models; made when something is kept.
        sources: the files that the model is read from.
    """

    def __init__(self, folder: Path, sources: Sequence[Path]) -> None:
        self._sources = tuple(SourceFile.of(each) for each in sources)
        name = blake2b("\0".join(each.path for each in self._sources).encode(), digest_size=16).hexdigest()
        self.path = folder / f"{name}{SUFFIX}"
        self.weights_digest: bytes | None = None
        """Of the source files' contents, if it is kept."""
        self._data: mmap.mmap | None = None
        self._kept: dict[str, tuple[Section, int]] = {}
        """Parts and their offsets, by key; emptied when one of them is damaged."""
        self._used: dict[str, Tensor] = {}
        self._is_complete = False
        self._open()

    @property
    def gave_all(self) -> bool:
        """Whether packed parts were asked for, and all of them were there and whole."""
        return self._is_complete and bool(self._used)

    def blocks(self, key: str, num_bytes: int, fill: Fill) -> Tensor:
        """See `PackedStore`."""
        part = self._read(key, num_bytes)
        if part is None:
            self._is_complete = False
            part = new_blocks(num_bytes, fill)
        self._used[key] = part
        return part

    def save(self, weights_digest: bytes) -> None:
        """Keep what was asked for, unless all of it came from here. Whatever goes wrong is logged, and harmless."""
        if self._is_complete:
            return
        started = time.monotonic()
        try:
            if tuple(SourceFile.of(Path(each.path)) for each in self._sources) != self._sources:
                raise OSError("the model changed as it was read")
            self.path.parent.mkdir(parents=True, exist_ok=True)
            free_bytes = shutil.disk_usage(self.path.parent).free
            if MIN_FREE_SIZES * sum(each.nbytes for each in self._used.values()) > free_bytes:
                raise OSError(f"only {free_bytes} bytes are free")
            num_bytes = self._write(weights_digest)
            _sweep(self.path.parent)
        except OSError as error:
            log.warning("weight_cache_not_written", path=str(self.path), reason=str(error))
        else:
            taken_s = round(time.monotonic() - started, 3)
            log.info("weight_cache_written", path=str(self.path), num_bytes=num_bytes, duration_s=taken_s)

    def _open(self) -> None:
        try:
            self._data, header, offsets = _map(self.path)
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            self._complain(str(error).partition("\n")[0])
            return
        if (header.layout, header.sources) == (PACKED_LAYOUT_VERSION, self._sources):
            self.weights_digest = bytes.fromhex(header.weights_digest)
            self._kept = {each.key: (each, offset) for each, offset in zip(header.sections, offsets, strict=True)}
            self._is_complete = True
        else:
            log.info("weight_cache_outdated", path=str(self.path))

    def _read(self, key: str, num_bytes: int) -> Tensor | None:
        """Return a kept part whose bytes are as they were written, or None. Summing them brings them into memory."""
        section, offset = self._kept.get(key, (None, 0))
        if section is None or self._data is None or section.num_bytes != num_bytes:
            return None
        part = torch.frombuffer(self._data, dtype=torch.uint8, count=num_bytes, offset=offset)
        if zlib.crc32(_bytes(part)) != section.crc:
            self._complain(f"{key} has not the bytes that were written")
            self._kept = {}
            return None
        return part

    def _complain(self, reason: str) -> None:
        log.warning("weight_cache_unusable", path=str(self.path), reason=reason, remedy="packing the weights anew")

    def _write(self, weights_digest: bytes) -> int:
        """Write a whole file beside the old one and put it in its place; return its size."""
        handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=self.path.stem, suffix=UNFINISHED)
        unfinished = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                self._write_to(file, weights_digest)
                file.flush()
                os.fsync(file.fileno())
                num_bytes = file.tell()
            unfinished.replace(self.path)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
        return num_bytes

    def _write_to(self, file: BinaryIO, weights_digest: bytes) -> None:
        header = Header(
            layout=PACKED_LAYOUT_VERSION,
            sources=self._sources,
            weights_digest=weights_digest.hex(),
            sections=tuple(
                Section(key=key, num_bytes=part.nbytes, crc=zlib.crc32(_bytes(part)))
                for key, part in self._used.items()
            ),
        )
        text = header.model_dump_json().encode()
        file.write(PREFIX.pack(MAGIC, len(text), zlib.crc32(text)) + text)
        offsets, num_bytes = _places(header, PREFIX.size + len(text))
        for offset, part in zip(offsets, self._used.values(), strict=True):
            file.write(bytes(offset - file.tell()))
            file.write(_bytes(part))
        file.write(bytes(num_bytes - file.tell()))


def _map(path: Path) -> tuple[mmap.mmap, Header, tuple[int, ...]]:
    """Map a kept model; return its header and the offsets of its sections, too.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not a whole file of this kind.
    """
    with path.open("rb") as file:
        # Copy-on-write, because torch has no read-only tensors; nobody writes, so every process sees the same pages.
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    if len(data) < PREFIX.size:
        raise ValueError(f"{len(data)} bytes are no header")
    magic, num_bytes, crc = PREFIX.unpack_from(data)
    text = data[PREFIX.size : PREFIX.size + num_bytes]
    if magic != MAGIC:
        raise ValueError("not a file of packed weights, or of another version")
    if zlib.crc32(text) != crc:
        raise ValueError("its header is damaged")
    try:
        header = Header.model_validate_json(text)
    except ValidationError as error:
        raise ValueError("its header is of another version") from error
    offsets, wanted = _places(header, PREFIX.size + len(text))
    if len(data) != wanted:
        raise ValueError(f"it has {len(data)} bytes, want {wanted}")
    return data, header, offsets


def _places(header: Header, end: int) -> tuple[tuple[int, ...], int]:
    """Return where the sections begin when the header ends at `end`, and where the file does."""
    places = []
    for section in header.sections:
        places.append(_aligned(end))
        end = places[-1] + section.num_bytes
    return tuple(places), _aligned(end)


def _sweep(folder: Path) -> None:
    """Remove models whose files are gone, and what killed processes left unfinished."""
    for path in folder.glob(f"*{UNFINISHED}"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > UNFINISHED_LIFE_S:
                path.unlink()
    for path in folder.glob(f"*{SUFFIX}"):
        with contextlib.suppress(OSError, ValueError):
            _, header, _ = _map(path)
            if not all(Path(each.path).exists() for each in header.sources):
                path.unlink()


def _bytes(part: Tensor) -> memoryview:
    return part.numpy().data


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
