"""Text and token ids: tokenizer, chat template, incremental detokeniser, stop strings. See README.md."""
