#!/usr/bin/env python3
"""Build the quickstart's data sets: emoji pictures by three artists with human-written names.

Downloads four npm packages (160 MB) and one with licence texts, all pinned by sha256, and writes
cocoa_dist/assets/emoji/{train,validation,unseen_picture,unseen_concept}. The same packages and the
same Pillow give the same bytes (the shipped ones: Pillow 13.0.0 with libwebp 1.6.0). Needs npm:

    python tools/build_emoji_shards.py --cache DIR
    python tools/build_tokenizer.py
"""

import argparse
import hashlib
import io
import json
import subprocess
import tarfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import PIL
from build_tokenizer import fit_tokenizer, tokenizer_sha256, training_texts
from PIL import Image, features

from cocoa_dist.data.records import Record, image_part, text_part
from cocoa_dist.data.shards import remove_dataset, verify, write_shards

ASSETS = Path(__file__).resolve().parents[1] / "cocoa_dist" / "assets"
PICTURE_SIZE = 64  # pixels; the size of two artists' originals
# Lossy at 90 takes 1.1 KB a picture; lossless takes 2.7 KB and would not fit the 11 MB we allow.
WEBP_OPTIONS = {"quality": 90, "method": 6}
RECORDS_PER_BATCH = 64
SIZE_LIMIT = 11 * 10**6  # bytes of all data sets together


@dataclass(frozen=True)
class Package:
    """One pinned npm package: what is read of it, and its tarball's sha256."""

    name: str
    version: str
    sha256: str
    prefix: str  # only members below it are read

    @property
    def tarball(self) -> str:
        """The file name that `npm pack` gives it."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


PICTURES = {  # by artist
    "fluent": Package(
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
        "package/assets/",
    ),
    "google": Package(
        "emoji-datasource-google",
        "16.0.0",
        "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
        "package/img/google/64/",
    ),
    "twitter": Package(
        "emoji-datasource-twitter",
        "16.0.0",
        "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
        "package/img/twitter/64/",
    ),
}
NAMES = Package(
    "emojibase-data",
    "17.0.0",
    "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
    "package/",
)
LICENCES = Package(
    "spdx-license-list",
    "6.12.0",
    "54cc8d13086187333ca1457c8edaa06d9a412144f076aa7f7c1b59c4f3b0a1ef",
    "package/licenses/",
)
LICENCE_NAMES = ("Apache-2.0", "CC-BY-4.0", "Unicode-3.0")


class Split(StrEnum):
    """The four data sets."""

    TRAIN = "train"
    VALIDATION = "validation"
    UNSEEN_PICTURE = "unseen_picture"
    UNSEEN_CONCEPT = "unseen_concept"


@dataclass(frozen=True)
class Picture:
    """One drawing: its encoded file, and the hash of the pixels it was encoded from."""

    webp: bytes
    pixel_hash: str


@dataclass(frozen=True)
class Concept:
    """What one emoji means, and how each artist drew it (artists in alphabetical order)."""

    hexcode: str
    name: str
    keywords: tuple[str, ...]
    group: str
    subgroup: str
    names: dict[str, str]  # by locale
    pictures: dict[str, Picture]  # by artist


@dataclass
class Plan:
    """The records of each split, in emojibase's order, before they are written."""

    records: dict[Split, list[Record]] = field(
        default_factory=lambda: {split: [] for split in Split}
    )
    dropped: list[str] = field(default_factory=list)  # "split name/artist" of leaking pictures


def stable_hash(text: str) -> int:
    """Return the sha1 of `text` as a number."""
    return int(hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest(), 16)


def held_out_artist(concept: Concept) -> str:
    """Return whose picture of this concept is held out, if one is."""
    return sorted(concept.pictures)[stable_hash(concept.hexcode + "v") % len(concept.pictures)]


def assign(concept: Concept) -> dict[Split, tuple[str, ...]]:
    """Return which artists' pictures of a concept go to which split, by hash of its code point."""
    percentile = stable_hash(concept.hexcode) % 100
    held_out = held_out_artist(concept)
    rest = tuple(artist for artist in concept.pictures if artist != held_out)
    if percentile < 10:
        return {Split.UNSEEN_CONCEPT: (held_out,)}
    if percentile < 30 and rest:
        return {Split.UNSEEN_PICTURE: (held_out,), Split.TRAIN: rest}
    if 30 <= percentile < 35:
        return {Split.VALIDATION: (held_out,)}
    if 35 <= percentile < 45 and rest:
        return {Split.VALIDATION: (held_out,), Split.TRAIN: rest}
    return {Split.TRAIN: tuple(concept.pictures)}


def plan_splits(concepts: Sequence[Concept]) -> Plan:
    """Assign every picture, then drop those that would show a held-out picture too early.

    Some concepts share one drawing (Norway and Svalbard, most families), so a hash of the code
    point alone would let 'unseen' pictures be trained on. The unseen sets keep all theirs;
    validation gives way to them, and training to all three.
    """
    plan = Plan()
    unseen: set[str] = set()
    assigned = [(concept, assign(concept)) for concept in concepts]
    for splits in (
        (Split.UNSEEN_PICTURE, Split.UNSEEN_CONCEPT),
        (Split.VALIDATION,),
        (Split.TRAIN,),
    ):
        seen_here: set[str] = set()
        for concept, artists_by_split in assigned:
            for split in splits:
                chosen = artists_by_split.get(split, ())
                kept = tuple(a for a in chosen if concept.pictures[a].pixel_hash not in unseen)
                plan.dropped += [f"{split} {concept.name}/{a}" for a in chosen if a not in kept]
                seen_here |= {concept.pictures[artist].pixel_hash for artist in kept}
                if kept:
                    plan.records[split].append(make_record(concept, split=split, artists=kept))
        unseen |= seen_here
    return plan


def make_record(concept: Concept, *, split: Split, artists: tuple[str, ...]) -> Record:
    """Return a record with the pictures of `artists`."""
    meta: dict[str, Any] = {
        "name": concept.name,
        "keywords": list(concept.keywords),
        "group": concept.group,
        "subgroup": concept.subgroup,
        "hexcode": concept.hexcode,
        "artists": list(artists),
        "names": concept.names,
    }
    if split is not Split.TRAIN:
        whole = Split.TRAIN not in assign(concept)
        meta["held_out"] = "concept" if whole else "picture"
    description = concept.name
    if concept.keywords:
        description += ": " + ", ".join(concept.keywords)
    return Record(
        key=concept.hexcode,
        task="emoji",
        query=(text_part(concept.name),),
        positives=tuple((image_part(number),) for number in range(len(artists))),
        target=(text_part(description),),
        images=tuple(concept.pictures[artist].webp for artist in artists),
        identity=concept.hexcode,
        meta=meta,
    )


def fetch(package: Package, cache: Path) -> Path:
    """Return the package's tarball, downloaded if `cache` has it not. ValueError if it differs."""
    cache.mkdir(parents=True, exist_ok=True)
    file = cache / package.tarball
    if not file.is_file():
        specification = f"{package.name}@{package.version}"
        command = ["npm", "pack", specification, "--silent", "--pack-destination", str(cache)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=600)
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != package.sha256:
        raise ValueError(
            f"{file} has sha256 {found}, expected {package.sha256}: remove it and run again"
        )
    return file


def read_members(
    package: Package, cache: Path, *, wanted: Callable[[str], bool]
) -> dict[str, bytes]:
    """Return the files of a package below its prefix, by their path below it."""
    contents = {}
    with tarfile.open(fetch(package, cache), "r:gz") as archive:
        for member in archive:
            name = member.name.removeprefix(package.prefix)
            if member.isfile() and name != member.name and wanted(name):
                stream = archive.extractfile(member)
                assert stream is not None  # it is a file
                contents[name] = stream.read()
    return contents


def encode_picture(data: bytes) -> Picture:
    """Put a drawing on white, bring it to PICTURE_SIZE, and encode it as WebP."""
    drawing = Image.open(io.BytesIO(data)).convert("RGBA")
    canvas = Image.new("RGBA", drawing.size, (255, 255, 255, 255))
    canvas.alpha_composite(drawing)
    size = (PICTURE_SIZE, PICTURE_SIZE)
    picture = canvas.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", **WEBP_OPTIONS)
    return Picture(buffer.getvalue(), hashlib.sha256(picture.tobytes()).hexdigest())


def without_selector(code: str) -> str:
    """Return a code point sequence without variation selectors, which artists use differently."""
    return "-".join(point for point in code.split("-") if point != "fe0f")


def index_by_code(files: dict[str, bytes]) -> dict[str, bytes]:
    """Return pictures by lower-case code point sequence, with and without variation selectors."""
    index: dict[str, bytes] = {}
    for name in sorted(files):
        code = Path(name).stem.lower()
        index[code] = files[name]
        index.setdefault(without_selector(code), files[name])
    return index


def find_picture(index: dict[str, bytes], hexcode: str) -> bytes | None:
    """Return an artist's file for a code point sequence, if there is one."""
    code = hexcode.lower()
    for variant in (code, without_selector(code), f"{code}-fe0f"):
        if variant in index:
            return index[variant]
    return None


def load_concepts(cache: Path) -> list[Concept]:
    """Return every base emoji that at least one artist drew, in emojibase's order."""
    drawings = {
        artist: index_by_code(
            read_members(package, cache, wanted=lambda name: name.endswith((".png", ".webp")))
        )
        for artist, package in sorted(PICTURES.items())
    }
    files = read_members(
        NAMES, cache, wanted=lambda name: name.endswith("/data.json") or name == "en/messages.json"
    )
    messages = json.loads(files.pop("en/messages.json"))
    groups, subgroups = (
        {entry["order"]: entry["key"] for entry in messages[kind]}
        for kind in ("groups", "subgroups")
    )
    locales = {name.split("/")[0]: json.loads(files[name]) for name in sorted(files)}
    names = {
        locale: {entry["hexcode"]: entry["label"] for entry in entries}
        for locale, entries in locales.items()
    }
    concepts = []
    for entry in locales["en"]:
        if entry["label"].startswith("regional indicator"):
            continue
        found = {
            artist: find_picture(index, entry["hexcode"]) for artist, index in drawings.items()
        }
        pictures = {artist: encode_picture(data) for artist, data in found.items() if data}
        if pictures:
            concepts.append(
                Concept(
                    hexcode=entry["hexcode"],
                    name=entry["label"],
                    keywords=tuple(t for t in entry.get("tags", ()) if t != entry["label"]),
                    group=groups[entry["group"]],
                    subgroup=subgroups[entry["subgroup"]],
                    names={locale: names[locale][entry["hexcode"]] for locale in names},
                    pictures=pictures,
                )
            )
    return concepts


def write_licences(cache: Path, destination: Path) -> None:
    """Write the full licence texts that LICENSES.md refers to."""
    destination.mkdir(parents=True, exist_ok=True)
    wanted = {f"{name}.json" for name in LICENCE_NAMES}
    for name, data in read_members(LICENCES, cache, wanted=wanted.__contains__).items():
        text = json.loads(data)["licenseText"].strip() + "\n"
        (destination / Path(name).with_suffix(".txt")).write_text(text, encoding="utf-8")


def write_splits(plan: Plan, destination: Path) -> int:
    """Replace the four data sets below `destination`; return the bytes they take."""
    tokenizer = fit_tokenizer(
        text for record in plan.records[Split.TRAIN] for text in training_texts(record)
    )
    total = 0
    for split, records in plan.records.items():
        remove_dataset(destination / split)
        info = write_shards(
            records,
            destination / split,
            records_per_batch=RECORDS_PER_BATCH,
            count_tokens=lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids),
            tokenizer_sha256=tokenizer_sha256(tokenizer),
            info={"name": f"emoji/{split}", "licences": "../LICENSES.md"},
        )
        verify(destination / split)
        total += sum(f.stat().st_size for f in (destination / split).rglob("*") if f.is_file())
        pictures = sum(len(record.images) for record in records)
        print(f"{split:15s} {info.count:5d} records {pictures:5d} pictures {info.bytes:9d} bytes")
    return total


def main(arguments: Sequence[str] | None = None) -> None:
    """Download, encode, split, write, and say what came out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cache", type=Path, required=True, help="folder for the npm tarballs")
    parser.add_argument("--destination", type=Path, default=ASSETS / "emoji")
    options = parser.parse_args(arguments)
    concepts = load_concepts(options.cache)
    plan = plan_splits(concepts)
    write_licences(options.cache, options.destination / "license_texts")
    total = write_splits(plan, options.destination)
    print_summary(concepts, plan.dropped)
    print(f"total {total} bytes, Pillow {PIL.__version__}, libwebp {features.version('webp')}")
    if total > SIZE_LIMIT:
        raise SystemExit(f"the data sets take {total} bytes, expected at most {SIZE_LIMIT}")


def print_summary(concepts: Sequence[Concept], dropped: Iterable[str]) -> None:
    """Print how many concepts and pictures there were, and what was dropped."""
    pictures = sum(len(concept.pictures) for concept in concepts)
    print(f"{len(concepts)} concepts, {pictures} pictures")
    dropped = list(dropped)
    print(f"{len(dropped)} pictures dropped, the same as a held-out one: {'; '.join(dropped)}")


if __name__ == "__main__":
    main()
