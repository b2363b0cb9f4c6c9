"""OpenVINO GenAI: reads the GGUF itself, continuous batching."""

import argparse
import importlib.metadata

import numpy as np
import openvino
import openvino_genai

from ops.bench.compare.runner import NUM_THREADS, Prompts, answer_questions

CACHE_GIB = 2
STEP_TOKENS = 512
"""Rows of one step: 256, 1024 and 4096 were not faster here (Zen 5, 2026-11)."""


def main() -> None:
    """Load the model and answer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="GGUF file")
    parser.add_argument("--step-tokens", type=int, default=STEP_TOKENS)
    options = parser.parse_args()
    scheduling = openvino_genai.SchedulerConfig()
    scheduling.cache_size = CACHE_GIB
    scheduling.max_num_seqs = 64
    scheduling.max_num_batched_tokens = options.step_tokens
    scheduling.enable_prefix_caching = False
    scheduling.dynamic_split_fuse = True
    pipeline = openvino_genai.LLMPipeline(
        options.model, "CPU", scheduler_config=scheduling, INFERENCE_NUM_THREADS=NUM_THREADS
    )

    def generate(prompts: Prompts, new_tokens: int) -> list[int]:
        wish = openvino_genai.GenerationConfig()
        wish.max_new_tokens = wish.min_new_tokens = new_tokens
        wish.ignore_eos, wish.do_sample, wish.apply_chat_template = True, False, False
        token_ids = np.array(prompts, dtype=np.int64)
        mask = np.ones_like(token_ids)
        inputs = openvino_genai.TokenizedInputs(openvino.Tensor(token_ids), openvino.Tensor(mask))
        return [len(each) for each in pipeline.generate(inputs, wish).tokens]

    names = ("openvino", "openvino-genai")
    answer_questions({name: importlib.metadata.version(name) for name in names}, generate)


if __name__ == "__main__":
    main()
