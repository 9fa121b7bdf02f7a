"""One rank's part of a step: records read, made into samples, corrupted, and packed.

Encoding never raises for a bad record: it is masked, named and counted, and every other record
keeps its place. The order of the records is the plan's.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cocoa_dist.batch import BadRecord, PackedBatch, StepBatch
from cocoa_dist.config import RunConfig, StageConfig
from cocoa_dist.data.bounds import BOUNDS_VERSION, Bounds, index_bounds, mapped_bounds
from cocoa_dist.data.corruption import CorruptedSample, corrupt
from cocoa_dist.data.geometry import ImageGeometry
from cocoa_dist.data.order import Pack, Slot, StepPlan
from cocoa_dist.data.packing import (
    JOINT_EVERY,
    EmbeddingInfo,
    build_pack,
    end_tokens,
    identity_number,
    instruction_tokens,
    length_bound,
    picture_cost,
    uncounted_tokens,
)
from cocoa_dist.data.record_source import LEFT_OUT, RecordSource
from cocoa_dist.data.records import Record
from cocoa_dist.data.samples import (
    ViewResult,
    ViewSettings,
    Vocabulary,
    draw_for,
    fillers,
    view_samples,
    view_settings,
)
from cocoa_dist.segments import attention_rule

EXACT_BOUND_RECORDS = 20_000  # data sets up to this size are read once for tight length bounds


@dataclass
class PackDraft:
    """One pack while its records are being encoded."""

    samples: list[CorruptedSample]
    draws: list[np.random.Generator]
    embeddings: list[EmbeddingInfo]


class StepEncoder:
    """Turns the assignment of a step into one rank's StepBatch."""

    def __init__(
        self,
        *,
        config: RunConfig,
        stage_name: str,
        vocabulary: Vocabulary,
        geometry: ImageGeometry,
        num_nodes: int = 1,
    ) -> None:
        self.stage: StageConfig = config.stages[stage_name]
        self.num_nodes = num_nodes
        self.stage_name = stage_name
        self.vocabulary = vocabulary
        self.geometry = geometry
        self.settings: ViewSettings = replace(
            view_settings(config.data, geometry=geometry, stage=self.stage.data, training=True),
            scored=self.stage.reads_scores,
        )
        attention = self.stage.attention
        self._rule = attention_rule(attention.rule, **attention.options())
        self._config = config

    def settings_of(self, source: RecordSource) -> ViewSettings:
        """Return the settings for the records of one source."""
        return replace(self.settings, instruction=self.stage.data.instruction_of(source.name))

    def encode(
        self, plan: StepPlan, sources: dict[str, RecordSource], *, step: int, rank: int, world: int
    ) -> StepBatch:
        """Build the part of `rank`. Never raises for what a record holds."""
        assignment = plan.step(step, world, num_nodes=self.num_nodes)
        datasets, shrunk_before = assignment.datasets, self.settings.pictures.num_shrunk
        keys: list[str] = []
        bad: list[BadRecord] = []
        packs: list[PackedBatch] = []
        truncated = num_tokens = 0
        for pack in assignment.ranks[rank]:
            draft = self._encode_pack(
                pack, lambda slot: sources[datasets[slot.position]], keys=keys, bad=bad
            )
            real = [s.sample for s in draft.samples if not s.sample.is_filler]
            truncated += sum(sample.truncated for sample in real)
            num_tokens += sum(len(sample.input_ids) for sample in real)
            packs.append(self._build(draft))
        return StepBatch(
            step=step,
            datasets=datasets,
            record_ids=assignment.record_ids,
            record_keys=tuple(keys),
            digest=assignment.digest,
            packs=tuple(packs),
            num_samples=sum(pack.num_samples for pack in packs),
            num_tokens=num_tokens,
            fill_ratio=num_tokens / (len(packs) * plan.tokens_per_pack),
            num_truncated=truncated,
            num_shrunk=self.settings.pictures.num_shrunk - shrunk_before,
            bad_records=tuple(bad),
            cpu_seconds=0.0,
        )

    def bounds(self, source: RecordSource, *, folder: Path) -> Bounds:
        """Return upper bounds of tokens and patches for every record of a source.

        Records of a small data set are read, which makes them tight; those of a large one come
        from its index, and lie in a file of `folder` that all processes map.
        """
        if source.num_records <= EXACT_BOUND_RECORDS:
            return self._tight_bounds(source)
        reader = source.reader
        pictures, negatives = self.settings.pictures, self.settings.negatives
        instruction = instruction_tokens(self.vocabulary, self.settings_of(source))
        view = self.stage.data.view
        ends = end_tokens(view, self.vocabulary)
        uncounted = uncounted_tokens(view, self.vocabulary, self.settings)

        def part(begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
            return index_bounds(
                reader.index_columns(begin, end, counted=self._counted(source)),
                view=view,
                max_text_tokens=self.settings.max_text_tokens,
                picture_cost=lambda size: picture_cost(size, self.settings),
                joint_every=JOINT_EVERY,
                instruction=instruction,
                ends=ends,
                uncounted=uncounted,
                negatives=negatives,
                negative_ends=len(self.vocabulary.bridge_ids),
            )

        image = self._config.data.image
        described = [
            *(reader.fingerprint, view, self.settings.max_text_tokens),
            *(self._counted(source), image.min_pixels, image.max_pixels, pictures.factor),
            *(instruction, ends, uncounted, BOUNDS_VERSION),
            *([negatives] if negatives else []),
        ]
        return mapped_bounds(folder, count=source.num_records, key=repr(described), part=part)

    def _counted(self, source: RecordSource) -> bool:
        """Whether the index counts text with this run's tokenizer."""
        return source.reader.info.tokenizer_sha256 == self.vocabulary.sha256 != ""

    def _tight_bounds(self, source: RecordSource) -> Bounds:
        """Return bounds that know each record's texts and where its pictures are; none is read."""
        count, counted = source.num_records, self._counted(source)
        settings = self.settings_of(source)
        columns = source.reader.index_columns(0, count, counted=counted)
        texts, first = columns.num_text_tokens.tolist(), columns.first_picture.tolist()
        sizes = list(zip(columns.heights.tolist(), columns.widths.tolist(), strict=True))
        bounds = np.empty((count, 2), dtype=np.int64)
        for number in range(count):
            bounds[number] = length_bound(
                self.stage.data.view,
                num_text_tokens=texts[number],
                image_sizes=sizes[first[number] : first[number + 1]],
                record=source.outline(number),
                vocabulary=self.vocabulary,
                settings=settings,
            )
        return Bounds.of(bounds[:, 0], bounds[:, 1])

    def _encode_pack(
        self,
        pack: Pack,
        source_of: Callable[[Slot], RecordSource],
        *,
        keys: list[str],
        bad: list[BadRecord],
    ) -> PackDraft:
        draft = PackDraft([], [], [])
        for slot in pack:
            source = source_of(slot)
            stream = f"{self.stage_name}/{source.name}"
            draw = draw_for(self._config.seed, stream, slot.passes, slot.record)
            made, record = self._samples(source, slot.record, draw)
            key = source.key(slot.record) if record is None else record.key
            keys.append(key)
            if made.reason not in (None, LEFT_OUT):
                bad.append(source.bad_record(slot.record, key=key, reason=made.reason))
            for sample in made.samples:
                draft.samples.append(
                    corrupt(
                        sample,
                        self.stage.objective,
                        draw=draw,
                        vocabulary=self.vocabulary,
                        geometry=self.geometry,
                    )
                )
                draft.draws.append(draw)
            if self.stage.data.view == "pair":
                identity = f"{source.name}/{slot.record}" if record is None else record.identity
                draft.embeddings += _embeddings(made, slot.position, identity)
        return draft

    def _samples(
        self, source: RecordSource, number: int, draw: np.random.Generator
    ) -> tuple[ViewResult, Record | None]:
        """Return what a record became; the record is None if it could not be read."""
        view = self.stage.data.view
        if number in source.left_out:
            return ViewResult(fillers(view, self.vocabulary, self.settings), reason=LEFT_OUT), None
        settings = self.settings_of(source)
        try:
            record = source.record(number)
        except (ValueError, OSError) as error:
            made = fillers(view, self.vocabulary, settings)
            return ViewResult(made, reason=str(error)), None
        found = view_samples(view, record, draw=draw, vocabulary=self.vocabulary, settings=settings)
        return found, record

    def _build(self, draft: PackDraft) -> PackedBatch:
        objective = self.stage.objective
        return build_pack(
            draft.samples,
            rule=self._rule,
            geometry=self.geometry,
            vocabulary=self.vocabulary,
            embeddings=draft.embeddings,
            pooling=self.stage.pooling,
            noise=draft.draws,
            normalise_patches=objective.kind == "reconstruction" and objective.normalise_patches,
            replace_pixels=objective.kind != "reconstruction"
            or objective.mask_replacement == "gaussian",
        )


def _embeddings(made: ViewResult, position: int, identity: str) -> list[EmbeddingInfo]:
    """Say what the sides of a pair are; a negative that is not there weighs nothing."""
    weight = 1.0 if made.reason is None else 0.0
    number = identity_number(identity)
    found = [EmbeddingInfo(position, side, number, weight) for side in (0, 1)]
    for side, sample in enumerate(made.samples):
        label = sample.label
        if label is not None:
            known = EmbeddingInfo(
                position,
                side,
                identity=identity_number(label.identity),
                weight=weight,
                content=identity_number(label.content),
                score=label.score,
            )
            found[side:] = [known, *found[side + 1 :]]
        elif side > 1:
            found.append(EmbeddingInfo(position, side, number, weight=0.0))
    return found
