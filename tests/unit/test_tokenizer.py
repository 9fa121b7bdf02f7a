"""The shipped tokenizer: Qwen2's in everything but size, offline, and fitted on training texts."""

import importlib.util
import json
import unicodedata
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen2Tokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

import cocoa_dist
from cocoa_dist.data.shards import ShardReader

ASSETS = Path(cocoa_dist.__file__).parent / "assets"
FOLDER = ASSETS / "tokenizer"
TOOL = Path(__file__).parents[2] / "tools" / "build_tokenizer.py"
SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|mask|>",
    "<|object_ref_start|>",
]
SAMPLES = [
    "",
    " ",
    "grinning face: cheerful, cheery",
    "It's 12345 o'clock,  isn't it?\r\n\tyes\n\n",
    "日本語 ไทย हिन्दी українська العربية",
    "\U0001f469\u200d\U0001f680 \U0001f1f3\U0001f1f4",
    "\x00\x7f\x1b",
    "word" * 300,
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_tokenizer", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RAW = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


def test_it_loads_as_qwen2_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    assert isinstance(tokenizer, Qwen2Tokenizer)
    assert len(tokenizer) == 2048


def test_special_tokens_come_first(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.convert_ids_to_tokens(list(range(9))) == SPECIAL_TOKENS
    assert tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS) == list(range(9))
    named = (tokenizer.eos_token, tokenizer.pad_token, tokenizer.mask_token)
    assert named == ("<|im_end|>", "<|endoftext|>", "<|mask|>")
    assert tokenizer.bos_token is None


@pytest.mark.parametrize("token", SPECIAL_TOKENS)
def test_a_special_token_is_one_id(token: str, tokenizer: PreTrainedTokenizerBase) -> None:
    number = SPECIAL_TOKENS.index(token)
    assert tokenizer(f"a{token}b")["input_ids"].count(number) == 1
    assert RAW.encode(token).ids == [number]


def test_nothing_is_added_to_a_text(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer("grinning face")["input_ids"]
    assert ids == RAW.encode("grinning face", add_special_tokens=False).ids
    assert min(ids) > 8
    assert len(ids) <= 3


@pytest.mark.parametrize("text", SAMPLES, ids=range(len(SAMPLES)))
def test_text_comes_back(text: str, tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=60))
def test_any_text_comes_back_in_normal_form(text: str) -> None:
    ids = RAW.encode(text).ids
    # Qwen2's tokenizer puts text into Unicode normal form C, and so must this one
    assert RAW.decode(ids, skip_special_tokens=False) == unicodedata.normalize("NFC", text)


def test_the_library_class_and_the_file_agree(tokenizer: PreTrainedTokenizerBase) -> None:
    """transformers rebuilds the pipeline from class Qwen2Tokenizer: it must be the file's."""
    for split in ("train", "unseen_concept"):
        reader = ShardReader(ASSETS / "emoji" / split)
        texts = [name for i in range(100) for name in reader.record(i).meta["names"].values()]
        reader.close()
        ours = [encoding.ids for encoding in RAW.encode_batch(texts)]
        assert tokenizer(texts)["input_ids"] == ours


def test_words_are_cut_as_qwen2_cuts_them(tool: ModuleType) -> None:
    assert tool.WORD_PATTERN == PRETOKENIZE_REGEX


def test_fitting_again_gives_the_shipped_bytes(tool: ModuleType, tmp_path: Path) -> None:
    tool.main(["--destination", str(tmp_path)])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes()


def test_too_few_texts_are_refused(tool: ModuleType) -> None:
    with pytest.raises(ValueError, match="expected 2048: fit on more texts"):
        tool.fit_tokenizer(["a few words"])


def test_no_merge_comes_from_a_held_out_name_alone(tool: ModuleType) -> None:
    """Every word piece that a merge makes occurs in some training text."""
    reader = ShardReader(ASSETS / "emoji" / "train")
    texts = [t for i in range(len(reader)) for t in tool.training_texts(reader.record(i))]
    reader.close()
    used = {token for encoding in RAW.encode_batch(texts) for token in encoding.tokens}
    vocabulary = json.loads((FOLDER / "tokenizer.json").read_bytes())["model"]["vocab"]
    # a merge may be a step on the way to a longer piece; what matters is that words are theirs
    words = {word for text in texts for word, _ in RAW.pre_tokenizer.pre_tokenize_str(text)}
    merged = [token for token, number in vocabulary.items() if number >= 9 + 256]
    assert all(token in used or any(token in word for word in words) for token in merged)


def test_the_folder_is_small() -> None:
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 100_000
