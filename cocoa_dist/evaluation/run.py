"""Evaluate a model folder on a data folder: read rows, embed what is new, score, summarise."""

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cocoa_dist.data.images import image_size
from cocoa_dist.evaluation.cache import VectorCache, item_key, model_digest
from cocoa_dist.evaluation.embed import Batch, EmbedSettings, batches, embed
from cocoa_dist.evaluation.encoder import Job, vectors_each
from cocoa_dist.evaluation.rows import (
    EvalSet,
    Item,
    RowRules,
    find_sets,
    image_paths,
    images_root,
    read_set,
)
from cocoa_dist.evaluation.scores import SetVectors, score_set, summarise
from cocoa_dist.evaluation.sets import TABLE_NAME, SetInfo, expected_sets
from cocoa_dist.evaluation.vector_files import ragged, table_for, write_vectors

Progress = Callable[[int, int], None]  # items embedded, items to embed in all
SELF_TEST_NAME = "selftest.json"  # as in cocoa_dist.export, which loads torch
# Libraries whose version can change a vector.
_LIBRARIES = ("torch", "transformers", "sentence-transformers", "tokenizers", "pillow")


@dataclass(frozen=True)
class Evaluation:
    """What to evaluate and how."""

    data: Path
    embed: EmbedSettings
    images: Path | None = None  # None: data/images if it is there, else data
    only: tuple[str, ...] = ()  # sets; none: all
    rules: RowRules = field(default_factory=RowRules)
    cache: Path | None = None  # None: a folder that goes away
    save_vectors: Path | None = None  # write <set>.npz here


def evaluate(evaluation: Evaluation, *, progress: Progress) -> dict[str, Any]:
    """Return the result of `summarise`, and what was embedded beside it.

    Raises ValueError for input that cannot be scored, naming set and row; RuntimeError if a
    process dies.
    """
    table = table_for(evaluation.data)
    sets = read_sets_of(evaluation, table)
    model = evaluation.embed.model
    if not model.is_dir():
        raise ValueError(f"{model} is no folder: expected an exported model")
    digest, each = model_digest(model), vectors_each(model)
    paths = image_paths(sets, evaluation.images or images_root(evaluation.data))
    pictures = {name: _read_picture(path) for name, path in paths.items()}
    keys = {one.name: _keys(one, pictures) for one in sets}
    lists = {one.name: _lists(one, keys[one.name], evaluation.rules) for one in sets}
    jobs = _jobs(sets, keys, paths)
    with _cache_folder(evaluation, digest) as folder:
        cache = VectorCache(folder)
        sizes = [pictures[item.image].pixels if item.image else 0 for item in _first(sets, keys)]
        plan = batches(list(jobs.values()), sizes, batch_size=evaluation.embed.batch_size)
        _embed_missing(plan, cache, evaluation.embed, progress)
        scores = {}
        for one in sets:
            vectors = _vectors(one, keys[one.name], lists[one.name], cache, each=each)
            if evaluation.save_vectors is not None:
                write_vectors(vectors, evaluation.save_vectors)
            scores[one.name] = score_set(vectors)
        truncated = cache.truncated(list(jobs))
    _copy_table(evaluation)
    expected = expected_sets(scores, table, only=evaluation.only)
    result = summarise(scores, sets=table, expected=expected)
    result["warnings"] += _notes(evaluation, sets, items=len(jobs), truncated=truncated)
    result["model"] = {"name": model.resolve().name, "sha256": digest}
    result["embedded"] = {"items": len(jobs), "truncated": truncated}
    return result


def read_sets_of(evaluation: Evaluation, table: Mapping[str, SetInfo]) -> list[EvalSet]:
    """Read the sets that are asked for, those of the table first and in its order."""
    files = find_sets(evaluation.data)
    absent = [name for name in evaluation.only if name not in files]
    if absent:
        raise ValueError(
            f"no set {', '.join(absent)} in {evaluation.data} (have: {', '.join(files)})"
        )
    names = [name for name in table if name in files] + [n for n in files if n not in table]
    return [
        read_set(name, files[name], info=table.get(name), rules=evaluation.rules)
        for name in names
        if not evaluation.only or name in evaluation.only
    ]


@dataclass(frozen=True)
class _Picture:
    sha256: str  # of the file
    pixels: int  # 0 if it cannot be told


def _read_picture(path: Path) -> _Picture:
    data = path.read_bytes()
    try:
        height, width = image_size(data)
    except ValueError:
        height = width = 0  # refused, by name, where it is decoded
    return _Picture(hashlib.sha256(data).hexdigest(), height * width)


def _keys(one: EvalSet, pictures: Mapping[str, _Picture]) -> list[bytes]:
    return [
        item_key(item.text, pictures[item.image].sha256 if item.image else "") for item in one.items
    ]


def _jobs(
    sets: Sequence[EvalSet], keys: Mapping[str, Sequence[bytes]], paths: Mapping[str, Path]
) -> dict[bytes, Job]:
    """Return what to embed by content: the same text and picture in two sets is one."""
    jobs: dict[bytes, Job] = {}
    for one in sets:
        for number, (item, key) in enumerate(zip(one.items, keys[one.name], strict=True)):
            image = paths[item.image] if item.image else None
            jobs.setdefault(key, Job(key, item.text, image, one.where[number]))
    return jobs


def _first(sets: Sequence[EvalSet], keys: Mapping[str, Sequence[bytes]]) -> list[Item]:
    """Return the first item of each key, in the order of `_jobs`."""
    found: dict[bytes, Item] = {}
    for one in sets:
        for item, key in zip(one.items, keys[one.name], strict=True):
            found.setdefault(key, item)
    return list(found.values())


def _embed_missing(
    plan: Sequence[Sequence[Job]], cache: VectorCache, settings: EmbedSettings, progress: Progress
) -> None:
    """Embed whole batches that lack a vector, so that padding is as it would have been."""
    work = [
        Batch(tuple(jobs), tuple(job.key not in cache for job in jobs))
        for jobs in plan
        if any(job.key not in cache for job in jobs)
    ]
    total = sum(len(batch.jobs) for batch in work)
    done = 0

    def tell(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    embed(work, cache.folder, settings=settings, progress=tell)
    cache.refresh()


@dataclass(frozen=True)
class _Lists:
    """The candidates of a set by content, and which of them each row lists."""

    keys: tuple[bytes, ...]
    rows: tuple[tuple[int, ...], ...]


def _lists(one: EvalSet, keys: Sequence[bytes], rules: RowRules) -> _Lists:
    """Return candidates numbered by content in the order they appear.

    Raises ValueError if a row lists one content twice, unless the rules count it once.
    """
    numbers: dict[bytes, int] = {}
    rows = []
    for row, listed in enumerate(one.candidates_N):
        found = [numbers.setdefault(keys[item], len(numbers)) for item in listed]
        once = tuple(dict.fromkeys(found))
        if len(once) < len(found) and not rules.drop_duplicates:
            twice = next(i for i, number in enumerate(found) if number in found[:i])
            items = [one.items[listed[i]] for i in (found.index(found[twice]), twice)]
            raise ValueError(
                f"set '{one.name}' row {row}: candidates {items[0]} and {items[1]} have the same "
                "text and the same picture; --drop-duplicates counts them once"
            )
        rows.append(once)
    return _Lists(tuple(numbers), tuple(rows))


def _vectors(
    one: EvalSet, keys: Sequence[bytes], lists: _Lists, cache: VectorCache, *, each: int
) -> SetVectors:
    index_NC, count_N = ragged(lists.rows)
    return SetVectors(
        name=one.name,
        query_ND=cache.vectors([keys[item] for item in one.query_N]),
        candidates_MD=cache.vectors(lists.keys),
        candidate_index_NC=index_NC,
        candidate_count_N=count_N if (count_N < index_NC.shape[1]).any() else None,
        vectors_each=each,
    )


@contextmanager
def _cache_folder(evaluation: Evaluation, digest: str) -> Iterator[Path]:
    """Yield the folder of this model, these libraries and this device."""
    if evaluation.cache is None:
        with tempfile.TemporaryDirectory(prefix="cocoa_vectors_") as folder:
            yield Path(folder)
        return
    facts = [digest, evaluation.embed.device.split(":")[0]]
    facts += [f"{name}=={version(name)}" for name in _LIBRARIES]
    yield evaluation.cache / hashlib.sha256("\n".join(facts).encode()).hexdigest()[:24]


def _copy_table(evaluation: Evaluation) -> None:
    """Put a data folder's own table beside the vectors, so that they score alike."""
    own = evaluation.data / TABLE_NAME
    if evaluation.save_vectors is not None and own.is_file():
        shutil.copyfile(own, evaluation.save_vectors / TABLE_NAME)


def _notes(
    evaluation: Evaluation, sets: Sequence[EvalSet], *, items: int, truncated: int
) -> list[str]:
    found = []
    dropped = {one.name: one.duplicates for one in sets if one.duplicates}
    if dropped:
        listed = ", ".join(f"{name} {count}" for name, count in dropped.items())
        found.append(f"duplicate candidates left out: {listed}")
    if truncated:
        found.append(f"{truncated} of {items} texts are longer than the model reads and were cut")
    if evaluation.rules.limit is not None:
        found.append(f"only the first {evaluation.rules.limit} rows of each set")
    if not evaluation.rules.instructions:
        found.append("without the sets' instructions: the score is not the benchmark's")
    if not (evaluation.embed.model / SELF_TEST_NAME).is_file():
        found.append(f"the model has no {SELF_TEST_NAME}: whether it is loaded right is not known")
    return found
