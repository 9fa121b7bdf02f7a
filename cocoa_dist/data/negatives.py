"""The hard negatives of a pair: which of a record's are used, and what each is known by.

A record's meta may say more of them: `negative_identities`, one text for each, equal to the
`identity` of records whose target it is; and `scores`, a teacher's similarities to the query, as
`{"positives": [...], "negatives": [...]}`. Both are checked where they are read.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from cocoa_dist.data.records import Record, Side, content_hash, side_hash

NEGATIVE_IDENTITIES = "negative_identities"
SCORES = "scores"


@dataclass(frozen=True)
class Label:
    """What one side of a pair is known by."""

    identity: str  # equal for things that are the same
    content: str  # equal for equal texts and pictures
    score: float = math.nan  # a teacher's similarity to the query; NaN: none


@dataclass(frozen=True)
class Negative:
    """One hard negative of a record."""

    side: Side
    label: Label


def target_label(record: Record, number: int, *, scored: bool) -> Label:
    """Return what positive `number` is known by; of a record without positives, its target.

    A record that has no name for what it is about is known by its first positive: another one of
    its positives is known by itself. Raises ValueError, with `scored`, for scores that do not fit.
    """
    sides = record.positives or (record.target,)
    score = _scores(record, "positives", count=len(sides))[number] if scored else math.nan
    content = side_hash(record, sides[number])
    named = number == 0 or record.identity != content_hash(record)
    return Label(record.identity if named else content, content, score)


def chosen_negatives(
    record: Record,
    *,
    count: int,
    choice: Literal["first", "draw"],
    draw: np.random.Generator,
    scored: bool,
) -> tuple[Negative, ...]:
    """Return at most `count` negatives of a record: its first, or as many drawn without repeats.

    Raises ValueError for one that is a positive of its own record, and for meta that does not fit.
    """
    have = len(record.negatives)
    numbers: Sequence[int] = range(min(count, have))
    if choice == "draw" and have > count:
        numbers = sorted(draw.permutation(have)[:count].tolist())
    identities = _identities(record)
    scores = _scores(record, "negatives", count=have) if scored else [math.nan] * have
    positives = {side_hash(record, side) for side in (*record.positives, record.target) if side}
    found = []
    for number in numbers:
        content = side_hash(record, record.negatives[number])
        identity = identities[number] if identities else content
        if content in positives or identity == record.identity:
            raise ValueError(
                f"negatives[{number}] is a positive of the same record, expected something else; "
                "take it out, or mine the negatives anew"
            )
        label = Label(identity, content, scores[number])
        found.append(Negative(record.negatives[number], label))
    return tuple(found)


def _identities(record: Record) -> list[str]:
    """Return the identity of each negative, nothing if the record does not say."""
    found = record.meta.get(NEGATIVE_IDENTITIES)
    if found is None:
        return []
    count = len(record.negatives)
    if not isinstance(found, list) or [type(item) for item in found] != [str] * count:
        raise ValueError(
            f"meta.{NEGATIVE_IDENTITIES} is {str(found)[:80]}, expected {count} texts, one for "
            "each negative"
        )
    return found


def _scores(record: Record, name: str, *, count: int) -> list[float]:
    """Return a teacher's scores of a record's positives or negatives, NaN if there are none."""
    scores: Any = record.meta.get(SCORES)
    if scores is None:
        return [math.nan] * count
    found = scores.get(name) if isinstance(scores, dict) else None
    if (
        not isinstance(found, list)
        or len(found) != count
        or not all(isinstance(x, float | int) and math.isfinite(x) for x in found)
    ):
        raise ValueError(
            f"meta.{SCORES}.{name} is {str(found)[:80]}, expected {count} numbers, one for each"
        )
    return [float(score) for score in found]
