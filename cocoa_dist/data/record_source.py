"""Records of one data set as a loader asks for them, and by name where they fail."""

import json

from cocoa_dist.batch import BadRecord
from cocoa_dist.config import resolve_path
from cocoa_dist.data.records import Record
from cocoa_dist.data.shards import ShardReader

LEFT_OUT = "left out"  # the reason of a record that the recipe does without

# What a reason says, and the kind it is counted under; the first one found counts.
_KINDS = (
    ("crc32 is", "wrong checksum"),
    ("was cut", "shard is damaged"),
    (" is damaged", "shard is damaged"),
    ("is not a record", "shard is damaged"),
    ("No such file", "shard is missing"),
    ("image is empty", "picture is empty"),
    ("is not a readable picture", "not a picture"),
    ("is too large", "picture is too large"),
    ("has zero size", "picture has no size"),
    ("absurd aspect", "picture is too long"),
    ("broken EXIF", "picture is truncated"),
    ("truncated or damaged", "picture is truncated"),
    ("has no tokens", "text is empty"),
    ("dialogue without answers", "dialogue without answers"),
    ("empty after truncation", "target is cut away"),
    ("is a positive of the same record", "negative is a positive"),
    ("the record has no", "no part for this view"),
    ("meta.", "meta does not fit"),
    ("[Errno", "store fails"),
    ("msc://", "store fails"),
)


class RecordSource:
    """Records of one data set; none is kept, reading one costs 10 us (tools/bench_data.py)."""

    def __init__(
        self,
        name: str,
        reader: ShardReader,
        num_records: int,
        *,
        left_out: frozenset[int] = frozenset(),
    ) -> None:
        """`left_out`: numbers of records that keep their place and are not used."""
        self.left_out = left_out
        self.name = name
        self.reader = reader
        self.num_records = num_records

    def record(self, number: int) -> Record:
        """Return a record. Raises ValueError for a damaged one, OSError if the store fails."""
        return self.reader.record(number)

    def outline(self, number: int) -> Record | None:
        """Return a record with empty pictures, or None: a damaged one is named when its turn comes.

        OSError if the store fails.
        """
        try:
            return self.reader.outline(number)
        except ValueError:
            return None

    def key(self, number: int) -> str:
        """Return the key of a record that may be unreadable: then it is `?`."""
        try:
            return self.reader.key(number)
        except (ValueError, OSError):
            return "?"

    def bad_record(self, number: int, *, key: str, reason: str) -> BadRecord:
        """Return what the quarantine file says of a record that could not be used."""
        location = self.reader.location(number)
        return BadRecord(
            dataset=self.name,
            number=number,
            shard=location.shard,
            row=location.row,
            key=key,
            kind=fault_kind(reason),
            reason=reason,
        )


def read_left_out(path: str | None) -> dict[str, frozenset[int]]:
    """Read which records of which data set are not to be used: JSON lines, as quarantine/ has them.

    Raises ValueError naming the line that has no data set and number.
    """
    if path is None:
        return {}
    file, found = resolve_path(path), dict[str, set[int]]()
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(f"data.left_out '{path}' cannot be read: {error.strerror}") from error
    for row, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            found.setdefault(str(entry["dataset"]), set()).add(int(entry["number"]))
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"data.left_out '{path}' line {row}: expected JSON with dataset and number, "
                f"found {line[:80]!r}"
            ) from None
    return {name: frozenset(numbers) for name, numbers in found.items()}


def fault_kind(reason: str) -> str:
    """Return the kind under which a reason is counted."""
    return next((kind for words, kind in _KINDS if words in reason), "other")
