"""How each known GGUF pre-tokenizer (`tokenizer.ggml.pre`) cuts a text before byte pairs are merged.

A GGUF file names the cut instead of holding it, so the definitions stand here, each as in the tokenizer.json of the
model family that it is named after. A wrong cut gives plausible wrong tokens; therefore an unknown name is refused.

Checked on 2026-11-24 against the vocabulary tests that llama.cpp publishes (46 texts each, all ids equal): gpt-2,
starcoder, refact, llama-bpe, qwen2, falcon, deepseek-coder, deepseek-llm; smollm against transformers on the GGUF that
the tests install. The others (tekken, deepseek-v3, default) are checked by how they cut only.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from tokenizers import Regex, normalizers, pre_tokenizers


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """One family's way of cutting."""

    patterns: tuple[str, ...] = ()
    """Regular expressions, applied one after the other; each match and each gap becomes a piece."""
    has_single_digits: bool = False
    """Every digit is a piece of its own."""
    uses_gpt2_pattern: bool = False
    """The pattern that is built into the library's byte-level step comes last."""
    is_nfc: bool = False
    """The text is composed (Unicode NFC) first."""
    ignores_merges: bool = False
    """A piece that is a token as it stands is not merged up from bytes."""
    adds_bos: bool = False
    """Raw prompts begin with the beginning-of-text token, unless the file says otherwise."""

    def splitter(self) -> pre_tokenizers.PreTokenizer:
        """Build the library's pre-tokenizer, which ends by spelling bytes as characters."""
        steps: list[pre_tokenizers.PreTokenizer] = [
            pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in self.patterns
        ]
        if self.has_single_digits:
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=self.uses_gpt2_pattern))
        return pre_tokenizers.Sequence(steps)

    def normalizer(self) -> normalizers.Normalizer | None:
        """Build the library's normalizer, if there is one."""
        return normalizers.NFC() if self.is_nfc else None


_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"

_LLAMA3 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_SIGNS}|{_SPACES}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}|{_SIGNS}|{_SPACES}"

_UPPER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}"
_LOWER = r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*"
    rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)

_GPT2_WITHOUT_SPACES = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"

# The cased letters that DeepSeek's first tokenizer lists one range after the other.
_DEEPSEEK_LETTERS = (
    r"A-Za-z\x{b5}\x{c0}-\x{d6}\x{d8}-\x{f6}\x{f8}-\x{1ba}\x{1bc}-\x{1bf}\x{1c4}-\x{293}\x{295}-\x{2af}"
    r"\x{370}-\x{373}\x{376}\x{377}\x{37b}-\x{37d}\x{37f}\x{386}\x{388}-\x{38a}\x{38c}\x{38e}-\x{3a1}"
    r"\x{3a3}-\x{3f5}\x{3f7}-\x{481}\x{48a}-\x{52f}\x{531}-\x{556}\x{10a0}-\x{10c5}\x{13a0}-\x{13f5}"
    r"\x{13f8}-\x{13fd}\x{1c90}-\x{1cba}\x{1cbd}-\x{1cbf}\x{1d00}-\x{1d2b}\x{1d6b}-\x{1d77}\x{1d79}-\x{1d9a}"
    r"\x{1e00}-\x{1f15}\x{1f18}-\x{1f1d}\x{1f20}-\x{1f45}\x{1f48}-\x{1f4d}\x{1f50}-\x{1f57}\x{1f59}\x{1f5b}"
    r"\x{1f5d}\x{1f5f}-\x{1f7d}\x{1f80}-\x{1fb4}\x{1fb6}-\x{1fbc}\x{1fbe}\x{1fc2}-\x{1fc4}\x{1fc6}-\x{1fcc}"
    r"\x{1fd0}-\x{1fd3}\x{1fd6}-\x{1fdb}\x{1fe0}-\x{1fec}\x{1ff2}-\x{1ff4}\x{1ff6}-\x{1ffc}\x{2102}\x{2107}"
    r"\x{210a}-\x{2113}\x{2115}\x{2119}-\x{211d}\x{2124}\x{2126}\x{2128}\x{212a}-\x{212d}\x{212f}-\x{2134}"
    r"\x{2139}\x{213c}-\x{213f}\x{2145}-\x{2149}\x{214e}\x{2183}\x{2184}\x{2c00}-\x{2c7b}\x{2c7e}-\x{2ce4}"
    r"\x{2ceb}-\x{2cee}\x{2cf2}\x{2cf3}\x{a640}-\x{a66d}\x{a680}-\x{a69b}\x{a722}-\x{a76f}\x{a771}-\x{a787}"
    r"\x{a78b}-\x{a78e}\x{ab70}-\x{abbf}\x{fb00}-\x{fb06}\x{fb13}-\x{fb17}\x{ff21}-\x{ff3a}\x{ff41}-\x{ff5a}"
    r"\x{10400}-\x{1044f}\x{104b0}-\x{104d3}\x{104d8}-\x{104fb}\x{10c80}-\x{10cb2}\x{10cc0}-\x{10cf2}"
    r"\x{118a0}-\x{118df}\x{1e900}-\x{1e943}"
)
_DEEPSEEK_SIGNS = r"!-/:-~\x{ff01}-\x{ff0f}\x{ff1a}-\x{ff5e}\x{2018}-\x{201f}\x{3000}-\x{3002}"
_DEEPSEEK_EAST_ASIAN = r"[\x{4e00}-\x{9fa5}\x{800}-\x{4e00}\x{ac00}-\x{d7ff}]+"
_DEEPSEEK_V3_WORDS = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
)

_gpt2 = PreTokenizer(uses_gpt2_pattern=True)
_smollm = PreTokenizer(has_single_digits=True, uses_gpt2_pattern=True)
_llama3 = PreTokenizer((_LLAMA3,), ignores_merges=True, adds_bos=True)
_qwen2 = PreTokenizer((_QWEN2,), is_nfc=True)

PRE_TOKENIZERS: Mapping[str, PreTokenizer] = MappingProxyType(
    {
        # What converters wrote when they did not know the family; the cut that the field then agreed on.
        "default": PreTokenizer(
            (r"[\p{P}\$\+<=>\^~\|]+", _GPT2_WITHOUT_SPACES, r"\p{N}+", r"[0-9][0-9][0-9]"),
        ),
        "falcon": PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2_WITHOUT_SPACES, r"[0-9][0-9][0-9]")),
        "gpt-2": _gpt2,
        "phi-2": _gpt2,
        "smollm": _smollm,
        "starcoder": _smollm,
        "refact": _smollm,
        "llama-bpe": _llama3,
        "llama3": _llama3,
        "llama-v3": _llama3,
        "qwen2": _qwen2,
        "deepseek-r1-qwen": _qwen2,
        "tekken": PreTokenizer((_TEKKEN,), ignores_merges=True, adds_bos=True),
        "deepseek-coder": PreTokenizer(
            (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_EAST_ASIAN), has_single_digits=True
        ),
        "deepseek-llm": PreTokenizer(
            (r"[\r\n]", rf"\s?[{_DEEPSEEK_LETTERS}]+", rf"\s?[{_DEEPSEEK_SIGNS}]+", r"\s+$", _DEEPSEEK_EAST_ASIAN),
            has_single_digits=True,
        ),
        "deepseek-v3": PreTokenizer(
            (r"\p{N}{1,3}", r"[\x{4e00}-\x{9fa5}\x{3040}-\x{309f}\x{30a0}-\x{30ff}]+", _DEEPSEEK_V3_WORDS)
        ),
    }
)
