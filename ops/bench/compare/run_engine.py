"""Our own engine loop: scheduler, runner and sampler in a plain loop; no thread, no event loop, no gRPC."""

import argparse
import itertools
import time
from collections import Counter
from pathlib import Path

import numpy as np

from kernels.cpu import library
from ops.bench.compare.runner import NUM_THREADS, Prompts, answer_questions
from server.config import EngineConfig
from server.engine.core import Core, CoreSizes
from server.engine.events import EmittedToken
from server.engine.runner import page_bytes
from server.messages import GenerateRequest, SamplingParams
from server.model.loader import load_model


def main() -> None:
    """Load the model and answer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="GGUF file")
    options = parser.parse_args()
    library.set_num_threads(NUM_THREADS)
    core = load_core(options.model)
    serials = itertools.count()

    def generate(prompts: Prompts, new_tokens: int) -> list[int]:
        counts: Counter[int] = Counter()
        submitted = []
        for prompt in prompts:
            serial = next(serials)
            sampling = SamplingParams(seed=0, max_tokens=new_tokens, temperature=0.0)
            core.submit(GenerateRequest(str(serial), tuple(prompt), sampling), np.array(prompt, dtype=np.int32), serial)
            submitted.append(serial)
        while core.scheduler.has_work:
            core.step()
            counts.update(serial for serial, emission in core.emissions if isinstance(emission, EmittedToken))
            core.emissions = []
        return [counts[serial] for serial in submitted]

    answer_questions({}, generate)


def load_core(file: Path) -> Core:
    """Load a model into an engine's heart of the usual sizes, which guesses no tokens."""
    model, config = load_model(file), EngineConfig()
    num_pages = config.page_pool_bytes // page_bytes(model)
    sizes = CoreSizes(config.max_num_seqs, config.max_step_tokens, num_pages, config.target_step_s)
    return Core(model, sizes, fingerprint="bench", clock=time.monotonic)


if __name__ == "__main__":
    main()
