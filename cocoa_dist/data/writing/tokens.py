"""Counts text tokens as the loader's vocabulary encodes them, and says with which tokenizer."""

from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from cocoa_dist.data.samples import load_tokenizer
from cocoa_dist.manifest import sha256_file


class TokenCounter:
    """Number of plain BPE tokens of a text; pickled by its folder, loaded when first called.

    Raises ValueError if the folder has no tokenizer.json.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise ValueError(
                f"{folder} has no tokenizer.json: name the folder of the model that will be "
                "trained, or leave the tokenizer out (token counts are unknown then)"
            )
        self.sha256 = sha256_file(file)

    def __call__(self, text: str) -> int:
        """Return the number of tokens of a text."""
        return len(self._tokenizer.encode(text, add_special_tokens=False))

    def __reduce__(self) -> tuple[Any, ...]:
        return (TokenCounter, (self.folder,))

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.folder)
