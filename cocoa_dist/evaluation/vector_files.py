"""Vectors made elsewhere: a folder with one `<set>.npz` a set, read, checked and written.

An npz holds query (N, D), candidates (M, D) and candidate_index (N, C), whose column 0 is the right
candidate. Optional: candidate_count (N,), columns of a row that count, for lists of unequal length;
answer (N,), the right candidate once more, to be checked; vectors_each (1,), how many vectors an
embedding is, end to end in D. Numbers only: nothing is unpickled.
"""

import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cocoa_dist.evaluation.scores import SetVectors, Vectors
from cocoa_dist.evaluation.sets import TABLE_NAME, SetInfo, mmeb_sets, read_sets

SUFFIX = ".npz"
_REQUIRED = ("query", "candidates", "candidate_index")
_EACH = "vectors_each"
_OPTIONAL = {"candidate_count": "candidate_count_N", "answer": "answer_N"}


def vector_files(folder: Path) -> dict[str, Path]:
    """Return the files of a folder by the name of their set. ValueError if there are none."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: expected one with a file <set>{SUFFIX} a set")
    files = {path.name.removesuffix(SUFFIX): path for path in sorted(folder.glob(f"*{SUFFIX}"))}
    if not files:
        raise ValueError(f"{folder} holds no {SUFFIX} file: expected one a set, named after it")
    return files


def table_for(folder: Path) -> Mapping[str, SetInfo]:
    """Return the table of sets that lies in a folder, else MMEB-V1's."""
    own = folder / TABLE_NAME
    return read_sets(own) if own.is_file() else mmeb_sets()


def read_vectors(path: Path, *, name: str, drop_duplicates: bool = False) -> SetVectors:
    """Read and check one set; with `drop_duplicates` a candidate counts once a row.

    Raises ValueError naming the file, the set and the row.
    """
    arrays = dict(_arrays(path))
    missing = [key for key in _REQUIRED if key not in arrays]
    if missing:
        raise ValueError(
            f"{path}: set '{name}' has no {', '.join(missing)} (have: {', '.join(sorted(arrays))}; "
            f"needed: {', '.join(_REQUIRED)})"
        )
    extra: dict[str, Any] = {
        field: _integers(path, key, arrays[key])
        for key, field in _OPTIONAL.items()
        if key in arrays
    }
    if _EACH in arrays:
        each = _integers(path, _EACH, arrays[_EACH]).reshape(-1)
        if len(each) != 1:
            raise ValueError(f"{path}: {_EACH} holds {len(each)} numbers, expected one")
        extra[_EACH] = int(each[0])
    index_NC = _integers(path, "candidate_index", arrays["candidate_index"])
    counts = extra.get("candidate_count_N")
    countable = counts is None or counts.shape == index_NC.shape[:1]
    if drop_duplicates and index_NC.ndim == 2 and countable:
        index_NC, extra["candidate_count_N"] = each_once(index_NC, counts)
    return SetVectors(
        name=name,
        query_ND=_floats(path, "query", arrays["query"]),
        candidates_MD=_floats(path, "candidates", arrays["candidates"]),
        candidate_index_NC=index_NC,
        **extra,
    )


def each_once(
    index_NC: NDArray[np.int64], count_N: NDArray[np.int64] | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return candidate_index and candidate_count with the first of equal candidates of each row.

    The right one stays first. Columns behind a row's count repeat it and mean nothing.
    """
    lists = [
        list(dict.fromkeys(row if count_N is None else row[: count_N[number]]))
        for number, row in enumerate(index_NC.tolist())
    ]
    return ragged(lists)


def ragged(lists: Sequence[Sequence[int]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return candidate_index and candidate_count of lists of any lengths."""
    count_N = np.array([len(one) for one in lists], dtype=np.int64)
    width = int(count_N.max(initial=0))
    index_NC = np.zeros((len(lists), width), dtype=np.int64)
    for number, one in enumerate(lists):
        index_NC[number, : len(one)] = one
        index_NC[number, len(one) :] = one[0] if one else 0
    return index_NC, count_N


def write_vectors(vectors: SetVectors, folder: Path) -> Path:
    """Write one set into a folder, whole or not at all; returns its path."""
    arrays: dict[str, Any] = {
        "query": vectors.query_ND,
        "candidates": vectors.candidates_MD,
        "candidate_index": vectors.candidate_index_NC,
    }
    for key, field in _OPTIONAL.items():
        if getattr(vectors, field) is not None:
            arrays[key] = getattr(vectors, field)
    if vectors.vectors_each > 1:
        arrays[_EACH] = np.array([vectors.vectors_each])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{vectors.name}{SUFFIX}"
    staged = folder / f".{vectors.name}.{os.getpid()}.tmp"
    with staged.open("wb") as file:
        np.savez(file, **arrays)
    staged.rename(path)
    return path


def _arrays(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            if isinstance(archive, np.ndarray):
                raise ValueError("it holds one array and no names")
            for key in archive.files:
                yield key, archive[key]
    except (OSError, ValueError, zipfile.BadZipFile, EOFError, KeyError) as error:
        raise ValueError(
            f"{path} cannot be read as arrays saved by numpy.savez: {error}"
        ) from error


def _floats(path: Path, key: str, values: np.ndarray) -> Vectors:
    if values.dtype.kind not in "fiu":
        raise ValueError(f"{path}: {key} is {values.dtype}, expected numbers")
    with np.errstate(over="ignore"):  # what does not fit is infinite then, and refused by row
        return np.ascontiguousarray(values, dtype=np.float32)


def _integers(path: Path, key: str, values: np.ndarray) -> np.ndarray:
    if values.dtype.kind not in "iu":
        raise ValueError(f"{path}: {key} is {values.dtype}, expected integers")
    return values.astype(np.int64)
