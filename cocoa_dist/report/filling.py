"""What a reconstruction stage learnt: held-out words and pixels hidden, and filled in again.

Examples are the first in the order of a hash of their keys: never chosen by how well they went.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from cocoa_dist.config import ReconstructionConfig, RunConfig
from cocoa_dist.data.corruption import CorruptedSample, corrupt
from cocoa_dist.data.geometry import ImageGeometry
from cocoa_dist.data.images import Pixels
from cocoa_dist.data.packing import build_pack, patchify
from cocoa_dist.data.records import Record
from cocoa_dist.data.samples import (
    ViewSettings,
    draw_for,
    view_samples,
    view_settings,
)
from cocoa_dist.model.embedder import EmbeddingModel, ModelOutput
from cocoa_dist.report.examples import hash_order, load_tokenizer
from cocoa_dist.segments import Role, attention_rule
from cocoa_dist.train.build import build_objective, load_weights
from cocoa_dist.train.evaluate import Embedder

_VARIANCE_FLOOR = 1e-6  # of normalised patches, as in packing
_MASKED_RECORDS = 192  # held-out records that the shares of right guesses are counted on
_RECORDS_PER_PACK = 32

Bools = NDArray[np.bool_]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Piece:
    """A piece of text; `guess` is what the model wrote where it was hidden."""

    text: str
    guess: str | None = None


@dataclass(frozen=True)
class Rebuilt:
    """A picture at the model's size (H, W, 3); where `hidden`, the model saw noise."""

    original: Pixels
    rebuilt: Pixels
    hidden: Bools  # (H, W)


@dataclass(frozen=True)
class Masked:
    """One held-out sample as a reconstruction stage fills it in."""

    picture: Pixels | None  # the sample's picture, if it has one
    rebuilt: Rebuilt | None  # where parts of the picture were hidden
    context: str  # text that was given, in front of the bridge
    pieces: tuple[Piece, ...]  # text with its hidden pieces


@dataclass(frozen=True)
class MaskedStage:
    """What a reconstruction stage can do at its end, with shares over many held-out records."""

    stage: str
    examples: tuple[Masked, ...]
    num_tokens: int  # hidden pieces of text that were counted
    right_share: float  # of them guessed exactly, 0 to 1
    num_patches: int  # hidden visual tokens that were counted
    explained: float  # share of their pixels' variance that is explained; NaN without any


def fill_in(
    config: RunConfig,
    stage_name: str,
    *,
    embedder: Embedder,
    weights: Path,
    records: Sequence[Record],
    count: int,
) -> MaskedStage:
    """Hide and rebuild held-out records as a reconstruction stage does, with its final weights.

    `embedder` lends its backbone, which has the stage's weights afterwards. Examples are the first
    in hash order that had something hidden of each kind the stage hides.
    """
    stage = config.stages[stage_name]
    objective = stage.objective
    assert isinstance(objective, ReconstructionConfig)
    heads = build_objective(stage, geometry=embedder.geometry).heads
    model = EmbeddingModel(embedder.model.backbone, heads)
    model.compression_tokens = embedder.model.compression_tokens
    load_weights(model, weights)
    model.eval()
    settings = view_settings(config.data, geometry=embedder.geometry, stage=stage.data)
    order = hash_order(records)[:_MASKED_RECORDS]
    tokenizer = load_tokenizer(config)
    tally = _Tally()
    examples: list[Masked] = []
    for begin in range(0, len(order), _RECORDS_PER_PACK):
        drafts = [
            draft
            for index in order[begin : begin + _RECORDS_PER_PACK]
            if (draft := _draft(config, stage_name, index, records[index], embedder, settings))
        ]
        if not drafts:
            continue
        pack = build_pack(
            [draft.sample for draft in drafts],
            rule=attention_rule(stage.attention.rule, **stage.attention.options()),
            geometry=embedder.geometry,
            vocabulary=embedder.vocabulary,
            noise=[draft.draw for draft in drafts],
            normalise_patches=objective.normalise_patches,
            replace_pixels=objective.mask_replacement == "gaussian",
        )
        with torch.inference_mode():
            output = model(pack)
        tally.add(output, pack.labels, pack.patch_targets)
        guesses = _Guesses(output, normalised=objective.normalise_patches)
        for draft in drafts:
            example = guesses.next(draft.sample, geometry=embedder.geometry, tokenizer=tokenizer)
            shows_all = len(draft.sample.labels) > 0 and (
                objective.image_mask_ratio == 0.0 or example.rebuilt is not None
            )
            if shows_all and len(examples) < count:
                examples.append(example)
    return tally.stage(stage_name, examples)


def reconstruction_stages(config: RunConfig) -> list[str]:
    """Stages whose end can be shown by filling in."""
    return [
        name
        for name, stage in config.stages.items()
        if isinstance(stage.objective, ReconstructionConfig)
    ]


@dataclass(frozen=True)
class _Draft:
    sample: CorruptedSample
    draw: np.random.Generator


def _draft(
    config: RunConfig,
    stage_name: str,
    index: int,
    record: Record,
    embedder: Embedder,
    settings: ViewSettings,
) -> _Draft | None:
    """Make one record's sample as the stage would; None if the record cannot be used."""
    stage = config.stages[stage_name]
    draw = draw_for(config.seed, f"report/{stage_name}", 0, index)
    made = view_samples(
        stage.data.view, record, draw=draw, vocabulary=embedder.vocabulary, settings=settings
    )
    if made.reason is not None:
        return None
    sample = corrupt(
        made.samples[0],
        stage.objective,
        draw=draw,
        vocabulary=embedder.vocabulary,
        geometry=embedder.geometry,
    )
    return _Draft(sample, draw)


class _Tally:
    """Counts over packs how much of what was hidden came back."""

    def __init__(self) -> None:
        self._tokens = self._right = 0
        self._targets: list[Floats] = []
        self._errors = 0.0

    def add(self, output: ModelOutput, labels: torch.Tensor, targets: torch.Tensor) -> None:
        if output.logits_SV is not None and len(labels):
            self._tokens += len(labels)
            self._right += int((output.logits_SV.argmax(dim=1) == labels).sum())
        if output.patches_RC is not None and len(targets):
            self._targets.append(targets.numpy())
            self._errors += float((output.patches_RC.float() - targets).square().sum())

    def stage(self, name: str, examples: Sequence[Masked]) -> MaskedStage:
        explained, patches = float("nan"), 0
        if self._targets:
            targets_RC = np.concatenate(self._targets)
            patches = len(targets_RC)
            around_mean = float(np.square(targets_RC - targets_RC.mean(axis=0)).sum())
            explained = 1.0 - self._errors / max(around_mean, 1e-12)
        return MaskedStage(
            stage=name,
            examples=tuple(examples),
            num_tokens=self._tokens,
            right_share=self._right / max(self._tokens, 1),
            num_patches=patches,
            explained=explained,
        )


class _Guesses:
    """Hands out a pack's predictions sample by sample, in the order of the pack."""

    def __init__(self, output: ModelOutput, *, normalised: bool) -> None:
        assert output.logits_SV is not None
        self._tokens = output.logits_SV.argmax(dim=1).tolist()
        patches = output.patches_RC
        self._patches = None if patches is None else patches.float().numpy()
        self._normalised = normalised
        self._token = self._patch = 0

    def next(
        self, sample: CorruptedSample, *, geometry: ImageGeometry, tokenizer: Tokenizer
    ) -> Masked:
        guessed = self._tokens[self._token : self._token + len(sample.labels)]
        self._token += len(sample.labels)
        rebuilt = self._rebuild(sample, geometry)
        context, pieces = _pieces(sample, guessed, tokenizer)
        images = sample.sample.images
        return Masked(
            picture=images[0] if images else None,
            rebuilt=rebuilt,
            context=context,
            pieces=tuple(pieces),
        )

    def _rebuild(self, sample: CorruptedSample, geometry: ImageGeometry) -> Rebuilt | None:
        """Put the predicted tokens into the first picture; None if nothing or all was hidden."""
        if self._patches is None or not sample.sample.images:
            return None
        counts = [int(mask.sum()) for mask in sample.image_masks]
        predicted = self._patches[self._patch : self._patch + counts[0]]
        self._patch += sum(counts)
        mask = sample.image_masks[0]
        if not 0 < counts[0] < len(mask):
            return None
        image = sample.sample.images[0]
        return rebuild_picture(
            image, mask=mask, predicted=predicted, geometry=geometry, normalised=self._normalised
        )


def rebuild_picture(
    image: Pixels,
    *,
    mask: Bools,
    predicted: Floats,
    geometry: ImageGeometry,
    normalised: bool = False,
) -> Rebuilt:
    """Put predicted visual tokens (R, C') into the places that `mask` (tokens,) hid.

    Predictions are in the model's normalised units. `normalised`: per-patch normalised ones, which
    get the true patch's mean and spread back, since the model was never asked for these.
    """
    size, merge = geometry.patch_size, geometry.merge
    patches = predicted.reshape(len(predicted), merge * merge, 3 * size * size)
    if normalised:
        frames = patchify(image[None], geometry=geometry)
        clean = frames.reshape(len(mask), merge * merge, 3, geometry.temporal, -1)[:, :, :, 0]
        true = clean.reshape(len(mask), merge * merge, -1)[mask]
        spread = np.sqrt(true.var(axis=2, ddof=1, keepdims=True) + _VARIANCE_FLOOR)
        patches = patches * spread + true.mean(axis=2, keepdims=True)
    values = patches.reshape(-1, merge, merge, 3, size, size).transpose(0, 1, 4, 2, 5, 3)
    blocks = values.reshape(-1, geometry.factor, geometry.factor, 3)
    scaled = (blocks * np.array(geometry.std) + np.array(geometry.mean)) * 255.0
    pixels = np.clip(np.rint(scaled), 0, 255).astype(np.uint8)
    rebuilt = np.array(image)
    hidden = np.zeros(image.shape[:2], dtype=np.bool_)
    across = image.shape[1] // geometry.factor
    for block, token in zip(pixels, np.flatnonzero(mask), strict=True):
        top, left = (token // across) * geometry.factor, (token % across) * geometry.factor
        place = np.s_[top : top + geometry.factor, left : left + geometry.factor]
        rebuilt[place] = block
        hidden[place] = True
    return Rebuilt(original=np.asarray(image), rebuilt=rebuilt, hidden=hidden)


def _pieces(
    sample: CorruptedSample, guessed: Sequence[int], tokenizer: Tokenizer
) -> tuple[str, list[Piece]]:
    """Return the given text and the text with holes; the latter is the TARGET if there is one."""
    plain = sample.sample
    targets = [segment for segment in plain.segments if segment.role is Role.TARGET]
    has_target = bool(targets)
    hidden_rows = np.flatnonzero(sample.input_ids != plain.input_ids).tolist()
    if has_target:  # what is hidden of its context is not asked for
        hidden_rows = [r for r in hidden_rows if any(s.start <= r < s.stop for s in targets)]
    guesses = dict(zip(hidden_rows, guessed, strict=True))
    context: list[int] = []
    pieces: list[Piece] = []
    for segment in plain.segments:
        for row in range(segment.start, segment.stop):
            token = int(plain.input_ids[row])
            if not plain.text_positions[row]:
                continue
            if has_target and segment.role is not Role.TARGET:
                context.append(token)
            elif row in guesses:
                pieces.append(Piece(tokenizer.decode([token]), tokenizer.decode([guesses[row]])))
            else:
                pieces.append(Piece(tokenizer.decode([token])))
    return tokenizer.decode(context).strip(), pieces
