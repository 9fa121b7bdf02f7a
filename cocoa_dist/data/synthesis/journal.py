"""The append-only record of a synthesis: one JSON line for each thing that happened.

A line is durable before anything is built on it: before a request is sent, and before its answer is
used. Lines are written by one process at a time; a line cut short by a kill is taken off when the
journal is opened. Prompts and answers stand in it, never pictures or keys to the endpoint.
"""

import asyncio
import fcntl
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from cocoa_dist.data.synthesis.answers import Reply
from cocoa_dist.data.synthesis.bill import Bill, tokens_of
from cocoa_dist.manifest import fsync_folder

JOURNAL_NAME = "journal.jsonl"
_VERSION = 1
_SHOWN = 60  # characters of a setting in an error


class Journal:
    """What was asked and answered; see `lines` for what a file holds.

    `rows`: (key, digest of the picture) of every row that was begun. `ended`: rows that are done,
    with the reason if they became no record. `bill`: see there.
    """

    def __init__(self, path: Path, plan: dict[str, Any]) -> None:
        """Open, or begin, the journal of a plan.

        Raises ValueError if another process has it, if it is damaged, or if it is of another plan:
        the message says what has changed.
        """
        self.path = path
        self.bill = Bill()
        self.rows: dict[int, tuple[str, str]] = {}
        self.ended: dict[int, str] = {}
        self.offsets: dict[str, int] = {}  # of the line that settles a request
        self._pending = b""
        self._asked = self._written = 0  # lines
        self._turn, self._file_lock = asyncio.Lock(), threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = _open_locked(path)
        try:
            self._end = _whole_end(self._file)
            self._load(plan)
        except BaseException:
            self._file.close()
            raise

    def _load(self, plan: dict[str, Any]) -> None:
        found = lines(self.path)
        first = next(found, None)
        if first is None:
            self._pending = _encoded({"e": "plan", "version": _VERSION, "plan": plan})
            self._write()
            fsync_folder(self.path.parent)
            return
        _check_plan(self.path, first[1], plan)
        for offset, line in found:
            self._fold(offset, line)
        self.bill.count_killed()

    async def append(self, line: dict[str, Any]) -> None:
        """Write a line; it is durable on return. Lines of many callers share one fsync.

        Raises ValueError if the disk does not take it.
        """
        self.note(line)
        mine = self._asked
        async with self._turn:
            if self._written < mine:
                await asyncio.to_thread(self._write)

    def note(self, line: dict[str, Any]) -> None:
        """Write a line along with the next one that must be durable."""
        data = _encoded(line)
        with self._file_lock:
            self._fold(self._end + len(self._pending), line)
            self._pending += data
            self._asked += 1

    def reply(self, request: str) -> Reply | None:
        """Return what a request was answered, if it was."""
        offset = self.offsets.get(request)
        return None if offset is None else read_reply(self._file, offset)

    def close(self) -> None:
        """Write what is pending and give the journal free."""
        try:
            self._write()
        finally:
            self._file.close()

    def _fold(self, offset: int, line: dict[str, Any]) -> None:
        self.bill.add(line)
        kind = line["e"]
        if kind == "row":
            self.rows[line["row"]] = (line["key"], line["picture"])
        elif kind == "end":
            self.ended[line["row"]] = line["reason"]
        elif kind == "answer" or (kind == "failure" and line["final"]):
            self.offsets[line["id"]] = offset

    def _write(self) -> None:
        """Write all that is pending; what does not get whole is taken off again."""
        with self._file_lock:
            data, asked = self._pending, self._asked
            if not data:
                return
            try:
                left = memoryview(data)
                while left:  # a disk that is nearly full takes a part
                    left = left[self._file.write(left) :]
                os.fsync(self._file.fileno())
            except OSError as error:
                self._file.truncate(self._end)
                self._pending = b""
                raise ValueError(
                    f"{self.path} cannot be written on ({error}); make room and start the same "
                    "command again: what is in it stays"
                ) from error
            self._end += len(data)
            self._pending = b""
            self._written = asked


def lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (offset, line). Raises ValueError naming the line that is damaged.

    e=plan: what was decided; e=row: a picture was read; e=sent: a request goes out; e=answer: it
    was answered with 200; e=failure: it was not (`lost`: it may have been, `final`: asking again
    is no use); e=end: the row is done (`reason`: why it is no record).
    """
    offset = 0
    with path.open("rb") as file:
        for number, data in enumerate(file, start=1):
            try:
                line = json.loads(data)
                kind = line["e"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path} line {number} is damaged ({type(error).__name__}); restore the file, "
                    "or cut it off before that line: what comes after is asked again"
                ) from error
            assert isinstance(kind, str)
            yield offset, line
            offset += len(data)


def read_bill(path: Path) -> Bill:
    """Return the bill of a journal that nobody writes, whatever its plan."""
    bill = Bill()
    for _, line in lines(path):
        bill.add(line)
    bill.count_killed()
    return bill


def read_reply(file: BinaryIO, offset: int) -> Reply:
    """Return the reply in the line at an offset; the file's own position is not used."""
    data, size = b"", 2**13
    while b"\n" not in data:
        piece = os.pread(file.fileno(), size, offset + len(data))
        assert piece  # only whole lines are in the table of offsets
        data += piece
    line = json.loads(data[: data.index(b"\n")])
    if line["e"] == "failure":
        return Reply(fault=f"{line['kind']}: {line['reason']}", again=False)
    prompt, completion = tokens_of(line["usage"])
    return Reply(
        content=line["content"],
        refusal=line["refusal"],
        finish=line["finish"],
        fault=line["fault"],
        again=bool(line["fault"]),
        prompt_tokens=prompt,
        completion_tokens=completion,
        day=line["at"][:10],
    )


def _open_locked(path: Path) -> BinaryIO:
    file = path.open("a+b", buffering=0)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise ValueError(
            f"{path.parent}: another process is writing there; wait for it, or name another folder"
        ) from error
    return file


def _whole_end(file: BinaryIO) -> int:
    """Take off a last line that was cut short, and return where the file ends now."""
    end = place = file.seek(0, os.SEEK_END)
    while place > 0:
        start = max(0, place - 2**16)
        tail = os.pread(file.fileno(), place - start, start)
        newline = tail.rfind(b"\n")
        if newline >= 0:
            place = start + newline + 1
            break
        place = start
    if place < end:
        file.truncate(place)
        os.fsync(file.fileno())
    return place


def _check_plan(path: Path, line: dict[str, Any], plan: dict[str, Any]) -> None:
    if line["e"] != "plan" or line.get("version") != _VERSION:
        raise ValueError(f"{path} is no journal of this version; name another folder")
    found = line["plan"]
    changed = [
        f"{name} was {_shown(found.get(name))}, is {_shown(value)}"
        for name, value in plan.items()
        if found.get(name) != value
    ]
    if changed:
        raise ValueError(
            f"{path.parent} holds answers to other questions: {'; '.join(changed)}. Go on with the "
            "old settings and files, or name another folder"
        )


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _encoded(line: dict[str, Any]) -> bytes:
    return (json.dumps(line, ensure_ascii=True, separators=(",", ":")) + "\n").encode()
