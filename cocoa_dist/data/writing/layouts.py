"""What a row means: captions, pictures, MMEB pairs, documents, dialogues; one function each.

A layout turns the columns of a row into a record, or says by ValueError why it cannot. Reasons
begin with their kind and a colon, so that they can be counted.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cocoa_dist.data.images import check_size, image_size
from cocoa_dist.data.records import Part, Record, Side, image_part, text_part
from cocoa_dist.data.writing.source import Rejected, SourceRow, Table

# Columns that are kept in a record's meta where a row has them: where it is from and who made it.
CARRIED = (
    *("source", "url", "license", "licence", "author", "attribution", "copyright"),
    *("language", "keywords"),
)
# What data sets write where a picture stands in a text: Qwen2-VL's, Phi-3's (in MMEB), LLaVA's.
PLACEHOLDER = re.compile(
    r"<\|vision_start\|>(?:<\|image_pad\|>)+<\|vision_end\|>|<\|image_pad\|>"
    r"|<\|image_(?P<number>\d+)\|>|<image>"
)
_SPEAKERS = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "bot"), "assistant"),
    "system": "system",
}


@dataclass(frozen=True)
class Layout:
    """How the rows of one source become records.

    `columns` names the column of a role where it has none of the usual names; roles and usual
    names are in LAYOUTS. `images` is where relative picture paths start; None: the row's folder.
    """

    name: str
    task: str = ""  # "": the row's own, else the layout's name
    columns: Mapping[str, str] = field(default_factory=dict)
    images: Path | None = None
    carried: tuple[str, ...] = CARRIED
    max_pixels: int = 100_000_000  # of a picture; as data.image.max_decoded_pixels in recipes

    def __post_init__(self) -> None:
        if self.name not in LAYOUTS:
            raise ValueError(f"layout '{self.name}' is unknown (have: {', '.join(LAYOUTS)})")
        known = LAYOUTS[self.name].roles
        for role in self.columns:
            if role not in known:
                raise ValueError(
                    f"layout '{self.name}' has no role '{role}' (have: {', '.join(known)})"
                )

    def record(self, row: SourceRow) -> Record:
        """Return the record of a row. Raises ValueError, `kind: details`, if it cannot be one."""
        kind = LAYOUTS[self.name]
        cells = _Cells(self, row)
        made = kind.read(cells)
        task = self.task or cells.text("task") or (row.group if kind.task_is_folder else kind.task)
        meta = {name: row.values[name] for name in self.carried if _is_set(row.values.get(name))}
        try:
            return Record(
                key=str(cells.find("key") or row.key),
                task=task,
                query=made.query,
                positives=made.positives,
                negatives=made.negatives,
                target=made.target,
                images=tuple(cells.images),
                meta={**_json_values(meta), **made.meta},
            )
        except ValueError as error:
            raise ValueError(f"record is refused: {error}") from error

    def check_columns(self, row: SourceRow) -> None:
        """Raise ValueError if a column that every row must have is not in this one."""
        for role in LAYOUTS[self.name].required:
            self.column(role, row.values)

    def column(self, role: str, values: Mapping[str, Any]) -> str:
        """Return the column of a role. Raises ValueError if the row has none."""
        usual = LAYOUTS[self.name].roles[role]
        wanted = (self.columns[role],) if role in self.columns else usual
        for name in wanted:
            if name in values:
                return name
        raise ValueError(
            f"column of '{role}' is missing: found {', '.join(sorted(values)) or 'no column'}; "
            f"expected {' or '.join(wanted)}, or say which it is: {role}=COLUMN"
        )


@dataclass(frozen=True)
class LayoutSource:
    """The rows of a table as records."""

    table: Table
    layout: Layout

    @classmethod
    def of(cls, table: Table, layout: Layout) -> "LayoutSource":
        """Join the two. Raises ValueError if the first row has not the columns."""
        first = next(iter(table.rows(0, min(1, len(table)))), None)
        if isinstance(first, SourceRow):
            try:
                layout.check_columns(first)
            except ValueError as error:
                raise ValueError(f"{first.where}: {error}") from error
        return cls(table, layout)

    def __len__(self) -> int:
        return len(self.table)

    def rows(self, start: int, stop: int) -> Iterator[Record | Rejected]:
        """Yield what the rows of [start, stop) become."""
        for row in self.table.rows(start, stop):
            if isinstance(row, Rejected):
                yield row
                continue
            try:
                record = self.layout.record(row)
            except ValueError as error:
                yield Rejected(row.where, str(error))
            else:
                yield record

    def where(self, number: int) -> str:
        """Return file and row of row `number`."""
        return self.table.where(number)

    @property
    def stamp(self) -> list[Any]:
        """The table's, and the layout."""
        layout = self.layout
        settings = [layout.name, layout.task, sorted(layout.columns.items()), str(layout.images)]
        return [self.table.stamp, *settings, list(layout.carried), layout.max_pixels]


@dataclass(frozen=True)
class _Made:
    """What a layout makes of a row."""

    query: Side
    positives: tuple[Side, ...] = ()
    negatives: tuple[Side, ...] = ()
    target: Side = ()
    meta: dict[str, Any] = field(default_factory=dict)


class _Cells:
    """The columns of one row by role, and the pictures that were taken from them."""

    def __init__(self, layout: Layout, row: SourceRow) -> None:
        self.images: list[bytes] = []
        self._layout, self._row = layout, row
        self._numbers: dict[bytes, int] = {}

    def find(self, role: str) -> Any:
        """Return what stands in the column of a role, None if it has none."""
        try:
            name = self._layout.column(role, self._row.values)
        except (KeyError, ValueError):
            return None
        value = self._row.values[name]
        return value if _is_set(value) else None

    def need(self, role: str) -> Any:
        """Return what stands in the column of a role. Raises ValueError if that is nothing."""
        name = self._layout.column(role, self._row.values)
        value = self._row.values[name]
        if not _is_set(value):
            raise ValueError(f"{role} is empty: column '{name}'")
        return value

    def text(self, role: str) -> str:
        """Return a text, "" if there is none. Raises ValueError if it is something else."""
        value = self.find(role)
        return "" if value is None else _text(value, role)

    def texts(self, role: str) -> list[str]:
        """Return one text, or those of a list; at least one."""
        value = self.need(role)
        listed = value if isinstance(value, list) else [value]
        texts = [_text(one, role) for one in listed if _is_set(one)]
        if not texts:
            raise ValueError(f"{role} is empty: a list without texts")
        return texts

    def pictures(self, value: Any) -> list[Part]:
        """Take one picture, or those of a list."""
        listed = value if isinstance(value, list | tuple) else [value]
        return [self.picture(one) for one in listed if _is_set(one)]

    def picture(self, value: Any) -> Part:
        """Take a picture: bytes, a path, or Hugging Face's bytes and path; equal ones once."""
        data = self._load(value)
        _check_picture(data, max_pixels=self._layout.max_pixels)
        number = self._numbers.setdefault(data, len(self.images))
        if number == len(self.images):
            self.images.append(data)
        return image_part(number)

    def _load(self, value: Any) -> bytes:
        if isinstance(value, dict):
            inside = value.get("bytes")
            value = value.get("path") if inside is None else inside
        if isinstance(value, bytes):
            return value
        if not isinstance(value, str):
            kind = type(value).__name__
            raise ValueError(f"picture is neither bytes nor a path: found {kind}")
        folder = self._layout.images or self._row.folder
        path = Path(value)
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"picture path leads out of its folder: {value!r}")
        try:
            return (folder / path).read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise ValueError(f"picture is missing: {folder / path}") from None
        except OSError as error:  # one of them is no reason to stop; many end the build
            raise ValueError(f"picture cannot be read: {error}") from error


def _captions(cells: _Cells) -> _Made:
    """Read a picture and its texts. Query and target are the first text, positives the pictures."""
    texts = cells.texts("text")
    pictures = cells.pictures(cells.need("image"))
    meta = {"captions": texts} if len(texts) > 1 else {}
    first = (text_part(texts[0]),)
    return _Made(query=first, positives=tuple((one,) for one in pictures), target=first, meta=meta)


def _pictures(cells: _Cells) -> _Made:
    """Read pictures as the query, and as the target the first text beside them, if there is one."""
    pictures = tuple(cells.pictures(cells.need("image")))
    texts = cells.texts("text") if cells.find("text") is not None else []
    meta = {"captions": texts} if len(texts) > 1 else {}
    return _Made(query=pictures, target=tuple(map(text_part, texts[:1])), meta=meta)


def _mmeb(cells: _Cells) -> _Made:
    """Read a query, a positive and negatives, each a text, a picture or both."""
    query = _with_placeholders(cells, cells.text("query"), cells.find("query_image"))
    positive_text = cells.text("positive")
    positive = _with_placeholders(cells, positive_text, cells.find("positive_image"))
    for name, side in (("query", query), ("positive", positive)):
        if not side:
            raise ValueError(f"{name} is empty: it has neither text nor picture")
    texts, images = _listed(cells.find("negative")), _listed(cells.find("negative_image"))
    count = max(len(texts), len(images))
    negatives = []
    for text, image in zip(_filled(texts, count), _filled(images, count), strict=True):
        side = _with_placeholders(cells, _text(text, "negative") if text else "", image)
        negatives += [side] if side else []
    target = tuple(part for part in positive if part.kind == "text")
    return _Made(query, (positive,), tuple(negatives), target)


def _interleaved(cells: _Cells) -> _Made:
    """Read a document: texts and pictures in their order, all of it the query.

    One without words is its pictures.
    """
    images = cells.find("images")
    text = cells.need("text") if images is None else cells.find("text")
    if isinstance(text, list):  # as many texts as pictures, None where the other one stands
        side: list[Part] = []
        for one, image in zip(text, _filled(_listed(images), len(text)), strict=True):
            if _is_set(image):
                side.append(cells.picture(image))
            if _is_set(one):
                side.append(text_part(_text(one, "text")))
        query = tuple(side)
    else:
        written = "" if text is None else _text(text, "text")
        query = _with_placeholders(cells, written, images)
    if not query:
        raise ValueError("text is empty: the document has neither words nor pictures")
    return _Made(query)


def _dialogues(cells: _Cells) -> _Made:
    """Read pictures as the query, turns as the target; meta.roles says who speaks."""
    turns = _turns(cells.need("turns"))
    system = [text for role, text in turns if role == "system"]
    spoken = [(role, PLACEHOLDER.sub("", text).strip()) for role, text in turns if role != "system"]
    for place, (role, text) in enumerate(spoken):
        expected = ("user", "assistant")[place % 2]
        if role != expected:
            raise ValueError(f"turns do not alternate: turn {place} is of {role}, not {expected}")
        if not text:
            raise ValueError(f"text is empty: turn {place}")
    if len(spoken) < 2 or len(spoken) % 2:
        raise ValueError(f"turns end without an answer: found {len(spoken)} of them")
    images = cells.find("image")
    query: Side = tuple(cells.pictures(images)) if images is not None else ()
    if not query:
        query, spoken = (text_part(spoken[0][1]),), spoken[1:]
    meta: dict[str, Any] = {"roles": [role for role, _ in spoken]}
    if system:
        meta["system"] = "\n".join(system)
    return _Made(query, target=tuple(text_part(text) for _, text in spoken), meta=meta)


@dataclass(frozen=True)
class LayoutKind:
    """One layout: its roles with the usual names of their columns, and how it reads a row."""

    read: Callable[[_Cells], _Made]
    task: str
    roles: Mapping[str, tuple[str, ...]]
    required: tuple[str, ...]  # roles whose column every row has
    task_is_folder: bool = False  # where no column says the task


_COMMON = {"key": ("key", "id", "__key__"), "task": ("task", "subset", "dataset")}
_PICTURE_NAMES = (
    *("image", "img", "picture", "jpg", "jpeg", "png", "webp", "image_path", "file_name"),
    *("filename", "path"),
)
_TEXT_NAMES = ("text", "caption", "captions", "txt", "title", "sentence", "description")
LAYOUTS: dict[str, LayoutKind] = {
    "captions": LayoutKind(
        _captions,
        "caption",
        {
            **_COMMON,
            "image": (*_PICTURE_NAMES, "images"),
            "text": _TEXT_NAMES,
        },
        required=("image",),  # a picture without a text beside it is a row that is rejected
    ),
    "pictures": LayoutKind(
        _pictures,
        "picture",
        {**_COMMON, "image": (*_PICTURE_NAMES, "images"), "text": _TEXT_NAMES},
        required=("image",),
    ),
    "mmeb": LayoutKind(
        _mmeb,
        "mmeb",
        {
            **_COMMON,
            "query": ("qry", "query", "qry_text"),
            "query_image": ("qry_image_path", "qry_image", "query_image"),
            "positive": ("pos_text", "positive"),
            "positive_image": ("pos_image_path", "pos_image", "positive_image"),
            "negative": ("neg_text", "negative"),
            "negative_image": ("neg_image_path", "neg_image", "negative_image"),
        },
        required=("query", "positive"),
        task_is_folder=True,
    ),
    "interleaved": LayoutKind(
        _interleaved,
        "interleaved",
        {**_COMMON, "text": ("text", "texts", "document"), "images": ("images", "image")},
        required=("text",),
    ),
    "dialogues": LayoutKind(
        _dialogues,
        "dialogue",
        {
            **_COMMON,
            "turns": ("conversations", "messages", "conversation", "turns", "dialogue"),
            "image": (*_PICTURE_NAMES, "images"),
        },
        required=("turns",),
    ),
}


def _with_placeholders(cells: _Cells, text: str, images: Any) -> Side:
    """Cut a text where pictures stand; pictures that it does not name come first."""
    pictures = cells.pictures(images) if images is not None else []
    side: list[Part] = []
    end = used = 0
    for match in PLACEHOLDER.finditer(text):
        side += _text_parts(text[end : match.start()])
        number = int(match["number"]) - 1 if match["number"] else used
        if not 0 <= number < len(pictures):
            raise ValueError(
                f"picture is named but not there: number {number + 1} of {len(pictures)}"
            )
        side.append(pictures[number])
        used, end = used + 1, match.end()
    side += _text_parts(text[end:])
    if pictures and not used:
        return (*pictures, *side)
    named = {part.image for part in side if part.kind == "image"}
    unnamed = [part for part in pictures if part.image not in named]
    if unnamed:
        raise ValueError(
            f"picture is there but not named: {len(unnamed)} of {len(pictures)} have no "
            "placeholder in the text"
        )
    return tuple(side)


def _text_parts(text: str) -> list[Part]:
    stripped = text.strip()
    return [text_part(stripped)] if stripped else []


def _turns(value: Any) -> list[tuple[str, str]]:
    """Return (role, text) of turns as LLaVA (from, value) or OpenAI (role, content) write them."""
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise ValueError(f"turns are no list of objects: found {type(value).__name__}")
    turns = []
    for turn in value:
        speaker = turn.get("from", turn.get("role"))
        if speaker not in _SPEAKERS:
            raise ValueError(f"turn is of nobody: {speaker!r}, expected {', '.join(_SPEAKERS)}")
        content = turn.get("value", turn.get("content"))
        if isinstance(content, list):  # pieces; pictures are in a column of their own
            pieces = [piece.get("text") for piece in content if isinstance(piece, dict)]
            content = "\n".join(piece for piece in pieces if piece)
        turns.append((_SPEAKERS[speaker], _text(content, "turn").strip()))
    return turns


def _text(value: Any, role: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{role} is no text: found {type(value).__name__}")
    if not value.strip():
        raise ValueError(f"{role} is empty: nothing but white space")
    return value.strip()


def _check_picture(data: bytes, *, max_pixels: int) -> None:
    """Refuse what no loader could use, from the header alone."""
    try:
        height, width = image_size(data)
        check_size(height=height, width=width, max_pixels=max_pixels)
    except ValueError as error:
        raise ValueError(f"picture cannot be used: {error}") from error


def _is_set(value: Any) -> bool:
    """Tell whether a cell holds anything: None, NaN and "" are what tables write for nothing."""
    return not (value is None or value == "" or value != value or value == [])


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _filled(values: Sequence[Any], count: int) -> list[Any]:
    return [*values, *[None] * (count - len(values))]


def _json_values(meta: dict[str, Any]) -> dict[str, Any]:
    """Return meta with whatever JSON does not know as text: dates, decimals, bytes."""
    plain = (str, int, float, bool, list, dict)
    return {name: v if isinstance(v, plain) else str(v) for name, v in meta.items()}
