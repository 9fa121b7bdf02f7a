"""Exported folders and data in MMEB's row format, as mteb wants them (extra `export`).

mteb measures ViDoRe and its image tasks with NDCG and the like; it knows no local folder as an
image model and has no MMEB. Everything here works without a network.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from cocoa_dist.data.images import decode_image
from cocoa_dist.evaluation.cache import model_digest
from cocoa_dist.evaluation.rows import (
    EvalSet,
    Item,
    RowRules,
    find_sets,
    image_paths,
    images_root,
    read_set,
)
from cocoa_dist.evaluation.vector_files import table_for
from cocoa_dist.export.selftest import refuse_old_transformers, refuse_several_vectors

MAX_PIXELS = 100_000_000
_SPLIT, _SUBSET = "test", "default"


def as_mteb(path: Path, *, device: str = "cpu") -> Any:
    """Return an exported folder as a model for `mteb.evaluate`: texts, pictures, and both.

    Its prompts are those of the folder. Raises ValueError if the folder or mteb is not there.
    """
    if not path.is_dir():
        raise ValueError(f"{path} is no folder: expected an exported model")
    _need_mteb()
    refuse_old_transformers(path)
    refuse_several_vectors(
        path,
        needed_by="this bridge",
        instead="give mteb sentence_transformers.MultiVectorEncoder(folder) itself",
    )
    from mteb.models import SentenceTransformerEncoderWrapper
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(path), device=device, local_files_only=True)
    wrapped = SentenceTransformerEncoderWrapper(model)
    # For a model in memory mteb assumes that it reads texts alone.
    facts = {
        "modalities": ["image", "text"],
        "name": f"cocoa/{path.resolve().name}",
        "revision": model_digest(path)[:12],
    }
    wrapped.mteb_model_meta = wrapped.mteb_model_meta.model_copy(update=facts)
    return wrapped


def as_task(data: Path, name: str, *, rules: RowRules | None = None) -> Any:
    """Return a set of a data folder as an mteb retrieval task over each row's own candidates.

    `hit_rate_at_1` is Precision@1 where no scores tie; the main score is `ndcg_at_5`, as ViDoRe's.
    Raises ValueError if the set is not there, cannot be read, or mteb is missing.
    """
    _need_mteb()
    files = find_sets(data)
    if name not in files:
        raise ValueError(f"no set {name} in {data} (have: {', '.join(files)})")
    info = table_for(data).get(name)
    one = read_set(name, files[name], info=info, rules=rules or RowRules())
    return _task_class(one)(one, image_paths([one], images_root(data)))


def _need_mteb() -> None:
    try:
        import mteb  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"mteb cannot be imported ({error}): install cocoa_dist[export]"
        ) from error


def _task_class(one: EvalSet) -> Any:
    name = one.name
    sides = ({*one.query_N}, {item for row in one.candidates_N for item in row})
    query, target = (_parts([one.items[item] for item in side]) for side in sides)

    from mteb import TaskMetadata
    from mteb.abstasks import AbsTaskRetrieval

    class LocalTask(AbsTaskRetrieval):  # type: ignore[misc]
        """One set in MMEB's row format."""

        metadata = TaskMetadata(
            name=name,
            description=f"{name}: each row's own candidates, one of them right",
            reference=None,
            dataset={"path": f"local/{name}", "revision": "1"},
            type="Any2AnyRetrieval",
            category="2".join("".join(part[0] for part in side) for side in (query, target)),
            modalities=sorted({*query, *target}),
            eval_splits=[_SPLIT],
            eval_langs=["eng-Latn"],
            main_score="ndcg_at_5",
            date=None,
            domains=None,
            task_subtypes=None,
            license=None,
            annotations_creators=None,
            dialect=None,
            sample_creation=None,
            bibtex_citation=None,
        )

        def __init__(self, one: EvalSet, paths: dict[str, Path]) -> None:
            super().__init__()
            self._set, self._paths = one, paths

        def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
            """Put the rows where mteb looks for them."""
            self.dataset = {_SUBSET: {_SPLIT: _split(self._set, self._paths)}}
            self.data_loaded = True

    return LocalTask


def _split(one: EvalSet, paths: dict[str, Path]) -> Any:
    from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData

    listed = dict.fromkeys(item for row in one.candidates_N for item in row)
    queries = [f"q{row}" for row in range(len(one.query_N))]
    return RetrievalSplitData(
        queries=_table(queries, [one.items[item] for item in one.query_N], paths),
        corpus=_table([f"d{i}" for i in listed], [one.items[i] for i in listed], paths),
        relevant_docs={
            query: {f"d{row[0]}": 1} for query, row in zip(queries, one.candidates_N, strict=True)
        },
        top_ranked={
            query: [f"d{item}" for item in row]
            for query, row in zip(queries, one.candidates_N, strict=True)
        },
    )


def _parts(items: Sequence[Item]) -> list[str]:
    """Return the parts, image before text, that items have.

    Raises ValueError where some items have a part and others do not: mteb has no such tables.
    """
    found = []
    for part in ("image", "text"):
        values = [getattr(item, part) for item in items]
        if any(values) and not all(values):
            raise ValueError(f"{values.count('')} of {len(values)} items have no {part}, others do")
        found += [part] if all(values) else []
    return found


def _table(ids: list[str], items: list[Item], paths: dict[str, Path]) -> Any:
    """Return a data set with a column for each part."""
    from datasets import Dataset

    columns: dict[str, list[Any]] = {"id": ids}
    for part in _parts(items):
        values = [getattr(item, part) for item in items]
        columns[part] = values if part == "text" else [_picture(paths[name]) for name in values]
    return Dataset.from_dict(columns)


def _picture(path: Path) -> Image.Image:
    return Image.fromarray(decode_image(path.read_bytes(), max_pixels=MAX_PIXELS))
