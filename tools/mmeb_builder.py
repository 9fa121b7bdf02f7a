"""What the builders of benchmarks in MMEB's row format have in common: rows, files, tables.

A builder makes sets of rows and the pictures that they name; `write_benchmark` makes a folder of
them that tools/evaluate_mmeb.py reads: <set>.jsonl, images/, sets.yaml, README.md. All choices are
by hash, so the same data gives the same bytes.
"""

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

PLACEHOLDER = "<|image_1|>\n"
Chosen = TypeVar("Chosen")


@dataclass(frozen=True)
class Row:
    """One query and its candidates as (text, image), the right one first."""

    text: str
    image: str
    candidates: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Task:
    """One set to build: its entry in sets.yaml, and what makes its rows of a source."""

    name: str
    group: str
    query: tuple[str, ...]  # its parts, of text and image
    target: tuple[str, ...]
    instruction: str
    rows: Callable[[Any], list[Row]]
    target_instruction: str = ""
    in_distribution: bool = False


@dataclass(frozen=True)
class Fact:
    """What came out of a task: an entry of sets.yaml, and a line of README.md."""

    name: str
    rows: int
    candidates: str  # a number, or the least to the most
    chance: float  # per cent
    table: dict[str, Any]

    @property
    def group(self) -> str:
        """The group of tasks that the set belongs to."""
        return str(self.table["group"])


def by_hash(seed: str, options: Iterable[Chosen], key: Callable[[Chosen], str]) -> list[Chosen]:
    """Return the options in an order that looks random and is the same everywhere."""

    def number(option: Chosen) -> str:
        return hashlib.sha256(f"{seed}|{key(option)}".encode()).hexdigest()

    return sorted(options, key=number)


def as_texts(texts: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Return texts as candidates without pictures."""
    return tuple((text, "") for text in texts)


def right_first(right: str, labels: Sequence[str], *, seed: str) -> tuple[tuple[str, str], ...]:
    """Return the right label and then the others, as candidates."""
    rest = [label for label in dict.fromkeys(labels) if label != right]
    return as_texts([right, *by_hash(seed, rest, str)])


def as_picture(instruction: str) -> str:
    """Return the text of a candidate that is a picture."""
    return f"{PLACEHOLDER}{instruction}\n"


def published(row: Row, task: Task) -> dict[str, Any]:
    """Return a row in MMEB's columns, its texts written as MMEB writes them."""
    placeholder = PLACEHOLDER if row.image else ""
    text = f"{task.instruction} {row.text}" if row.text else task.instruction
    return {
        "qry_text": f"{placeholder}{text}\n",
        "qry_img_path": row.image,
        "tgt_text": [text for text, _ in row.candidates],
        "tgt_img_path": [image for _, image in row.candidates],
    }


def write_benchmark(
    destination: Path,
    sets: Iterable[tuple[Task, Sequence[Row]]],
    *,
    pictures: Mapping[str, bytes],
    about: Sequence[str],
    made_by: str,
) -> list[Fact]:
    """Write everything below a new folder; returns counts and chance of every set.

    Sets without rows are left out. `pictures`: encoded files by path below images/. `about`: lines
    of README.md. Raises ValueError if the folder is there already.
    """
    if destination.exists():
        raise ValueError(f"{destination} already exists: name another folder, or remove it")
    staging = destination.with_name(f".{destination.name}.new")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    facts = [_write(task, rows, staging) for task, rows in sets if rows]
    for name, content in pictures.items():
        path = staging / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (staging / "README.md").write_text(_readme(facts, about), encoding="utf-8")
    table = {"sets": {fact.name: fact.table for fact in facts}}
    (staging / "sets.yaml").write_text(
        f"# Built by {made_by}\n" + yaml.safe_dump(table, sort_keys=False)
    )
    staging.rename(destination)
    return facts


def _write(task: Task, rows: Sequence[Row], folder: Path) -> Fact:
    lines = [json.dumps(published(row, task), ensure_ascii=False) + "\n" for row in rows]
    (folder / f"{task.name}.jsonl").write_text("".join(lines), encoding="utf-8")
    counts = [len(row.candidates) for row in rows]
    fixed = len(set(counts)) == 1
    table: dict[str, Any] = {
        "group": task.group,
        "in_distribution": task.in_distribution,
        "query": list(task.query),
        "target": list(task.target),
        "query_instruction": task.instruction,
        "target_instruction": task.target_instruction,
        "candidates": counts[0] if fixed else None,
        "rows": len(rows),
    }
    chance = 100 * sum(1 / count for count in counts) / len(counts)
    of = str(counts[0]) if fixed else f"{min(counts)} to {max(counts)}"
    return Fact(task.name, len(rows), of, chance, table)


def _readme(facts: Sequence[Fact], about: Sequence[str]) -> str:
    lines = [*about, "", "| set | group | rows | candidates | chance, % |"]
    lines.append("| --- | --- | ---: | ---: | ---: |")
    for fact in facts:
        cells = [fact.name, fact.group, str(fact.rows), fact.candidates, f"{fact.chance:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def say_facts(facts: Sequence[Fact]) -> None:
    """Print one line a set."""
    for fact in facts:
        print(
            f"{fact.name:18} {fact.group:15} {fact.rows:4} rows, "
            f"{fact.candidates:>8} candidates, chance {fact.chance:5.2f}"
        )


def run_builder(build: Callable[[argparse.Namespace], Sequence[Fact]], options: Any) -> int:
    """Build, and say what came out; returns the exit code (2: bad input)."""
    try:
        facts = build(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    say_facts(facts)
    return 0
