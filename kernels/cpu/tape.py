"""Recordings of what a step asks of C++, so that the next step of its shape is one call: a CUDA graph for the CPU.

While a thread records, the faces of the C++ ops work as ever, and `invoke` writes down which function they called with
which struct. The structs are full of addresses, so whatever a step makes lies in an arena, where it lies again at the
next replay. What goes into a step (token ids, page table, weights) is read at the address where it was recorded:
whoever replays fills those places anew and keeps them alive.

A tape holds what C++ did and nothing else. So a step that has torch compute something, or read a number for Python to
branch on, is not recordable: `TorchFunctionMode` sees every such call. What neither C++ nor torch does (NumPy on memory
that is shared with a tensor) nobody sees; whoever uses a tape compares it with the step itself once.
"""

import ctypes
import math
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from typing import ClassVar, NamedTuple, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.overrides import TorchFunctionMode

from kernels.backend import Backend, backend_of
from kernels.cpu import library

Complain = Callable[[int], NoReturn]
"""Raises the error of a bad index."""

CPU = torch.device("cpu")
LINE_BYTES = 64
MIN_SLAB_BYTES = 4096

QUESTIONS = frozenset(
    getattr(Tensor, name)
    for name in ("data_ptr", "dim", "element_size", "is_contiguous", "ndimension", "numel", "size", "stride", "__len__")
)
"""What may be asked of a tensor while a tape records: the answer follows from the shape of the step."""
IDENTITIES = frozenset((Tensor.contiguous, Tensor.float, Tensor.to))
"""Calls that compute nothing when they hand back the tensor that they were given."""


def empty(shape: tuple[int, ...]) -> Tensor:
    """Make the float32 result of an op: anywhere, or while a tape records where its replays will find it."""
    recording = _current.get()
    return torch.empty(shape) if recording is None else recording.arena.empty(shape)


def invoke(name: str, arguments: bytes, complain: Complain | None = None, *, keep: object = None) -> None:
    """Call a C++ op, and write the call down while a tape records.

    Args:
        name: of the function; it takes one struct.
        arguments: the struct.
        complain: given if the function returns the first bad index or -1; called with a bad one.
        keep: must live as long as the struct.
    """
    loaded = library.load()
    answer = getattr(loaded, name)(arguments)
    recording = _current.get()
    if recording is not None:
        recording.calls.append(_Call(loaded, name, arguments, complain, keep))
    if complain is not None and answer >= 0:
        complain(answer)


class Tape:
    """The calls of a step. One thread at a time may replay the tapes of one recorder."""

    def __init__(self, calls: "list[_Call]", result: Tensor, arena: "Arena") -> None:
        self._library = calls[0].library
        self._complain = tuple(call.complain for call in calls)
        self._result = result
        structs = [ctypes.create_string_buffer(call.arguments, len(call.arguments)) for call in calls]
        self._kept = (arena, structs, [call.keep for call in calls])
        self._calls = (_RecordedCall * len(calls))(
            *(
                _RecordedCall(_address(call), ctypes.addressof(arguments), call.complain is not None)
                for call, arguments in zip(calls, structs, strict=True)
            )
        )
        self._tape = _Tape(ctypes.addressof(self._calls), len(calls), -1)
        self._reference = ctypes.byref(self._tape)

    @property
    def is_current(self) -> bool:
        """Say whether ops called here and now would run what this tape does."""
        return library.load() is self._library and backend_of(CPU) is Backend.CPU

    def replay(self) -> Tensor:
        """Do the step again on what now lies in its inputs.

        Returns:
            The result, in memory that the recorder's next tape writes to.

        Raises:
            ShapeError: as the recorded ops do.
        """
        at = self._library.pathfox_replay(self._reference)
        if at >= 0:
            complain = self._complain[at]
            assert complain is not None
            complain(self._tape.bad_index)
        return self._result


class TapeRecorder:
    """Makes tapes that share one arena, so that many take little more memory than the largest."""

    def __init__(self) -> None:
        self._arena = Arena()
        self.refusal: str | None = None
        """Why there is no tape of what was recorded last."""

    @property
    def num_bytes(self) -> int:
        """Return the memory that all tapes together compute in."""
        return self._arena.num_bytes

    def record(self, compute: Callable[[], Tensor]) -> tuple[Tensor, Tape | None]:
        """Compute something, and return the result with a tape of it, or None where it is not recordable."""
        recording = _Recording(self._arena)
        token = _current.set(recording)
        try:
            with recording:
                result = compute()
        finally:
            _current.reset(token)
        self.refusal = recording.refusal or self._find_flaw(recording, result)
        tape = None if self.refusal else Tape(recording.calls, self._arena.again(result), self._arena)
        return result, tape

    def _find_flaw(self, recording: "_Recording", result: Tensor) -> str | None:
        """Return why what was recorded cannot be replayed, or None if it can."""
        if not self._arena.holds(result):
            return "its result was not made by an op of kernels.cpu"
        if len({id(call.library) for call in recording.calls}) != 1:
            return "the instruction set changed on the way"
        if self._arena.num_new_live != 1:
            return "it keeps something that it made besides its result"
        return None


class Arena:
    """Memory for the tensors of a step. A tensor's place is free again once the last view of it is gone."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self.num_new_live = 0
        """Tensors made since `begin` that are still there."""
        self._free: Mapping[int, list[NDArray[np.uint8]]] = defaultdict(list)
        self._live: dict[int, NDArray[np.uint8]] = {}
        """By address."""
        self._generation = 0

    def begin(self) -> None:
        """Begin to count."""
        self._generation += 1
        self.num_new_live = 0

    def empty(self, shape: tuple[int, ...]) -> Tensor:
        """Make a float32 tensor."""
        num_bytes = 4 * math.prod(shape)
        size = max(MIN_SLAB_BYTES, 1 << (num_bytes - 1).bit_length())
        free = self._free[size]
        slab = free.pop() if free else self._allocate(size)
        values = _floats(slab, shape)
        self._live[slab.ctypes.data] = slab
        self.num_new_live += 1
        # torch holds `values` until the storage goes: views of the tensor are counted, too.
        weakref.finalize(values, self._release, slab, self._generation).atexit = False
        return torch.from_numpy(values)

    def holds(self, tensor: Tensor) -> bool:
        """Say whether a tensor is one of the arena's, as a whole and in order."""
        is_plain = tensor.dtype is torch.float32 and tensor.is_contiguous()
        return is_plain and tensor.data_ptr() in self._live

    def again(self, tensor: Tensor) -> Tensor:
        """Return a tensor with the place of one that the arena holds, which does not keep the place from being used."""
        return torch.from_numpy(_floats(self._live[tensor.data_ptr()], tuple(tensor.shape)))

    def _allocate(self, size: int) -> NDArray[np.uint8]:
        self.num_bytes += size
        memory = np.empty(size + LINE_BYTES, dtype=np.uint8)
        start = -memory.ctypes.data % LINE_BYTES
        return memory[start : start + size]

    def _release(self, slab: NDArray[np.uint8], generation: int) -> None:
        del self._live[slab.ctypes.data]
        self._free[slab.size].append(slab)
        if generation == self._generation:
            self.num_new_live -= 1


class _Call(NamedTuple):
    """A call of an op."""

    library: ctypes.CDLL
    name: str
    arguments: bytes
    complain: Complain | None
    keep: object


class _Recording(TorchFunctionMode):
    """What was recorded so far, and whether it may become a tape."""

    def __init__(self, arena: Arena) -> None:
        super().__init__()
        arena.begin()
        self.arena = arena
        self.calls: list[_Call] = []
        self.refusal: str | None = None

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Iterable[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        """Let torch do it, and refuse to become a tape if it computed anything."""
        del types
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        is_same = func in IDENTITIES and result is args[0]
        if not (is_same or func in QUESTIONS or name == "__get__"):
            self.refusal = self.refusal or f"it calls torch's {name}"
        return result


class _RecordedCall(ctypes.Structure):
    _fields_: ClassVar = [
        ("function", ctypes.c_void_p),
        ("arguments", ctypes.c_void_p),
        ("is_checked", ctypes.c_int64),
    ]


class _Tape(ctypes.Structure):
    _fields_: ClassVar = [("calls", ctypes.c_void_p), ("num_calls", ctypes.c_int64), ("bad_index", ctypes.c_int64)]


_current: ContextVar[_Recording | None] = ContextVar("recording", default=None)


def _address(call: _Call) -> int | None:
    return ctypes.cast(getattr(call.library, call.name), ctypes.c_void_p).value


def _floats(slab: NDArray[np.uint8], shape: tuple[int, ...]) -> NDArray[np.float32]:
    return slab[: 4 * math.prod(shape)].view(np.float32).reshape(shape)
