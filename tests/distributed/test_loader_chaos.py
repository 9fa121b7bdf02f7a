"""Fifty loader processes killed, 5 % of records broken in ten ways, three world sizes: one order.

What the ranks receive is compared, pack by pack, with a loader of one rank and no processes.
"""

import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cocoa_dist.batch import StepBatch
from cocoa_dist.config import RunConfig
from cocoa_dist.data.loader import MAX_DEATHS_IN_A_ROW, StageLoader
from cocoa_dist.data.records import Record, text_part
from cocoa_dist.data.samples import Vocabulary

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from small_loaders import BATCH_SIZE, GEOMETRY, TOKENIZER, config, read, record, write
from test_bad_data import MASKED
from test_loader import summary

NUM_RECORDS = 200
NUM_KILLS = 50
WORLD_SIZES = (2, 3, 1)
SEED = 7
PICTURES = (
    *("truncated PNG", "truncated JPEG", "truncated WEBP", "zero bytes", "zero size"),
    *("1 x 20000", "bomb", "a web page"),
)
EMPTY_TEXT, WRONG_BYTE = len(PICTURES), len(PICTURES) + 1  # the ninth and tenth way


def bad_numbers() -> list[int]:
    """One record of every twenty, one for each way to be broken."""
    return random.Random(SEED).sample(range(NUM_RECORDS), NUM_RECORDS // 20)


def write_broken(path: Path) -> dict[int, str]:
    """Write the data set; return which records are bad, and the kind each is named with."""
    records, expected = [record(number) for number in range(NUM_RECORDS)], {}
    for way, number in enumerate(bad_numbers()):
        if way < len(PICTURES):
            make, kind = MASKED[PICTURES[way]]
            records[number] = replace(records[number], images=(make(),))
        elif way == EMPTY_TEXT:
            records[number] = without_text(records[number])
            kind = "text is empty"
        else:
            kind = "wrong checksum"
        expected[number] = kind
    write(path, records)
    flip_a_byte(path, f"thing {bad_numbers()[WRONG_BYTE]}: ".encode())
    return expected


def without_text(one: Record) -> Record:
    return replace(one, query=(text_part(""),), target=(text_part(""),), meta={})


def flip_a_byte(path: Path, text: bytes) -> None:
    for shard in sorted(path.glob("*.arrow")):
        data = bytearray(shard.read_bytes())
        at = data.find(text)
        if at >= 0:
            data[at] ^= 0x20
            shard.write_bytes(data)
            return
    raise AssertionError(f"{text!r} is in no shard of {path}")


class Killer(threading.Thread):
    """Kills a worker of some rank at random moments, until it has killed `count` of them.

    Of one rank no more than the loader bears without a step between.
    """

    def __init__(self, loaders: Sequence[StageLoader], *, count: int, draw: random.Random) -> None:
        super().__init__(daemon=True)
        self.killed: Counter[int] = Counter()  # by rank
        self._of_step: Counter[tuple[int, int]] = Counter()  # by rank and the step that is due
        self._loaders, self._count, self._draw = loaders, count, draw

    def run(self) -> None:
        while self.killed.total() < self._count:
            time.sleep(self._draw.uniform(0.02, 0.7))
            rank = self._draw.randrange(len(self._loaders))
            due = self._loaders[rank]._expected
            if self._of_step[rank, due] >= MAX_DEATHS_IN_A_ROW - 2:
                continue
            iterator = self._loaders[rank]._loader._iterator
            alive = [one.pid for one in getattr(iterator, "_workers", ()) if is_alive(one.pid)]
            if alive:
                try:
                    os.kill(self._draw.choice(alive), signal.SIGKILL)
                except ProcessLookupError:  # the loader has just replaced it
                    continue
                self.killed[rank] += 1
                self._of_step[rank, due] += 1


def is_alive(pid: int) -> bool:
    """Look without reaping: that is the loader's part."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@contextmanager
def all_ranks(
    run: RunConfig,
    vocabulary: Vocabulary,
    folder: Path,
    *,
    world_size: int,
    start_step: int,
    state: Mapping[str, Any] | None,
) -> Iterator[list[StageLoader]]:
    with ExitStack() as stack:
        loaders = [
            StageLoader(
                *(run, "s"),
                vocabulary=vocabulary,
                geometry=GEOMETRY,
                rank=rank,
                world_size=world_size,
                start_step=start_step,
                folder=folder,
                state=state,
            )
            for rank in range(world_size)
        ]
        for loader in loaders:
            stack.callback(loader.close)
        yield loaders


def content(ranks: list[StepBatch]) -> dict[str, Any]:
    """What a step brought, without the fillers that stand for masked records and empty packs.

    Nothing of it holds a tensor: one that came from a worker keeps a file descriptor open.
    """
    found = summary(ranks)
    return {
        **{name: found[name] for name in ("step", "digest", "keys", "samples", "tokens")},
        "labels": [label for label in found["labels"] if label >= 0],
        "pixels": [pixel for pixel in found["pixels"] if pixel],
        "records": ranks[0].record_ids,
        "bad": sorted((x.number, x.key, x.kind) for one in ranks for x in one.bad_records),
    }


@pytest.mark.slow
# A death may interrupt the opening of a socket, which is then closed by garbage collection.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_fifty_deaths_bad_records_and_new_world_sizes_change_nothing(tmp_path: Path) -> None:
    vocabulary = Vocabulary.load(TOKENIZER, config({"a": "x"}).model)
    bad = write_broken(tmp_path / "a")
    assert len(bad) == NUM_RECORDS // 20
    assert len(set(bad.values())) >= 7
    run, draw = config({"a": tmp_path / "a"}, workers=2), random.Random(SEED)
    state, received, deaths = None, list[dict[str, Any]](), 0
    shares = [NUM_KILLS // len(WORLD_SIZES)] * len(WORLD_SIZES)
    shares[0] += NUM_KILLS - sum(shares)
    for world_size, count in zip(WORLD_SIZES, shares, strict=True):
        with all_ranks(
            *(run, vocabulary, tmp_path / "blend"),
            world_size=world_size,
            start_step=len(received) + 1,
            state=state,
        ) as loaders:
            received.append(content([loader.next_step() for loader in loaders]))
            killer = Killer(loaders, count=count, draw=draw)
            killer.start()
            last = sys.maxsize
            while len(received) < last:
                received.append(content([loader.next_step() for loader in loaders]))
                time.sleep(0.01)  # the training step
                if last == sys.maxsize and not killer.is_alive():
                    last = len(received) + 5  # what was prepared before the last death, and more
            assert killer.killed.total() == count
            found = sum(loader.worker_deaths for loader in loaders)
            assert 0 < found <= count  # two that die together are found together
            deaths += found
            state = loaders[0].state(len(received) + 1)
    assert deaths > NUM_KILLS * 0.6
    assert_follows_the_plan(received, bad, vocabulary, tmp_path)


def assert_follows_the_plan(
    received: list[dict[str, Any]], bad: dict[int, str], vocabulary: Vocabulary, tmp_path: Path
) -> None:
    """Compare with a loader that nothing has happened to, and the bad with what was broken."""
    assert len(received) * BATCH_SIZE > NUM_RECORDS  # at least a pass
    calm = read(config({"a": tmp_path / "a"}), vocabulary, tmp_path, steps=len(received))
    for ranks, found in zip(calm, received, strict=True):
        expected = content(ranks)
        for name, value in expected.items():
            assert found[name] == value, (found["step"], name)
        numbers = [number for number in found["records"] if number in bad]
        assert found["bad"] == sorted((number, f"a{number}", bad[number]) for number in numbers)
    consumed = [number for step in received for number in step["records"]]
    for begin in range(0, len(consumed) - NUM_RECORDS + 1, NUM_RECORDS):
        assert sorted(consumed[begin : begin + NUM_RECORDS]) == list(range(NUM_RECORDS))
