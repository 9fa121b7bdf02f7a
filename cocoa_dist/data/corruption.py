"""What a stage hides from a sample and what it asks for: masked text, next tokens, masked patches.

Pure: (sample, objective, draw) to the same result on any rank. No torch, and no pixel is touched
here: masked visual tokens are listed, `packing.py` fills them with noise.
"""

from dataclasses import dataclass

import numpy as np

from cocoa_dist.config import ObjectiveConfig, ReconstructionConfig
from cocoa_dist.data.geometry import ImageGeometry
from cocoa_dist.data.samples import Bools, Ints, Sample, Vocabulary
from cocoa_dist.segments import Role


@dataclass(frozen=True)
class CorruptedSample:
    """A sample as the model sees it, and what is asked of it; rows in the sample's coordinates."""

    sample: Sample
    input_ids: Ints  # (n,) with masked text replaced
    label_rows: Ints  # (S,): rows whose hidden state predicts a token, ascending
    labels: Ints  # (S,): the tokens they predict
    image_masks: tuple[Bools, ...]  # per picture, over its merged tokens: True is hidden


def uncorrupted(sample: Sample, *, geometry: ImageGeometry) -> CorruptedSample:
    """Return the sample with nothing hidden and nothing asked, as for an embedding."""
    none = np.empty(0, dtype=np.int64)
    return CorruptedSample(
        sample=sample,
        input_ids=sample.input_ids,
        label_rows=none,
        labels=none,
        image_masks=tuple(
            np.zeros(geometry.num_tokens(*image.shape[:2]), dtype=np.bool_)
            for image in sample.images
        ),
    )


def corrupt(
    sample: Sample,
    objective: ObjectiveConfig,
    *,
    draw: np.random.Generator,
    vocabulary: Vocabulary,
    geometry: ImageGeometry,
) -> CorruptedSample:
    """Apply a stage's objective to one sample.

    reconstruction: each token of text and each visual token is hidden with its own probability.
    next_token: nothing is hidden, every token of text is asked for from the row before it.
    contrastive: nothing. Where a sample has a TARGET, only its text is hidden or asked for.
    """
    plain = uncorrupted(sample, geometry=geometry)
    if objective.kind == "contrastive" or sample.is_filler:
        return plain
    if isinstance(objective, ReconstructionConfig):
        return _reconstruction(plain, objective, draw=draw, vocabulary=vocabulary)
    asked = np.flatnonzero(_supervised(sample, shifted=True))
    return CorruptedSample(
        sample=sample,
        input_ids=sample.input_ids,
        label_rows=asked - 1,
        labels=sample.input_ids[asked],
        image_masks=plain.image_masks,
    )


def _reconstruction(
    plain: CorruptedSample,
    objective: ReconstructionConfig,
    *,
    draw: np.random.Generator,
    vocabulary: Vocabulary,
) -> CorruptedSample:
    sample = plain.sample
    shifted = objective.label_shift
    drawn = draw.random(len(sample.input_ids)) < objective.text_mask_ratio
    hidden = np.flatnonzero(drawn & _supervised(sample, shifted=shifted))
    input_ids = sample.input_ids.copy()
    input_ids[hidden] = vocabulary.mask
    masks = plain.image_masks
    if objective.image_mask_ratio > 0.0:
        masks = tuple(draw.random(len(m)) < objective.image_mask_ratio for m in masks)
    return CorruptedSample(
        sample=sample,
        input_ids=input_ids,
        label_rows=hidden - 1 if shifted else hidden,
        labels=sample.input_ids[hidden],
        image_masks=masks,
    )


def _supervised(sample: Sample, *, shifted: bool) -> Bools:
    """Return which tokens may be hidden or asked for, (n,).

    A shifted label needs a row before it, so the first token of a sample never has one.
    """
    allowed = sample.text_positions.copy()
    if any(segment.role is Role.TARGET for segment in sample.segments):
        for segment in sample.segments:
            if segment.role is not Role.TARGET:
                allowed[segment.start : segment.stop] = False
    if shifted:
        allowed[:1] = False
    return allowed
