"""Weights in safetensors files, read one tensor at a time.

Nothing is mapped into memory: a page that was read once would count as this process's until
somebody else needed it. Format: https://github.com/huggingface/safetensors#format
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cocoa_dist.export.layers import Layer

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file

    def read(self) -> Tensor:
        """Read it whole. Raises ValueError if the file ends before it does."""
        value = torch.empty(self.shape, dtype=self.dtype)
        raw = value.reshape(-1).view(torch.uint8).numpy()
        with self.path.open("rb") as file:
            file.seek(self.offset)
            found = file.readinto(raw.data) if len(raw) else 0
        if found != len(raw):
            raise ValueError(f"{self.path} ends {len(raw) - found} bytes too early: fetch it again")
        return value


def stored_tensors(paths: Sequence[Path]) -> dict[str, StoredTensor]:
    """Return what safetensors files hold, by name. Raises ValueError for a file that is none."""
    found: dict[str, StoredTensor] = {}
    for path in paths:
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if length > _MAX_HEADER_BYTES:
                    raise ValueError(f"a header of {length} bytes")
                header = json.loads(file.read(length))
            if not isinstance(header, dict):
                raise ValueError("its header is no object")
            for name, entry in header.items():
                if name != "__metadata__":
                    found[name] = _stored(path, entry, begin=8 + length)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no file of safetensors: {error}") from error
    return found


def _stored(path: Path, entry: Mapping[str, object], *, begin: int) -> StoredTensor:
    shape = tuple(int(size) for size in _numbers(entry["shape"]))
    start, stop = _numbers(entry["data_offsets"])
    dtype = _DTYPES[str(entry["dtype"])]
    if math.prod(shape) * dtype.itemsize != stop - start:
        raise ValueError(f"a tensor of shape {shape} in {stop - start} bytes")
    return StoredTensor(path, dtype, shape, begin + start)


def _numbers(value: object) -> list[int]:
    if not isinstance(value, list):
        raise ValueError(f"{value!r} where a list of numbers is expected")
    return [int(number) for number in value]


class FileWeights:
    """A model's weights in files: a Hugging Face folder's, or those at a stage's end.

    `names`: what the files call a parameter, by its name in the model. `rows` are tensors (K, D)
    that take the place of rows [first, first + K) of a matrix, by the matrix's name: learnt tokens.
    """

    def __init__(
        self,
        stored: Mapping[str, StoredTensor],
        *,
        names: Mapping[str, str],
        dtype: torch.dtype,
        rows: Mapping[str, tuple[int, str]] | None = None,
    ) -> None:
        self._stored, self._names, self._dtype = stored, names, dtype
        self._rows = rows or {}

    def check(self, layers: Sequence[Layer]) -> None:
        """Raise ValueError naming the first parameter that is missing or has another shape."""
        for layer in layers:
            for name, shape in layer.shapes.items():
                stored = self._stored.get(self._names[name])
                if stored is None:
                    files = sorted({str(other.path) for other in self._stored.values()})
                    raise ValueError(f"{', '.join(files)}: no weights for {self._names[name]}")
                if stored.shape != shape:
                    raise ValueError(
                        f"{stored.path}: {self._names[name]} is {stored.shape}, expected {shape}"
                    )

    @contextmanager
    def layer(self, layer: Layer) -> Iterator[Mapping[str, Tensor]]:
        """Read a layer's tensors, one at a time where they are of another dtype."""
        yield {name: self._read(name) for name in layer.parameters}

    def _read(self, name: str) -> Tensor:
        value = self._stored[self._names[name]].read().to(self._dtype)
        if name in self._rows:
            first, other = self._rows[name]
            rows_KD = self._stored[other].read()
            value[first : first + len(rows_KD)] = rows_KD.to(self._dtype)
        return value
