"""From corrupted samples to one PackedBatch: rows end to end, patches, targets, attention plans.

Everything is vectorised over the pack; only segments are walked one by one. Pixels get their noise
here, so that a target is always the clean picture.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from cocoa_dist.attention import AttentionPlan, compile_plan
from cocoa_dist.batch import PackedBatch
from cocoa_dist.data.bounds import TWO_TEXTS
from cocoa_dist.data.corruption import CorruptedSample, uncorrupted
from cocoa_dist.data.dialogues import most_added_tokens
from cocoa_dist.data.geometry import ImageGeometry
from cocoa_dist.data.images import Pixels
from cocoa_dist.data.records import Record, Side, side_texts
from cocoa_dist.data.samples import (
    Bools,
    Ints,
    ViewSettings,
    Vocabulary,
    filler_sample,
    text_start,
)
from cocoa_dist.data.vision_layout import vision_layout
from cocoa_dist.segments import AttentionRule, Role, Segment

Floats = NDArray[np.float32]
Pooling = Literal["last", "mean", "compression", "late_interaction"]

JOINT_EVERY = 4  # the index counts texts one by one; joined, each may take a token more
_LEVELS = 2**16  # of noise
_VARIANCE_FLOOR = 1e-6  # of normalised patches (arXiv 2111.06377, released code)


@dataclass(frozen=True)
class EmbeddingInfo:
    """Which embedding a sample of the pack is."""

    pair_id: int  # position of its pair in the global batch
    side: int  # 0 query, 1 target, 2 on the pair's hard negatives
    identity: int  # int64, see identity_number; equal for targets that are the same thing
    weight: float = 1.0  # 0 for a record that could not be used, and a negative that is not there
    content: int = 0  # int64; equal for equal texts and pictures
    score: float = math.nan  # a teacher's, of this against the pair's query


def identity_number(identity: str) -> int:
    """Return a record's identity as int64."""
    digest = hashlib.blake2b(identity.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def build_pack(
    samples: Sequence[CorruptedSample],
    *,
    rule: AttentionRule,
    geometry: ImageGeometry,
    vocabulary: Vocabulary,
    embeddings: Sequence[EmbeddingInfo] = (),
    pooling: Pooling = "last",
    noise: Sequence[np.random.Generator] = (),
    normalise_patches: bool = False,
    replace_pixels: bool = True,
) -> PackedBatch:
    """Build one micro-batch on the host.

    `embeddings`: one for each sample, or none at all. `noise`: one generator for each sample,
    needed where visual tokens are hidden; without `replace_pixels` their pixels stay, and the model
    replaces them. Without samples the pack holds a filler alone.
    """
    if not samples:
        samples = [uncorrupted(filler_sample(vocabulary), geometry=geometry)]
        embeddings = ()
    if embeddings and len(embeddings) != len(samples):
        raise ValueError(f"{len(samples)} samples, but {len(embeddings)} embeddings")
    lengths = np.array([len(s.input_ids) for s in samples])
    starts = np.cumsum(lengths) - lengths
    clean_ids = np.concatenate([s.sample.input_ids for s in samples])
    image_rows = np.flatnonzero(clean_ids == vocabulary.image_pad)
    vision = _vision(
        samples,
        geometry=geometry,
        noise=noise,
        normalise=normalise_patches,
        replace=replace_pixels,
    )
    vectors = len(vocabulary.bridge_ids) if pooling == "late_interaction" else 1
    pooled = _no_rows()
    if embeddings:
        pooled = _pooled_rows(samples, starts, lengths, pooling=pooling, vectors=vectors)
    num_real = sum(not s.sample.is_filler for s in samples)
    return PackedBatch(
        input_ids=_joined([s.input_ids for s in samples]),
        position_ids=_positions(clean_ids, starts, samples, vocabulary, geometry),
        plan=_plan(samples, starts, rule),
        pixel_values=torch.from_numpy(vision.pixels),
        image_grid_thw=torch.tensor(vision.grids, dtype=torch.int64),
        vision=vision_layout(tuple(vision.grids), geometry),
        image_rows=torch.from_numpy(image_rows),
        label_rows=_joined(
            [s.label_rows + start for s, start in zip(samples, starts, strict=True)]
        ),
        labels=_joined([s.labels for s in samples]),
        patch_rows=torch.from_numpy(image_rows[vision.hidden]),
        patch_targets=torch.from_numpy(vision.targets),
        pool_rows=torch.from_numpy(pooled.rows),
        pool_index=torch.from_numpy(pooled.index),
        bridge_rows=torch.from_numpy(_long_bridges(samples, starts, vocabulary)),
        pair_ids=torch.tensor([e.pair_id for e in embeddings], dtype=torch.int64),
        sides=torch.tensor([e.side for e in embeddings], dtype=torch.int64),
        identities=torch.tensor([e.identity for e in embeddings], dtype=torch.int64),
        contents=torch.tensor([e.content for e in embeddings], dtype=torch.int64),
        scores=torch.tensor([e.score for e in embeddings], dtype=torch.float32),
        pair_weights=torch.tensor([e.weight for e in embeddings], dtype=torch.float32),
        num_filler_images=vision.num_fillers,
        num_samples=num_real,
        num_image_tokens=len(vision.pixels) // geometry.merge**2,
        num_vectors=vectors,
    )


def patchify(
    images: NDArray[np.uint8], *, geometry: ImageGeometry, out: Floats | None = None
) -> Floats:
    """Turn pictures of one size (N, H, W, 3) into patches (N * patches, C), normalised.

    Order of patches and of the C = 3 * temporal * patch_size**2 values as Qwen2-VL's processor: the
    patches of one visual token are neighbours; a patch is (colour, frame, row, column). `out`:
    where they are to be written, contiguous.
    """
    count, height, width, _ = images.shape
    size, merge = geometry.patch_size, geometry.merge
    high, wide = height // geometry.factor, width // geometry.factor
    split = images.reshape(count, high, merge, size, wide, merge, size, 3)
    ordered = split.transpose(0, 1, 4, 2, 5, 7, 3, 6).reshape(-1, 3, size * size)
    scale = np.array([1.0 / (255.0 * std) for std in geometry.std], dtype=np.float32)
    offset = np.array(
        [m / std for m, std in zip(geometry.mean, geometry.std, strict=True)], np.float32
    )
    if out is None:
        out = np.empty((len(ordered), 3 * geometry.temporal * size * size), dtype=np.float32)
    patches = out.reshape(len(ordered), 3, geometry.temporal, size * size)
    values = ordered.astype(np.float32)  # on contiguous float32 both lines below use vectors
    values *= scale[:, None]
    values -= offset[:, None]
    patches[...] = values[:, :, None]
    return out


def rope_positions(
    input_ids: Ints,
    grids: Sequence[tuple[int, int, int]],
    vocabulary: Vocabulary,
    *,
    merge: int = 2,
) -> Ints:
    """M-RoPE positions (3, n) of one sample: time, height, width (arXiv 2409.12191, section 2.1).

    `grids` holds (time, height, width) in patches of each picture, in order. Text goes on behind
    the largest position of a picture. Raises ValueError if pictures and tokens do not fit.
    """
    rows = np.flatnonzero(input_ids == vocabulary.image_pad)
    grids_N3 = np.array(grids, dtype=np.int64).reshape(-1, 3)
    high, wide = grids_N3[:, 1] // merge, grids_N3[:, 2] // merge
    sizes = grids_N3[:, 0] * high * wide
    if sizes.sum() != len(rows):
        raise ValueError(
            f"{len(rows)} visual tokens, but pictures of {grids_N3.tolist()} patches have "
            f"{sizes.sum()}"
        )
    advance = np.ones(len(input_ids), dtype=np.int64)
    advance[rows] = 0
    ends = np.cumsum(sizes)
    advance[rows[ends - 1]] = np.maximum(grids_N3[:, 1], grids_N3[:, 2]) // merge
    positions = np.tile(np.cumsum(advance) - advance, (3, 1))
    if len(rows):
        inside = np.arange(len(rows)) - np.repeat(ends - sizes, sizes)
        high_of, wide_of = np.repeat(high, sizes), np.repeat(wide, sizes)
        positions[0, rows] += inside // (high_of * wide_of)
        positions[1, rows] += inside // wide_of % high_of
        positions[2, rows] += inside % wide_of
    return positions


def length_bound(
    view: str,
    *,
    num_text_tokens: int,
    image_sizes: Sequence[tuple[int, int]],
    record: Record | None,
    vocabulary: Vocabulary,
    settings: ViewSettings,
) -> tuple[int, int]:
    """Return the most (tokens, patches) that the samples of one record can have together.

    `num_text_tokens` and `image_sizes` are the index's; UNKNOWN_TOKENS and sizes of 0 are allowed.
    With the record the bound is tight; without it every picture may be in one sample.
    """
    limit = settings.max_text_tokens
    known = num_text_tokens >= 0
    text = min(num_text_tokens, limit) if known else limit
    ends = end_tokens(view, vocabulary)
    costs = [picture_cost(size, settings) for size in image_sizes]

    def pictures(side: Side) -> tuple[int, int]:
        return _added([costs[part.image] for part in side if part.kind == "image"])

    query = target = _added(costs)
    if record is not None:
        query = pictures(record.query)
        sides = [pictures(side) for side in record.positives or (record.target,)]
        target = max(cost[0] for cost in sides), max(cost[1] for cost in sides)
    if view != "pair":
        tokens, patches = query if query[1] or record is None else target
        if view in TWO_TEXTS:
            added = uncounted_tokens(view, vocabulary, settings)
            text = min(num_text_tokens + added, 2 * limit) if known else 2 * limit
        return tokens + text + ends, patches
    instruction = instruction_tokens(vocabulary, settings)
    if record is None:
        most = num_text_tokens + num_text_tokens // JOINT_EVERY if known else limit
        both = min(most + instruction, limit) + min(most, limit)
        more = settings.negatives * (min(most, limit) + len(vocabulary.bridge_ids))
        return query[0] + both + ends + more, query[1]
    texts = record.positives or (record.target,)
    text = max(text, _text_length(record.query, vocabulary, limit))  # joined, texts may take more
    longest = max(_text_length(side, vocabulary, limit) for side in texts)
    tokens = query[0] + target[0] + min(text + instruction, limit) + longest + ends
    costly = [
        (pictures(side), _text_length(side, vocabulary, limit))
        for side in _possible_negatives(record, settings)
    ]
    lengths = sorted((cost[0] + words for cost, words in costly), reverse=True)
    tokens += sum(lengths[: settings.negatives])
    tokens += settings.negatives * len(vocabulary.bridge_ids)
    patches = sum(sorted((cost[1] for cost, _ in costly), reverse=True)[: settings.negatives])
    return tokens, query[1] + target[1] + patches


def _possible_negatives(record: Record, settings: ViewSettings) -> Sequence[Side]:
    """Return the negatives of a record that a stage can use."""
    if settings.negatives_choice == "first" or not settings.negatives:
        return record.negatives[: settings.negatives]
    return record.negatives


def _text_length(side: Side, vocabulary: Vocabulary, limit: int) -> int:
    """Return how many tokens the texts of a side have, joined and cut."""
    text = text_start(" ".join(side_texts(side)), limit)
    return min(len(vocabulary.encode(text)), limit)


def end_tokens(view: str, vocabulary: Vocabulary) -> int:
    """Return how many tokens the samples of a record have beside pictures and texts, at most."""
    bridge = len(vocabulary.bridge_ids)
    return 2 * bridge if view == "pair" else 1 + bridge if view in TWO_TEXTS else 2


def uncounted_tokens(view: str, vocabulary: Vocabulary, settings: ViewSettings) -> int:
    """Return how many tokens of text a view can add to those that the index counts."""
    if view == "bridged" and settings.separate_views:
        return 2 * settings.max_text_tokens  # texts of meta.captions are not counted
    return most_added_tokens(view, vocabulary=vocabulary, max_turns=settings.max_turns)


def instruction_tokens(vocabulary: Vocabulary, settings: ViewSettings) -> int:
    """Return how many tokens the instruction puts in front of a pair's query."""
    return len(vocabulary.encode(settings.instruction)) + 1 if settings.instruction else 0


def picture_cost(size: tuple[int, int], settings: ViewSettings) -> tuple[int, int]:
    """Tokens and patches of a picture of that size; none if it cannot be used."""
    try:
        height, width = settings.pictures.model_size(*size)
    except ValueError:
        return 0, 0
    count = settings.geometry.num_tokens(height, width)
    return count + 2, count * settings.geometry.merge**2


def _added(costs: Sequence[tuple[int, int]]) -> tuple[int, int]:
    return sum(tokens for tokens, _ in costs), sum(patches for _, patches in costs)


@dataclass(frozen=True)
class _Vision:
    """The pictures of a pack."""

    pixels: Floats  # (P, C), hidden tokens replaced by noise
    grids: list[tuple[int, int, int]]  # per picture, in patches
    hidden: Bools  # (M,): which visual tokens are hidden
    targets: Floats  # (R, C'): clean pixels of the hidden ones
    num_fillers: int


def _vision(
    samples: Sequence[CorruptedSample],
    *,
    geometry: ImageGeometry,
    noise: Sequence[np.random.Generator],
    normalise: bool,
    replace: bool,
) -> _Vision:
    images = [image for s in samples for image in s.sample.images]
    per_token = geometry.merge**2
    values = 3 * geometry.temporal * geometry.patch_size**2
    target_values = per_token * 3 * geometry.patch_size**2
    if not images:
        return _Vision(
            pixels=np.zeros((per_token, values), dtype=np.float32),
            grids=[(1, geometry.merge, geometry.merge)],
            hidden=np.zeros(0, dtype=np.bool_),
            targets=np.zeros((0, target_values), dtype=np.float32),
            num_fillers=1,
        )
    pixels = _all_patches(images, geometry=geometry, values=values)
    hidden = np.concatenate([mask for s in samples for mask in s.image_masks])
    rows = np.flatnonzero(np.repeat(hidden, per_token))
    first_frame = pixels.reshape(-1, 3, geometry.temporal, geometry.patch_size**2)[:, :, 0]
    targets = first_frame[rows].reshape(len(rows), 3 * geometry.patch_size**2)
    if normalise and len(rows):
        centred = targets - targets.mean(axis=1, keepdims=True)
        variance = targets.var(axis=1, ddof=1, keepdims=True)
        targets = centred / np.sqrt(variance + np.float32(_VARIANCE_FLOOR))
    if len(rows) and replace:
        counts = [sum(int(mask.sum()) for mask in s.image_masks) * per_token for s in samples]
        _make_noise(pixels, np.split(rows, np.cumsum(counts)[:-1]), noise)
    return _Vision(
        pixels=pixels,
        grids=[geometry.grid(image) for image in images],
        hidden=hidden,
        targets=targets.reshape(int(hidden.sum()), target_values),
        num_fillers=0,
    )


def _all_patches(images: Sequence[Pixels], *, geometry: ImageGeometry, values: int) -> Floats:
    """Patchify pictures of any sizes, each into its place."""
    per_token = geometry.merge**2
    counts = [geometry.num_tokens(*image.shape[:2]) * per_token for image in images]
    patches = np.empty((sum(counts), values), dtype=np.float32)
    end = 0
    for image, count in zip(images, counts, strict=True):
        end += count
        patchify(image[None], geometry=geometry, out=patches[end - count : end])
    return patches


def _make_noise(pixels: Floats, rows: Sequence[Ints], noise: Sequence[np.random.Generator]) -> None:
    """Put unit-Gaussian noise into the rows of each sample, from its record's own generator."""
    if len(noise) != len(rows):
        raise ValueError(
            f"visual tokens are hidden: expected a generator for each of {len(rows)} samples, "
            f"found {len(noise)}"
        )
    for hidden, draw in zip(rows, noise, strict=True):
        if len(hidden):
            values = gaussian(draw, len(hidden) * pixels.shape[1])
            pixels[hidden] = values.reshape(len(hidden), -1)


def gaussian(draw: np.random.Generator, count: int) -> Floats:
    """Draw (count,) unit-Gaussian values of 2**16 levels: the medians of equally likely ranges.

    Four values of each 64 bits, 2.4 ns a value; numpy's float32 takes 12. The largest is 4.3.
    """
    bits = draw.bit_generator.random_raw(-(-count // 4)).astype("<u8", copy=False)
    values: Floats = _gaussian_levels()[bits.view("<u2")[:count]]
    return values


@lru_cache(maxsize=1)
def _gaussian_levels() -> Floats:
    """Return the levels in ascending order; mean 0, variance 1."""
    inverse, half = NormalDist().inv_cdf, _LEVELS // 2
    upper = np.array([inverse((level + 0.5) / _LEVELS) for level in range(half, _LEVELS)])
    upper /= np.sqrt((upper**2).mean())
    return np.concatenate([-upper[::-1], upper]).astype(np.float32)


@dataclass(frozen=True)
class _Rows:
    rows: Ints
    index: Ints


def _no_rows() -> _Rows:
    return _Rows(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))


def _pooled_rows(
    samples: Sequence[CorruptedSample],
    starts: Ints,
    lengths: Ints,
    *,
    pooling: Pooling,
    vectors: int,
) -> _Rows:
    """Return the rows each sample's embedding is averaged from: its last, its bridge, or all.

    With several vectors an embedding the rows of its bridge are these; a filler's one is repeated.
    """
    if vectors > 1:
        ends = [np.resize(_bridge(s), vectors) for s in samples]
        rows = [one + start for one, start in zip(ends, starts, strict=True)]
        return _Rows(np.concatenate(rows), np.repeat(np.arange(len(starts)), vectors))
    if pooling == "compression":
        rows = [_bridge(s) + start for s, start in zip(samples, starts, strict=True)]
        counts = [len(one) for one in rows]
        return _Rows(np.concatenate(rows), np.repeat(np.arange(len(starts)), counts))
    if pooling == "last":
        return _Rows(starts + lengths - 1, np.arange(len(starts)))
    return _Rows(np.arange(int(lengths.sum())), np.repeat(np.arange(len(starts)), lengths))


def _bridge(sample: CorruptedSample) -> Ints:
    """Return the rows of a sample's bridge, in the sample's coordinates."""
    spans = [s for s in sample.sample.segments if s.role is Role.BRIDGE]
    return np.concatenate([np.empty(0, np.int64), *(np.arange(s.start, s.stop) for s in spans)])


def _long_bridges(samples: Sequence[CorruptedSample], starts: Ints, vocabulary: Vocabulary) -> Ints:
    """Return the rows (B, K) of the bridges of real samples; none where a bridge is one token."""
    length = len(vocabulary.bridge_ids)
    rows = [
        _bridge(s) + start
        for s, start in zip(samples, starts, strict=True)
        if length > 1 and not s.sample.is_filler
    ]
    return np.array([one for one in rows if len(one)], dtype=np.int64).reshape(-1, length)


def _positions(
    clean_ids: Ints,
    starts: Ints,
    samples: Sequence[CorruptedSample],
    vocabulary: Vocabulary,
    geometry: ImageGeometry,
) -> torch.Tensor:
    """M-RoPE positions (3, T), from 0 again in every sample.

    Positions only ever grow by what came before, so those of the whole pack, less each sample's
    first, are those of the samples alone: one call instead of one for each sample.
    """
    grids = [geometry.grid(image) for s in samples for image in s.sample.images]
    running = rope_positions(clean_ids, grids, vocabulary, merge=geometry.merge)
    lengths = np.diff(starts, append=len(clean_ids))
    return torch.from_numpy(running - np.repeat(running[:, starts], lengths, axis=1))


def _plan(samples: Sequence[CorruptedSample], starts: Ints, rule: AttentionRule) -> AttentionPlan:
    moved = [
        [Segment(s.start + start, s.stop + start, s.role) for s in sample.sample.segments]
        for sample, start in zip(samples, starts.tolist(), strict=True)
    ]
    return compile_plan(moved, rule)


def _joined(parts: Sequence[Ints]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts))


__all__ = [
    "EmbeddingInfo",
    "build_pack",
    "identity_number",
    "length_bound",
    "patchify",
    "picture_cost",
    "rope_positions",
]
