#!/usr/bin/env python3
"""Build a transfer set in MMEB's row format: photographs and sentences of Tux Paint's stamps.

    python tools/build_stamps_mmeb.py OUT [--fetched DIR]
    python tools/evaluate_mmeb.py --data OUT --model MODEL_FOLDER

Nothing of ours is trained on them. They are Debian's package tuxpaint-stamps-default (GPL-2, each
sentence in many languages), which is downloaded, 161 MB, and unpacked without installing it: needs
apt-get and dpkg-deb, as on Debian 12, no root. --fetched: a folder of tools/fetch_clipart.py, which
has it already. Letters, numbers, notes and coins (`symbols`) are left out, pictures are put over
white and made smaller.
"""

import argparse
import hashlib
import io
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tools")]

from fetch_clipart import STAMPS, FetchError, fetch, stamps, words_of  # noqa: E402
from mmeb_builder import (  # noqa: E402
    Fact,
    Row,
    Task,
    as_picture,
    as_texts,
    by_hash,
    right_first,
    run_builder,
    write_benchmark,
)
from PIL import Image  # noqa: E402

LANGUAGES = {"de": "German", "fr": "French", "ru": "Russian", "ja": "Japanese"}
SIDE = 336  # pixels at most
LEFT_OUT = "symbols"
FEWEST = {"group": 3, "kind": 5}  # stamps of a class


@dataclass(frozen=True)
class Stamp:
    """One picture and what is said of it."""

    image: str  # below images/
    sentence: str
    group: str  # its folder, as words
    kind: str  # the folder in it, "" without one
    sentences: dict[str, str]  # by locale
    picture: bytes  # an encoded file


@dataclass(frozen=True)
class Stamps:
    """All stamps that can be used, and the files that cannot, with the reason."""

    usable: list[Stamp]
    rejected: list[str]


def load_stamps(folder: Path) -> Stamps:
    """Read an unpacked package below `folder`; what is another one's picture is left out.

    Raises ValueError if there are no stamps.
    """
    usable: list[Stamp] = []
    rejected: list[str] = []
    seen: set[str] = set()
    for row in stamps(folder):
        file = folder / row["file_name"]
        where = file.parts[len(file.parts) - file.parts[::-1].index("stamps") :]
        if where[0] == LEFT_OUT:
            continue
        try:
            picture = small_picture(file)
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            rejected.append(f"{'/'.join(where)}: {error}")
            continue
        digest = hashlib.sha256(picture).hexdigest()
        if digest in seen:
            rejected.append(f"{'/'.join(where)}: another stamp has the same picture")
            continue
        seen.add(digest)
        usable.append(
            Stamp(
                image="/".join(("stamps", *where[:-1], f"{file.stem}.jpg")),
                sentence=row["text"],
                group=words_of(where[0]).replace("naturalforces", "forces of nature"),
                kind=words_of(where[1]).lower() if len(where) > 2 else "",
                sentences=sentences(file.with_suffix(".txt")),
                picture=picture,
            )
        )
    if not usable:
        raise ValueError(
            f"{folder} has no stamps: is it a folder of tools/fetch_clipart.py? (looked for "
            f"{STAMPS}/**/*.txt beside .png)"
        )
    return Stamps(usable, rejected)


def small_picture(file: Path) -> bytes:
    """Return a picture as JPEG, over white, at most SIDE pixels wide and high."""
    with Image.open(file) as opened:
        picture = opened.convert("RGBA")
    picture.thumbnail((SIDE, SIDE), Image.Resampling.BICUBIC)
    canvas = Image.new("RGB", picture.size, "white")
    canvas.paste(picture, mask=picture.getchannel("A"))
    buffer = io.BytesIO()
    canvas.save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def sentences(file: Path) -> dict[str, str]:
    """Return the translations of a stamp's sentence, by language."""
    found: dict[str, str] = {}
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines()[1:]:
        locale, equals, text = line.partition("=")
        if equals and text.strip():
            found[locale.removesuffix(".utf8")] = text.strip()
    return found


# ------------------------------------------------------------------------------------------- rows


def classes(attribute: str) -> Callable[[Stamps], list[Row]]:
    """Return rows that ask for the class of a picture among all that have enough stamps."""

    def rows(of: Stamps) -> list[Row]:
        counts = Counter(getattr(stamp, attribute) for stamp in of.usable)
        labels = sorted(n for n, count in counts.items() if n and count >= FEWEST[attribute])
        return [
            Row("", stamp.image, right_first(getattr(stamp, attribute), labels, seed=stamp.image))
            for stamp in of.usable
            if len(labels) > 1 and getattr(stamp, attribute) in labels
        ]

    return rows


def look_alike_rows(of: Stamps) -> list[Row]:
    """Ask for the sentence of a picture among those of its group: lists of unequal length."""
    rows = []
    known = distinct(of, lambda stamp: stamp.sentence)
    for stamp in known:
        said = [other.sentence for other in known if other.group == stamp.group]
        if len(said) >= FEWEST["group"]:
            listed = right_first(stamp.sentence, said, seed=stamp.image)
            rows.append(Row("What is it?", stamp.image, listed))
    return rows


def to_pictures(text: Callable[[Stamp], str]) -> Callable[[Stamps], list[Row]]:
    """Return rows that look for the picture of a sentence among all pictures."""

    def rows(of: Stamps) -> list[Row]:
        known = distinct(of, text)
        return [
            Row(text(one), "", tuple((as_picture(PICTURE), o.image) for o in before(one, known)))
            for one in known
        ]

    return rows


def to_sentences(query: Callable[[Stamp], tuple[str, str]]) -> Callable[[Stamps], list[Row]]:
    """Return rows that look for the English sentence of a picture or of another sentence."""

    def rows(of: Stamps) -> list[Row]:
        known = [one for one in distinct(of, lambda stamp: stamp.sentence) if any(query(one))]
        return [
            Row(*query(one), as_texts([other.sentence for other in before(one, known)]))
            for one in known
        ]

    return rows


def distinct(of: Stamps, text: Callable[[Stamp], str]) -> list[Stamp]:
    """Return the stamps whose text is there and is no other one's."""
    counts = Counter(text(stamp) for stamp in of.usable)
    return [stamp for stamp in of.usable if text(stamp) and counts[text(stamp)] == 1]


def before(right: Stamp, known: Iterable[Stamp]) -> list[Stamp]:
    """Return the right stamp and then the others."""
    rest = [stamp for stamp in known if stamp is not right]
    return [right, *by_hash(right.image, rest, lambda one: one.image)]


PICTURE = "Represent the given image."


def _tasks() -> list[Task]:
    image, text, both = ("image",), ("text",), ("image", "text")
    tasks = [
        Task("stamps-group", "classification", image, text, "Identify what this belongs to",
             classes("group")),
        Task("stamps-kind", "classification", image, text, "Identify the kind of thing shown",
             classes("kind")),
        Task("stamps-vqa", "vqa", both, text,
             "Represent the given image with the following question:", look_alike_rows),
        Task("stamps-t2i", "retrieval", text, image, "Find the picture of this sentence:",
             to_pictures(lambda one: one.sentence), PICTURE),
        Task("stamps-i2t", "retrieval", image, text, "Find the sentence about this picture.",
             to_sentences(lambda one: ("", one.image))),
        Task("stamps-de2en", "retrieval", text, text, "Find the English form of this sentence:",
             to_sentences(lambda one: (one.sentences.get("de", ""), ""))),
    ]  # fmt: skip
    return [*tasks, *(_from_language(*item) for item in LANGUAGES.items())]


def _from_language(locale: str, language: str) -> Task:
    return Task(
        f"stamps-t2i-{locale}",
        "retrieval",
        ("text",),
        ("image",),
        f"Find the picture of this {language} sentence:",
        to_pictures(lambda one: one.sentences.get(locale, "")),
        PICTURE,
    )


def build(destination: Path, *, fetched: Path) -> list[Fact]:
    """Write everything below a new folder; returns counts and chance of every set.

    Raises ValueError if the folder is there already, or if `fetched` has no stamps.
    """
    if destination.exists():
        raise ValueError(f"{destination} already exists: name another folder, or remove it")
    found = load_stamps(fetched)
    about = [
        "# Stamps: a transfer set",
        "",
        f"{len(found.usable)} pictures, most of them photographs, with a sentence each, in MMEB's",
        "row format. The right candidate is the first of each row. Built by",
        f"`tools/build_stamps_mmeb.py` from Debian's package {STAMPS}; GPL-2,",
        "see its copyright file before passing this folder on.",
    ]
    if found.rejected:
        about += ["", "Left out:", "", *(f"- {line}" for line in found.rejected)]
    return write_benchmark(
        destination,
        [(task, task.rows(found)) for task in _tasks()],
        pictures={stamp.image: stamp.picture for stamp in found.usable},
        about=about,
        made_by="tools/build_stamps_mmeb.py",
    )


def fetch_and_build(options: argparse.Namespace) -> list[Fact]:
    """Build from what --fetched names, or from a download. Raises ValueError."""
    if options.fetched is not None:
        return build(options.out, fetched=options.fetched)
    if options.out.exists():  # before the download
        raise ValueError(f"{options.out} already exists: name another folder, or remove it")
    with tempfile.TemporaryDirectory(prefix="stamps-") as folder:
        try:
            fetch(Path(folder), packages=(STAMPS,))
        except FetchError as error:
            raise ValueError(f"{STAMPS} cannot be had here: {error}") from error
        return build(options.out, fetched=Path(folder))


def main(arguments: Sequence[str] | None = None) -> int:
    """Build, and say what came out; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--fetched", type=Path, metavar="DIR", help="where the package is unpacked")
    return run_builder(fetch_and_build, parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
