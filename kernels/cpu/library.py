"""The loaded object of C++ ops: built on first use, one per instruction set, the best of this machine active."""

import contextlib
import ctypes
import functools
import threading
from collections.abc import Iterator

import structlog

from kernels.cpu import build, isa, threads
from kernels.cpu.isa import Isa

log = structlog.get_logger(__name__)

POINTER = ctypes.c_void_p
INT64 = ctypes.c_int64
STRUCT = ctypes.c_char_p
SIGNATURES: dict[str, tuple[type | None, list[type]]] = {
    "pathfox_set_num_threads": (None, [ctypes.c_int32]),
    "pathfox_num_threads": (ctypes.c_int32, []),
    "pathfox_packed_bytes": (INT64, [INT64, INT64, INT64]),
    "pathfox_pack": (None, [INT64, POINTER, INT64, INT64, POINTER]),
    "pathfox_embed_rows": (INT64, [STRUCT]),
    "pathfox_check_indices": (INT64, [STRUCT]),
    "pathfox_rms_norm": (None, [POINTER, INT64, INT64, POINTER, ctypes.c_float, POINTER]),
    "pathfox_linear": (None, [STRUCT]),
    "pathfox_gated_linear": (None, [STRUCT]),
    "pathfox_rotate_and_store": (INT64, [STRUCT]),
    "pathfox_paged_attention": (None, [STRUCT]),
    "pathfox_replay": (INT64, [POINTER]),
    "pathfox_sample": (None, [STRUCT]),
    "pathfox_score": (None, [STRUCT]),
}
"""Result and argument types of the functions in `src`.

What a step calls for every layer takes one struct, packed by the `struct` module: ctypes needs 0.1 us an argument.
"""

_active: ctypes.CDLL | None = None
_loading = threading.Lock()


def is_available() -> bool:
    """Say whether the C++ ops can run here; builds and loads them when asked first."""
    return _active is not None or _default() is not None


def load() -> ctypes.CDLL:
    """Return the active object.

    Raises:
        BuildError: there is none and it cannot be built.
    """
    return _active or _require_default()


def active_isa() -> Isa | None:
    """Return the instruction set of the active object, or None without one."""
    return Isa(load().pathfox_isa().decode()) if is_available() else None


def set_num_threads(count: int) -> None:
    """Let ops use this many threads, the caller's among them. Waits for an op that runs."""
    load().pathfox_set_num_threads(count)


def num_threads() -> int:
    """Return how many threads ops use."""
    return int(load().pathfox_num_threads())


@contextlib.contextmanager
def use_isa(wanted: Isa) -> Iterator[None]:
    """Make all ops of this process run on the object of one instruction set. For tests and benchmarks.

    Raises:
        BuildError: it cannot be built.
    """
    global _active  # noqa: PLW0603 one object is active in a process, for all threads
    before = load()
    chosen = _open(wanted)
    chosen.pathfox_set_num_threads(before.pathfox_num_threads())
    _active = chosen
    try:
        yield
    finally:
        _active = before


def _require_default() -> ctypes.CDLL:
    """Load the object of this machine's best instruction set, and make it active."""
    global _active  # noqa: PLW0603 as in use_isa
    with _loading:
        if _active is None:
            opened = _open(_best_isa())
            opened.pathfox_set_num_threads(threads.default_num_threads())
            _active = opened
        return _active


def _best_isa() -> Isa:
    """Choose the instruction set of this machine; where that is none of x86's, say what is lost."""
    chosen = isa.best()
    if chosen is Isa.PORTABLE and isa.is_x86():
        log.warning("cpu_kernels_portable", missing=isa.missing(Isa.AVX2), lost="most of the speed; no bit of a result")
    return chosen


@functools.cache
def _default() -> ctypes.CDLL | None:
    """Load the default object; without it, say once what is lost."""
    try:
        return _require_default()
    except (build.BuildError, OSError) as error:
        log.warning(
            "cpu_kernels_unavailable",
            reason=str(error),
            lost="speed, and the prefix law: the PyTorch reference is not row-invariant",
            remedy="install g++ or clang++, or `pip install ziglang`; then `python -m kernels.cpu.build`",
        )
        return None


@functools.cache
def _open(wanted: Isa) -> ctypes.CDLL:
    """Open the object of an instruction set, built earlier or now."""
    path = build.find_object(wanted) or build.build(wanted)
    opened = ctypes.CDLL(str(path))
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(opened, name)
        function.restype = result
        function.argtypes = arguments
    opened.pathfox_isa.restype = ctypes.c_char_p
    return opened
