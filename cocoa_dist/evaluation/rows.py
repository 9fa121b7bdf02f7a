"""Rows in MMEB's published format, read and checked, item by item.

A row holds qry_text, qry_img_path, and the lists tgt_text and tgt_img_path, the right one first.
A candidate is known by its text and its picture: sets whose candidates share a picture, or a text,
keep them apart. Reads no picture and loads no model.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cocoa_dist.data.writing.layouts import PLACEHOLDER
from cocoa_dist.evaluation.sets import SetInfo

IMAGES_FOLDER = "images"
SUFFIXES = (".parquet", ".jsonl")
_TEXTS = ("qry_text", "tgt_text")
_IMAGES = ("qry_img_path", "tgt_img_path")
_INSTRUCTIONS = ("qry_inst", "tgt_inst")  # columns of their own in MMEB-V2's files
_NAMED_AT_MOST = 5  # missing pictures in one message


@dataclass(frozen=True)
class Item:
    """One thing to embed. Equal items are embedded once; `where` takes no part in that."""

    text: str  # "" if there is none
    image: str  # path below the images folder, "" if there is none


@dataclass(frozen=True)
class EvalSet:
    """One set: its items, each once, and which of them each row asks and lists."""

    name: str
    items: tuple[Item, ...]
    query_N: tuple[int, ...]  # index into items
    candidates_N: tuple[tuple[int, ...], ...]  # indices into items, the right one first
    where: Mapping[int, str]  # where an item stands first, for messages
    duplicates: int  # candidates left out because their row has them already


@dataclass(frozen=True)
class RowRules:
    """How rows are read."""

    limit: int | None = None  # rows of each set; None: all
    instructions: bool = True  # False: texts without the instruction that the table knows
    drop_duplicates: bool = False  # True: a candidate counts once a row; False: twice is an error


def find_sets(folder: Path) -> dict[str, list[Path]]:
    """Return the files of each set: <set>/*.parquet as published, or <set>.jsonl, <set>.parquet.

    Raises ValueError if there are none. Where a set has several splits, `test` is read.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: expected one with a folder or file a set")
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix in SUFFIXES:
            found.setdefault(path.stem, []).append(path)
        elif path.is_dir() and path.name != IMAGES_FOLDER:
            files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
            tests = [file for file in files if file.name.startswith("test")]
            if files:
                found.setdefault(path.name, []).extend(tests or files)
    if not found:
        raise ValueError(
            f"{folder} holds no set: expected <set>/*.parquet, <set>.parquet or .jsonl"
        )
    return found


def read_set(name: str, files: Sequence[Path], *, info: SetInfo | None, rules: RowRules) -> EvalSet:
    """Read and check one set. Raises ValueError naming set, row and candidate."""
    index: dict[Item, int] = {}
    where: dict[int, str] = {}
    queries: list[int] = []
    candidates: list[tuple[int, ...]] = []
    duplicates = 0

    def number(item: Item, place: str) -> int:
        if not item.text and not item.image:
            raise ValueError(f"{place} is empty: it has neither text nor picture")
        found = index.setdefault(item, len(index))
        where.setdefault(found, place)
        return found

    for row, cells in enumerate(_rows(name, files, limit=rules.limit)):
        place = f"set '{name}' row {row}"
        queries.append(number(_query(cells, place, info, rules), place))
        listed = [
            number(item, f"{place} candidate {column}")
            for column, item in enumerate(_targets(cells, place, info, rules))
        ]
        if not listed:
            raise ValueError(f"{place}: the list of candidates is empty")
        once = tuple(dict.fromkeys(listed))
        if len(once) < len(listed) and not rules.drop_duplicates:
            twice = next(i for i, one in enumerate(listed) if one in listed[:i])
            raise ValueError(
                f"{place}: candidate {twice} is there already, as candidate "
                f"{listed.index(listed[twice])}; --drop-duplicates counts it once"
            )
        duplicates += len(listed) - len(once)
        candidates.append(once)
    if not queries:
        raise ValueError(f"set '{name}': {', '.join(map(str, files))} hold no rows")
    return EvalSet(name, tuple(index), tuple(queries), tuple(candidates), where, duplicates)


def plain_text(text: str) -> str:
    """Return a text as training reads it: without placeholders, and the spaces around them."""
    parts = (part.strip() for part in PLACEHOLDER.sub("\0", text).split("\0"))
    return " ".join(part for part in parts if part)


def image_paths(sets: Sequence[EvalSet], root: Path) -> dict[str, Path]:
    """Return the file of every picture. Raises ValueError naming those that are missing."""
    resolved_root = root.resolve()
    paths: dict[str, Path] = {}
    missing: list[str] = []
    for one in sets:
        for number, item in enumerate(one.items):
            if not item.image or item.image in paths:
                continue
            path = (root / item.image).resolve()
            if not path.is_relative_to(resolved_root):
                raise ValueError(f"{one.where[number]}: picture {item.image!r} is outside {root}")
            if not path.is_file():
                missing.append(f"{one.where[number]}: {item.image}")
            paths[item.image] = path
    if missing:
        more = (
            f", and {len(missing) - _NAMED_AT_MOST} more" if len(missing) > _NAMED_AT_MOST else ""
        )
        raise ValueError(
            f"{len(missing)} pictures are missing below {root}: "
            f"{'; '.join(missing[:_NAMED_AT_MOST])}{more}; --images names another folder"
        )
    return paths


def images_root(folder: Path) -> Path:
    """Return where the pictures of a data folder lie: below `images` if there is one."""
    inner = folder / IMAGES_FOLDER
    return inner if inner.is_dir() else folder


def _query(cells: Mapping[str, Any], place: str, info: SetInfo | None, rules: RowRules) -> Item:
    text = _string(cells["qry_text"], f"{place}: qry_text")
    image = _string(cells["qry_img_path"], f"{place}: qry_img_path")
    instruction = _string(cells["qry_inst"], f"{place}: qry_inst")
    joined = plain_text(f"{instruction} {text}")
    if not rules.instructions and info:
        joined = _without(joined, info.query_instruction, place)
    return Item(joined, image)


def _targets(
    cells: Mapping[str, Any], place: str, info: SetInfo | None, rules: RowRules
) -> Iterator[Item]:
    texts = _strings(cells["tgt_text"], f"{place}: tgt_text")
    images = _strings(cells["tgt_img_path"], f"{place}: tgt_img_path") or [""] * len(texts)
    if len(texts) != len(images):
        raise ValueError(f"{place}: {len(texts)} tgt_text and {len(images)} tgt_img_path")
    instruction = _string(cells["tgt_inst"], f"{place}: tgt_inst")
    for column, (text, image) in enumerate(zip(texts, images, strict=True)):
        joined = plain_text(f"{instruction} {text}" if image else text)
        if not rules.instructions and info:
            joined = _without(joined, info.target_instruction, f"{place} candidate {column}")
        yield Item(joined, image)


def _without(text: str, instruction: str, place: str) -> str:
    """Return a text without the instruction at its front; ValueError if it is not there."""
    stem = plain_text(instruction).rstrip(" .:")
    if not text.startswith(stem):
        raise ValueError(
            f"{place}: the text begins with {text[:60]!r}, not with the instruction of its set, "
            f"{instruction!r}: it cannot be left out"
        )
    return text[len(stem) :].lstrip(" .:\n")


def _rows(name: str, files: Sequence[Path], *, limit: int | None) -> Iterator[dict[str, Any]]:
    count = 0
    for path in files:
        for cells in _read(name, path):
            if limit is not None and count >= limit:
                return
            yield cells
            count += 1


def _read(name: str, path: Path) -> Iterator[dict[str, Any]]:
    if path.suffix == ".jsonl":
        yield from _read_jsonl(name, path)
        return
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"set '{name}': {path} cannot be read as Parquet: {error}") from error
    defaults = _defaults(name, path, table.column_names)
    wanted = [column for column in table.column_names if column not in defaults]
    for batch in table.select([c for c in wanted if c in _known()]).to_batches(max_chunksize=64):
        for row in batch.to_pylist():
            yield {**defaults, **row}


def _read_jsonl(name: str, path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines):
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise ValueError(
                    f"set '{name}' row {number}: {path} is no JSON: {error}"
                ) from error
            if not isinstance(row, dict):
                raise ValueError(f"set '{name}' row {number}: {path} holds {type(row).__name__}")
            yield {**_defaults(name, path, list(row), row=number), **row}


def _known() -> tuple[str, ...]:
    return (*_TEXTS, *_IMAGES, *_INSTRUCTIONS)


def _defaults(
    name: str, path: Path, columns: Sequence[str], *, row: int | None = None
) -> dict[str, Any]:
    """Return values of columns that may be missing; ValueError for those that may not.

    MMEB-V2's files, known by qry_inst, leave out the pictures' columns where there are none.
    """
    optional = (*_INSTRUCTIONS, *(_IMAGES if "qry_inst" in columns else ()))
    missing = [c for c in _known() if c not in columns and c not in optional]
    if missing:
        place = f"set '{name}'" + ("" if row is None else f" row {row}")
        raise ValueError(
            f"{place}: {path} has no column {', '.join(missing)} (have: {', '.join(columns)})"
        )
    return {c: None for c in optional if c not in columns}


def _string(value: Any, place: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{place} is {type(value).__name__}, expected a text")
    return value


def _strings(value: Any, place: str) -> list[str]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise ValueError(f"{place} is {type(value).__name__}, expected a list")
    return [_string(one, f"{place}[{i}]") for i, one in enumerate(value)]
