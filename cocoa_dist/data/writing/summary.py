"""What is in a data set, in numbers and in a few examples; nothing is printed here."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cocoa_dist.data.bounds import IndexColumns
from cocoa_dist.data.images import decode_image, picture_format
from cocoa_dist.data.records import Record, Side, side_texts
from cocoa_dist.data.shard_format import BUILD_FOLDER, UNREADABLE, DatasetInfo
from cocoa_dist.data.shards import ShardReader
from cocoa_dist.data.writing.build import rejected_kinds

SAMPLE_RECORDS = 2000  # read for what the index does not say, spread evenly
_NUM_BINS = 12
_MAX_EXAMPLE_PIXELS = 50_000_000
_TEXT_LENGTH = 160  # characters of an example


@dataclass(frozen=True)
class Histogram:
    """Counts of values between edges; the last edge belongs to the last bin of broken numbers."""

    title: str
    unit: str
    edges: tuple[float, ...]
    whole: bool  # whole numbers: a bin ends before its upper edge, the last one too
    counts: tuple[int, ...]
    mean: float
    largest: float


@dataclass(frozen=True)
class Example:
    """One record to look at."""

    number: int
    key: str
    task: str
    texts: tuple[str, ...]  # query, then positives, then target; cut
    pictures: tuple[bytes, ...] = field(repr=False)  # encoded files
    sizes: tuple[tuple[int, int], ...]  # height, width
    broken: str = ""  # why it cannot be shown


@dataclass(frozen=True)
class Summary:
    """What is in a data set."""

    path: str
    info: DatasetInfo
    pictures: int
    unreadable_pictures: int
    histograms: tuple[Histogram, ...]
    sampled: int  # records that the counters below are about
    tasks: dict[str, int]
    formats: dict[str, int]  # of pictures
    licences: dict[str, int]
    sources: dict[str, int]
    rejected: dict[str, int]  # rows that became no record, by kind of reason
    examples: tuple[Example, ...]


def summarise(path: Path | str, *, num_examples: int = 48) -> Summary:
    """Read index, a sample of the records and the list of rejected rows.

    Raises ValueError if there is no data set, saying how far a build has come if there is one.
    """
    unfinished = Path(path) / BUILD_FOLDER / "plan.json"
    if unfinished.is_file():
        whole = len(list(unfinished.parent.glob("*.part")))
        raise ValueError(f"{path} is still being built, or was interrupted: {whole} shards whole")
    reader = ShardReader(path)
    chosen = spread(len(reader), SAMPLE_RECORDS)
    shown = set(spread(len(reader), num_examples))
    tasks, formats, licences, sources = (Counter[str]() for _ in range(4))
    examples = []
    for number in sorted({*chosen, *shown}):
        try:
            record = reader.record(number)
        except ValueError as error:
            examples.append(Example(number, reader.key(number), "", (), (), (), str(error)))
            continue
        tasks[record.task] += 1
        formats.update(picture_format(image) or "unknown" for image in record.images)
        meta = record.meta
        licences[str(meta.get("licence") or meta.get("license") or "not stated")] += 1
        sources[str(meta.get("source") or "not stated")] += 1
        if number in shown:
            examples.append(_example(number, record, reader))
    columns = reader.index_columns(0, len(reader), counted=True)
    reader.close()
    return Summary(
        path=str(path),
        info=reader.info,
        pictures=len(columns.heights),
        unreadable_pictures=int((columns.heights == UNREADABLE).sum()),
        histograms=_histograms(columns),
        sampled=tasks.total(),
        tasks=dict(tasks.most_common()),
        formats=dict(formats.most_common()),
        licences=dict(licences.most_common()),
        sources=dict(sources.most_common()),
        rejected=rejected_kinds(Path(path)),
        examples=tuple(examples),
    )


def spread(count: int, wanted: int) -> list[int]:
    """Return at most `wanted` numbers below `count`, evenly spread, the first one included."""
    return sorted({count * place // wanted for place in range(wanted)}) if count else []


def _example(number: int, record: Record, reader: ShardReader) -> Example:
    broken = ""
    for image in record.images[:1]:
        try:
            decode_image(image, max_pixels=_MAX_EXAMPLE_PIXELS)
        except ValueError as error:
            broken = str(error)
    sides: Sequence[Side] = (record.query, *record.positives, record.target)
    texts = [" ".join(side_texts(side)) for side in sides]
    unique = dict.fromkeys(text for text in texts if text)
    return Example(
        number=number,
        key=record.key,
        task=record.task,
        texts=tuple(_cut(text) for text in unique),
        pictures=record.images,
        sizes=reader.image_sizes(number)[: len(record.images)],
        broken=broken,
    )


def _cut(text: str) -> str:
    return text if len(text) <= _TEXT_LENGTH else text[: _TEXT_LENGTH - 3] + "..."


def _histograms(columns: IndexColumns) -> tuple[Histogram, ...]:
    made = []
    if (columns.num_text_tokens >= 0).any():
        made.append(
            histogram(columns.num_text_tokens, title="Text of the largest sample", unit="tokens")
        )
    readable = columns.heights > UNREADABLE
    if readable.any():
        heights, widths = columns.heights[readable], columns.widths[readable]
        longer = np.maximum(heights, widths)
        made.append(histogram(longer, title="Longer side of pictures", unit="pixels"))
        ratio = longer / np.minimum(heights, widths)
        made.append(histogram(ratio, title="Longer by shorter side", unit="ratio"))
    counts = np.diff(columns.first_picture)
    made.append(histogram(counts, title="Pictures of a record", unit="pictures"))
    return tuple(made)


def histogram(values: NDArray[np.generic], *, title: str, unit: str) -> Histogram:
    """Count values between edges that are equally far apart, in logarithms if they spread wide."""
    numbers = values.astype(np.float64)
    low, high = float(numbers.min()), float(numbers.max())
    whole = bool((numbers == np.rint(numbers)).all())
    end = high + 1 if whole else high
    if low > 0 and high / low > 20:
        edges = np.geomspace(low, end, _NUM_BINS + 1)
    else:
        edges = np.linspace(low, end, _NUM_BINS + 1)
    if whole:
        edges = np.unique(np.rint(edges))
    edges[0], edges[-1] = low, end  # rounding must lose no value
    counts, _ = np.histogram(numbers, bins=edges)
    return Histogram(
        title=title,
        unit=unit,
        edges=tuple(map(float, edges)),
        whole=whole,
        counts=tuple(map(int, counts)),
        mean=float(numbers.mean()),
        largest=high,
    )
