"""From paths, as people give them, to the rows in them."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from cocoa_dist.data.writing.pictures import PICTURE_SUFFIXES, PictureFolder, TarTable
from cocoa_dist.data.writing.source import Table
from cocoa_dist.data.writing.tables import OPENERS, JoinedTables

_OPENERS = {**OPENERS, ".tar": TarTable.open}
_TABLES = (".parquet", ".arrow", ".tar")  # looked for below a folder
_METADATA = "metadata"  # stem of the table that Hugging Face's picture folders have


def open_table(paths: Sequence[Path]) -> Table:
    """Return the rows of files and folders, in the order given, files of a folder by name.

    A folder is either a table `metadata.csv` or `.jsonl` and the pictures it names, or Parquet,
    Arrow or tar files, or pictures with texts beside them. Raises ValueError for a path that is
    not there, a format that is not known, and a damaged file.
    """
    files = [file for path in paths for file in _files(path)]
    tables = [file for file in files if file.is_file()]
    common = Path(os.path.commonpath([file.absolute().parent for file in tables] or [Path("/")]))
    opened: list[Table] = []
    for file in files:
        if file.is_dir():
            opened.append(PictureFolder.open(file))
        else:
            label = str(file.absolute().relative_to(common))
            opened.append(_OPENERS[file.suffix.lower()](file, label))
    return opened[0] if len(opened) == 1 else JoinedTables.of(opened)


def _files(path: Path) -> Iterator[Path]:
    """Yield the tables of a path, or the folder itself if it holds pictures."""
    if path.is_file():
        if path.suffix.lower() not in _OPENERS:
            raise ValueError(
                f"{path}: format '{path.suffix}' is unknown, expected a folder or one of "
                f"{', '.join(_OPENERS)}{_hint(path)}"
            )
        yield path
        return
    if not path.is_dir():
        raise ValueError(f"{path} is not there; name a file or a folder")
    described = sorted(file for file in path.glob(f"{_METADATA}.*") if file.suffix in OPENERS)
    if described:
        yield described[0]
        return
    inside = sorted(Path(root) / name for root, _, names in os.walk(path) for name in names)
    tables = [file for file in inside if file.suffix.lower() in _TABLES]
    kinds = {file.suffix.lower() for file in tables}
    if len(kinds) > 1:
        raise ValueError(
            f"{path} holds {' and '.join(sorted(kinds))} files; name the files that are meant"
        )
    if tables:
        yield from tables
    elif any(file.suffix.lower() in PICTURE_SUFFIXES for file in inside):
        yield path
    else:
        raise ValueError(
            f"{path} holds neither tables ({', '.join(_TABLES)}, {_METADATA}.jsonl, "
            f"{_METADATA}.csv) nor pictures ({', '.join(PICTURE_SUFFIXES)})"
        )


def _hint(path: Path) -> str:
    compressed = path.suffix.lower() in (".gz", ".zst", ".bz2", ".xz", ".tgz", ".zip")
    return "; decompress it first" if compressed else ""
