#!/usr/bin/env python3
"""Fit the quickstart's 2048-entry tokenizer on the texts of the emoji training split.

Byte-level BPE with Qwen2's pre-tokeniser and normaliser, stored as a Hugging Face folder that loads
as Qwen2Tokenizer. The same texts give the same bytes. Run it after tools/build_emoji_shards.py:

    python tools/build_tokenizer.py
"""

import argparse
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from cocoa_dist.data.records import Record, side_texts
from cocoa_dist.data.shards import ShardReader

ASSETS = Path(__file__).resolve().parents[1] / "cocoa_dist" / "assets"
VOCABULARY_SIZE = 2048  # special tokens, 256 bytes, merges
SPECIAL_TOKENS = (  # ids 0, 1, ...
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|mask|>",
    "<|object_ref_start|>",
)
# How Qwen2 cuts text into words before BPE: contractions, letters with one leading sign or space,
# single digits, runs of signs, line ends, other space.
WORD_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TOKENIZER_CONFIG = {
    "tokenizer_class": "Qwen2Tokenizer",
    "add_bos_token": False,
    "add_prefix_space": False,
    "bos_token": None,
    "clean_up_tokenization_spaces": False,
    "eos_token": "<|im_end|>",
    "errors": "replace",
    "mask_token": "<|mask|>",
    "model_max_length": 1024,
    "pad_token": "<|endoftext|>",
    "split_special_tokens": False,
    "unk_token": None,
}


def training_texts(record: Record) -> list[str]:
    """Return what the tokenizer learns from one record: name, keywords, name with keywords."""
    names, targets = side_texts(record.query), side_texts(record.target)
    keywords = ", ".join(record.meta["keywords"])
    return [text for text in (*names, keywords, *targets) if text]


def fit_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Fit the tokenizer. Raises ValueError if the texts are too few to fill the vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != VOCABULARY_SIZE:
        raise ValueError(
            f"the texts gave {tokenizer.get_vocab_size()} entries, expected {VOCABULARY_SIZE}: "
            "fit on more texts or lower VOCABULARY_SIZE"
        )
    return tokenizer


def tokenizer_bytes(tokenizer: Tokenizer) -> bytes:
    """Return the content of tokenizer.json."""
    return tokenizer.to_str(pretty=False).encode()


def tokenizer_sha256(tokenizer: Tokenizer) -> str:
    """Return the hash that data sets carry: sha256 of tokenizer.json, in hex."""
    return hashlib.sha256(tokenizer_bytes(tokenizer)).hexdigest()


def write_folder(tokenizer: Tokenizer, destination: Path) -> None:
    """Write the Hugging Face folder."""
    destination.mkdir(parents=True, exist_ok=True)
    (destination / "tokenizer.json").write_bytes(tokenizer_bytes(tokenizer))
    config = json.dumps(TOKENIZER_CONFIG, indent=1) + "\n"
    (destination / "tokenizer_config.json").write_text(config, encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the training split, fit, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--emoji", type=Path, default=ASSETS / "emoji" / "train")
    parser.add_argument("--destination", type=Path, default=ASSETS / "tokenizer")
    options = parser.parse_args(arguments)
    reader = ShardReader(options.emoji)
    texts = [text for i in range(len(reader)) for text in training_texts(reader.record(i))]
    tokenizer = fit_tokenizer(texts)
    write_folder(tokenizer, options.destination)
    print(f"{options.destination}: {VOCABULARY_SIZE} entries from {len(texts)} texts")
    print(f"tokenizer.json sha256 {tokenizer_sha256(tokenizer)}")
    if reader.info.tokenizer_sha256 != tokenizer_sha256(tokenizer):
        raise SystemExit(
            f"{options.emoji} counted its tokens with another tokenizer "
            f"({reader.info.tokenizer_sha256}): run tools/build_emoji_shards.py again"
        )


if __name__ == "__main__":
    main()
