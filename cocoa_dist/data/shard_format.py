"""What a data set on disk is: names, Arrow schemas, the manifest, and the checks against it.

A data set exists if and only if its folder holds a whole `manifest.json`, which is written last and
lists every other file with its size and sha256. Knows nothing of how records are written or read.
"""

import json
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa

from cocoa_dist.data.store import Store, open_store
from cocoa_dist.manifest import sha256_file

SCHEMA_VERSION = 2
MANIFEST_NAME = "manifest.json"
RECORD_INDEX = "index/records.arrow"
BATCH_INDEX = "index/batches.arrow"
REJECTED_LIST = "rejected.jsonl"  # rows of the source that became no record; may be missing
BUILD_FOLDER = ".build"  # what a builder notes while it works; gone when the manifest is there
ENERGON_FOLDER = ".nv-meta"
ENERGON_FILES = (".info.json", "split.yaml", "dataset.yaml")
UNKNOWN_TOKENS = -1  # num_text_tokens of a data set that was written without a tokenizer
UNREADABLE = 0  # height and width of a picture whose header cannot be read

_PART = pa.struct([("kind", pa.string()), ("text", pa.string()), ("image", pa.int32())])
_SIDE = pa.list_(_PART)
# What training reads comes first and lies together: headers, then pictures. The columns behind them
# say the same for other programs, and cost no read.
SCHEMA = pa.schema(
    [
        ("header", pa.string()),  # JSON of all but meta and pictures, see records.joined_header
        ("meta", pa.string()),  # JSON
        ("images", pa.list_(pa.large_binary())),
        ("key", pa.string()),
        ("task", pa.string()),
        ("query", _SIDE),
        ("positives", pa.list_(_SIDE)),
        ("negatives", pa.list_(_SIDE)),
        ("target", _SIDE),
        ("identity", pa.string()),
        ("crc32", pa.uint32()),  # records.record_crc32
    ]
)
RECORD_INDEX_SCHEMA = pa.schema(
    [
        ("shard", pa.int32()),
        ("batch", pa.int32()),  # in the whole data set, a row of BATCH_INDEX
        ("row", pa.int32()),  # in its batch
        ("crc32", pa.uint32()),
        ("num_text_tokens", pa.int32()),  # see count_text_tokens
        # Pixels, upright; UNREADABLE if broken; then again of what is used again
        ("image_heights", pa.list_(pa.int32())),
        ("image_widths", pa.list_(pa.int32())),
    ]
)
BATCH_INDEX_SCHEMA = pa.schema(
    [
        ("shard", pa.int32()),
        ("num_rows", pa.int32()),
        ("offset", pa.int64()),  # bytes from the start of the shard to the batch's IPC message
        ("length", pa.int64()),  # bytes of that message
        # Where buffers of the message begin, in bytes from its start; see BatchPlace
        ("header_offsets", pa.int64()),
        ("header_data", pa.int64()),
        ("meta_offsets", pa.int64()),
        ("meta_data", pa.int64()),
        ("picture_counts", pa.int64()),
        ("picture_offsets", pa.int64()),
        ("picture_data", pa.int64()),
        ("picture_bytes", pa.int64()),  # in all pictures of the batch
        ("head_crc32", pa.uint32()),  # over [header_offsets, picture_data)
    ]
)


@dataclass(frozen=True)
class DatasetInfo:
    """What a data set is, as its manifest says."""

    count: int  # records
    num_batches: int
    num_shards: int
    records_per_batch: int  # in every batch but the last of a shard, unless pictures are huge
    records_per_shard: int  # source rows, in every shard but the last
    bytes: int  # of all files but the manifest
    tokenizer_sha256: str  # of the tokenizer that counted num_text_tokens; "" if none did
    fingerprint: str  # sha256 over the checksums of all records, in order
    info: dict[str, Any]  # whatever the writer had to say: source, licence, split


def shard_name(number: int) -> str:
    """Return the file name of shard `number`."""
    return f"shard-{number:05d}.arrow"


def dataset_info(manifest: dict[str, Any]) -> DatasetInfo:
    """Return the part of a manifest that describes the data set as a whole."""
    return DatasetInfo(**{field.name: manifest[field.name] for field in fields(DatasetInfo)})


def read_manifest(store: Store | Path) -> dict[str, Any]:
    """Return the manifest of the data set in a store, or in a folder.

    Raises ValueError if there is none, if it is damaged, or if its schema is not ours; OSError if
    the store fails.
    """
    store = open_store(store) if isinstance(store, Path) else store
    file = f"{store.location}/{MANIFEST_NAME}"
    try:
        content = store.read(MANIFEST_NAME)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(
            f"{store.location} is not a data set: it has no {MANIFEST_NAME}. Writing it was "
            "interrupted, or the path is wrong; rebuild the data set or correct the path"
        ) from error
    try:
        manifest = dict(json.loads(content))
        version = manifest["schema_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} is damaged ({type(error).__name__}: {error}); rebuild the data set or "
            "restore the file"
        ) from error
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"{file} has schema_version {version}, expected {SCHEMA_VERSION}: rebuild the data set "
            "with this version of the package"
        )
    missing = {"files", *(field.name for field in fields(DatasetInfo))} - manifest.keys()
    if missing:
        raise ValueError(f"{file} lacks {sorted(missing)}; rebuild the data set")
    return manifest


def check_sizes(store: Store | Path, manifest: dict[str, Any]) -> None:
    """Raise ValueError for the first file of the data set that is missing or has another size."""
    store = open_store(store) if isinstance(store, Path) else store
    sizes = store.sizes(entry["path"] for entry in manifest["files"])
    for entry in manifest["files"]:
        name = entry["path"]
        found = f"{sizes[name]} bytes" if name in sizes else "no file"
        if found != f"{entry['bytes']} bytes":
            raise ValueError(
                f"{store.location}/{name}: found {found}, expected {entry['bytes']} bytes; rebuild "
                "the data set or restore the file"
            )


def verify(path: Path) -> None:
    """Read every byte of a data set and compare with its manifest.

    Raises ValueError that names every file whose content is not what was written.
    """
    manifest = read_manifest(path)
    check_sizes(path, manifest)
    wrong = [
        f"{entry['path']} has sha256 {found[:12]}..., expected {entry['sha256'][:12]}..."
        for entry in manifest["files"]
        if (found := sha256_file(path / entry["path"])) != entry["sha256"]
    ]
    if wrong:
        raise ValueError(
            f"{path}: {len(wrong)} damaged files: {'; '.join(wrong)}; rebuild the data set or "
            "restore the files"
        )


def remove_dataset(path: Path) -> None:
    """Remove the files of a data set, manifest first; other files in the folder stay."""
    (path / MANIFEST_NAME).unlink(missing_ok=True)
    for name in file_names(path):
        (path / name).unlink()
    remove_build(path)
    for folder in (path / "index", path / ENERGON_FOLDER):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def remove_build(path: Path) -> None:
    """Remove what a builder noted while it worked."""
    folder = path / BUILD_FOLDER
    if folder.is_dir():
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()


def file_names(folder: Path) -> list[str]:
    """Return the files of the data set that are there, without the manifest, in a fixed order."""
    shards = sorted(
        path.name for path in folder.glob("shard-*.arrow") if re.match(r"shard-\d+\.", path.name)
    )
    others = [RECORD_INDEX, BATCH_INDEX, REJECTED_LIST]
    others += [f"{ENERGON_FOLDER}/{name}" for name in ENERGON_FILES]
    return shards + [name for name in others if (folder / name).is_file()]
