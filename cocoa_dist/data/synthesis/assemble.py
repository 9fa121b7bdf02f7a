"""From a journal to records: the same answers give the same ones, in the order of the source.

Nothing is asked here. Items that say what an earlier one said are left out by name.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cocoa_dist.data.records import MAX_KEY_BYTES, Record, image_part, text_part
from cocoa_dist.data.synthesis.answers import FaultError, Reply, normalised, text_digest
from cocoa_dist.data.synthesis.journal import JOURNAL_NAME, Journal, read_reply
from cocoa_dist.data.synthesis.pictures import RejectedUnit, Unit, picture_digest, units
from cocoa_dist.data.synthesis.plan import Plan, plan_hash
from cocoa_dist.data.synthesis.prompts import Prompt
from cocoa_dist.data.synthesis.talk import Item, request_id, talk
from cocoa_dist.data.writing.source import Rejected, Source

_ROWS_AT_A_TIME = 64


@dataclass(frozen=True)
class _Place:
    """One output row: an item of a source row, or the reason why there is none."""

    row: int  # of the source
    item: int
    reason: str = ""  # "": it becomes a record
    picture: str = ""  # digest of the one that was asked about


@dataclass(frozen=True)
class Talked:
    """What became of one picture: its items, and what its answers took."""

    items: tuple[Item, ...]
    replies: tuple[Reply, ...]


@dataclass(frozen=True)
class SynthesisSource:
    """The items of a journal as records, for the builder of shards."""

    plan: Plan
    plan_name: str
    source: Source
    journal: Path
    places: tuple[_Place, ...] = field(repr=False)
    offsets: dict[str, int] = field(repr=False)  # of replies in the journal

    @classmethod
    def of(cls, plan: Plan, source: Source, folder: Path, *, rows: int) -> "SynthesisSource":
        """Read the journal of the first `rows` rows.

        Rows without an answer become rejected ones; repeated items too. Raises ValueError if there
        is no journal of this plan.
        """
        facts = plan.facts(source)
        name, path = plan_hash(facts), folder / JOURNAL_NAME
        journal = Journal(path, facts)
        try:
            places = tuple(_places(plan, name, journal, rows))
            return cls(plan, name, source, path, places, dict(journal.offsets))
        finally:
            journal.close()

    def __len__(self) -> int:
        return len(self.places)

    @property
    def num_records(self) -> int:
        """Output rows that become a record."""
        return sum(not place.reason for place in self.places)

    def rows(self, start: int, stop: int) -> Iterator[Record | Rejected]:
        """Yield the output rows of [start, stop)."""
        with self.journal.open("rb") as file:
            for places, unit in self._units(start, stop):
                if isinstance(unit, RejectedUnit):
                    reason = places[0].reason or unit.reason
                    yield from (Rejected(unit.key, place.reason or reason) for place in places)
                    continue
                talked = Talked((), ())
                if not all(place.reason for place in places):
                    talked = _replay(
                        self.plan,
                        self.plan_name,
                        unit.row,
                        unit.key,
                        lambda request: read_reply(file, self.offsets[request]),
                    )
                for place in places:
                    if place.reason:
                        yield Rejected(unit.where, place.reason)
                    elif place.picture != picture_digest(unit.picture):
                        yield Rejected(unit.where, "picture has changed: since it was asked about")
                    else:
                        yield self._record(unit, talked, place)

    def _units(self, start: int, stop: int) -> Iterator[tuple[list[_Place], Unit | RejectedUnit]]:
        """Yield the rows of the source behind [start, stop), with their places there."""
        grouped: dict[int, list[_Place]] = {}
        for place in self.places[start:stop]:
            grouped.setdefault(place.row, []).append(place)
        if not grouped:
            return
        for unit in units(self.source, min(grouped), max(grouped) + 1):
            if unit.row in grouped:
                yield grouped[unit.row], unit

    def _record(self, unit: Unit, talked: Talked, place: _Place) -> Record | Rejected:
        item = talked.items[place.item]
        meta: dict[str, Any] = {
            **unit.meta,
            "synthesis": {
                "model": self.plan.model,
                "endpoint": self.plan.address,
                "prompt": f"{self.plan.prompt.name}@{self.plan.prompt.version}",
                "date": max(reply.day for reply in talked.replies),
                "source_key": unit.key,
                "usage": {
                    "calls": len(talked.replies),
                    "prompt_tokens": sum(reply.prompt_tokens for reply in talked.replies),
                    "completion_tokens": sum(reply.completion_tokens for reply in talked.replies),
                    "shared_by": len(talked.items),  # records of the same calls
                },
            },
        }
        if item.roles:
            meta["roles"] = list(item.roles)
        target = tuple(text_part(text) for text in item.target)
        words = (text_part(item.query),) if item.query else ()
        task = self.plan.prompt.file.task
        try:
            return Record(
                key=_key(unit.key, item),
                task=f"{task}/{item.kind}" if item.kind else task,
                query=(image_part(0), *words),
                positives=() if item.roles else (target,),
                target=target,
                images=(unit.picture,),
                meta=meta,
            )
        except ValueError as error:
            return Rejected(unit.where, f"record is refused: {error}")

    def where(self, number: int) -> str:
        """Return the row of the source behind an output row, for people."""
        return self.source.where(self.places[number].row)

    @property
    def stamp(self) -> list[Any]:
        """The plan and the answers."""
        digest = hashlib.sha256()
        for place in self.places:
            digest.update(json.dumps([place.row, place.item, place.reason, place.picture]).encode())
        return [self.plan_name, digest.hexdigest()]


def _key(key: str, item: Item) -> str:
    """Return a key that no other item of the source has; over-long ones keep their end's hash."""
    full = f"{key}#{item.kind}" if item.kind else key
    data = full.encode()
    if len(data) <= MAX_KEY_BYTES:
        return full
    end = hashlib.sha256(data).hexdigest()[:16]
    return f"{data[: MAX_KEY_BYTES - 20].decode('utf-8', 'ignore')}...{end}"


def _places(plan: Plan, name: str, journal: Journal, rows: int) -> Iterator[_Place]:
    """Yield what each row becomes, in order; the first of several equal items stays."""
    seen: dict[bytes, str] = {}
    for row in range(rows):
        reason = journal.ended.get(row)
        if reason is None:
            yield _Place(row, 0, "no answer: not finished")
            continue
        if reason:
            yield _Place(row, 0, reason)
            continue
        key, picture = journal.rows[row]
        items = _replay(plan, name, row, key, journal.reply).items
        for number, item in enumerate(items):
            reason = _repeats(plan.prompt, item, _key(key, item), seen)
            yield _Place(row, number, reason, picture)


def _repeats(prompt: Prompt, item: Item, key: str, seen: dict[bytes, str]) -> str:
    """Return why an item says nothing new; texts that are short may recur, they are labels."""
    text = item.words if item.roles else "\n".join(item.target)
    if normalised(text).count(" ") + 1 < prompt.file.repeat_words:
        return ""
    first = seen.setdefault(text_digest(text), key)
    return "" if first == key else f"repeated answer: the same words as {first!r}"


def _replay(plan: Plan, name: str, row: int, key: str, find: Any) -> Talked:
    """Hold a talk again with the replies of the journal."""
    talking = talk(plan.prompt, key=key, caption="", asks=plan.asks)
    replies: list[Reply] = []
    try:
        request = next(talking)
        while True:
            reply = find(request_id(name, row, request))
            assert reply is not None  # an ended row has all its replies
            replies.append(reply)
            request = talking.send(reply)
    except StopIteration as end:
        return Talked(end.value, tuple(replies))
    except FaultError as error:
        raise ValueError(
            f"row {row}: the journal says it has an answer, but {error}; the package's rules have "
            "changed since: name another folder"
        ) from error
