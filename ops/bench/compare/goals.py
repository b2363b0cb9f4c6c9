"""How many times as fast as each contender we have to be, by measure."""

from ops.bench.compare import machine

OURS = "pathfox"
ENGINE = "own engine loop"
LLAMA_BEST = "llama.cpp Q4_0"
LLAMA_SAME = "llama.cpp Q4_1"
OPENVINO = "OpenVINO GenAI"
TRANSFORMERS = {"bfloat16": "transformers bf16", "float32": "transformers fp32"}
BETTER_DTYPE = "transformers, better dtype"
"""No contender: the faster of the two, for each measure."""

_COLUMNS = ("prefill 512", "1 stream", "8 streams", "32 streams")
_LONG = {"prefill 2048": 1.5, "prefill 4096": 1.5}


def goals() -> dict[str, dict[str, float]]:
    """Return the least ratios. Without AVX512-VNNI llama.cpp's best is its AVX2 build, and nearer."""
    llama_best = (1.8, 1.3, 2.3, 2.1) if "avx512_vnni" in machine.flags() else (1.5, 1.1, 1.6, 1.7)
    return {
        LLAMA_BEST: _columns(*llama_best) | _LONG,
        LLAMA_SAME: _columns(4.5, 1.5, 3.8, 4.2),
        OPENVINO: _columns(1.0, 2.0, 2.0, 1.9),
        BETTER_DTYPE: _columns(1.8, 8.0, 7.0, 5.0),
        ENGINE: dict(zip(_COLUMNS[1:], (0.90, 0.93, 0.93), strict=True)),
    }


def _columns(*least: float) -> dict[str, float]:
    return dict(zip(_COLUMNS, least, strict=True))
