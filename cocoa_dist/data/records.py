"""One training record: a query, its positives and negatives, a target, and the pictures they use.

A record checks itself when it is built, converts to and from a row of an Arrow shard, and has a
checksum of its content. What comes back under the checksum it was written with is not checked
again. It holds encoded pictures and never decodes them.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

from cocoa_dist.data.checksum import crc32
from cocoa_dist.data.stored_json import load_json

PartKind = Literal["text", "image"]
PART_KINDS: tuple[str, ...] = get_args(PartKind)
NO_IMAGE = -1
MAX_KEY_BYTES = 1024  # keys go into logs and error messages


class _PartFields(NamedTuple):
    kind: PartKind
    text: str = ""  # for kind text
    image: int = NO_IMAGE  # for kind image: index into Record.images


class Part(_PartFields):
    """One piece of one side of a record: a text, or a reference to a picture of the record.

    A tuple, because one is made of a list in one call: reading a record makes three of them.
    """

    __slots__ = ()

    def __new__(cls, kind: PartKind, text: str = "", image: int = NO_IMAGE) -> "Part":
        """Raise ValueError for what is neither a text nor a picture, and for half a character."""
        if kind not in PART_KINDS:
            raise ValueError(f"part kind {kind!r} is unknown, expected one of {PART_KINDS}")
        if kind == "text" and image != NO_IMAGE:
            raise ValueError(f"a text part has image {image}, expected {NO_IMAGE}")
        if kind == "image" and text:
            raise ValueError(f"an image part has text {text[:40]!r}, expected none")
        _check_unicode(text, "part text")
        return super().__new__(cls, kind, text, image)


Side = tuple[Part, ...]


def text_part(text: str) -> Part:
    """Return a part that is a text."""
    return Part("text", text=text)


def image_part(index: int) -> Part:
    """Return a part that is picture number `index` of its record."""
    return Part("image", image=index)


@dataclass(frozen=True, slots=True)
class Record:
    """One query and what belongs to it. `images` holds encoded files, each stored once.

    Raises ValueError, naming the record and the field, for anything a reader could trip over later.
    The bytes of a picture are not looked at: a broken one is found, and masked, when it is decoded.
    """

    key: str  # unique in its data set
    task: str
    query: Side
    positives: tuple[Side, ...] = ()
    negatives: tuple[Side, ...] = ()
    target: Side = ()  # what reconstruction stages rebuild
    images: tuple[bytes, ...] = ()
    identity: str = ""  # two targets with one identity are no negatives; default: content_hash
    meta: dict[str, Any] = field(default_factory=dict)  # JSON values only

    def __post_init__(self) -> None:
        _check_names(self)
        for name, side in _named_sides(self):
            _check_side(self, name, side)
        _check_meta(self)
        if not self.identity:
            object.__setattr__(self, "identity", content_hash(self))


def content_hash(record: Record) -> str:
    """Return the sha1, in hex, of the texts and picture bytes of the first positive.

    A record without positives is known by its target, else by its query.
    """
    side = next((s for s in (*record.positives[:1], record.target) if s), record.query)
    return side_hash(record, side)


def side_hash(record: Record, side: Side) -> str:
    """Return the sha1, in hex, of the texts and picture bytes of one side of a record."""
    digest = hashlib.sha1(usedforsecurity=False)
    for part in side:
        data = part.text.encode() if part.kind == "text" else record.images[part.image]
        digest.update(f"{part.kind}:{len(data)}:".encode())
        digest.update(data)
    return digest.hexdigest()


def record_header(record: Record) -> bytes:
    """Return all of a record but its pictures, as JSON that equal records, and only they, share."""
    return joined_header(_short_header(record).encode(), _dump_json(record.meta).encode())


def joined_header(short: bytes, meta: bytes) -> bytes:
    """Return the header of a record from its two columns: meta stands before the last list."""
    sizes = short.rfind(b",[")
    return b"%b,%b%b" % (short[:sizes], meta, short[sizes:])


def stored_crc32(header: bytes, pictures: bytes) -> int:
    """Return the checksum of a record from its header and its pictures, end to end."""
    return crc32(pictures, crc32(header))


def record_crc32(record: Record) -> int:
    """Return the CRC-32 of zlib over header and pictures; equal records have equal ones."""
    return stored_crc32(record_header(record), b"".join(record.images))


def trusted_record(header: bytes, pictures: bytes | None) -> Record:
    """Build a record from what record_header returned and its pictures, end to end.

    For bytes whose checksum has been compared: nothing is looked at again, which takes a twentieth
    of the time. Without `pictures` every picture is empty.
    """
    key, task, query, positives, negatives, target, identity, meta, sizes = load_json(header)
    if pictures is None:
        images: tuple[bytes, ...] = (b"",) * len(sizes)
    elif len(sizes) == 1:
        images = (pictures,)
    else:
        images = _cut(pictures, sizes)
    record: Record = _new(Record)
    _set_key(record, key)
    _set_task(record, task)
    _set_query(record, tuple(map(_trusted_part, query)))
    _set_positives(record, tuple([tuple(map(_trusted_part, side)) for side in positives]))
    _set_negatives(
        record, tuple([tuple(map(_trusted_part, side)) for side in negatives]) if negatives else ()
    )
    _set_target(record, tuple(map(_trusted_part, target)))
    _set_images(record, images)
    _set_identity(record, identity)
    _set_meta(record, meta)
    return record


def to_row(record: Record) -> dict[str, Any]:
    """Return the record as plain values, one per column of shards.SCHEMA, checksum included."""
    short, meta = _short_header(record), _dump_json(record.meta)
    header = joined_header(short.encode(), meta.encode())
    return {
        "header": short,
        "meta": meta,
        "images": list(record.images),
        "key": record.key,
        "task": record.task,
        "query": _side_to_row(record.query),
        "positives": [_side_to_row(side) for side in record.positives],
        "negatives": [_side_to_row(side) for side in record.negatives],
        "target": _side_to_row(record.target),
        "identity": record.identity,
        "crc32": stored_crc32(header, b"".join(record.images)),
    }


def from_row(row: dict[str, Any]) -> Record:
    """Build a record from the typed columns of a row; its header and checksum are not looked at.

    Raises ValueError for a row that is no record: a missing column, a null, meta that is no JSON.
    """
    try:
        meta = json.loads(row["meta"])
        return Record(
            key=row["key"],
            task=row["task"],
            query=_side_from_row(row["query"]),
            positives=tuple(_side_from_row(side) for side in row["positives"]),
            negatives=tuple(_side_from_row(side) for side in row["negatives"]),
            target=_side_from_row(row["target"]),
            images=tuple(row["images"]),
            identity=row["identity"],
            meta=meta,
        )
    except KeyError as error:
        raise ValueError(f"row {row.get('key')!r}: column {error} is missing") from error
    except (TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"row {row.get('key')!r} is not a record: {error}") from error


def side_texts(side: Side) -> list[str]:
    """Return the texts of one side, in order."""
    return [part.text for part in side if part.kind == "text"]


def _named_sides(record: Record) -> Iterator[tuple[str, Side]]:
    yield "query", record.query
    for number, side in enumerate(record.positives):
        yield f"positives[{number}]", side
    for number, side in enumerate(record.negatives):
        yield f"negatives[{number}]", side
    if record.target:
        yield "target", record.target


def _check_names(record: Record) -> None:
    for name in ("key", "task"):
        value = getattr(record, name)
        if not isinstance(value, str) or not value:
            raise ValueError(
                f"record {record.key!r}: {name} is {value!r}, expected a text that is not empty"
            )
        _check_unicode(value, name)
    if not isinstance(record.identity, str):
        raise ValueError(f"record {record.key!r}: identity is {record.identity!r}, expected a text")
    _check_unicode(record.identity, "identity")
    size = len(record.key.encode())
    if size > MAX_KEY_BYTES:
        raise ValueError(
            f"record {record.key[:40]!r}...: key has {size} bytes, expected at most {MAX_KEY_BYTES}"
        )
    for number, image in enumerate(record.images):
        if not isinstance(image, bytes):
            raise ValueError(
                f"record {record.key!r}: images[{number}] is {type(image).__name__}, expected bytes"
            )


def _check_unicode(text: str, name: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} {text[:40]!r} holds half a surrogate pair ({error})") from error


def _check_side(record: Record, name: str, side: Side) -> None:
    if not side:
        raise ValueError(f"record {record.key!r}: {name} is empty, expected at least one part")
    for number, part in enumerate(side):
        if part.kind == "image" and not 0 <= part.image < len(record.images):
            raise ValueError(
                f"record {record.key!r}: {name}[{number}] is image {part.image}, "
                f"the record has {len(record.images)} images"
            )


def _check_meta(record: Record) -> None:
    """Refuse meta that would come back from JSON as something else, such as tuples or NaN."""
    try:
        same = json.loads(_dump_json(record.meta).encode()) == record.meta
    except (TypeError, ValueError) as error:
        raise ValueError(f"record {record.key!r}: meta is not JSON: {error}") from error
    if not same or not isinstance(record.meta, dict):
        raise ValueError(
            f"record {record.key!r}: meta changes when it is stored as JSON, expected a dict with "
            "text keys and lists (no tuples) inside"
        )


def _dump_json(value: Any) -> str:
    return json.dumps(
        value, ensure_ascii=False, allow_nan=False, sort_keys=True, separators=(",", ":")
    )


def _short_header(record: Record) -> str:
    """Return the JSON of a record without meta, and of its pictures only the sizes, in bytes."""
    return _dump_json(
        [
            record.key,
            record.task,
            _plain_side(record.query),
            [_plain_side(side) for side in record.positives],
            [_plain_side(side) for side in record.negatives],
            _plain_side(record.target),
            record.identity,
            [len(image) for image in record.images],
        ]
    )


def _plain_side(side: Side) -> list[list[str | int]]:
    return [[part.kind, part.text, part.image] for part in side]


def _side_to_row(side: Side) -> list[dict[str, Any]]:
    return [{"kind": part.kind, "text": part.text, "image": part.image} for part in side]


def _side_from_row(row: list[dict[str, Any]]) -> Side:
    return tuple(Part(part["kind"], text=part["text"], image=part["image"]) for part in row)


# What builds a record or a part without its checks.
_new = object.__new__
_trusted_part: Callable[[list[Any]], Part] = partial(tuple.__new__, Part)
(
    _set_key,
    _set_task,
    _set_query,
    _set_positives,
    _set_negatives,
    _set_target,
    _set_images,
    _set_identity,
    _set_meta,
) = (Record.__dict__[name].__set__ for name in Record.__slots__)


def _cut(pictures: bytes, sizes: list[int]) -> tuple[bytes, ...]:
    """Cut the pictures of a record apart."""
    images, begin = [], 0
    for size in sizes:
        images.append(pictures[begin : begin + size])
        begin += size
    return tuple(images)
