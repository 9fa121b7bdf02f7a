"""The files of a checkpoint: one safetensors file a rank, copied first, written later.

Each file says which elements of which parameter it holds, so that any number of ranks can read
what any other number wrote: a rank reads the ranges it needs and nothing else. Nothing in a file is
executed when it is read. Knows no DeepSpeed, and of the manifest only what it lists of a file.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cocoa_dist.manifest import FileEntry
from cocoa_dist.train.zero_state import WEIGHT, Counters, ParameterSlice

SHARD_FOLDER = "shards"
_FORMAT = "1"
_CHUNK_BYTES = 4 * 2**20  # hashing and writing let go of the interpreter lock for a chunk each
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def shard_name(rank: int) -> str:
    """Return the path of a rank's file in its checkpoint."""
    return f"{SHARD_FOLDER}/rank_{rank:05d}.safetensors"


@dataclass(frozen=True)
class LiveState:
    """What one rank's file will hold, in the memory it is trained in.

    Forward and backward passes leave `tensors` alone, the next optimizer step does not.
    """

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    ready: Any = None  # event behind the kernels that wrote it; None without a GPU


@dataclass(frozen=True)
class Snapshot:
    """What one rank's file will hold: host memory that training does not touch."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]


class HostCopy:
    """A block of host memory that is used again for every save, page-locked if there is a GPU.

    Touching new memory costs several times what copying into old memory does.
    """

    def __init__(self) -> None:
        self._block = torch.empty(0, dtype=torch.uint8)

    def reserve(self, num_bytes: int) -> None:
        """Have a block of at least so many bytes, every page of it touched."""
        if len(self._block) < num_bytes:
            gpu = torch.cuda.is_available()
            self._block = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=gpu).fill_(0)

    def take(self, live: LiveState) -> Snapshot:
        """Copy a state into the block; the snapshot is good until the next call.

        In any thread: a GPU copies on a stream of its own, beside the kernels of training.
        """
        tensors = live.tensors
        order = sorted(tensors, key=lambda name: -tensors[name].element_size())  # keeps alignment
        self.reserve(sum(value.nbytes for value in tensors.values()))
        taken: dict[str, Tensor] = {}
        begin = 0
        with _beside_training(live.ready):
            for name in order:
                value = tensors[name].detach()
                place = self._block[begin : begin + value.nbytes]
                taken[name] = place.view(value.dtype).view(value.shape)
                taken[name].copy_(value, non_blocking=True)
                begin += value.nbytes
        return Snapshot(taken, live.metadata)


@contextmanager
def _beside_training(ready: Any) -> Iterator[None]:
    """Run GPU copies on a stream of their own, once `ready` has happened, and wait for them.

    A stream of the GPU where it happened: a new thread's own is the first, whichever its rank's is.
    """
    if ready is None:
        yield
        return
    stream: Any = torch.cuda.Stream(ready.device)  # type: ignore[no-untyped-call]
    stream.wait_event(ready)
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


def live_state(
    slices: Sequence[ParameterSlice],
    *,
    buffers: Mapping[str, Tensor],
    counters: Counters,
    rank: int,
    world_size: int,
) -> LiveState:
    """Gather a rank's state as it stands; buffers, which a forward may change, are copied."""
    live = {f"{kind}/{s.name}": value for s in slices for kind, value in s.values.items()}
    live.update({f"buffer/{name}": value.clone() for name, value in buffers.items()})
    content = {
        "rank": rank,
        "world_size": world_size,
        "counters": counters.as_dict(),
        "slices": {s.name: [list(s.shape), s.start, s.stop] for s in slices},
    }
    gpu = any(value.is_cuda for value in live.values())
    ready = torch.cuda.current_stream().record_event() if gpu else None
    return LiveState(live, {"format": _FORMAT, "cocoa_dist": json.dumps(content)}, ready)


def write_file(folder: Path, name: str, chunks: Iterable[Any]) -> FileEntry:
    """Write a file of a checkpoint durably and hash it on the way; it is whole or absent.

    `chunks` are bytes-like. Raises OSError.
    """
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    digest, size = hashlib.sha256(), 0
    try:
        with temporary.open("wb") as file:
            for chunk in chunks:
                digest.update(chunk)
                file.write(chunk)
                size += len(chunk)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    return FileEntry(path=name, bytes=size, sha256=digest.hexdigest())


def safetensors_chunks(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a safetensors file: length of the header, header, tensors."""
    specifications = {name: (value.dtype, tuple(value.shape)) for name, value in tensors.items()}
    yield safetensors_header(specifications, metadata)
    for value in tensors.values():
        yield from tensor_chunks(value)


def safetensors_header(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    metadata: Mapping[str, str] | None = None,
) -> bytes:
    """Return the head of a safetensors file of tensors of these dtypes and shapes, in order.

    https://github.com/huggingface/safetensors#format
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    begin = 0
    for name, (dtype, shape) in tensors.items():
        place = [begin, begin + prod(shape) * dtype.itemsize]
        header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": place}
        begin = place[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def tensor_chunks(value: Tensor) -> Iterator[memoryview]:
    """Yield the bytes of a tensor as a safetensors file has them."""
    flat = value.detach().contiguous().reshape(-1)
    raw: memoryview = flat.view(torch.uint8).numpy().data
    for offset in range(0, len(raw), _CHUNK_BYTES):
        yield raw[offset : offset + _CHUNK_BYTES]


@dataclass(frozen=True)
class ShardInfo:
    """What a rank's file says about itself."""

    counters: Counters
    moments: tuple[str, ...]
    slices: Mapping[str, tuple[tuple[int, ...], int, int]]  # name -> shape, start, stop


def read_info(folder: Path, *, rank: int) -> ShardInfo:
    """Read the description of a rank's file. Raises ValueError if it is not one of ours."""
    path = folder / shard_name(rank)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            kinds = {name.partition("/")[0] for name in file.keys()}
    except FileNotFoundError:
        raise ValueError(f"{path} is not there; it was written by another version") from None
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if metadata.get("format") != _FORMAT:
        found = metadata.get("format")
        raise ValueError(f"{path} has format {found!r}, expected {_FORMAT!r}: another version's")
    content = json.loads(metadata["cocoa_dist"])
    return ShardInfo(
        counters=Counters(**content["counters"]),
        moments=tuple(sorted(kinds - {WEIGHT, "buffer"})),
        slices={n: (tuple(s), start, stop) for n, (s, start, stop) in content["slices"].items()},
    )


def fill(
    slices: Sequence[ParameterSlice], folder: Path, *, written_by: int, rank: int, world_size: int
) -> None:
    """Overwrite this rank's slices from the files of `written_by` ranks, however they were cut.

    Opens one file after the other, the likeliest first, until nothing is missing: with as many
    ranks as before that is one file. Raises ValueError naming the parameter that does not fit.
    """
    missing = {part.name: part.stop - part.start for part in slices}
    centre = (rank + 0.5) * written_by / world_size - 0.5
    for old in sorted(range(written_by), key=lambda number: abs(number - centre)):
        info = read_info(folder, rank=old)
        _check_parameters(slices, info, path=folder / shard_name(old))
        with safe_open(folder / shard_name(old), framework="pt") as file:
            for part in slices:
                missing[part.name] -= _copy_overlap(part, info, file)
        if not any(missing.values()):
            return
    name = next(name for name, count in missing.items() if count)
    raise ValueError(f"the shards in {folder} lack {missing[name]} elements of parameter {name}")


def fill_buffers(buffers: Mapping[str, Tensor], folder: Path) -> None:
    """Overwrite the model's buffers. Raises ValueError naming one that is not there."""
    if not buffers:
        return
    with safe_open(folder / shard_name(0), framework="pt") as file:
        known = set(file.keys())
        for name, value in buffers.items():
            if f"buffer/{name}" not in known:
                raise ValueError(f"the shards in {folder} lack buffer {name}")
            value.copy_(file.get_tensor(f"buffer/{name}"))


def _copy_overlap(part: ParameterSlice, info: ShardInfo, file: Any) -> int:
    """Copy the elements that a file has of a slice; returns how many."""
    _, start, stop = info.slices[part.name]
    begin, end = max(start, part.start), min(stop, part.stop)
    if begin >= end:
        return 0
    for kind, target in part.values.items():
        stored = file.get_slice(f"{kind}/{part.name}")[begin - start : end - start]
        target[begin - part.start : end - part.start].copy_(stored)
    return end - begin


def _check_parameters(slices: Sequence[ParameterSlice], info: ShardInfo, *, path: Path) -> None:
    wanted = {part.name: part.shape for part in slices}
    for fault, names in (
        ("lacks", wanted.keys() - info.slices.keys()),
        ("has, not trained here,", info.slices.keys() - wanted.keys()),
    ):
        if names:
            raise ValueError(f"{path} {fault} {len(names)} parameters, first {min(names)}")
    for name, shape in wanted.items():
        if info.slices[name][0] != shape:
            raise ValueError(
                f"{path} has {name} with shape {list(info.slices[name][0])}, the model's is "
                f"{list(shape)}"
            )
