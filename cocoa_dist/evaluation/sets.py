"""Which sets a benchmark has: groups, in or out of distribution, instructions, as one YAML table.

`mmeb_v1.yaml` beside this module is MMEB-V1 with the source of every fact; a data folder of one's
own has a `sets.yaml` of the same form. Imports nothing heavy.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

TABLE_NAME = "sets.yaml"
GROUPS = ("classification", "vqa", "retrieval", "grounding")
_PARTS = ("text", "image")


@dataclass(frozen=True)
class SetInfo:
    """One set of a benchmark, as published."""

    name: str
    group: str  # one of GROUPS
    in_distribution: bool | None  # whether its task is trained on; None: not said
    query: tuple[str, ...] = ()  # of _PARTS
    target: tuple[str, ...] = ()
    query_instruction: str = ""  # what a query's text begins with, placeholder and spaces aside
    target_instruction: str = ""
    candidates: int | None = None  # of each row; None: not said
    rows: int | None = None
    confirmed: str = ""  # which source showed the instruction
    note: str = ""

    def __post_init__(self) -> None:
        if self.group not in GROUPS:
            raise ValueError(
                f"set '{self.name}': group '{self.group}' is unknown (have: {', '.join(GROUPS)})"
            )
        for side in (self.query, self.target):
            if set(side) - set(_PARTS):
                raise ValueError(f"set '{self.name}': parts {side}, expected some of {_PARTS}")
        if self.candidates is not None and self.candidates < 2:
            raise ValueError(f"set '{self.name}': {self.candidates} candidates, expected 2 or more")

    @property
    def chance(self) -> float | None:
        """Precision@1 of a guess, in per cent."""
        return None if self.candidates is None else 100.0 / self.candidates


@cache
def mmeb_sets() -> Mapping[str, SetInfo]:
    """Return the 36 sets of MMEB-V1 by name, in the order of the paper's tables."""
    return read_sets(Path(__file__).with_name("mmeb_v1.yaml"))


def read_sets(path: Path) -> Mapping[str, SetInfo]:
    """Read a table of sets. Raises ValueError naming the file and the set for what is wrong."""
    try:
        table = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: cannot be read as a table of sets: {error}") from error
    if not isinstance(table, dict) or not isinstance(table.get("sets"), dict):
        raise ValueError(f"{path}: expected a mapping with the key 'sets'")
    return MappingProxyType({str(name): _info(path, name, v) for name, v in table["sets"].items()})


def expected_sets(
    found: Iterable[str], table: Mapping[str, SetInfo], *, only: Sequence[str] = ()
) -> list[str]:
    """Return the sets whose absence is worth a word: all of a benchmark that is there at all."""
    return list(table) if not only and set(found) & set(table) else []


def nearest(name: str, known: Mapping[str, SetInfo]) -> str:
    """Return "; nearest: X" for a name that is not in the table, or nothing."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; nearest: {close[0]}" if close else ""


def _info(path: Path, name: str, values: Any) -> SetInfo:
    if not isinstance(values, dict):
        raise ValueError(f"{path}: set '{name}' is {values!r}, expected a mapping")
    known = SetInfo.__dataclass_fields__.keys() - {"name"}
    unknown = sorted(set(values) - known)
    if unknown or "group" not in values:
        raise ValueError(
            f"{path}: set '{name}' has unknown keys {unknown} or no 'group' "
            f"(known: {', '.join(sorted(known))})"
        )
    sides = {side: tuple(values.get(side, ())) for side in ("query", "target")}
    fields = {"in_distribution": None, **values, **sides}
    return SetInfo(name=str(name), **fields)
