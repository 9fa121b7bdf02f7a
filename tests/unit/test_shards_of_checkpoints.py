"""The shard files: any number of ranks reads what any other number wrote."""

import hashlib
import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cocoa_dist.manifest import FileEntry
from cocoa_dist.train import shards
from cocoa_dist.train.verify import deal
from cocoa_dist.train.zero_state import Counters, ParameterSlice

SHAPES = {"matrix": (7, 5), "vector": (13,), "tiny": (1,), "even": (12, 4)}
KINDS = ("weight", "exp_avg", "exp_avg_sq")
COUNTERS = Counters(optimizer_steps=3, global_steps=4, global_samples=8, skipped_steps=1)


def whole_values() -> dict[tuple[str, str], Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        (name, kind): torch.randn(math.prod(shape), generator=generator)
        for name, shape in SHAPES.items()
        for kind in KINDS
    }


def cut(values: dict[tuple[str, str], Tensor], *, rank: int, world_size: int):
    """What ZeRO-3 gives a rank: equal lengths, the last ones cut short or empty."""
    slices = []
    for name, shape in SHAPES.items():
        numel = math.prod(shape)
        length = -(-numel // world_size)
        start, stop = min(rank * length, numel), min((rank + 1) * length, numel)
        parts = {kind: values[name, kind][start:stop].clone() for kind in KINDS}
        slices.append(ParameterSlice(name, shape, start, stop, parts))
    return slices


def write(folder, *, world_size: int, buffers=None) -> list[FileEntry]:
    entries = []
    for rank in range(world_size):
        live = shards.live_state(
            cut(whole_values(), rank=rank, world_size=world_size),
            buffers=buffers or {},
            counters=COUNTERS,
            rank=rank,
            world_size=world_size,
        )
        snapshot = shards.HostCopy().take(live)
        chunks = shards.safetensors_chunks(snapshot.tensors, snapshot.metadata)
        entries.append(shards.write_file(folder, shards.shard_name(rank), chunks))
    return entries


@pytest.mark.parametrize("written_by", range(1, 6))
@pytest.mark.parametrize("world_size", range(1, 6))
def test_every_number_of_ranks_reads_what_every_other_wrote(
    written_by, world_size, tmp_path
) -> None:
    write(tmp_path, world_size=written_by)
    nothing = {key: torch.full_like(value, torch.nan) for key, value in whole_values().items()}
    for rank in range(world_size):
        found = cut(nothing, rank=rank, world_size=world_size)
        shards.fill(found, tmp_path, written_by=written_by, rank=rank, world_size=world_size)
        expected = cut(whole_values(), rank=rank, world_size=world_size)
        for mine, wanted in zip(found, expected, strict=True):
            for kind in KINDS:
                assert torch.equal(mine.values[kind], wanted.values[kind])


def test_the_file_is_safetensors_and_its_digest_is_taken_on_the_way(tmp_path) -> None:
    (entry,) = write(tmp_path, world_size=1, buffers={"count": torch.tensor(7)})
    content = (tmp_path / entry.path).read_bytes()
    assert (len(content), hashlib.sha256(content).hexdigest()) == (entry.bytes, entry.sha256)
    tensors = load_file(tmp_path / entry.path)
    assert tensors["buffer/count"].item() == 7
    assert torch.equal(tensors["exp_avg/matrix"], whole_values()["matrix", "exp_avg"])
    info = shards.read_info(tmp_path, rank=0)
    assert (info.counters, info.moments) == (COUNTERS, ("exp_avg", "exp_avg_sq"))


def test_training_on_does_not_change_what_was_copied() -> None:
    values = {"a": torch.ones(5), "b": torch.zeros(3, dtype=torch.int64)}
    host, live = shards.HostCopy(), shards.LiveState(values, {})
    taken = host.take(live).tensors
    values["a"].add_(1)
    assert taken["a"].tolist() == [1.0] * 5
    assert taken["b"].dtype == torch.int64
    again = host.take(live).tensors
    assert again["a"].data_ptr() == taken["a"].data_ptr()  # the same memory, used again


def test_a_buffer_is_kept_as_it_was_when_the_state_was_taken() -> None:
    count = torch.tensor(7)
    live = shards.live_state([], buffers={"n": count}, counters=COUNTERS, rank=0, world_size=1)
    count.add_(1)  # as a forward pass may, before the copy is made
    assert shards.HostCopy().take(live).tensors["buffer/n"].item() == 7


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("new", (3,), "lacks 1 parameters, first new"),
        ("matrix", (5, 7), r"matrix with shape \[7, 5\], the model's is \[5, 7\]"),
    ],
)
def test_parameters_that_do_not_fit_are_named(name, shape, message, tmp_path) -> None:
    write(tmp_path, world_size=2)
    parts = {part.name: part for part in cut(whole_values(), rank=0, world_size=1)}
    values = {kind: torch.zeros(math.prod(shape)) for kind in KINDS}
    parts[name] = ParameterSlice(name, shape, 0, math.prod(shape), values)
    with pytest.raises(ValueError, match=message):
        shards.fill(list(parts.values()), tmp_path, written_by=2, rank=0, world_size=1)


def test_a_parameter_that_is_no_longer_trained_is_named(tmp_path) -> None:
    write(tmp_path, world_size=1)
    parts = [p for p in cut(whole_values(), rank=0, world_size=1) if p.name != "tiny"]
    with pytest.raises(ValueError, match="has, not trained here, 1 parameters, first tiny"):
        shards.fill(parts, tmp_path, written_by=1, rank=0, world_size=1)


def test_a_shard_that_is_missing_or_foreign_is_named(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"rank_00000.safetensors is not there"):
        shards.read_info(tmp_path, rank=0)
    shards.write_file(tmp_path, shards.shard_name(0), [b"not a shard at all"])
    with pytest.raises(ValueError, match="cannot be read"):
        shards.read_info(tmp_path, rank=0)
    chunks = shards.safetensors_chunks({"a": torch.zeros(2)})
    shards.write_file(tmp_path, shards.shard_name(0), chunks)
    with pytest.raises(ValueError, match="has format None, expected '1'"):
        shards.read_info(tmp_path, rank=0)
    write(tmp_path, world_size=1)
    with pytest.raises(ValueError, match="lack buffer count"):
        shards.fill_buffers({"count": torch.tensor(1)}, tmp_path)


def test_shards_of_fewer_ranks_than_said_lack_elements(tmp_path) -> None:
    write(tmp_path, world_size=2)
    (tmp_path / shards.shard_name(1)).unlink()
    parts = cut(whole_values(), rank=0, world_size=1)
    with pytest.raises(ValueError, match="lack 17 elements of parameter matrix"):
        shards.fill(parts, tmp_path, written_by=1, rank=0, world_size=1)


def test_a_write_that_fails_leaves_no_file(tmp_path) -> None:
    def chunks():
        yield b"half"
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        shards.write_file(tmp_path, "a.bin", chunks())
    assert list(tmp_path.iterdir()) == []


def test_files_are_dealt_evenly_and_each_once() -> None:
    sizes = [5, 1, 1, 1, 9, 3, 3, 2]
    lanes = deal(sizes, num_lanes=3)
    assert sorted(index for lane in lanes for index in lane) == list(range(len(sizes)))
    loads = [sum(sizes[index] for index in lane) for lane in lanes]
    assert max(loads) - min(loads) <= 1


def test_a_copy_runs_on_the_gpu_that_trains_whatever_thread_it_is_in(monkeypatch) -> None:
    """A new thread's own GPU is the first: a stream there would be waited for in vain."""
    made = []

    class Stream:
        def __init__(self, device=None) -> None:
            made.append(self)
            self.device, self.calls = device, []

        def wait_event(self, event) -> None:
            self.calls.append(("after", event))

        def synchronize(self) -> None:
            self.calls.append("waited")

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    ready = SimpleNamespace(device=torch.device("cuda", 3))
    live = shards.LiveState({"weight/a": torch.ones(3)}, {}, ready)
    shards.HostCopy().take(live)
    (stream,) = made
    assert stream.device == torch.device("cuda", 3)
    assert stream.calls == [("after", ready), "waited"]
