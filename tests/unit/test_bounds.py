"""Lengths of all records from the index alone: the same as one by one, made once, then mapped."""

import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cocoa_dist.data import bounds
from cocoa_dist.data.bounds import Bounds, IndexColumns, index_bounds, mapped_bounds

LIMIT = 20
COUNT = 500


def cost(size: tuple[int, int]) -> tuple[int, int]:
    """Tokens and patches of a picture; one that cannot be used costs nothing."""
    height, width = size
    return (height // 28 + 2, width // 14) if height and width else (0, 0)


@pytest.fixture
def columns() -> IndexColumns:
    random = np.random.default_rng(0)
    pictures = random.integers(0, 4, COUNT)
    total = int(pictures.sum())
    sizes = random.integers(0, 6, (2, total)).astype(np.int32) * 100
    return IndexColumns(
        num_text_tokens=random.integers(-1, 60, COUNT).astype(np.int32),
        heights=sizes[0],
        widths=sizes[1],
        first_picture=np.concatenate([[0], np.cumsum(pictures)]),
    )


def one_by_one(columns: IndexColumns, view: str) -> list[tuple[int, int]]:
    found = []
    for number in range(COUNT):
        begin, end = columns.first_picture[number : number + 2]
        sizes = zip(columns.heights[begin:end], columns.widths[begin:end], strict=True)
        costs = [cost((int(height), int(width))) for height, width in sizes]
        most = {"bridged": 2 * LIMIT}.get(view, LIMIT)
        counted = int(columns.num_text_tokens[number])
        text = most if counted < 0 else min(counted, most)
        if view == "pair":
            side = LIMIT if counted < 0 else counted + counted // 4
            text = min(side + 3, LIMIT) + min(side, LIMIT)
        tokens = sum(c[0] for c in costs) + text + 2
        found.append((tokens, sum(c[1] for c in costs)))
    return found


@pytest.mark.parametrize("view", ["caption", "bridged", "pair"])
def test_bounds_of_all_records_are_those_of_each(columns: IndexColumns, view: str) -> None:
    found = index_bounds(
        columns,
        view=view,
        max_text_tokens=LIMIT,
        picture_cost=cost,
        joint_every=4,
        instruction=3,
    )
    assert list(zip(*(unit.tolist() for unit in found), strict=True)) == one_by_one(columns, view)


def test_records_without_pictures(columns: IndexColumns) -> None:
    none = np.zeros(0, dtype=np.int32)
    texts = IndexColumns(columns.num_text_tokens, none, none, np.zeros(COUNT + 1, dtype=np.int64))
    found = index_bounds(texts, view="caption", max_text_tokens=LIMIT, picture_cost=cost)
    assert found[1].max() == 0
    assert found[0].max() == LIMIT + 2


def test_bounds_are_made_once_and_mapped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bounds, "_CHUNK", 64)
    random = np.random.default_rng(0)
    tokens, patches = random.integers(1, 10_000, (2, COUNT)).astype(np.int32)
    asked = []

    def part(begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        asked.append((begin, end))
        return tokens[begin:end], patches[begin:end]

    first = mapped_bounds(tmp_path / "new", count=COUNT, key="k", part=part)
    assert len(asked) == -(-COUNT // 64)
    again = mapped_bounds(tmp_path / "new", count=COUNT, key="k", part=part)
    assert len(asked) == -(-COUNT // 64)
    for found in (first, again):
        assert isinstance(found.tokens.base, np.memmap)
        assert (found.tokens == tokens).all()
        assert (found.patches == patches).all()
        assert found.largest == Bounds.of(tokens, patches).largest
    mapped_bounds(tmp_path / "new", count=COUNT, key="other settings", part=part)
    assert len(asked) == 2 * -(-COUNT // 64)


def test_work_that_was_cut_off_is_done_again(tmp_path: Path) -> None:
    def dies(begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        mapped_bounds(tmp_path, count=COUNT, key="k", part=dies)
    assert list(tmp_path.iterdir()) == []
    ones = np.ones(COUNT, dtype=np.int32)
    found = mapped_bounds(tmp_path, count=COUNT, key="k", part=lambda b, e: (ones[b:e], ones[b:e]))
    assert found.tokens.sum() == COUNT


HOLDER = """
import fcntl, sys, time
with open(sys.argv[1], "rb") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    print("held", flush=True)
    time.sleep(60)
"""


def test_what_a_killed_process_left_is_collected_and_nothing_else(tmp_path: Path) -> None:
    old = time.time() - 7200.0
    names = ("dead", "working", "young", "held elsewhere")
    files = {name: tmp_path / f".bounds-{n}.npy.1.ab.tmp" for n, name in enumerate(names)}
    other = tmp_path / ".other.npy.1.ab.tmp"
    for file in (*files.values(), other):
        file.write_bytes(b"half")
        os.utime(file, (old, old))
    os.utime(files["young"])
    command = [sys.executable, "-c", HOLDER, str(files["held elsewhere"])]
    ones = np.ones(COUNT, dtype=np.int32)

    def part(begin: int, end: int) -> tuple[Any, Any]:
        os.utime(mine := next(f for f in tmp_path.glob(".bounds-*") if f not in known), (old, old))
        mapped_bounds(tmp_path, count=COUNT, key="another process", part=quick)
        assert mine.exists()
        return quick(begin, end)

    def quick(begin: int, end: int) -> tuple[Any, Any]:
        return ones[begin:end], ones[begin:end]

    known = set(files.values())
    with (
        files["working"].open("rb") as held,
        subprocess.Popen(command, stdout=subprocess.PIPE) as holder,
    ):
        fcntl.flock(held, fcntl.LOCK_EX)
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        mapped_bounds(tmp_path, count=COUNT, key="k", part=part)
        holder.kill()
    left = {name for name, file in files.items() if file.exists()}
    assert left == {"working", "young", "held elsewhere"}
    assert other.exists()
