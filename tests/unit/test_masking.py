"""How text and visual tokens are chosen to be hidden: ratios, counts, spans, squares, contexts."""

import numpy as np
import pytest
from test_corruption import GEOMETRY, VOCABULARY, apply, bridged_sample, caption_sample
from test_samples import PICTURE, emoji_record, encode, made, png, roles

from cocoa_dist.config import ReconstructionConfig
from cocoa_dist.data.corruption import CorruptedSample
from cocoa_dist.data.records import image_part, text_part
from cocoa_dist.data.samples import Sample, view_samples
from cocoa_dist.segments import Role, Segment

DRAWS = 1_000_000
SHAPES = [
    {},
    {"mask_sampling": "exact"},
    {"text_mask_span": 3, "image_mask_block": 2},
    {"text_mask_span": 3, "image_mask_block": 2, "mask_sampling": "exact"},
]
NAMES = ["one by one", "exact count", "spans and squares", "exact spans and squares"]


def long_sample(num_text: int = 250, tokens: int = 16) -> Sample:
    """Return a picture of `tokens` x `tokens` visual tokens and a text."""
    side = tokens * GEOMETRY.factor
    ids = [3, *[2] * tokens**2, 4, *range(20, 20 + num_text)]
    return Sample(
        input_ids=np.array(ids),
        segments=(Segment(0, len(ids), Role.CONTEXT),),
        images=(np.zeros((side, side, 3), dtype=np.uint8),),
        text_positions=np.array([False] * (tokens**2 + 2) + [True] * num_text),
    )


def hidden_text(result: CorruptedSample) -> np.ndarray:
    return result.input_ids == VOCABULARY.mask


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES, ids=NAMES)
def test_a_million_draws_keep_the_ratio(shape: dict) -> None:
    """5 standard errors; a group of g tokens that is hidden together counts as one draw."""
    ratios = {"text_mask_ratio": 0.37, "image_mask_ratio": 0.6}
    objective = ReconstructionConfig(**ratios, **shape)
    sample, places = long_sample(), DRAWS // 250
    text = pictures = 0
    for number in range(places):
        result = apply(sample, objective, number)
        hidden = hidden_text(result)
        assert not hidden[~sample.text_positions].any()
        assert len(result.labels) == hidden.sum()
        text += int(hidden.sum())
        pictures += int(result.image_masks[0].sum())
    for found, total, ratio, group in (
        (text, 250 * places, 0.37, shape.get("text_mask_span", 1)),
        (pictures, 256 * places, 0.6, shape.get("image_mask_block", 1) ** 2),
    ):
        error = 5 * np.sqrt(ratio * (1 - ratio) * group / total)
        assert found / total == pytest.approx(ratio, abs=error)


@pytest.mark.parametrize("shape", SHAPES, ids=NAMES)
def test_every_place_is_hidden_equally_often(shape: dict) -> None:
    """Edges too, where spans and squares are cut: 4000 draws, 5 standard errors are 0.04."""
    objective = ReconstructionConfig(text_mask_ratio=0.5, image_mask_ratio=0.5, **shape)
    sample = long_sample(num_text=11, tokens=5)
    results = [apply(sample, objective, number) for number in range(4000)]
    text = np.mean([hidden_text(r)[sample.text_positions] for r in results], axis=0)
    pictures = np.mean([r.image_masks[0] for r in results], axis=0)
    np.testing.assert_allclose(text, 0.5, atol=0.04)
    np.testing.assert_allclose(pictures, 0.5, atol=0.04)


@pytest.mark.parametrize("span", [1, 3])
def test_an_exact_count_is_the_same_in_every_sample(span: int) -> None:
    objective = ReconstructionConfig(
        text_mask_ratio=0.3,
        image_mask_ratio=0.25,
        mask_sampling="exact",
        text_mask_span=span,
        image_mask_block=span,
    )
    for number in range(50):
        result = apply(long_sample(num_text=20, tokens=4), objective, number)
        assert len(result.labels) == 6
        assert result.image_masks[0].sum() == 4


def test_an_exact_count_of_short_texts_keeps_the_ratio() -> None:
    """3 tokens at 0.2: none or one, 0.6 on average; 4 standard errors of 2000 draws are 0.044."""
    objective = ReconstructionConfig(text_mask_ratio=0.2, mask_sampling="exact")
    counts = [len(apply(caption_sample(3), objective, n).labels) for n in range(2000)]
    assert set(counts) == {0, 1}
    assert np.mean(counts) == pytest.approx(0.6, abs=0.044)


def test_spans_hide_neighbours_and_squares_hide_squares() -> None:
    objective = ReconstructionConfig(
        text_mask_ratio=0.3, image_mask_ratio=0.3, text_mask_span=4, image_mask_block=3
    )
    alone = inside = 0
    for number in range(100):
        result = apply(long_sample(num_text=200, tokens=12), objective, number)
        text = hidden_text(result)[-200:].astype(int)
        grid = result.image_masks[0].reshape(12, 12).astype(int)
        # a hidden token whose neighbours on both sides are shown, away from the edges
        alone += int((text[1:-1] & ~text[:-2] & ~text[2:] & 1).sum())
        inside += int((grid[1:-1, 1:-1] & ~grid[:-2, 1:-1] & ~grid[2:, 1:-1] & 1).sum())
    assert alone == 0
    assert inside == 0


@pytest.mark.parametrize("shape", SHAPES, ids=NAMES)
def test_draws_depend_on_the_record_alone(shape: dict) -> None:
    """Not on what was drawn before, nor on rank or worker: so on no world size and no resume."""
    objective = ReconstructionConfig(
        text_mask_ratio=0.4, image_mask_ratio=0.5, context_mask_ratio=0.0, **shape
    )
    sample = long_sample(num_text=30, tokens=4)
    forwards = [apply(sample, objective, n) for n in range(8)]
    backwards = [apply(sample, objective, n) for n in reversed(range(8))][::-1]
    for one, other in zip(forwards, backwards, strict=True):
        assert np.array_equal(one.input_ids, other.input_ids)
        assert np.array_equal(one.image_masks[0], other.image_masks[0])


def test_a_context_is_hidden_at_its_ratio_and_never_asked_for() -> None:
    everything = ReconstructionConfig(text_mask_ratio=0.0, context_mask_ratio=1.0)
    result = apply(bridged_sample(), everything)
    assert result.input_ids.tolist() == [5, 5, 5, 1, 30, 31, 32, 33]
    assert len(result.labels) == 0
    both = apply(bridged_sample(), ReconstructionConfig(text_mask_ratio=1.0, context_mask_ratio=1))
    assert both.input_ids.tolist() == [5, 5, 5, 1, 5, 5, 5, 5]
    assert both.labels.tolist() == [30, 31, 32, 33]


def test_a_context_loses_visual_tokens_too() -> None:
    sample = bridged_sample()
    pictured = Sample(
        input_ids=np.concatenate([[3, 2, 2, 2, 2, 4], sample.input_ids]),
        segments=(
            Segment(0, 9, Role.CONTEXT),
            Segment(9, 10, Role.BRIDGE),
            Segment(10, 14, Role.TARGET),
        ),
        images=(np.zeros((32, 32, 3), dtype=np.uint8),),
        text_positions=np.concatenate([[False] * 6, sample.text_positions]),
    )
    only = apply(pictured, ReconstructionConfig(text_mask_ratio=0.7, context_mask_ratio=1.0))
    assert only.image_masks[0].all()
    none = apply(pictured, ReconstructionConfig(text_mask_ratio=0.7))
    assert not none.image_masks[0].any()


def test_separate_views_have_one_text_in_the_context_and_another_as_the_target() -> None:
    name, words = tuple(encode("grinning face")), tuple(encode("happy, smile, teeth"))
    seen = set()
    for seed in range(20):
        (sample,) = made("bridged", emoji_record(), seed=seed, separate_views=True)
        (_, context), (_, bridge), (_, target) = roles(sample)
        assert context[: len(PICTURE)] == PICTURE
        assert bridge == [1]
        seen.add((tuple(context[len(PICTURE) :]), tuple(target)))
    assert seen == {(name, words), (words, name)}


def test_separate_views_take_two_different_captions() -> None:
    record = emoji_record(meta={"captions": ["one", "two", "three"]})
    for seed in range(10):
        (sample,) = made("bridged", record, seed=seed, separate_views=True, image_share=0.0)
        (_, context), _, (_, target) = roles(sample)
        assert context != target
        assert {tuple(context), tuple(target)} <= {
            tuple(encode(t)) for t in ("one", "two", "three")
        }


def test_a_record_with_one_text_has_no_separate_views() -> None:
    record = emoji_record(meta={}, query=(text_part("a cat"),), target=(text_part("a cat"),))
    from test_samples import VOCABULARY as WORDS
    from test_samples import settings

    from cocoa_dist.data.samples import draw_for

    result = view_samples(
        "bridged",
        record,
        draw=draw_for(0, "s", 0, 0),
        vocabulary=WORDS,
        settings=settings(view="bridged", separate_views=True),
    )
    assert result.reason == "the record has no second text, expected two for data.separate_views"


def test_a_document_keeps_the_order_of_its_texts_and_pictures() -> None:
    document = emoji_record(
        query=(text_part("a"), image_part(0), text_part("b c"), image_part(1), text_part("d")),
        positives=(),
        target=(),
        meta={},
    )
    (sample,) = made("interleaved", document)
    expected = [*encode("a"), *PICTURE, *encode("b c"), *PICTURE, *encode("d")]
    assert sample.input_ids.tolist() == expected
    assert [s.role for s in sample.segments] == [Role.CONTEXT]
    assert len(sample.images) == 2
    assert sample.text_positions.sum() == 4


def test_texts_of_a_document_share_one_limit_and_its_pictures_all_stay() -> None:
    document = emoji_record(
        query=(text_part("a b"), image_part(0), text_part("c d"), image_part(1), text_part("e")),
        positives=(),
        target=(),
        meta={},
        images=(png(1), png(2)),
    )
    from test_samples import VOCABULARY as WORDS
    from test_samples import settings

    from cocoa_dist.data.samples import draw_for

    result = view_samples(
        "interleaved",
        document,
        draw=draw_for(0, "s", 0, 0),
        vocabulary=WORDS,
        settings=settings(view="interleaved", max_text_tokens=3),
    )
    (sample,) = result.samples
    assert sample.input_ids.tolist() == [*encode("a b"), *PICTURE, *encode("c"), *PICTURE]
    assert sample.truncated == 2


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_records_of_captions_are_a_picture_with_text_or_text_alone(share: float) -> None:
    (sample,) = made("interleaved", emoji_record(), keywords="none", image_share=share)
    assert sample.input_ids.tolist() == [*(PICTURE if share else []), *encode("grinning face")]


@pytest.mark.parametrize("kind", ["text", "image"])
def test_documents_of_one_kind_are_documents(kind: str) -> None:
    part = text_part("a cat") if kind == "text" else image_part(0)
    document = emoji_record(query=(part,), positives=(), target=(), meta={})
    (sample,) = made("interleaved", document)
    assert sample.input_ids.tolist() == (encode("a cat") if kind == "text" else PICTURE)
