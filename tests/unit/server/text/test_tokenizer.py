import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from server.errors import ModelLoadError
from server.text import protection
from server.text.pretokenizers import PRE_TOKENIZERS
from server.text.tokenizer import Tokenizer

# SmolLM2's vocabulary lacks six control characters and the bytes of planes that Unicode has not assigned.
spelt = st.text(
    st.characters(max_codepoint=0x3FFFF, exclude_categories=["Cs"], exclude_characters="\x04\x06\x13\x14\x16\x1d"),
    max_size=60,
)

TEXTS = [
    "",
    " ",
    "Hello, world!",
    "It's 1234567 or 3.14; he'LL see 2²½ Ⅻ",
    "  leading and trailing  ",
    "tabs\tand\nnew\r\nlines\n\n\n  then",
    "def f(x):\n    return x ** 2\n",
    "naïve café Ünïcödé ﬁ e\u0301",
    "日本語のテキスト 中文 한국어",
    "👍🏽 👨‍👩‍👧‍👦 🇫🇷",
    "<|im_start|>user\nhi<|im_end|>\n",
    "<|im_start|> <|im_end|><|endoftext|>",
    "\u202eright\u00a0to\u2003left\ufeff",
    "a" * 1000,
]


@pytest.mark.parametrize("text", TEXTS)
def test_smollm_decodes_to_what_was_encoded(smollm: Tokenizer, text: str) -> None:
    """Byte-level BPE loses nothing."""
    ids = smollm.encode(text, allow_special=True)

    assert text == smollm.decode(ids, skip_special=False)


@pytest.mark.slow
def test_smollm_gives_the_ids_of_transformers(
    smollm: Tokenizer, smollm_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokenizer that is built from the GGUF encodes and decodes as the one that transformers builds from it.

    Except that transformers does not read `tokenizer.ggml.pre`: it keeps digits that are not 0 .. 9 together.
    """
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(smollm_path.parent, gguf_file=smollm_path.name)

    for text in [text.translate(dict.fromkeys(map(ord, "²½Ⅻ"))) for text in TEXTS]:
        ids = theirs(text, add_special_tokens=False).input_ids
        assert ids == smollm.encode(text, allow_special=True)
        assert theirs.decode(ids, clean_up_tokenization_spaces=False) == smollm.decode(ids, skip_special=False)


@settings(max_examples=200, deadline=None)
@given(text=spelt)
def test_any_text_survives(smollm: Tokenizer, text: str) -> None:
    """Encoding without control tokens and decoding gives the text, whatever it is."""
    ids = smollm.encode(text, allow_special=False)

    assert text == smollm.decode(ids)
    assert not {0, 1, 2} & set(ids)


def test_bytes_that_the_vocabulary_lacks_are_left_out(smollm: Tokenizer) -> None:
    """As in every implementation of this tokenizer: a character that it cannot spell is dropped, the rest stays."""
    assert smollm.decode(smollm.encode("a\x04b", allow_special=False)) == "ab"


def test_control_tokens_are_read_only_where_allowed(smollm: Tokenizer) -> None:
    """The same characters are a control token in a raw prompt and ordinary text in a content."""
    assert smollm.encode("<|im_end|>", allow_special=True) == [2]
    assert 2 not in smollm.encode("<|im_end|>", allow_special=False)


def test_decode_hides_control_tokens_unless_asked(smollm: Tokenizer) -> None:
    """Control tokens are no part of an answer's text."""
    ids = smollm.encode("hi<|im_end|>", allow_special=True)

    assert smollm.decode(ids) == "hi"
    assert smollm.decode(ids, skip_special=False) == "hi<|im_end|>"


def test_ids_outside_the_vocabulary_say_nothing(smollm: Tokenizer) -> None:
    """Decoding never fails."""
    assert smollm.decode([-1, 10**9, *smollm.encode("x", allow_special=False)]) == "x"


def test_token_text_is_empty_for_a_part_of_a_code_point(smollm: Tokenizer) -> None:
    """A token is shown as text only where it is text by itself."""
    ids = smollm.encode("𐍈", allow_special=False)

    assert len(ids) > 1
    assert "" in [smollm.token_text(token_id) for token_id in ids]
    assert smollm.token_text(1) == "<|im_start|>"


def test_smollm_describes_itself(smollm: Tokenizer, smollm_metadata: dict[str, object]) -> None:
    """Size, kind, roles of special tokens and a digest that is a function of the definition."""
    assert smollm.vocabulary_size == 49152
    assert smollm.kind == "byte-level"
    assert smollm.special_tokens["eos_token"] == "<|im_end|>"  # noqa: S105 (no password)
    assert smollm.digest == Tokenizer.from_gguf_metadata(smollm_metadata).digest


TINY = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "llama-bpe",
    "tokenizer.ggml.tokens": ["<s>", "</s>", "a", "b", "ab", "<think>"],
    "tokenizer.ggml.token_type": [3, 3, 1, 1, 1, 4],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.bos_token_id": 0,
}


def test_gguf_beginning_of_text_comes_first_and_once() -> None:
    """A raw prompt gets the beginning-of-text token of a family that has one, unless it is there already."""
    tokenizer = Tokenizer.from_gguf_metadata(TINY)

    assert tokenizer.encode("ab", allow_special=True) == [4]
    assert tokenizer.encode_prompt("ab") == [0, 4]
    assert tokenizer.encode_prompt("<s>ab") == [0, 4]


def test_gguf_may_say_that_there_is_no_beginning_of_text() -> None:
    """The file's own word is stronger than its family's habit."""
    assert Tokenizer.from_gguf_metadata({**TINY, "tokenizer.ggml.add_bos_token": False}).encode_prompt("ab") == [4]


def test_user_defined_tokens_are_ordinary_text() -> None:
    """Tokens that the model's makers added without calling them control tokens are found in any text, and shown."""
    tokenizer = Tokenizer.from_gguf_metadata(TINY)

    assert tokenizer.encode("a<think>b", allow_special=False) == [2, 5, 3]
    assert tokenizer.decode([2, 5, 3]) == "a<think>b"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"model": "llama"}, "kind 'llama'.*tokenizer.json"),
        ({"model": None}, "kind None"),
        ({"pre": "no-such"}, "'no-such'.*tokenizer.json"),
        ({"pre": None}, "does not say how.*tokenizer.json"),
        ({"tokens": None}, "tokens is not a list"),
        ({"tokens": ["a", 1]}, "tokens is not a list"),
        ({"tokens": ["a", "a"]}, "twice"),
        ({"token_type": [1]}, "token_type"),
        ({"merges": ["ab"]}, "not two tokens"),
        ({"merges": ["a c"]}, "does not fit"),
        ({"merges": None}, "merges is not a list"),
    ],
)
def test_gguf_that_cannot_be_trusted_is_refused(change: dict[str, object], problem: str) -> None:
    """Unknown or broken metadata is a start-up error that names file and reason, never a guess."""
    metadata = TINY | {f"tokenizer.ggml.{name}": value for name, value in change.items()}

    with pytest.raises(ModelLoadError, match=problem) as caught:
        Tokenizer.from_gguf_metadata(metadata, path="model.gguf")
    assert str(caught.value).startswith("model.gguf: ")


CUT = {
    "gpt-2": "It|'s| 1234|,| he|'|LL|\r\n | go",
    "smollm": "It|'s| |1|2|3|4|,| he|'|LL|\r\n | go",
    "llama-bpe": "It|'s| |123|4|,| he|'LL|\r\n| | go",
    "qwen2": "It|'s| |1|2|3|4|,| he|'LL|\r\n| | go",
    "tekken": "It|'s| |1|2|3|4|,| he|'LL|\r\n| | go",
    "deepseek-coder": "It|'|s| |1|2|3|4|,| he|'|LL|\r|\n| | go",
    "deepseek-v3": "It|'s| |123|4|,| he|'LL|\r\n| | go",
}


@pytest.mark.parametrize("family", CUT)
def test_families_cut_as_they_were_trained(family: str) -> None:
    """Digits, contractions and line ends are cut as the family's tokenizer.json says."""
    spelt = {ord("Ġ"): " ", ord("Ċ"): "\n", ord("č"): "\r"}
    pieces = PRE_TOKENIZERS[family].splitter().pre_tokenize_str("It's 1234, he'LL\r\n  go")

    assert CUT[family] == "|".join(piece.translate(spelt) for piece, _ in pieces)


@pytest.mark.parametrize("family", sorted(PRE_TOKENIZERS))
def test_no_family_loses_text(family: str) -> None:
    """However a family cuts, the pieces put together are the text."""
    for text in TEXTS:
        spelt = "".join(piece for piece, _ in PRE_TOKENIZERS[family].splitter().pre_tokenize_str(text))
        assert decoders.ByteLevel().decode([spelt]) == text


def sentencepiece(*, scheme: str = "first") -> tokenizers.Tokenizer:
    """A tiny tokenizer of the Llama 2 kind: U+2581 for spaces, bytes for what is not in the vocabulary."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "ab", "▁ab"]
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    merges = [("▁", "a"), ("a", "b"), ("▁a", "b")]
    core = tokenizers.Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>"))  # noqa: S106 (no password)
    core.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.add_special_tokens([AddedToken("<s>", normalized=True), AddedToken("</s>")])
    core.post_processor = processors.TemplateProcessing(single=["<s>", "$A"], special_tokens=[("<s>", 1)])
    return core


def test_sentencepiece_from_tokenizer_json(tmp_path: Path) -> None:
    """Spaces, bytes and the space before a text are read as the file's decoder means them."""
    core = sentencepiece()
    core.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_file(tmp_path / "tokenizer.json")

    assert tokenizer.kind == "byte-fallback"
    for text in ["ab a b", "a中b", "👍", "b  ", ""]:
        ids = tokenizer.encode(text, allow_special=True)
        assert text == tokenizer.decode(ids) == core.decode(ids)
    assert tokenizer.encode_prompt("ab") == [1, *tokenizer.encode("ab", allow_special=True)]


def test_special_tokens_are_read_from_the_file_beside(tmp_path: Path) -> None:
    """tokenizer_config.json names the roles, as text or as an object with content."""
    sentencepiece().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        '{"bos_token": {"content": "<s>"}, "eos_token": "</s>", "pad_token": null}'
    )

    tokenizer = Tokenizer.from_file(tmp_path / "tokenizer.json")

    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize("content", ["", "{}", "no json", '{"version": "1.0"}'])
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path, content: str) -> None:
    """The error names the file."""
    path = tmp_path / "tokenizer.json"
    path.write_text(content)

    with pytest.raises(ModelLoadError, match=re.escape(str(path))):
        Tokenizer.from_file(path)


def test_a_decoder_that_cannot_be_streamed_is_refused(tmp_path: Path) -> None:
    """Tokens that are not pieces of text in a row (WordPiece) are refused at load, not in mid-stream."""
    core = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))  # noqa: S106 (no password)
    core.decoder = decoders.WordPiece()
    core.save(str(tmp_path / "tokenizer.json"))

    with pytest.raises(ModelLoadError, match="WordPiece"):
        Tokenizer.from_file(tmp_path / "tokenizer.json")


def test_a_broken_tokenizer_config_is_refused(tmp_path: Path) -> None:
    """A broken file beside the tokenizer is named."""
    sentencepiece().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text("[")

    with pytest.raises(ModelLoadError, match="tokenizer_config"):
        Tokenizer.from_file(tmp_path / "tokenizer.json")


SENTENCEPIECE = Tokenizer(sentencepiece(), special_tokens={}, path="test")


def test_other_threads_run_while_a_text_is_encoded(smollm: Tokenizer) -> None:
    """A long text does not keep the interpreter's lock, with control tokens, without, and with marks."""
    text = "word " * 150_000
    smollm.encode_protected(protection.MARK)  # its tokenizer is made at the first call
    for encode in (
        lambda: smollm.encode(text, allow_special=True),
        lambda: smollm.encode(text, allow_special=False),
        lambda: smollm.encode_protected(text + protection.MARK),
    ):
        has_begun = threading.Event()

        def work(encode: Callable[[], list[int]] = encode, has_begun: threading.Event = has_begun) -> int:
            has_begun.set()
            return len(encode())

        with ThreadPoolExecutor(1) as pool:
            done = pool.submit(work)
            has_begun.wait()
            turns = 0
            while not done.done():
                time.sleep(0.001)
                turns += 1

        assert done.result() >= 150_000
        assert turns > 15  # with the lock kept: one or two


def test_encoding_starts_no_threads() -> None:
    """The library's own threads stay away: there is one text at a time, and a later fork is not warned about."""
    code = (
        "import os; from tests.fixtures.front_ends import TOKENIZER;"
        "before = len(os.listdir('/proc/self/task')); TOKENIZER.encode('a b ' * 5000, allow_special=True);"
        "print(len(os.listdir('/proc/self/task')) - before, flush=True);"
        "child = os.fork(); TOKENIZER.encode('a b', allow_special=True); child and os.waitpid(child, 0)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TOKENIZERS_PARALLELISM"}
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=environment, capture_output=True, text=True, check=True
    )

    assert (ran.stdout, ran.stderr) == ("0\n", "")


@settings(max_examples=200, deadline=None)
@given(text=st.text() | spelt.map(lambda text: text * 20), repeated=st.sampled_from(["", " ", "\x04", "=", "▁", "中"]))
def test_the_least_number_of_tokens_is_one(smollm: Tokenizer, text: str, repeated: str) -> None:
    """No text has fewer tokens than its length promises, whatever the vocabulary drops."""
    text += repeated * 500
    for tokenizer in (smollm, SENTENCEPIECE):
        assert tokenizer.least_tokens(text) <= len(tokenizer.encode(text, allow_special=True))
        assert tokenizer.least_tokens(tokenizer.protect(text)) <= len(tokenizer.encode(text, allow_special=False))


def test_the_longest_token_bounds_a_text(smollm: Tokenizer) -> None:
    """A text's bytes over those of the longest token, rounded up; characters that are dropped do not count."""
    longest = smollm.longest_token_bytes

    assert longest == max(len(smollm.token_bytes(each, skip_special=False)) for each in range(smollm.vocabulary_size))
    assert smollm.least_tokens("é" * longest) == 2
    assert smollm.least_tokens("é" * longest + "e") == 3
    assert smollm.least_tokens("\x04" * longest * 9) == 0
    assert SENTENCEPIECE.longest_token_bytes == 6  # <0x00>


def spoil_normalizer(core: tokenizers.Tokenizer) -> None:
    """Let two characters become one."""
    core.normalizer = normalizers.NFC()


def spoil_spaces(core: tokenizers.Tokenizer) -> None:
    """Drop the spaces between words."""
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), core.pre_tokenizer])


def spoil_split(core: tokenizers.Tokenizer) -> None:
    """Drop each space."""
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "removed"), core.pre_tokenizer])


def spoil_replace(core: tokenizers.Tokenizer) -> None:
    """Make two spaces one."""
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace("  ", " ")])


def spoil_added(core: tokenizers.Tokenizer) -> None:
    """Let a token take in the spaces before it."""
    core.add_special_tokens([AddedToken("<mask>", lstrip=True)])


@pytest.mark.parametrize("spoil", [spoil_normalizer, spoil_spaces, spoil_split, spoil_replace, spoil_added])
def test_a_tokenizer_that_may_lose_text_has_no_bound(spoil: Callable[[tokenizers.Tokenizer], None]) -> None:
    """Where text can vanish before it is cut, its length says nothing about its tokens."""
    core = sentencepiece()
    spoil(core)
    tokenizer = Tokenizer(core, special_tokens={}, path="test")

    assert tokenizer.longest_token_bytes is None
    assert tokenizer.least_tokens("a" * 10_000) == 0
