#!/usr/bin/env python3
"""Build emoji-MMEB: MMEB's four groups of tasks, in its row format, from the shipped emoji.

    python tools/build_emoji_mmeb.py OUT
    python tools/evaluate_mmeb.py --data OUT --model MODEL_FOLDER

Only concepts of the split `unseen_concept` are used: neither their pictures nor their names are
trained on. OUT gets a file <set>.jsonl a set, sets.yaml, README.md with counts and chance, and
images/. Every choice is by hash, so the same data and the same Pillow give the same bytes.
"""

import argparse
import hashlib
import io
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]  # works in a checkout that is not installed

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

from cocoa_dist.data.records import Record  # noqa: E402
from cocoa_dist.data.shards import ShardReader  # noqa: E402

SOURCE = ROOT / "cocoa_dist" / "assets" / "emoji" / "unseen_concept"
LANGUAGES = {"de": "German", "fr": "French", "ru": "Russian", "zh": "Chinese"}
SCENE = 160  # pixels a side of a composed picture: two by two cells
CELL = SCENE // 2
SIDES = (44, 52, 60, 68)  # pixels of a drawing in a scene
PART_CANDIDATES = 50  # parts of a row's own scene and of others
KEYWORD_CANDIDATES = 50


@dataclass(frozen=True)
class Concept:
    """One emoji that is held out whole."""

    code: str
    name: str
    keywords: tuple[str, ...]  # that are not words of the name
    group: str
    subgroup: str
    names: dict[str, str]  # by locale
    picture: bytes  # an encoded file

    @property
    def image(self) -> str:
        """The picture's path below images/."""
        return f"emoji/{self.code}.webp"


@dataclass(frozen=True)
class Scene:
    """Four drawings on one canvas; `parts` are their crops, in the order of `concepts`."""

    image: str
    concepts: tuple[Concept, ...]
    parts: tuple[str, ...]


@dataclass
class Emoji:
    """The concepts and what is composed of them; `files` fills as pictures are asked for."""

    concepts: list[Concept]
    scenes: dict[str, Scene] = field(default_factory=dict)  # by the code of whom it is made for
    files: dict[str, bytes] = field(default_factory=dict)  # by path below images/


def words(text: str) -> set[str]:
    """Return the words of a name or keyword, in lower case."""
    return set(re.findall(r"\w+", text.lower()))


def load_concepts(source: Path) -> tuple[list[Concept], list[str]]:
    """Return the concepts, and the names of those left out: no whole hold-out, or no own picture.

    A drawing that two concepts share would make two candidates one.
    """
    reader = ShardReader(source)
    try:
        records = [reader.record(number) for number in range(len(reader))]
    finally:
        reader.close()
    kept: list[Concept] = []
    left_out: list[str] = []
    seen: set[str] = set()
    for record in records:
        digest = hashlib.sha256(record.images[0]).hexdigest()
        if record.meta.get("held_out") != "concept" or digest in seen:
            left_out.append(record.meta["name"])
            continue
        seen.add(digest)
        kept.append(_concept(record))
    return kept, left_out


def _concept(record: Record) -> Concept:
    meta = record.meta
    known = words(meta["name"])
    return Concept(
        code=meta["hexcode"],
        name=meta["name"],
        keywords=tuple(k for k in meta["keywords"] if k.isascii() and not words(k) & known),
        group=meta["group"].replace("-", " and "),
        subgroup=meta["subgroup"].replace("-", " "),
        names=meta["names"],
        picture=record.images[0],
    )


# ------------------------------------------------------------------------------ pictures to texts


def classes(attribute: str, *, with_name: bool = False) -> Callable[[Emoji], list[Row]]:
    """Return rows that ask for the class of a picture among all classes."""

    def rows(emoji: Emoji) -> list[Row]:
        labels = sorted({getattr(concept, attribute) for concept in emoji.concepts})
        return [
            Row(
                concept.name if with_name else "",
                concept.image,
                right_first(getattr(concept, attribute), labels, seed=concept.code),
            )
            for concept in emoji.concepts
        ]

    return rows


def keyword_rows(emoji: Emoji) -> list[Row]:
    """Ask for a word that goes with a picture and is not in its name, among others' words."""
    every = sorted({word for concept in emoji.concepts for word in concept.keywords})
    rows = []
    for concept in emoji.concepts:
        if not concept.keywords:
            continue
        right = by_hash("keyword", concept.keywords, str)[0]
        own = {w for text in (concept.name, *concept.keywords) for w in words(text)}
        wrong = [word for word in every if not words(word) & own]
        chosen = by_hash(concept.code, wrong, str)[: KEYWORD_CANDIDATES - 1]
        rows.append(Row("Which word goes with it?", concept.image, as_texts([right, *chosen])))
    return rows


def look_alike_rows(emoji: Emoji) -> list[Row]:
    """Ask for the name of a picture among the names of its CLDR group: lists of unequal length."""
    rows = []
    for concept in emoji.concepts:
        names = [other.name for other in emoji.concepts if other.group == concept.group]
        listed = right_first(concept.name, names, seed=concept.code)
        rows.append(Row("What is it called?", concept.image, listed))
    return rows


def flag_rows(emoji: Emoji) -> list[Row]:
    """Ask whose flag it is."""
    flags = [c for c in emoji.concepts if c.subgroup == "country flag"]
    owners = [concept.name.removeprefix("flag: ") for concept in flags]
    return [
        Row("Whose flag is it?", flag.image, right_first(owner, owners, seed=flag.code))
        for flag, owner in zip(flags, owners, strict=True)
    ]


def person_rows(emoji: Emoji) -> list[Row]:
    """Ask whether a man, a woman or neither in particular is shown, where the name says which."""
    answers = {"man": "a man", "woman": "a woman", "person": "a person"}
    rows = []
    for concept in emoji.concepts:
        said = sorted(words(concept.name) & answers.keys())
        if concept.group == "people and body" and len(said) == 1:
            listed = right_first(answers[said[0]], list(answers.values()), seed=concept.code)
            rows.append(Row("Who is it, a man, a woman or a person?", concept.image, listed))
    return rows


# -------------------------------------------------------------------------------------- retrieval


def to_pictures(text: Callable[[Concept], str], target: str) -> Callable[[Emoji], list[Row]]:
    """Return rows that look for the picture of a text among all pictures."""

    def rows(emoji: Emoji) -> list[Row]:
        asked = _distinct(emoji.concepts, text)
        return [
            Row(
                text(concept),
                "",
                tuple((as_picture(target), other.image) for other in _before(concept, asked)),
            )
            for concept in asked
        ]

    return rows


def to_texts(
    query: Callable[[Concept], tuple[str, str]], target: Callable[[Concept], str]
) -> Callable[[Emoji], list[Row]]:
    """Return rows that look for the text of a concept among all such texts."""

    def rows(emoji: Emoji) -> list[Row]:
        asked = _distinct(emoji.concepts, target)
        return [
            Row(*query(concept), as_texts([target(other) for other in _before(concept, asked)]))
            for concept in asked
        ]

    return rows


# -------------------------------------------------------------------------------------- grounding


def crop_rows(emoji: Emoji) -> list[Row]:
    """Ask for the part of a composed picture that a name stands for, among parts of many."""
    rows = []
    for code, scene in emoji.scenes.items():
        parts = _parts(emoji, code)
        listed = tuple((as_picture(CROP), one.parts[number]) for one, number in parts)
        rows.append(Row(_quoted(scene, code), scene.image, listed))
    return rows


def matching_rows(emoji: Emoji) -> list[Row]:
    """Ask for another wording of the same part: candidates share pictures and differ in text."""
    rows = []
    for code, scene in emoji.scenes.items():
        listed = tuple(
            (as_picture(f'{MATCH} "{_other_words(one.concepts[number])}"'), one.image)
            for one, number in _parts(emoji, code)
        )
        rows.append(Row(_quoted(scene, code), scene.image, listed))
    return rows


def _quoted(scene: Scene, code: str) -> str:
    return next(f'"{concept.name}"' for concept in scene.concepts if concept.code == code)


def _parts(emoji: Emoji, code: str) -> list[tuple[Scene, int]]:
    """Return parts of scenes: that of the concept first, its neighbours, and others by hash.

    Every concept once: two drawings of one would be two right answers, or the same crop.
    """
    own = emoji.scenes[code]
    place = [concept.code for concept in own.concepts].index(code)
    found = [(own, place)] + [(own, n) for n in range(len(own.parts)) if n != place]
    known = {concept.code for concept in own.concepts}
    for scene in by_hash(f"beside {code}", emoji.scenes.values(), lambda one: one.image):
        for number, concept in enumerate(scene.concepts):
            if concept.code not in known and len(found) < PART_CANDIDATES:
                known.add(concept.code)
                found.append((scene, number))
    return [found[0], *by_hash(code, found[1:], lambda part: part[0].parts[part[1]])]


def compose_scenes(emoji: Emoji) -> None:
    """Make one scene for each concept that has keywords, and their pictures and crops."""
    usable = [concept for concept in emoji.concepts if concept.keywords]
    for concept in usable:
        others = [
            o for o in usable if _other_words(o) != _other_words(concept) and o is not concept
        ]
        chosen: list[Concept] = [concept]
        for other in by_hash(f"scene {concept.code}", others, lambda one: one.code):
            if len(chosen) < 4 and _other_words(other) not in map(_other_words, chosen):
                chosen.append(other)
        placed = by_hash(f"places {concept.code}", chosen, lambda one: one.code)
        emoji.scenes[concept.code] = _draw(emoji, concept.code, placed)


def _draw(emoji: Emoji, code: str, concepts: Sequence[Concept]) -> Scene:
    canvas = Image.new("RGB", (SCENE, SCENE), "white")
    boxes = []
    for number, concept in enumerate(concepts):
        draws = hashlib.sha256(f"{code}|{concept.code}".encode()).digest()
        side = SIDES[draws[0] % len(SIDES)]
        left = CELL * (number % 2) + draws[1] % (CELL - side + 1)
        top = CELL * (number // 2) + draws[2] % (CELL - side + 1)
        with Image.open(io.BytesIO(concept.picture)) as drawing:
            resized = drawing.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
        canvas.paste(resized, (left, top))
        boxes.append((left, top, left + side, top + side))
    image = f"scenes/{code}.png"
    emoji.files[image] = _png(canvas)
    parts = []
    for number, box in enumerate(boxes):
        parts.append(f"crops/{code}-{number}.png")
        emoji.files[parts[-1]] = _png(canvas.crop(box))
    return Scene(image, tuple(concepts), tuple(parts))


def _other_words(concept: Concept) -> str:
    return ", ".join(by_hash("words", concept.keywords, str)[:3])


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


# ---------------------------------------------------------------------------------------- helpers


def _before(right: Concept, concepts: Sequence[Concept]) -> list[Concept]:
    """Return the right concept and then the others."""
    rest = [concept for concept in concepts if concept is not right]
    return [right, *by_hash(right.code, rest, lambda one: one.code)]


def _distinct(concepts: Sequence[Concept], text: Callable[[Concept], str]) -> list[Concept]:
    """Return concepts whose text is there and is no one else's."""
    texts = [text(concept) for concept in concepts]
    return [
        concept
        for concept, one in zip(concepts, texts, strict=True)
        if one and texts.count(one) == 1
    ]


PICTURE = "Represent the given image."
CROP = "Represent the given cropped image of the object."
MATCH = "Select the portion of the image that is described as:"
QUESTION = "Represent the given image with the following question:"


def _tasks() -> list[Task]:
    image, text, both = ("image",), ("text",), ("image", "text")
    tasks = [
        Task("emoji-group", "classification", image, text, "Identify the group of this emoji",
             classes("group")),
        Task("emoji-subgroup", "classification", image, text, "Identify the kind of this emoji",
             classes("subgroup")),
        Task("emoji-named-group", "classification", both, text,
             "Represent the given emoji with its name for classification:",
             classes("group", with_name=True)),
        Task("emoji-vqa-keyword", "vqa", both, text, QUESTION, keyword_rows),
        Task("emoji-vqa-name", "vqa", both, text, QUESTION, look_alike_rows),
        Task("emoji-vqa-flag", "vqa", both, text, QUESTION, flag_rows),
        Task("emoji-vqa-person", "vqa", both, text, QUESTION, person_rows),
        Task("emoji-t2i", "retrieval", text, image, "Find the emoji with this name:",
             to_pictures(lambda c: c.name, PICTURE), PICTURE, in_distribution=True),
        Task("emoji-i2t", "retrieval", image, text, "Find the name of this emoji.",
             to_texts(lambda c: ("", c.image), lambda c: c.name), in_distribution=True),
        Task("emoji-words-t2i", "retrieval", text, image, "Find the emoji these words describe:",
             to_pictures(lambda c: ", ".join(c.keywords), PICTURE), PICTURE),
    ]  # fmt: skip
    for locale, language in LANGUAGES.items():
        tasks.append(_from_language(locale, language))
    tasks += [
        Task("emoji-i2t-de", "retrieval", image, text, "Find the German name of this emoji.",
             to_texts(lambda c: ("", c.image), lambda c: c.names["de"])),
        Task("emoji-de2en", "retrieval", text, text, "Find the English name of this emoji:",
             to_texts(lambda c: (c.names["de"], ""), lambda c: c.name)),
        Task("emoji-crop", "grounding", both, image,
             "Select the portion of the image that isolates the object labeled as",
             crop_rows, CROP),
        Task("emoji-matching", "grounding", both, both, MATCH, matching_rows, MATCH),
    ]  # fmt: skip
    return tasks


def _from_language(locale: str, language: str) -> Task:
    return Task(
        f"emoji-t2i-{locale}",
        "retrieval",
        ("text",),
        ("image",),
        f"Find the emoji with this {language} name:",
        to_pictures(lambda concept: concept.names[locale], PICTURE),
        PICTURE,
    )


def build(destination: Path, *, source: Path = SOURCE) -> list[Fact]:
    """Write everything below a new folder; returns counts and chance of every set.

    Raises ValueError if the folder is there already.
    """
    concepts, left_out = load_concepts(source)
    emoji = Emoji(concepts, files={concept.image: concept.picture for concept in concepts})
    compose_scenes(emoji)
    return write_benchmark(
        destination,
        [(task, task.rows(emoji)) for task in _tasks()],
        pictures=emoji.files,
        about=_about(len(concepts), left_out),
        made_by="tools/build_emoji_mmeb.py",
    )


def _about(concepts: int, left_out: Sequence[str]) -> list[str]:
    lines = [
        "# emoji-MMEB",
        "",
        f"{concepts} emoji whose names and pictures were held out of training, as MMEB's four",
        "groups of tasks in its row format. The right candidate is the first of each row. Built by",
        "`tools/build_emoji_mmeb.py`; pictures: Noto Emoji (Apache-2.0), Twemoji (CC-BY-4.0),",
        "Fluent Emoji (MIT), names: Unicode CLDR through emojibase. Scenes and crops are made of",
        "them.",
    ]
    if left_out:  # none of the shipped ones
        lines += ["", f"Left out, their drawing is another's too: {', '.join(left_out)}."]
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Build, and say what came out; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder to make")
    return run_builder(lambda options: build(options.out), parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
