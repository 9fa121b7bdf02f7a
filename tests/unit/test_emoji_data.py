"""The shipped emoji data: whole, small, licensed, and nothing held out leaks into training."""

import hashlib
import importlib.util
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

import cocoa_dist
from cocoa_dist.data.images import decode_image
from cocoa_dist.data.records import Record
from cocoa_dist.data.shards import ShardReader, verify

ASSETS = Path(cocoa_dist.__file__).parent / "assets"
TOOLS = Path(__file__).parents[2] / "tools"
EMOJI = ASSETS / "emoji"
HELD_OUT = ("validation", "unseen_picture", "unseen_concept")
SPLITS = ("train", *HELD_OUT)
COUNTS = {"train": 1607, "validation": 297, "unseen_picture": 373, "unseen_concept": 197}
SIZE_LIMIT = 11 * 10**6


@cache
def records(split: str) -> tuple[Record, ...]:
    reader = ShardReader(EMOJI / split)
    found = tuple(reader.record(number) for number in range(len(reader)))
    reader.close()
    return found


@cache
def pixel_hashes(split: str) -> frozenset[str]:
    return frozenset(
        hashlib.sha256(decode_image(image, max_pixels=64 * 64).tobytes()).hexdigest()
        for record in records(split)
        for image in record.images
    )


def concepts_held_out() -> Iterator[Record]:
    for split in HELD_OUT:
        yield from (r for r in records(split) if r.meta["held_out"] == "concept")


@pytest.fixture
def build_tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(TOOLS))
    path = TOOLS / "build_emoji_shards.py"
    spec = importlib.util.spec_from_file_location("build_emoji_shards", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("split", SPLITS)
def test_every_byte_is_the_one_that_was_written(split: str) -> None:
    verify(EMOJI / split)


@pytest.mark.parametrize("split", SPLITS)
def test_counts(split: str) -> None:
    assert len(records(split)) == COUNTS[split]


def test_held_out_kinds() -> None:
    kinds = {split: {r.meta.get("held_out") for r in records(split)} for split in SPLITS}
    assert kinds == {
        "train": {None},
        "validation": {"concept", "picture"},
        "unseen_picture": {"picture"},
        "unseen_concept": {"concept"},
    }


def test_the_data_is_small() -> None:
    assert sum(file.stat().st_size for file in EMOJI.rglob("*") if file.is_file()) <= SIZE_LIMIT


def test_no_held_out_concept_is_trained() -> None:
    trained = records("train")
    keys, identities = {r.key for r in trained}, {r.identity for r in trained}
    names = {r.meta["name"].lower() for r in trained}
    texts = {part.text for r in trained for part in (*r.query, *r.target)}
    found = list(concepts_held_out())
    assert len(found) == 197 + 106
    for record in found:
        assert record.key not in keys
        assert record.identity not in identities
        assert record.meta["name"].lower() not in names
        assert record.target[0].text not in texts


@pytest.mark.parametrize("split", HELD_OUT)
def test_no_held_out_picture_is_trained(split: str) -> None:
    trained_bytes = {image for record in records("train") for image in record.images}
    held_out_bytes = {image for record in records(split) for image in record.images}
    assert not held_out_bytes & trained_bytes
    assert not pixel_hashes(split) & pixel_hashes("train")


def test_validation_shows_nothing_of_the_unseen_sets() -> None:
    unseen = [r for split in ("unseen_picture", "unseen_concept") for r in records(split)]
    assert not {r.key for r in records("validation")} & {r.key for r in unseen}
    assert not pixel_hashes("validation") & (
        pixel_hashes("unseen_picture") | pixel_hashes("unseen_concept")
    )


def test_a_held_out_picture_has_a_trained_concept_by_other_artists() -> None:
    trained = {record.key: set(record.meta["artists"]) for record in records("train")}
    untrained = []
    for split in ("validation", "unseen_picture"):
        for record in records(split):
            if record.meta["held_out"] == "picture":
                if record.key not in trained:
                    untrained.append(record.meta["name"])
                assert not set(record.meta["artists"]) & trained.get(record.key, set())
    # its other drawing is the same picture as a held-out one, so it left the training set
    assert untrained == ["family: adult, child"]


@pytest.mark.parametrize("split", HELD_OUT)
def test_held_out_queries_have_one_answer(split: str) -> None:
    assert all(len(record.images) == 1 for record in records(split))
    assert len(pixel_hashes(split)) == len(records(split))
    assert len({record.meta["name"] for record in records(split)}) == len(records(split))


@pytest.mark.parametrize("split", SPLITS)
def test_every_record_has_the_agreed_shape(split: str) -> None:
    for record in records(split):
        meta = record.meta
        assert record.key == record.identity == meta["hexcode"]
        assert record.task == "emoji"
        assert [part.text for part in record.query] == [meta["name"]]
        assert [[part.image for part in side] for side in record.positives] == [
            [number] for number in range(len(record.images))
        ]
        assert not record.negatives
        text = ": ".join(filter(None, [meta["name"], ", ".join(meta["keywords"])]))
        assert [part.text for part in record.target] == [text]
        assert meta["name"] not in meta["keywords"]
        assert len(meta["artists"]) == len(record.images) >= 1
        assert len(meta["names"]) == 28
        assert meta["names"]["en"] == meta["name"]
        assert meta["group"]
        assert meta["subgroup"]


@pytest.mark.parametrize("split", SPLITS)
def test_pictures_are_64_pixels_and_show_something(split: str) -> None:
    reader = ShardReader(EMOJI / split)
    for number, record in enumerate(records(split)):
        assert set(reader.image_sizes(number)) == {(64, 64)}
        for image in record.images:
            pixels = decode_image(image, max_pixels=64 * 64)
            assert (pixels != pixels[0, 0]).any()
    reader.close()


def test_the_splits_follow_the_hash_of_the_code_point() -> None:
    expected = {"unseen_concept": range(10), "unseen_picture": range(10, 30)}
    for split, percentiles in expected.items():
        for record in records(split):
            digest = hashlib.sha1(record.key.encode()).hexdigest()
            assert int(digest, 16) % 100 in percentiles
    for record in records("validation"):
        percentile = int(hashlib.sha1(record.key.encode()).hexdigest(), 16) % 100
        whole = record.meta["held_out"] == "concept"
        assert percentile in (range(30, 35) if whole else range(35, 45))


@pytest.mark.parametrize(
    ("file", "phrase"),
    [
        ("LICENSES.md", "Copyright (c) Microsoft Corporation"),
        ("LICENSES.md", "CC-BY-4.0"),
        ("LICENSES.md", "Twemoji"),
        ("LICENSES.md", "Noto Emoji"),
        ("LICENSES.md", "Miles Johnson"),
        ("LICENSES.md", "Permission is hereby granted"),
        ("license_texts/Apache-2.0.txt", "Apache License"),
        ("license_texts/CC-BY-4.0.txt", "Creative Commons Attribution 4.0 International"),
        ("license_texts/Unicode-3.0.txt", "UNICODE LICENSE V3"),
        ("README.md", "python tools/build_emoji_shards.py"),
    ],
)
def test_licences_and_attribution_are_there(file: str, phrase: str) -> None:
    assert phrase in (EMOJI / file).read_text(encoding="utf-8")


@pytest.mark.parametrize("split", SPLITS)
def test_text_tokens_are_counted_with_the_shipped_tokenizer(split: str) -> None:
    from tokenizers import Tokenizer

    file = ASSETS / "tokenizer" / "tokenizer.json"
    reader = ShardReader(EMOJI / split)
    assert reader.info.tokenizer_sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    tokenizer = Tokenizer.from_file(str(file))
    expected = [
        sum(len(tokenizer.encode(part.text).ids) for part in (*record.query, *record.target))
        for record in records(split)
    ]
    assert reader.num_text_tokens.tolist() == expected
    reader.close()


def test_a_shared_drawing_is_dropped_where_it_would_leak(build_tool: ModuleType) -> None:
    """Two concepts with one drawing: the unseen set keeps it, training loses it."""
    picture, other = build_tool.Picture(b"a", "hash a"), build_tool.Picture(b"b", "hash b")

    def concept(hexcode: str, pictures: dict[str, object]) -> object:
        return build_tool.Concept(
            hexcode=hexcode, name=hexcode, keywords=(), group="g", subgroup="s", names={},
            pictures=pictures,
        )  # fmt: skip

    codes = {build_tool.stable_hash(f"{n:X}") % 100: f"{n:X}" for n in range(0x1F300, 0x1F700)}
    unseen = concept(codes[5], {"google": picture})
    trained = concept(codes[50], {"google": picture, "twitter": other})
    lost = concept(codes[60], {"google": picture})
    plan = build_tool.plan_splits([lost, trained, unseen])
    keys = {split.value: [r.key for r in found] for split, found in plan.records.items()}
    assert keys["unseen_concept"] == [codes[5]]
    assert keys["train"] == [codes[50]]
    assert plan.records[build_tool.Split.TRAIN][0].images == (b"b",)
    assert plan.dropped == [f"train {codes[60]}/google", f"train {codes[50]}/google"]


def test_a_package_with_other_bytes_is_refused(build_tool: ModuleType, tmp_path: Path) -> None:
    (tmp_path / build_tool.NAMES.tarball).write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"emojibase-data-17\.0\.0\.tgz has sha256"):
        build_tool.fetch(build_tool.NAMES, tmp_path)
