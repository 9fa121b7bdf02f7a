"""What a record becomes in each view, and that a bad one becomes a filler with a reason."""

import io
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cocoa_dist.config import ASSET_DIR, DataConfig, ImageConfig, ModelConfig, RandomModelConfig
from cocoa_dist.config import StageDataConfig as StageData
from cocoa_dist.data.records import Record, image_part, text_part
from cocoa_dist.data.samples import (
    VIEWS,
    ImageGeometry,
    PictureCache,
    Sample,
    ViewSettings,
    Vocabulary,
    augment,
    draw_for,
    embedding_sample,
    view_samples,
    view_settings,
)
from cocoa_dist.segments import Role, check_segments

GEOMETRY = ImageGeometry(patch_size=8)
SPECIALS = {"eos": 1, "image_pad": 2, "vision_start": 3, "vision_end": 4, "mask": 5, "bos": 6}
PICTURE = [3, 2, 2, 2, 2, 4]  # a 32x32 picture in tokens
TOKENIZER = ASSET_DIR / "tokenizer"
EMOJI_VIEWS = sorted(VIEWS.keys() - {"dialogue"})  # its records have turns


def encode(text: str) -> list[int]:
    return [16 + zlib.crc32(word.encode()) % 1000 for word in text.split()]


VOCABULARY = Vocabulary(**SPECIALS, size=1016, encoder=encode)


def png(value: int = 0, size: int = 32) -> bytes:
    file = io.BytesIO()
    pixels = np.full((size, size, 3), value, dtype=np.uint8)
    pixels[: size // 2] //= 2
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def emoji_record(**changes: object) -> Record:
    fields: dict[str, object] = {
        "key": "1F600",
        "task": "emoji",
        "query": (text_part("grinning face"),),
        "positives": ((image_part(0),), (image_part(1),)),
        "target": (text_part("grinning face: happy, smile, teeth"),),
        "images": (png(40), png(200)),
        "meta": {"keywords": ["grinning face", "happy", "smile", "teeth"]},
    }
    return Record(**(fields | changes))  # type: ignore[arg-type]


def settings(*, training: bool = False, max_text_tokens: int = 48, **stage: object) -> ViewSettings:
    data = DataConfig(max_text_tokens=max_text_tokens)
    source = {"sources": {"a": {"path": "x"}}, "view": "caption"}
    parsed = StageData.model_validate(source | stage)
    return view_settings(data, geometry=GEOMETRY, stage=parsed, training=training)


def made(view: str, record: Record, *, seed: int = 0, **stage: object) -> tuple[Sample, ...]:
    result = view_samples(
        view,
        record,
        draw=draw_for(seed, "s", 0, 0),
        vocabulary=VOCABULARY,
        settings=settings(**stage),
    )
    assert result.reason is None
    return result.samples


def roles(sample: Sample) -> list[tuple[Role, list[int]]]:
    return [(s.role, sample.input_ids[s.start : s.stop].tolist()) for s in sample.segments]


def test_a_caption_is_the_picture_and_then_its_text() -> None:
    (sample,) = made("caption", emoji_record(), keywords="all")
    text = encode("grinning face: happy, smile, teeth")
    assert roles(sample) == [(Role.CONTEXT, PICTURE + text)]
    assert sample.text_positions.tolist() == [False] * len(PICTURE) + [True] * len(text)
    assert [image.shape for image in sample.images] == [(32, 32, 3)]


def test_keywords_none_leaves_the_name() -> None:
    (sample,) = made("caption", emoji_record(), keywords="none")
    assert sample.input_ids.tolist() == PICTURE + encode("grinning face")


def test_without_keywords_the_text_is_the_records_own() -> None:
    (sample,) = made("caption", emoji_record(meta={}, target=(text_part("a cat"),)))
    assert sample.input_ids.tolist() == PICTURE + encode("grinning face a cat")


def test_sampled_keywords_have_the_shares_of_the_recipe() -> None:
    """30 % name alone; of the rest 75 % with the name; 4 sigma of 2000 draws is 0.045."""
    counts = {"name": 0, "both": 0, "keywords": 0}
    words = {"happy", "smile", "teeth"}
    texts: list[str] = []
    spy = Vocabulary(**SPECIALS, size=9, encoder=lambda text: texts.append(text) or [20])
    for seed in range(2000):
        draw = draw_for(seed, "s", 0, 0)
        options = {"draw": draw, "vocabulary": spy, "settings": settings(keywords="sample")}
        VIEWS["pair"](emoji_record(), **options)
        head, _, tail = texts.pop(0).partition(": ")
        texts.clear()
        kind = "keywords" if head != "grinning face" else ("both" if tail else "name")
        counts[kind] += 1
        listed = (tail or head).split(", ")
        assert kind == "name" or (set(listed) <= words and len(set(listed)) == len(listed))
    assert counts["name"] / 2000 == pytest.approx(0.3, abs=0.045)
    assert counts["both"] / 2000 == pytest.approx(0.7 * 0.75, abs=0.045)


def test_bridged_from_a_picture_has_context_bridge_and_target() -> None:
    (sample,) = made("bridged", emoji_record(), image_share=1.0, keywords="none")
    expected = [
        (Role.CONTEXT, PICTURE),
        (Role.BRIDGE, [1]),
        (Role.TARGET, encode("grinning face")),
    ]
    assert roles(sample) == expected
    check_segments([sample.segments])


def test_bridged_from_text_goes_both_ways() -> None:
    seen = set()
    for seed in range(20):
        (sample,) = made("bridged", emoji_record(), seed=seed, image_share=0.0)
        assert not sample.images
        context, _, target = (tuple(ids) for _, ids in roles(sample))
        seen.add((context, target))
    name, words = tuple(encode("grinning face")), tuple(encode("happy, smile, teeth"))
    assert seen == {(name, words), (words, name)}


def test_bridged_without_keywords_always_takes_the_picture() -> None:
    (sample,) = made("bridged", emoji_record(meta={}), image_share=0.0)
    assert len(sample.images) == 1


def test_bridged_record_with_a_picture_in_its_query_keeps_query_and_target() -> None:
    record = emoji_record(
        query=(text_part("what is it"), image_part(1)), target=(text_part("a cat"),), meta={}
    )
    (sample,) = made("bridged", record, image_share=0.0)
    assert roles(sample) == [
        (Role.CONTEXT, PICTURE + encode("what is it")),
        (Role.BRIDGE, [1]),
        (Role.TARGET, encode("a cat")),
    ]


@pytest.mark.parametrize(("share", "head"), [(1.0, PICTURE), (0.0, [6])], ids=["picture", "bos"])
def test_language_supervises_the_text_and_its_end(share: float, head: list[int]) -> None:
    (sample,) = made("language", emoji_record(), image_share=share, keywords="none")
    text = [*encode("grinning face"), 1]
    assert roles(sample) == [(Role.CONTEXT, head + text)]
    assert sample.text_positions.tolist() == [False] * len(head) + [True] * len(text)


def test_a_share_of_the_samples_has_a_picture() -> None:
    """4 sigma of 1000 draws at 0.34 is 0.06."""
    shared = settings(image_share=0.34, keywords="none")
    record, count = emoji_record(), 0
    for number in range(1000):
        draw = draw_for(0, "s", 0, number)
        options = {"draw": draw, "vocabulary": VOCABULARY, "settings": shared}
        count += bool(VIEWS["language"](record, **options)[0].images)
    assert count / 1000 == pytest.approx(0.34, abs=0.06)


def test_a_pair_is_query_and_one_positive_each_ending_on_eos() -> None:
    query, target = made("pair", emoji_record(), keywords="none", instruction="Find the picture")
    assert roles(query) == [
        (Role.CONTEXT, encode("Find the picture grinning face")),
        (Role.BRIDGE, [1]),
    ]
    assert roles(target) == [(Role.CONTEXT, PICTURE), (Role.BRIDGE, [1])]


def test_a_pair_draws_every_positive() -> None:
    values = {
        int(made("pair", emoji_record(), seed=seed)[1].images[0][-1, -1, 0]) for seed in range(20)
    }
    assert values == {40, 200}


def test_a_long_text_is_cut_before_eos_and_counted() -> None:
    long = " ".join(f"w{number}" for number in range(10))
    record = emoji_record(query=(text_part(long),), meta={}, target=(text_part(long),))
    query, _ = made("pair", record, max_text_tokens=4)
    assert query.input_ids.tolist() == [*encode(long)[:4], 1]
    assert query.truncated == 1
    (bridged,) = made("bridged", record, max_text_tokens=4)
    assert bridged.input_ids.tolist() == [*PICTURE, 1, *encode(long)[:4]]


@pytest.mark.parametrize("view", EMOJI_VIEWS)
def test_an_undecodable_picture_gives_fillers_and_the_reason(view: str) -> None:
    record = emoji_record(images=(b"not a picture", b"neither"))
    result = view_samples(
        view,
        record,
        draw=draw_for(0, "s", 0, 0),
        vocabulary=VOCABULARY,
        settings=settings(image_share=1.0),
    )
    assert result.reason is not None
    assert "not a readable picture" in result.reason
    assert len(result.samples) == (2 if view == "pair" else 1)
    for sample in result.samples:
        assert sample.is_filler
        assert sample.input_ids.tolist() == [VOCABULARY.eos]
        assert not sample.text_positions.any()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"positives": ()}, "no picture"),
        ({"query": (text_part("  "),), "meta": {}, "target": ()}, "no tokens"),
        ({"meta": {"keywords": "happy"}}, "expected a list of texts"),
    ],
    ids=["no picture", "no text", "odd keywords"],
)
def test_a_record_that_a_view_cannot_use_says_why(changes: dict[str, object], reason: str) -> None:
    result = view_samples(
        "caption",
        emoji_record(**changes),
        draw=draw_for(0, "s", 0, 0),
        vocabulary=VOCABULARY,
        settings=settings(),
    )
    assert reason in str(result.reason)


def test_draws_repeat_for_one_record_and_differ_between_records() -> None:
    first = draw_for(1, "stage", 2, 3).random(4)
    assert np.array_equal(first, draw_for(1, "stage", 2, 3).random(4))
    for other in ((2, "stage", 2, 3), (1, "x", 2, 3), (1, "stage", 3, 3), (1, "stage", 2, 4)):
        assert not np.array_equal(first, draw_for(*other).random(4))


@pytest.mark.parametrize("view", EMOJI_VIEWS)
def test_the_same_draw_gives_the_same_sample(view: str) -> None:
    options = {"training": True, "keywords": "sample", "image_share": 0.5}
    for seed in range(5):
        one = made(view, emoji_record(), seed=seed, **options)
        two = made(view, emoji_record(), seed=seed, **options)
        for left, right in zip(one, two, strict=True):
            assert np.array_equal(left.input_ids, right.input_ids)
            assert all(map(np.array_equal, left.images, right.images))


@pytest.mark.parametrize("instruction", ["", "Find it"])
@pytest.mark.parametrize(
    ("text", "with_image"),
    [("a cat", False), ("a cat", True), (None, True)],
    ids=["text", "picture and text", "picture"],
)
def test_serialisation_is_picture_instruction_text_eos(
    instruction: str, text: str | None, with_image: bool
) -> None:
    words = " ".join(part for part in (instruction, text) if part)
    sample = embedding_sample(
        text=text,
        image=np.zeros((40, 40, 3), dtype=np.uint8) if with_image else None,
        instruction=instruction,
        vocabulary=VOCABULARY,
        settings=settings(),
    )
    expected = (PICTURE if with_image else []) + encode(words) + [VOCABULARY.eos]
    assert sample.input_ids.tolist() == expected
    assert sample.segments[-1].role is Role.BRIDGE
    assert sample.segments[-1].stop - sample.segments[-1].start == 1


def test_pictures_kept_stay_within_the_limit() -> None:
    one = 32 * 32 * 3
    cache = PictureCache(config=ImageConfig(cache_bytes=3 * one), geometry=GEOMETRY)
    files = [png(value) for value in range(10)]
    for file in files:
        cache.load(file)
        assert cache._num_bytes <= 3 * one
    assert cache.load(files[-1]) is cache.load(files[-1])
    assert not cache.load(files[-1]).flags.writeable


def test_augmentation_moves_in_white_and_never_brightens() -> None:
    image = np.full((32, 32, 3), 100, dtype=np.uint8)
    config = ImageConfig(augment_shift=0.1, augment_brightness=0.2)
    seen = set()
    for number in range(50):
        result = augment(image, draw=draw_for(0, "s", 0, number), config=config)
        inside = result[4:-4, 4:-4]
        assert 79 <= int(inside.min()) == int(inside.max()) <= 100
        white = result > 100
        assert set(np.unique(result[~white])) == {int(inside[0, 0, 0])}
        seen.add((int(white[0].all()), int(white[-1].all()), int(white[:, 0].all())))
    assert len(seen) > 2
    assert int(image.min()) == 100


def test_vocabulary_agrees_with_transformers() -> None:
    from transformers import AutoTokenizer

    vocabulary = Vocabulary.load(TOKENIZER, tiny_model())
    reference = AutoTokenizer.from_pretrained(str(TOKENIZER))
    for text in ("grinning face: happy", "Ünïcödé 12345", " spaces  inside "):
        assert vocabulary.encode(text) == reference(text, add_special_tokens=False)["input_ids"]
    assert vocabulary.eos == reference.eos_token_id
    assert vocabulary.mask == reference.mask_token_id
    assert vocabulary.size == len(reference)


def test_a_special_token_in_a_text_is_read_as_text() -> None:
    vocabulary = Vocabulary.load(TOKENIZER, tiny_model())
    ids = vocabulary.encode("<|image_pad|> and <|im_end|>")
    assert not {vocabulary.image_pad, vocabulary.eos} & set(ids)


def test_a_missing_mask_token_is_added_and_another_missing_token_is_named(tmp_path: Path) -> None:
    known = Vocabulary.load(TOKENIZER, tiny_model())
    added = Vocabulary.load(TOKENIZER, tiny_model(mask_token="<|hidden|>"))
    assert (added.mask, added.size) == (known.size, known.size + 1)
    assert (len(known.new), added.new) == (0, range(known.size, known.size + 1))
    content = json.loads((TOKENIZER / "tokenizer.json").read_text(encoding="utf-8"))
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match=r"has no token <\|stop\|>"):
        Vocabulary.load(tmp_path, tiny_model(bridge_token="<|stop|>"))


def test_a_tokenizer_file_that_is_cut_off_is_named(tmp_path: Path) -> None:
    content = (TOKENIZER / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be read: .*fetch the model"):
        Vocabulary.load(tmp_path, tiny_model())


def test_new_tokens_go_behind_the_last_id_and_one_that_is_there_stays() -> None:
    known = Vocabulary.load(TOKENIZER, tiny_model())
    tokens = ("<|a|>", "<|mask|>", "<|b|>")
    added = Vocabulary.load(TOKENIZER, tiny_model(new_tokens=tokens, bridge_token="<|b|>"))
    assert added.new == range(known.size, known.size + 2)
    assert (added.mask, added.eos, added.size) == (known.mask, known.size + 1, known.size + 2)
    assert not {*added.encode("<|a|> and <|b|>")} & {*added.new}  # in a text it is text


def tiny_model(**changes: object) -> ModelConfig:
    return ModelConfig(random=RandomModelConfig(), tokenizer="x", **changes)  # type: ignore[arg-type]
