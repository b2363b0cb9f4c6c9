"""Hugging Face transformers: the GGUF's weights dequantised to one dtype, a static batch, its own `generate`."""

import argparse
import importlib.metadata
from pathlib import Path

import torch
from transformers import GenerationConfig

from ops.bench.compare.runner import NUM_THREADS, Prompts, answer_questions
from tests.fixtures.transformers_llama import TransformersLlama


def main() -> None:
    """Load the model and answer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="GGUF file")
    parser.add_argument("dtype", choices=("float32", "bfloat16"))
    options = parser.parse_args()
    torch.set_num_threads(NUM_THREADS)
    model = TransformersLlama(options.model).model.to(getattr(torch, options.dtype))
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call] # theirs has no types
        do_sample=False, pad_token_id=0
    )

    def generate(prompts: Prompts, new_tokens: int) -> list[int]:
        token_ids = torch.tensor(prompts)
        with torch.inference_mode():
            output = model.generate(token_ids, attention_mask=torch.ones_like(token_ids), max_new_tokens=new_tokens)
        return [int(output.shape[1]) - len(prompts[0])] * len(prompts)

    names = ("transformers", "torch")
    answer_questions({name: importlib.metadata.version(name) for name in names}, generate)


if __name__ == "__main__":
    main()
