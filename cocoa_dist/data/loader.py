"""The loader of a stage: one StepBatch for each optimizer step, through megatron-energon.

energon brings the data sets, their weights and the worker processes; the order is our plan's, and
so is the state: a resume needs the next step alone. Encoding never raises for a bad record: it is
masked, named and counted, and every other record keeps its place.
"""

# No `from __future__ import annotations`: energon reads ArrowDatasetFactory's at run time.
import hashlib
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import yaml
from megatron.energon import (
    CrudeSample,
    DefaultTaskEncoder,
    SavableDataset,
    WorkerConfig,
    get_savable_loader,
    get_train_dataset,
)
from megatron.energon.epathlib import EPath
from megatron.energon.flavors.base_dataset import BaseCoreDatasetFactory

from cocoa_dist.batch import BadRecord, PackedBatch, StepBatch
from cocoa_dist.config import RunConfig, StageConfig, resolve_path
from cocoa_dist.data.bounds import Bounds, index_bounds, mapped_bounds
from cocoa_dist.data.corruption import CorruptedSample, corrupt
from cocoa_dist.data.geometry import ImageGeometry
from cocoa_dist.data.order import Pack, PlanSource, StepPlan, check_world_size
from cocoa_dist.data.packing import (
    EmbeddingInfo,
    build_pack,
    identity_number,
    length_bound,
    picture_cost,
)
from cocoa_dist.data.record_source import LEFT_OUT, RecordSource, read_left_out
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
from cocoa_dist.data.shards import ShardReader
from cocoa_dist.data.shuffle import Shuffle
from cocoa_dist.data.store import absolute
from cocoa_dist.manifest import write_atomic
from cocoa_dist.segments import attention_rule

EXACT_BOUND_RECORDS = 20_000  # data sets up to this size are read once for tight length bounds
_ENDLESS = 10**9  # steps, or seconds: never
_COLLECT_EVERY_STEPS = 10  # garbage collection in a worker process
_WATCHDOG_SECONDS = 60.0  # a worker that takes longer over a step writes its stack to the log
_SOURCE_KEY = "source"  # name of a source, among energon's subflavors
_IGNORED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class ArrowDatasetFactory(BaseCoreDatasetFactory[CrudeSample]):  # type: ignore[misc]
    """The leaf that `.nv-meta/dataset.yaml` names: one data set of Arrow shards.

    energon type-checks every annotated parameter as if it came from YAML, so the objects that it
    passes besides (a worker configuration, a decoder) are taken without annotation, and not used.
    """

    __sample_type__ = CrudeSample

    def __init__(  # type: ignore[no-untyped-def]  # noqa: ANN204
        self,
        path: EPath,
        *,
        subflavors: dict[str, Any] | None = None,
        **_injected,  # noqa: ANN003
    ):
        self.path = path
        self.paths = [path]
        self.subflavors = dict(subflavors or {})
        self.reader = ShardReader(str(path))

    def __len__(self) -> int:
        return len(self.reader)

    def build(self, worker_rotation_offset: int = 0) -> SavableDataset[CrudeSample]:
        """Refuse: the order of records is the plan's, which PlanTaskEncoder sets up."""
        raise NotImplementedError(f"{self.path}: read it with StageLoader or ShardReader")

    def as_file_store(self) -> Any:
        """Refuse, as build does."""
        return self.build()


@dataclass
class _PackDraft:
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
        self.settings: ViewSettings = view_settings(
            config.data, geometry=geometry, stage=self.stage.data, training=True
        )
        attention = self.stage.attention
        self._rule = attention_rule(attention.rule, **attention.options())
        self._config = config

    def encode(
        self, plan: StepPlan, sources: dict[str, RecordSource], *, step: int, rank: int, world: int
    ) -> StepBatch:
        """Build the part of `rank`. Never raises for what a record holds."""
        assignment = plan.step(step, world, num_nodes=self.num_nodes)
        source = sources[assignment.dataset]
        keys: list[str] = []
        bad: list[BadRecord] = []
        packs: list[PackedBatch] = []
        truncated = num_tokens = 0
        for pack in assignment.ranks[rank]:
            draft = self._encode_pack(pack, source, keys=keys, bad=bad)
            real = [s.sample for s in draft.samples if not s.sample.is_filler]
            truncated += sum(sample.truncated for sample in real)
            num_tokens += sum(len(sample.input_ids) for sample in real)
            packs.append(self._build(draft))
        return StepBatch(
            step=step,
            dataset=assignment.dataset,
            record_ids=assignment.record_ids,
            record_keys=tuple(keys),
            digest=assignment.digest,
            packs=tuple(packs),
            num_samples=sum(pack.num_samples for pack in packs),
            num_tokens=num_tokens,
            fill_ratio=num_tokens / (len(packs) * plan.tokens_per_pack),
            num_truncated=truncated,
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
        pictures = self.settings.pictures

        def part(begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
            return index_bounds(
                reader.index_columns(begin, end, counted=self._counted(source)),
                view=self.stage.data.view,
                max_text_tokens=self.settings.max_text_tokens,
                picture_cost=lambda size: picture_cost(size, self.settings),
            )

        image = self._config.data.image
        described = [
            *(reader.fingerprint, self.stage.data.view, self.settings.max_text_tokens),
            *(self._counted(source), image.min_pixels, image.max_pixels, pictures.factor),
        ]
        return mapped_bounds(folder, count=source.num_records, key=repr(described), part=part)

    def _counted(self, source: RecordSource) -> bool:
        """Whether the index counts text with this run's tokenizer."""
        return source.reader.info.tokenizer_sha256 == self.vocabulary.sha256 != ""

    def _tight_bounds(self, source: RecordSource) -> Bounds:
        reader, count = source.reader, source.num_records
        counted = self._counted(source)
        bounds = np.empty((count, 2), dtype=np.int64)
        for number in range(count):
            bounds[number] = length_bound(
                self.stage.data.view,
                num_text_tokens=int(reader.num_text_tokens[number]) if counted else -1,
                image_sizes=reader.image_sizes(number),
                record=source.readable(number),
                vocabulary=self.vocabulary,
                settings=self.settings,
            )
        return Bounds.of(bounds[:, 0], bounds[:, 1])

    def _encode_pack(
        self, pack: Pack, source: RecordSource, *, keys: list[str], bad: list[BadRecord]
    ) -> _PackDraft:
        draft = _PackDraft([], [], [])
        for slot in pack:
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
                number = identity_number(identity)
                weight = 1.0 if made.reason is None else 0.0
                draft.embeddings.append(EmbeddingInfo(slot.position, 0, number, weight))
                draft.embeddings.append(EmbeddingInfo(slot.position, 1, number, weight))
        return draft

    def _samples(
        self, source: RecordSource, number: int, draw: np.random.Generator
    ) -> tuple[ViewResult, Record | None]:
        """Return what a record became; the record is None if it could not be read."""
        view = self.stage.data.view
        if number in source.left_out:
            return ViewResult(fillers(view, self.vocabulary), reason=LEFT_OUT), None
        try:
            record = source.record(number)
        except (ValueError, OSError) as error:
            return ViewResult(fillers(view, self.vocabulary), reason=str(error)), None
        made = view_samples(
            view, record, draw=draw, vocabulary=self.vocabulary, settings=self.settings
        )
        return made, record

    def _build(self, draft: _PackDraft) -> PackedBatch:
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
        )


class PlanDataset(SavableDataset[StepBatch]):  # type: ignore[misc]
    """Yields one rank's part of step after step; its only state is the next step.

    Worker w of W makes the steps start + w, start + w + W, ..., which is the order in which the
    DataLoader asks the workers. An exception here is a fault of ours and ends the run.
    """

    _savable_fields = ("_next_step",)

    def __init__(
        self,
        *,
        plan: StepPlan,
        sources: dict[str, RecordSource],
        encoder: StepEncoder,
        start_step: int,
        worker_config: WorkerConfig,
    ) -> None:
        super().__init__(worker_config=worker_config)
        self.plan = plan
        self._sources = sources
        self._encoder = encoder
        self._start_step = start_step
        self.reset_state_own()

    def reset_state_own(self) -> None:
        """Forget the position; part of energon's interface."""
        self._next_step: int | None = None

    def __iter__(self) -> Iterator[StepBatch]:
        in_worker = torch.utils.data.get_worker_info() is not None
        if in_worker:
            for number in _IGNORED_SIGNALS:  # the rank decides when its workers end
                signal.signal(number, signal.SIG_IGN)
        if self._next_step is None:
            self._next_step = self._start_step + self.worker_config.rank_worker_id()
        while True:
            step = self._next_step
            self._next_step += max(1, self.worker_config.num_workers)
            began = time.process_time()
            batch = self._encoder.encode(
                self.plan,
                self._sources,
                step=step,
                rank=self.worker_config.rank,
                world=self.worker_config.world_size,
            )
            if in_worker:
                spent = time.process_time() - began
                batch = replace(batch, cpu_seconds=spent)
            yield batch

    def close(self) -> None:
        """Close the files of all sources."""
        for source in self._sources.values():
            source.reader.close()

    def len_worker(self, worker_idx: int | None = None) -> int:
        """Return a number that is never reached: a plan has no end."""
        return _ENDLESS

    def worker_has_samples(self) -> bool:
        """Return True: every worker has steps."""
        return True

    def config(self) -> dict[str, Any]:
        """Describe the data set to energon."""
        return {"type": type(self).__qualname__, "plan_hash": self.plan.plan_hash}


class PlanTaskEncoder(DefaultTaskEncoder):  # type: ignore[misc]
    """Takes energon's data sets and weights, and replaces its order by our plan."""

    decoder = None  # pictures stay encoded until a view asks for them

    def __init__(
        self,
        *,
        config: RunConfig,
        encoder: StepEncoder,
        start_step: int,
        state: Mapping[str, Any] | None,
        folder: Path,
    ) -> None:
        super().__init__()
        self._folder = folder
        self._run = config
        self._encoder = encoder
        self._start_step = start_step
        self._state = state

    def build_train_datasets(
        self, *, datasets: list[Any], worker_config: WorkerConfig, **_unused: object
    ) -> PlanDataset:
        """Build the plan over the loaded data sets; energon calls this."""
        sources: dict[str, RecordSource] = {}
        planned: list[PlanSource] = []
        configured = self._encoder.stage.data.sources
        left_out = read_left_out(self._run.data.left_out)
        for loaded in datasets:
            factory: ArrowDatasetFactory = loaded.dataset
            name = str(factory.subflavors[_SOURCE_KEY])
            count = min(len(factory), configured[name].limit or len(factory))
            unused = left_out.get(name, frozenset())
            sources[name] = RecordSource(name, factory.reader, count, left_out=unused)
            bounds = self._encoder.bounds(sources[name], folder=self._folder)
            planned.append(
                PlanSource(
                    name=name,
                    weight=configured[name].weight,
                    tokens=bounds.tokens,
                    patches=bounds.patches,
                    largest=bounds.largest,
                    fingerprint=factory.reader.fingerprint,
                    left_out=_digest(unused),
                )
            )
        plan = StepPlan(
            sources=tuple(planned),
            batch_size=self._encoder.stage.batch_size,
            seed=self._run.seed,
            stage=self._encoder.stage_name,
            tokens_per_pack=self._run.data.tokens_per_pack,
            patches_per_pack=self._run.data.patches_per_pack,
            shuffle=Shuffle(**self._run.data.shuffle.model_dump()),
        )
        if self._state is not None:
            may_change = self._run.data.on_change == "continue"
            plan = plan.resumed(self._state, may_change=may_change)
        return PlanDataset(
            plan=plan,
            sources=sources,
            encoder=self._encoder,
            start_step=self._start_step,
            worker_config=worker_config,
        )


class StageLoader:
    """One rank's steps of a stage: start_step, start_step + 1, ...

    Raises ValueError at once for a data set that is missing or damaged, for a batch that the ranks
    cannot share, and for a `state` of a checkpoint that this recipe does not go on from. `folder`
    receives `<stage>.yaml`, the blend as energon reads it.
    """

    def __init__(
        self,
        config: RunConfig,
        stage_name: str,
        *,
        vocabulary: Vocabulary,
        geometry: ImageGeometry,
        rank: int,
        world_size: int,
        start_step: int,
        folder: Path,
        num_nodes: int = 1,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        stage = config.stages[stage_name]
        check_world_size(stage.batch_size, world_size, stage=stage_name)
        encoder = StepEncoder(
            config=config,
            stage_name=stage_name,
            vocabulary=vocabulary,
            geometry=geometry,
            num_nodes=num_nodes,
        )
        in_process = config.data.num_workers == 0
        dataset = get_train_dataset(
            str(_write_metadataset(stage, stage_name, folder)),
            worker_config=WorkerConfig(
                rank=rank, world_size=world_size, num_workers=config.data.num_workers
            ),
            batch_size=None,
            shuffle_buffer_size=None,
            max_samples_per_sequence=None,
            task_encoder=PlanTaskEncoder(
                config=config,
                encoder=encoder,
                start_step=start_step,
                state=state,
                folder=folder,
            ),
        )
        self._dataset = cast(PlanDataset, dataset)
        self._loader = get_savable_loader(
            dataset,
            checkpoint_every_sec=_ENDLESS,  # energon's own state is not used
            gc_collect_every_n_steps=0 if in_process else _COLLECT_EVERY_STEPS,
            watchdog_timeout_seconds=None if in_process else _WATCHDOG_SECONDS,
        )
        self._loader.pin_memory = False  # its thread would warn without a GPU; batches are small
        self._steps: Iterator[StepBatch] | None = None
        self._expected = start_step

    @property
    def plan(self) -> StepPlan:
        """The order of the stage."""
        return self._dataset.plan

    @property
    def fingerprint(self) -> str:
        """Hash of all that decides which records a step takes."""
        return self.plan.plan_hash

    def next_step(self) -> StepBatch:
        """Return the next step's part of this rank; the same number of packs on every rank."""
        # A DataLoader draws a seed when it starts: a resumed run's dropout would be another one.
        with torch.random.fork_rng(devices=[]):
            self._steps = self._steps or iter(self._loader)
            batch: StepBatch = next(self._steps)
        assert batch.step == self._expected, f"step {batch.step}, expected {self._expected}"
        self._expected += 1
        return batch

    def state(self, next_step: int) -> dict[str, Any]:
        """Return what a checkpoint keeps; `next_step` is the first one not yet trained."""
        return self.plan.state(next_step)

    def close(self) -> None:
        """End the worker processes and close the files. The loader cannot be used afterwards."""
        workers, self._loader._iterator, self._steps = self._loader._iterator, None, None
        if hasattr(workers, "_shutdown_workers"):  # a loader in process has none to end
            workers._shutdown_workers()
        self._dataset.close()


def _digest(numbers: frozenset[int]) -> str:
    if not numbers:
        return ""
    return hashlib.blake2b(str(sorted(numbers)).encode(), digest_size=16).hexdigest()


def _write_metadataset(stage: StageConfig, stage_name: str, folder: Path) -> Path:
    """Write the stage's blend in energon's format; every rank writes the same bytes."""
    blend = []
    for name, source in stage.data.sources.items():
        path = absolute(resolve_path(source.path))
        ShardReader(path)  # names what is missing; energon would only say "invalid dataset"
        blend.append({"path": path, "weight": source.weight, "subflavors": {_SOURCE_KEY: name}})
    content = {
        "__module__": "megatron.energon",
        "__class__": "MetadatasetV2",
        "splits": {"train": {"blend": blend}},
    }
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{stage_name}.yaml"
    write_atomic(file, yaml.safe_dump(content, sort_keys=False).encode())
    return file
