"""The tokens a run works with: ids of those that the package writes itself, and plain BPE.

Special tokens written out in a text are read as text, never as what they stand for.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from tokenizers import Tokenizer

from cocoa_dist.config import ModelConfig
from cocoa_dist.manifest import sha256_file

_TOKENIZER_FILE = "tokenizer.json"
_MEMO_TEXTS = 65536  # encoded texts kept; names and short captions recur in every pass
_MEMO_LENGTH = 256  # characters; longer texts are encoded anew, they would fill the memory
_MIN_ENCODED_LENGTH = 65536  # characters; shorter texts are always encoded whole
_CHARACTERS_PER_TOKEN = 64  # more than any text has for long


@dataclass(frozen=True)
class Vocabulary:
    """Ids of the tokens that the package writes itself, and plain BPE for the rest."""

    eos: int  # config.model.bridge_token: the embedding is read from it
    image_pad: int
    vision_start: int
    vision_end: int
    mask: int
    bos: int  # <|im_start|>
    size: int  # ids are below it; the model's embedding table must be at least as large
    encoder: Callable[[str], Sequence[int]] = field(repr=False, compare=False)
    sha256: str = ""  # of tokenizer.json; "" where there is none
    new: range = range(0)  # ids of the tokens that the recipe has added to the tokenizer's own
    learnt: range = range(0)  # ids of tokens with embeddings of their own, see model/learnt.py
    learnt_before: bool = False  # the tokenizer had them already: the model's rows are theirs
    bridge: tuple[int, ...] = ()  # what an embedding is read from; () is EOS alone

    @property
    def bridge_ids(self) -> tuple[int, ...]:
        """Tokens of a bridge, in order."""
        return self.bridge or (self.eos,)

    def encode(self, text: str) -> list[int]:
        """Return plain BPE ids: special tokens written out in a text are read as text."""
        return list(self.encoder(text))

    @classmethod
    def load(cls, tokenizer_path: Path, model_config: ModelConfig) -> "Vocabulary":
        """Load from a Hugging Face folder; what it lacks of a recipe's tokens goes behind the last.

        Raises ValueError naming the folder and the token that is missing.
        """
        tokenizer = load_tokenizer(tokenizer_path)
        first_new = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())
        wanted = (model_config.mask_token, *model_config.new_tokens)
        tokenizer.add_special_tokens([t for t in wanted if tokenizer.token_to_id(t) is None])
        behind_new = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())
        learnt = learnt_tokens(model_config)
        learnt_before = tokenizer.token_to_id(_learnt_token(0)) is not None
        further = _learnt_token(len(learnt))
        if learnt and learnt_before and tokenizer.token_to_id(further) is not None:
            raise ValueError(
                f"tokenizer {tokenizer_path} has {further}, the recipe asks for {len(learnt)} "
                "compression tokens: it comes from a model with more of them; set "
                "model.compression_tokens or model.num_bridge_tokens to that number"
            )
        tokenizer.add_special_tokens([t for t in learnt if tokenizer.token_to_id(t) is None])
        tokens = {
            "eos": model_config.bridge_token,
            "image_pad": "<|image_pad|>",
            "vision_start": "<|vision_start|>",
            "vision_end": "<|vision_end|>",
            "mask": model_config.mask_token,
            "bos": "<|im_start|>",
        }
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        missing = [token for token in tokens.values() if token not in vocabulary]
        if missing:
            raise ValueError(
                f"tokenizer {tokenizer_path} has no token {', '.join(missing)}, expected one of "
                "Qwen2-VL's kind; set model.tokenizer or model.bridge_token, or model.new_tokens"
            )
        file = tokenizer_path / _TOKENIZER_FILE
        ids = _learnt_ids([vocabulary[token] for token in learnt], folder=tokenizer_path)
        eos = () if model_config.compression_tokens else (vocabulary[model_config.bridge_token],)
        return cls(
            **{name: vocabulary[token] for name, token in tokens.items()},
            size=1 + max(vocabulary.values()),
            encoder=_memoising_short(
                lambda text: tuple(tokenizer.encode(text, add_special_tokens=False).ids)
            ),
            sha256=sha256_file(file) if file.is_file() else "",
            new=range(first_new, behind_new),
            learnt=ids,
            learnt_before=learnt_before,
            bridge=(*eos, *ids) if ids else (),
        )


def learnt_tokens(config: ModelConfig) -> tuple[str, ...]:
    """Return the names of the tokens whose embeddings are a parameter of their own, in order."""
    return tuple(_learnt_token(number) for number in range(config.num_learnt_tokens))


def bridge_tokens(config: ModelConfig) -> tuple[str, ...]:
    """Return the names of the tokens of a bridge, in order; none for EOS alone."""
    learnt = learnt_tokens(config)
    return learnt if config.compression_tokens or not learnt else (config.bridge_token, *learnt)


def _learnt_token(number: int) -> str:
    return f"<|compress_{number}|>"


def _learnt_ids(ids: Sequence[int], *, folder: Path) -> range:
    """Return ids as a range. Raises ValueError for a tokenizer that has some of the tokens."""
    if not ids:
        return range(0)
    found = range(ids[0], ids[0] + len(ids))
    if list(ids) != list(found):
        raise ValueError(
            f"tokenizer {folder} has some of the {len(ids)} compression tokens, or has them in "
            f"another order (ids {ids[0]} to {ids[-1]}): it comes from a model with another number "
            "of them; set model.compression_tokens or model.num_bridge_tokens to that number"
        )
    return found


def load_tokenizer(path: Path) -> Tokenizer:
    """Read tokenizer.json without transformers, whose import takes seconds, where there is one."""
    file = path / _TOKENIZER_FILE
    if file.is_file():
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers has no class of its own for it
            raise ValueError(f"{file} cannot be read: {error}; fetch the model again") from error
    else:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(str(path)).backend_tokenizer
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # a caption that says <|image_pad|> says just that
    return tokenizer


def _memoising_short(encode: Callable[[str], Sequence[int]]) -> Callable[[str], Sequence[int]]:
    """Return `encode` with a memory for short texts."""
    remembered = lru_cache(maxsize=_MEMO_TEXTS)(encode)
    return lambda text: remembered(text) if len(text) <= _MEMO_LENGTH else encode(text)


def text_start(text: str, max_tokens: int) -> str:
    """Return as much of a text as can matter: ten megabytes take 12 s to encode, each time."""
    return text[: max(_MIN_ENCODED_LENGTH, _CHARACTERS_PER_TOKEN * max_tokens)]
