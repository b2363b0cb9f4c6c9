"""Tile sizes of the Triton kernels, all in one place.

They are pinned and never tuned at run time: a tile's width along the summed axis is part of the order of the sum, so
a choice that could change with the batch, the device's mood or a cache would change bits. A change here changes the
numerics of the GPU backend. The sizes are reasoned, not measured: none was timed on a device yet.
"""

from dataclasses import dataclass

NUMERICS_VERSION = 1
"""Part of the fingerprint of a model on a GPU. Raise it by hand with any change of a `gpu.py` or of this table that may
change one bit of a result."""

MAY_FUSE = False
"""No a * b + c is made one operation by the compiler: it decides anew for each variant of a kernel, and those depend on
the alignment of addresses. Products on tensor cores are not meant by this."""


@dataclass(frozen=True, slots=True)
class LinearTile:
    """The tile of a matrix product. It depends on the weight's kind, never on the number of rows."""

    num_rows: int
    num_outputs: int
    num_inputs: int
    num_warps: int
    num_stages: int


LINEAR = {
    "half": LinearTile(num_rows=64, num_outputs=64, num_inputs=64, num_warps=4, num_stages=4),
    "float32": LinearTile(num_rows=32, num_outputs=32, num_inputs=32, num_warps=4, num_stages=2),
    "q4": LinearTile(num_rows=32, num_outputs=64, num_inputs=64, num_warps=4, num_stages=3),
    "q8": LinearTile(num_rows=32, num_outputs=64, num_inputs=64, num_warps=4, num_stages=3),
}
"""By the kind of the weight; float32 activations take "float32" with any. Quantised weights take fewer rows: with their
few bytes the tensor cores would be the limit."""

EMBED_COLUMNS = 1024
NORM_COLUMNS = 1024
ARGMAX_COLUMNS = 4096

ATTENTION_QUERIES = 16
"""Queries of a tile (rows times the heads that share a key/value head): the least that a tensor core takes."""
ATTENTION_TOKENS = 64
"""Keys that are scored at once."""
ATTENTION_SPLIT = 512
"""Keys that one program reduces; a longer past is split at multiples of it, counted from its start."""
ATTENTION_WORKSPACE_BYTES = 64 << 20
"""Rows are launched in groups whose unjoined splits fit in this."""
