"""The default model on our CPU path next to transformers in float32 on the same dequantised weights.

Greedy continuations of 20 prompts, 64 tokens each, and the perplexity of a fixed text. Columns of the table:

- tokens: what transformers wrote, the end of the turn included
- same: places at which both outputs have the same token
- first: the first place at which they differ
- gap: by how much (in logits) transformers preferred its token to ours there; a small gap is a coin toss
- forced: places at which both choose the same next token when both read what transformers wrote

Example:
    .venv/bin/python -m ops.bench.quality
"""

import argparse
import platform
import time
from collections.abc import Sequence
from typing import NamedTuple

from server.model.loader import load_model, read_text_assets
from server.model.loader.bundled import find_bundled_model
from server.model.model import Model
from server.text.tokenizer import Tokenizer
from tests.fixtures.forward import greedy, logits_of
from tests.fixtures.quality import TEXT, first_divergence, perplexity
from tests.fixtures.transformers_llama import TransformersLlama

NEW_TOKENS = 64
QUESTIONS = (
    "What is the capital of France?",
    "Name three primary colours.",
    "How do bees make honey?",
    "Write a two-line poem about rain.",
    "What is 12 + 7?",
    "Explain photosynthesis in one sentence.",
    "Give me a recipe for pancakes.",
    "Who wrote Hamlet?",
    "What does a blacksmith do?",
    "Translate 'good morning' into Spanish.",
    "Why is the sky blue?",
    "List four animals that live in the sea.",
)
BEGINNINGS = (
    "The old lighthouse stood",
    "In the beginning there was",
    "def fibonacci(n):",
    "Water boils at",
    "The three most important rules of cooking are",
    "Once upon a time, in a small village,",
    "The difference between a cat and a dog is",
    "1, 2, 3, 4,",
)


class Output(NamedTuple):
    """What transformers wrote, and where we would have written something else after the same tokens."""

    token_ids: list[int]
    places: list[int]
    gaps: list[float]


class Comparison(NamedTuple):
    """One prompt's outputs, compared."""

    prompt: str
    ours: list[int]
    theirs: Output

    @property
    def num_same(self) -> int:
        """Count the places with equal tokens."""
        return sum(a == b for a, b in zip(self.ours, self.theirs.token_ids, strict=False))

    @property
    def num_forced_same(self) -> int:
        """Count the places at which both agree after the same tokens."""
        return len(self.theirs.token_ids) - len(self.theirs.places)


def main() -> None:
    """Print the table and its sums."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    started = time.monotonic()
    file = find_bundled_model()
    metadata = read_text_assets(file).gguf_metadata
    assert metadata is not None
    tokenizer, model, reference = Tokenizer.from_gguf_metadata(metadata), load_model(file), TransformersLlama(file)
    prompts = {text: f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n" for text in QUESTIONS}
    prompts |= {text: text for text in BEGINNINGS}
    report(
        [
            compare(text, tokenizer.encode(prompt, allow_special=True), model, reference)
            for text, prompt in prompts.items()
        ]
    )
    token_ids = tokenizer.encode(TEXT.read_text(encoding="utf-8"), allow_special=False)
    ours, theirs = (perplexity(each, token_ids) for each in (logits_of(model, token_ids), reference.logits(token_ids)))
    print(f"perplexity of {len(token_ids)} tokens: {ours:.4f} and {theirs:.4f}, {100 * (ours / theirs - 1):+.3f} %")
    print(f"{model.backend} backend, {platform.machine()}, {time.monotonic() - started:.0f} s")


def compare(text: str, prompt: Sequence[int], model: Model, reference: TransformersLlama) -> Comparison:
    """Continue one prompt with both."""
    return Comparison(text, continue_alone(model, prompt, NEW_TOKENS), continue_by_drafts(reference, model, prompt))


def continue_alone(model: Model, prompt: Sequence[int], num_tokens: int) -> list[int]:
    """Return our greedy continuation, with the end of the turn if it comes to that."""
    output = greedy(model, prompt, num_tokens)
    return output if len(output) == num_tokens else [*output, model.eos_token_ids[0]]


def continue_by_drafts(reference: TransformersLlama, model: Model, prompt: Sequence[int]) -> Output:
    """Return the greedy continuation of transformers: our drafts, judged all tokens at once and corrected."""
    output = Output([], [], [])
    while len(output.token_ids) < NEW_TOKENS and output.token_ids[-1:] != [model.eos_token_ids[0]]:
        read = [*prompt, *output.token_ids]
        draft = continue_alone(model, read, NEW_TOKENS - len(output.token_ids))
        logits = reference.logits([*read, *draft])[len(read) - 1 : -1]
        choices = [int(each) for each in logits.argmax(dim=1)]
        place = first_divergence(draft, choices)
        if place is not None:
            output.places.append(len(output.token_ids) + place)
            output.gaps.append(float(logits[place, choices[place]] - logits[place, draft[place]]))
        output.token_ids.extend(choices if place is None else choices[: place + 1])
    return output


def report(rows: Sequence[Comparison]) -> None:
    """Print one line per prompt, and the sums."""
    print("| prompt | tokens | same | first | gap | forced |\n|---|---|---|---|---|---|")
    for each in rows:
        first, gap = (each.theirs.places[0], f"{each.theirs.gaps[0]:.3f}") if each.theirs.places else ("-", "-")
        tokens = len(each.theirs.token_ids)
        print(f"| {each.prompt} | {tokens} | {each.num_same} | {first} | {gap} | {each.num_forced_same} |")
    total = sum(len(each.theirs.token_ids) for each in rows)
    same = 100 * sum(each.num_same for each in rows) / total
    forced = 100 * sum(each.num_forced_same for each in rows) / total
    equal = sum(not each.theirs.places for each in rows)
    print(f"| all {len(rows)}, {equal} of them equal | {total} | {same:.1f} % | | | {forced:.1f} % |")


if __name__ == "__main__":
    main()
