"""What is hidden and what is asked for."""

import numpy as np
import pytest

from cocoa_dist.config import ContrastiveConfig, NextTokenConfig, ReconstructionConfig
from cocoa_dist.data.corruption import CorruptedSample, corrupt, uncorrupted
from cocoa_dist.data.samples import ImageGeometry, Sample, Vocabulary, draw_for, filler_sample
from cocoa_dist.segments import Role, Segment

GEOMETRY = ImageGeometry(patch_size=8)
VOCABULARY = Vocabulary(
    eos=1,
    image_pad=2,
    vision_start=3,
    vision_end=4,
    mask=5,
    bos=6,
    size=99,
    encoder=lambda text: [ord(letter) for letter in text],
)
NUM_SAMPLES = 400


def caption_sample(num_text: int = 10) -> Sample:
    ids = [3, 2, 2, 2, 2, 4, *range(20, 20 + num_text)]
    return Sample(
        input_ids=np.array(ids),
        segments=(Segment(0, len(ids), Role.CONTEXT),),
        images=(np.zeros((32, 32, 3), dtype=np.uint8),),
        text_positions=np.array([False] * 6 + [True] * num_text),
    )


def bridged_sample() -> Sample:
    ids = [20, 21, 22, 1, 30, 31, 32, 33]
    return Sample(
        input_ids=np.array(ids),
        segments=(
            Segment(0, 3, Role.CONTEXT),
            Segment(3, 4, Role.BRIDGE),
            Segment(4, 8, Role.TARGET),
        ),
        images=(),
        text_positions=np.array([True, True, True, False, True, True, True, True]),
    )


def apply(
    sample: Sample,
    objective: ReconstructionConfig | NextTokenConfig | ContrastiveConfig,
    number: int = 0,
) -> CorruptedSample:
    return corrupt(
        sample,
        objective,
        draw=draw_for(0, "s", 0, number),
        vocabulary=VOCABULARY,
        geometry=GEOMETRY,
    )


def test_shares_of_hidden_text_and_pictures_are_the_configured_ones() -> None:
    """4 sigma: text 4000 draws at 0.2: 0.025; pictures 1600 at 0.5: 0.05."""
    objective = ReconstructionConfig(text_mask_ratio=0.2, image_mask_ratio=0.5)
    results = [apply(caption_sample(), objective, number) for number in range(NUM_SAMPLES)]
    text = sum(len(result.labels) for result in results) / (10 * NUM_SAMPLES)
    pictures = sum(int(result.image_masks[0].sum()) for result in results) / (4 * NUM_SAMPLES)
    assert text == pytest.approx(0.2, abs=0.025)
    assert pictures == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_ratios_of_none_and_all_are_exact(ratio: float) -> None:
    objective = ReconstructionConfig(text_mask_ratio=ratio, image_mask_ratio=ratio)
    result = apply(caption_sample(), objective)
    assert len(result.labels) == 10 * ratio
    assert int(result.image_masks[0].sum()) == 4 * ratio


@pytest.mark.parametrize("shift", [True, False])
def test_labels_are_the_hidden_tokens(shift: bool) -> None:
    sample = caption_sample()
    result = apply(sample, ReconstructionConfig(text_mask_ratio=0.5, label_shift=shift))
    hidden = np.flatnonzero(result.input_ids == VOCABULARY.mask)
    assert len(hidden) > 0
    assert np.array_equal(result.label_rows, hidden - shift)
    assert np.array_equal(result.labels, sample.input_ids[hidden])
    kept = np.setdiff1d(np.arange(16), hidden)
    assert np.array_equal(result.input_ids[kept], sample.input_ids[kept])
    assert sample.text_positions[hidden].all()


def test_the_clean_sample_is_left_alone() -> None:
    sample = caption_sample()
    before = sample.input_ids.copy()
    apply(sample, ReconstructionConfig(text_mask_ratio=1.0, image_mask_ratio=1.0))
    assert np.array_equal(sample.input_ids, before)


def test_only_the_target_of_a_bridged_sample_is_hidden() -> None:
    result = apply(bridged_sample(), ReconstructionConfig(text_mask_ratio=1.0))
    assert result.input_ids.tolist() == [20, 21, 22, 1, 5, 5, 5, 5]
    assert result.label_rows.tolist() == [3, 4, 5, 6]  # EOS predicts the first
    assert result.labels.tolist() == [30, 31, 32, 33]


def test_next_token_asks_for_every_text_token_and_hides_nothing() -> None:
    sample = caption_sample(3)
    result = apply(sample, NextTokenConfig())
    assert result.input_ids.tolist() == sample.input_ids.tolist()
    assert result.label_rows.tolist() == [5, 6, 7]
    assert result.labels.tolist() == [20, 21, 22]
    assert not result.image_masks[0].any()


def test_next_token_asks_for_the_target_alone_where_there_is_one() -> None:
    assert apply(bridged_sample(), NextTokenConfig()).labels.tolist() == [30, 31, 32, 33]


def test_the_first_token_has_no_row_before_it() -> None:
    sample = Sample(
        input_ids=np.array([20, 21]),
        segments=(Segment(0, 2, Role.CONTEXT),),
        images=(),
        text_positions=np.array([True, True]),
    )
    shifted = apply(sample, ReconstructionConfig(text_mask_ratio=1.0))
    assert shifted.input_ids.tolist() == [20, VOCABULARY.mask]
    assert shifted.label_rows.tolist() == [0]
    assert apply(sample, NextTokenConfig()).label_rows.tolist() == [0]
    plain = apply(sample, ReconstructionConfig(text_mask_ratio=1.0, label_shift=False))
    assert plain.label_rows.tolist() == [0, 1]


@pytest.mark.parametrize(
    "objective",
    [ReconstructionConfig(text_mask_ratio=1.0), NextTokenConfig(), ContrastiveConfig()],
    ids=lambda objective: objective.kind,
)
def test_a_filler_is_never_hidden_or_asked_for(
    objective: ReconstructionConfig | NextTokenConfig | ContrastiveConfig,
) -> None:
    result = apply(filler_sample(VOCABULARY), objective)
    assert result.input_ids.tolist() == [VOCABULARY.eos]
    assert len(result.labels) == 0


def test_contrastive_hides_nothing() -> None:
    sample = caption_sample()
    result, plain = apply(sample, ContrastiveConfig()), uncorrupted(sample, geometry=GEOMETRY)
    assert result.input_ids is plain.input_ids
    assert len(result.labels) == 0
    assert [mask.tolist() for mask in result.image_masks] == [[False] * 4]


def test_the_same_draw_hides_the_same() -> None:
    objective = ReconstructionConfig(text_mask_ratio=0.3, image_mask_ratio=0.5)
    one, two = (apply(caption_sample(), objective, 7) for _ in range(2))
    assert np.array_equal(one.input_ids, two.input_ids)
    assert np.array_equal(one.image_masks[0], two.image_masks[0])
    others = [apply(caption_sample(), objective, number) for number in range(8, 20)]
    assert any(not np.array_equal(one.input_ids, other.input_ids) for other in others)
