#!/usr/bin/env python3
"""Fetch some thousand real pictures with names, as two Debian packages, for trying builders.

Downloads tuxpaint-stamps-default (photographs and drawings, a sentence for each; GPL-2) and
openclipart-png (titles and authors inside the PNG files; public domain), 292 MB, unpacks them
without installing anything, and writes DIR/metadata.jsonl beside the pictures. Needs apt-get and
dpkg-deb, as on Debian 12, and a package index; no root:

    python tools/fetch_clipart.py DIR
    python tools/build_shards.py OUT DIR --layout captions --tokenizer asset:tokenizer
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

STAMPS, CLIPART = "tuxpaint-stamps-default", "openclipart-png"
METADATA = "metadata.jsonl"
_SECONDS = 900.0
_NO_NAME = "Collection"  # hundreds of icons are titled "Part of the Flat Icon Collection"


class FetchError(ValueError):
    """The packages cannot be had here; the message says why."""


def fetch(folder: Path, *, packages: Sequence[str] = (STAMPS, CLIPART)) -> None:
    """Download and unpack packages below `folder`. Raises FetchError."""
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise FetchError(f"{tool} is missing: this needs Debian 12 or the like")
    folder.mkdir(parents=True, exist_ok=True)
    for package in packages:
        if not list(folder.glob(f"{package}_*.deb")):
            _run(["apt-get", "download", package], folder)
        (file,) = folder.glob(f"{package}_*.deb")
        _run(["dpkg-deb", "-x", file.name, package], folder)


def _run(command: Sequence[str], folder: Path) -> None:
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=_SECONDS, check=False
    )
    if done.returncode:
        raise FetchError(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")


def stamps(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the pictures that have a sentence beside them; its first line is the English one."""
    for text in sorted((folder / STAMPS).rglob("*.txt")):
        picture = text.with_suffix(".png")
        sentence = text.read_text(encoding="utf-8", errors="replace").partition("\n")[0].strip()
        if picture.is_file() and sentence:
            yield {
                "file_name": str(picture.relative_to(folder)),
                "text": sentence,
                "keywords": folder_words(picture, below="stamps"),
                "source": f"Debian package {STAMPS}",
                "licence": "GPL-2.0-only",
            }


def clipart(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the pictures, named by what is in the file, else by its name."""
    for picture in sorted((folder / CLIPART).rglob("*.png")):
        if picture.is_symlink():
            continue
        inside = texts_inside(picture)
        title = inside.get("Title", "").strip()
        row = {
            "file_name": str(picture.relative_to(folder)),
            "text": words_of(picture.stem) if _NO_NAME in title or not title else title,
            "keywords": folder_words(picture, below="png"),
            "source": f"Debian package {CLIPART}",
            "licence": "CC-PDDC",
        }
        yield row | ({"author": inside["Author"]} if inside.get("Author") else {})


def texts_inside(picture: Path) -> dict[str, str]:
    """Return the text chunks of a PNG; none if it is broken, which builders will say."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(picture) as header:
                return {k: v for k, v in header.info.items() if isinstance(v, str)}
    except (OSError, ValueError, Image.DecompressionBombError):
        return {}


def folder_words(picture: Path, *, below: str) -> list[str]:
    """Return the names of the folders that a picture lies in, as words."""
    parts = picture.parent.parts
    start = len(parts) - parts[::-1].index(below)
    return [words_of(part) for part in parts[start:]]


def words_of(name: str) -> str:
    """Return a file name as words: no underscores, no numbers."""
    return re.sub(r"[\d_\W]+", " ", name).strip() or name


def write_metadata(folder: Path) -> int:
    """Write one line a picture; return how many."""
    rows = [*stamps(folder), *clipart(folder)]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / METADATA).write_text(lines, encoding="utf-8")
    return len(rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Fetch, list, say what there is; 2 if the packages cannot be had."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="DIR")
    folder = parser.parse_args(arguments).folder
    try:
        fetch(folder)
    except FetchError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{folder / METADATA}: {write_metadata(folder)} pictures with names")
    return 0


if __name__ == "__main__":
    sys.exit(main())
