"""What a stage hides from a sample and what it asks for: masked text, next tokens, masked patches.

Pure: (sample, objective, draw) to the same result on any rank. No torch, and no pixel is touched
here: masked visual tokens are listed, `packing.py` fills them with noise.
"""

from dataclasses import dataclass

import numpy as np

from cocoa_dist.config import ObjectiveConfig, ReconstructionConfig
from cocoa_dist.data.geometry import Grid, ImageGeometry
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

    reconstruction: tokens of text and visual tokens are hidden at a ratio each, one by one or in
    spans and squares; those of a CONTEXT beside a TARGET at a ratio of their own, unasked.
    next_token: nothing is hidden, every token of text is asked for from the row before it.
    contrastive: nothing. Where a sample has a TARGET, only its text is hidden or asked for.
    """
    plain = uncorrupted(sample, geometry=geometry)
    if objective.kind == "contrastive" or sample.is_filler:
        return plain
    if isinstance(objective, ReconstructionConfig):
        return _reconstruction(
            plain, objective, draw=draw, vocabulary=vocabulary, geometry=geometry
        )
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
    geometry: ImageGeometry,
) -> CorruptedSample:
    sample = plain.sample
    shifted = objective.label_shift
    ratio = objective.text_mask_ratio
    hidden = np.flatnonzero(
        _hidden_text(_supervised(sample, shifted=shifted), ratio, objective, draw=draw)
    )
    input_ids = sample.input_ids.copy()
    input_ids[hidden] = vocabulary.mask
    ratio = objective.image_mask_ratio
    if objective.context_mask_ratio > 0.0:
        context = sample.text_positions & ~_in_target(sample)
        unseen = _hidden_text(context, objective.context_mask_ratio, objective, draw=draw)
        input_ids[unseen] = vocabulary.mask
        ratio = ratio or objective.context_mask_ratio
    masks = plain.image_masks
    if ratio > 0.0:
        masks = tuple(
            _hidden_visual(geometry.grid(image), ratio, objective, draw=draw, merge=geometry.merge)
            for image in sample.images
        )
    return CorruptedSample(
        sample=sample,
        input_ids=input_ids,
        label_rows=hidden - 1 if shifted else hidden,
        labels=sample.input_ids[hidden],
        image_masks=masks,
    )


def _hidden_text(
    allowed: Bools, ratio: float, objective: ReconstructionConfig, *, draw: np.random.Generator
) -> Bools:
    """Return which of the allowed tokens (n,) are hidden.

    Spans go round in a ring that begins anywhere: no token is likelier than others.
    """
    span, places = objective.text_mask_span, np.arange(len(allowed))
    count = int(allowed.sum())
    if span > 1 and count:
        places[allowed] = (np.arange(count) + int(draw.integers(count))) % count
    exact = objective.mask_sampling == "exact"
    return _chosen(allowed, places // span, places, ratio, exact=exact, draw=draw)


def _hidden_visual(
    grid: Grid,
    ratio: float,
    objective: ReconstructionConfig,
    *,
    draw: np.random.Generator,
    merge: int,
) -> Bools:
    """Return which of a picture's visual tokens (m,) are hidden; `grid` is in patches.

    Squares lie on a torus that begins anywhere: no token is likelier than others.
    """
    time, high, wide = grid[0], grid[1] // merge, grid[2] // merge
    side, places = objective.image_mask_block, np.arange(time * high * wide)
    groups = places
    if side > 1:
        down, across = int(draw.integers(high)), int(draw.integers(wide))
        frame, row, column = np.indices((time, high, wide))
        row, column = (row + down) % high, (column + across) % wide
        places = ((frame * high + row) * wide + column).ravel()
        groups = ((frame * high + row // side) * wide + column // side).ravel()
    allowed = np.ones(time * high * wide, dtype=np.bool_)
    exact = objective.mask_sampling == "exact"
    return _chosen(allowed, groups, places, ratio, exact=exact, draw=draw)


def _chosen(
    allowed: Bools,
    groups: Ints,
    places: Ints,
    ratio: float,
    *,
    exact: bool,
    draw: np.random.Generator,
) -> Bools:
    """Choose a share of the allowed places (n,), group by group; every place has that probability.

    `exact`: n times the ratio of them, a fraction of a place being drawn, so that short texts keep
    the ratio as well; the last group is cut, in the order of `places` (n,). Otherwise each group is
    chosen by itself.
    """
    keys = draw.random(int(groups.max()) + 1)[groups]
    if not exact:
        return allowed & (keys < ratio)
    rows = np.flatnonzero(allowed)
    count = int(len(rows) * ratio + draw.random())
    chosen = np.zeros(len(allowed), dtype=np.bool_)
    chosen[rows[np.lexsort((places[rows], keys[rows]))][:count]] = True
    return chosen


def _supervised(sample: Sample, *, shifted: bool) -> Bools:
    """Return which tokens may be hidden or asked for, (n,).

    A shifted label needs a row before it, so the first token of a sample never has one.
    """
    allowed = sample.text_positions.copy()
    if any(segment.role is Role.TARGET for segment in sample.segments):
        allowed &= _in_target(sample)
    if shifted:
        allowed[:1] = False
    return allowed


def _in_target(sample: Sample) -> Bools:
    inside = np.zeros(len(sample.input_ids), dtype=np.bool_)
    for segment in sample.segments:
        if segment.role is Role.TARGET:
            inside[segment.start : segment.stop] = True
    return inside
