"""Reads a tokenizer from the metadata of a GGUF file (`tokenizer.ggml.*`).

Only byte-level BPE (kind `gpt2`) with a known pre-tokenizer: for the rest a GGUF file does not hold enough to be sure,
and a tokenizer that is nearly right is worse than none.
"""

from collections.abc import Mapping, Sequence

import tokenizers
from tokenizers import AddedToken, decoders, models, processors

from server.errors import ModelLoadError
from server.text.pretokenizers import PRE_TOKENIZERS, PreTokenizer

_PREFIX = "tokenizer.ggml."
_CONTROL = 3
_USER_DEFINED = 4
_ADVICE = "put the model's tokenizer.json beside it"


def read_tokenizer(metadata: Mapping[str, object], path: str) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """Build the library's tokenizer, and the text of the special tokens by role.

    Raises:
        ModelLoadError: see the module.
    """
    kind = metadata.get(_PREFIX + "model")
    if kind != "gpt2":
        raise ModelLoadError(path, f"its tokenizer is of kind {kind!r}, only 'gpt2' can be read from a GGUF; {_ADVICE}")
    family = _family(metadata, path)
    tokens = _strings(metadata, "tokens", path)
    core = tokenizers.Tokenizer(_bpe(tokens, _strings(metadata, "merges", path), family, path))
    core.pre_tokenizer = family.splitter()
    core.decoder = decoders.ByteLevel()
    if normalizer := family.normalizer():
        core.normalizer = normalizer
    _add_whole_tokens(core, tokens, metadata, path)
    special_tokens = _special_tokens(tokens, metadata)
    bos = special_tokens.get("bos_token")
    if bos is not None and metadata.get(_PREFIX + "add_bos_token", family.adds_bos):
        core.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], special_tokens=[(bos, core.token_to_id(bos))]
        )
    return core, special_tokens


def _family(metadata: Mapping[str, object], path: str) -> PreTokenizer:
    name = metadata.get(_PREFIX + "pre")
    if name is None:
        raise ModelLoadError(path, f"does not say how its tokenizer cuts text ({_PREFIX}pre); {_ADVICE}")
    family = PRE_TOKENIZERS.get(str(name))
    if family is None:
        known = ", ".join(sorted(PRE_TOKENIZERS))
        raise ModelLoadError(path, f"its pre-tokenizer {str(name)!r} is not one of {known}; {_ADVICE}")
    return family


def _strings(metadata: Mapping[str, object], name: str, path: str) -> Sequence[str]:
    values = metadata.get(_PREFIX + name)
    if not isinstance(values, Sequence) or isinstance(values, str) or not all(isinstance(each, str) for each in values):
        raise ModelLoadError(path, f"{_PREFIX}{name} is not a list of strings")
    return values


def _bpe(tokens: Sequence[str], merges: Sequence[str], family: PreTokenizer, path: str) -> models.BPE:
    wrong = next((merge for merge in merges if merge.count(" ") != 1), None)
    if wrong is not None:
        raise ModelLoadError(path, f"{_PREFIX}merges holds {wrong!r}, which is not two tokens")
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise ModelLoadError(path, f"{_PREFIX}tokens holds the same token twice")
    try:
        return models.BPE(vocabulary, pairs, ignore_merges=family.ignores_merges)
    except Exception as error:  # the library raises bare Exception
        raise ModelLoadError(path, f"{_PREFIX}merges does not fit its tokens: {error}") from error


def _add_whole_tokens(
    core: tokenizers.Tokenizer, tokens: Sequence[str], metadata: Mapping[str, object], path: str
) -> None:
    """Register the tokens that are found in a text as a whole: control tokens, and those the model's makers added."""
    kinds = metadata.get(_PREFIX + "token_type")
    if not isinstance(kinds, Sequence) or len(kinds) != len(tokens):
        raise ModelLoadError(path, f"{_PREFIX}token_type is not a list with one entry for each token")
    whole = [
        AddedToken(token, normalized=False, special=kind == _CONTROL)
        for token, kind in zip(tokens, kinds, strict=True)
        if kind in (_CONTROL, _USER_DEFINED) and token
    ]
    core.add_tokens(whole)


def _special_tokens(tokens: Sequence[str], metadata: Mapping[str, object]) -> dict[str, str]:
    roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    found: dict[str, str] = {}
    for role, name in roles.items():
        token_id = metadata.get(f"{_PREFIX}{name}_token_id")
        if isinstance(token_id, int) and 0 <= token_id < len(tokens):
            found[role] = tokens[token_id]
    return found
