"""Writes a model's weights as safetensors files, one layer in memory at a time.

Names and index are those of transformers' save_pretrained: every loader of such folders reads them.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cocoa_dist.distributed import raise_together, rank
from cocoa_dist.export.layers import Layer, LayerWeights, layers_of, stored_names
from cocoa_dist.train.shards import safetensors_header, tensor_chunks

INDEX_NAME = "model.safetensors.index.json"
DEFAULT_FILE_BYTES = 2_000_000_000
_METADATA = {"format": "pt"}  # transformers reads no file that does not say so


@dataclass(frozen=True)
class WeightFile:
    """One file: its name and the layers in it, in order."""

    name: str
    layers: tuple[Layer, ...]


def plan_files(
    layers: Sequence[Layer], *, dtype: torch.dtype, max_file_bytes: int
) -> list[WeightFile]:
    """Deal layers into files in order; a file is larger than the limit only for one layer."""
    groups: list[list[Layer]] = []
    left = -1
    for layer in layers:
        size = layer_bytes(layer, dtype)
        if size > left:
            groups.append([])
            left = max_file_bytes
        groups[-1].append(layer)
        left -= size
    if len(groups) == 1:
        return [WeightFile("model.safetensors", tuple(groups[0]))]
    count = f"{len(groups):05d}"
    return [
        WeightFile(f"model-{number:05d}-of-{count}.safetensors", tuple(group))
        for number, group in enumerate(groups, start=1)
    ]


def layer_bytes(layer: Layer, dtype: torch.dtype) -> int:
    """Return how much memory a whole layer takes."""
    return sum(map(prod, layer.shapes.values())) * dtype.itemsize


def write_weights(
    model: PreTrainedModel,
    weights: LayerWeights,
    folder: Path,
    *,
    dtype: torch.dtype,
    max_file_bytes: int = DEFAULT_FILE_BYTES,
) -> None:
    """Write all weights of a model into `folder`, which rank 0 does alone.

    Collective: call on all ranks. Raises ValueError on all of them if rank 0 cannot write.
    """
    files = plan_files(layers_of(model), dtype=dtype, max_file_bytes=max_file_bytes)
    names = stored_names(model)
    for file in files:
        with _opened(folder / file.name) as write:
            specifications = {
                names[name]: (dtype, shape)
                for layer in file.layers
                for name, shape in layer.shapes.items()
            }
            write([safetensors_header(specifications, _METADATA)])
            for layer in file.layers:
                with weights.layer(layer) as tensors:
                    write(_layer_chunks(layer, tensors, dtype))
    if len(files) > 1:
        write_index = partial(_write_index, files, names, folder, dtype=dtype)
        raise_together(lambda: write_index() if rank() == 0 else None)


@contextmanager
def _opened(path: Path) -> Iterator[Callable[[Iterable[bytes | memoryview]], None]]:
    """Give what writes to a file on rank 0 alone; a fault stops all ranks. Collective."""
    writes = rank() == 0
    file = raise_together(lambda: path.open("wb") if writes else None)

    def write(chunks: Iterable[bytes | memoryview]) -> None:
        raise_together(lambda: file.writelines(chunks) if file is not None else None)

    try:
        yield write
        raise_together(lambda: file.close() if file is not None else None)
    finally:
        if file is not None:
            file.close()


def _layer_chunks(
    layer: Layer, tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> Iterator[memoryview]:
    for name, shape in layer.shapes.items():
        value = tensors[name]
        assert tuple(value.shape) == shape, f"{name} is {tuple(value.shape)}, expected {shape}"
        yield from tensor_chunks(value.to(dtype))


def _write_index(
    files: Sequence[WeightFile], names: Mapping[str, str], folder: Path, *, dtype: torch.dtype
) -> None:
    shapes = {
        name: shape for f in files for layer in f.layers for name, shape in layer.shapes.items()
    }
    where = {names[name]: f.name for f in files for layer in f.layers for name in layer.shapes}
    values = sum(map(prod, shapes.values()))
    total = {"total_parameters": values, "total_size": values * dtype.itemsize}
    content = {"metadata": total, "weight_map": dict(sorted(where.items()))}
    (folder / INDEX_NAME).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
