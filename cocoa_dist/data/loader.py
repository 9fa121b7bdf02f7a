"""The loader of a stage: one StepBatch for each optimizer step, through megatron-energon.

energon brings the data sets, their weights and the worker processes; the order is our plan's, and
so is the state: a resume needs the next step alone. Encoding never raises for a bad record: it is
masked, named and counted, and every other record keeps its place.
"""

# No `from __future__ import annotations`: energon reads ArrowDatasetFactory's at run time.
import signal
import time
from collections import OrderedDict
from collections.abc import Iterator
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

from cocoa_dist.batch import PackedBatch, StepBatch
from cocoa_dist.config import RunConfig, StageConfig, resolve_path
from cocoa_dist.data.corruption import CorruptedSample, corrupt
from cocoa_dist.data.geometry import ImageGeometry
from cocoa_dist.data.order import Pack, PlanSource, StepPlan, check_world_size
from cocoa_dist.data.packing import EmbeddingInfo, build_pack, identity_number, length_bound
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
from cocoa_dist.manifest import write_atomic
from cocoa_dist.segments import attention_rule

EXACT_BOUND_RECORDS = 20_000  # data sets up to this size are read once for tight length bounds
_RECORD_CACHE_BYTES = 64 * 2**20
_RECORD_OVERHEAD_BYTES = 8192  # of a decoded record beside its pictures, generously
_READ_RETRIES = (0.1, 1.0)  # seconds to wait before trying a failed read again
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
        self.reader = ShardReader(Path(str(path)))

    def __len__(self) -> int:
        return len(self.reader)

    def build(self, worker_rotation_offset: int = 0) -> SavableDataset[CrudeSample]:
        """Refuse: the order of records is the plan's, which PlanTaskEncoder sets up."""
        raise NotImplementedError(f"{self.path}: read it with StageLoader or ShardReader")

    def as_file_store(self) -> Any:
        """Refuse, as build does."""
        return self.build()


class RecordSource:
    """Records of one data set, the last used ones kept decoded (reading one costs 160 us)."""

    def __init__(self, name: str, reader: ShardReader, num_records: int) -> None:
        self.name = name
        self.reader = reader
        self.num_records = num_records
        self._kept: OrderedDict[int, Record] = OrderedDict()
        self._num_bytes = 0

    def record(self, number: int) -> Record:
        """Return a record. Raises ValueError for a damaged one, OSError if the disk fails."""
        found = self._kept.get(number)
        if found is not None:
            self._kept.move_to_end(number)
            return found
        record = self._read(number)
        self._kept[number] = record
        self._num_bytes += _record_bytes(record)
        while self._num_bytes > _RECORD_CACHE_BYTES:
            _, dropped = self._kept.popitem(last=False)
            self._num_bytes -= _record_bytes(dropped)
        return record

    def key(self, number: int) -> str:
        """Return the key of a record that may be unreadable: then it is `?`."""
        try:
            return self.reader.key(number)
        except (ValueError, OSError):
            return "?"

    def readable(self, number: int) -> Record | None:
        """Return a record, or None: a damaged one is named when its turn comes."""
        try:
            return self.record(number)
        except ValueError:
            return None

    def _read(self, number: int) -> Record:
        """Read with patience: a network file system may fail for a moment."""
        for pause in _READ_RETRIES:
            try:
                return self.reader.record(number)
            except OSError:
                time.sleep(pause)
        return self.reader.record(number)


def _record_bytes(record: Record) -> int:
    return _RECORD_OVERHEAD_BYTES + sum(map(len, record.images))


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
    ) -> None:
        self.stage: StageConfig = config.stages[stage_name]
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
        assignment = plan.step(step, world)
        source = sources[assignment.dataset]
        keys: list[str] = []
        bad: list[str] = []
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

    def length_bounds(self, source: RecordSource) -> tuple[np.ndarray, np.ndarray]:
        """Return upper bounds of (tokens, patches) for every record of a source."""
        reader, count = source.reader, source.num_records
        counted = reader.info.tokenizer_sha256 == self.vocabulary.sha256 != ""
        bounds = np.empty((count, 2), dtype=np.int64)
        for number in range(count):
            bounds[number] = length_bound(
                self.stage.data.view,
                num_text_tokens=int(reader.num_text_tokens[number]) if counted else -1,
                image_sizes=reader.image_sizes(number),
                record=source.readable(number) if count <= EXACT_BOUND_RECORDS else None,
                vocabulary=self.vocabulary,
                settings=self.settings,
            )
        return bounds[:, 0], bounds[:, 1]

    def _encode_pack(
        self, pack: Pack, source: RecordSource, *, keys: list[str], bad: list[str]
    ) -> _PackDraft:
        draft = _PackDraft([], [], [])
        for slot in pack:
            stream = f"{self.stage_name}/{source.name}"
            draw = draw_for(self._config.seed, stream, slot.passes, slot.record)
            made, record = self._samples(source, slot.record, draw)
            key = source.key(slot.record) if record is None else record.key
            keys.append(key)
            if made.reason is not None:
                bad.append(f"{source.name} {slot.record} {key}: {made.reason}")
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

    def __init__(self, *, config: RunConfig, encoder: StepEncoder, start_step: int) -> None:
        super().__init__()
        self._run = config
        self._encoder = encoder
        self._start_step = start_step

    def build_train_datasets(
        self, *, datasets: list[Any], worker_config: WorkerConfig, **_unused: object
    ) -> PlanDataset:
        """Build the plan over the loaded data sets; energon calls this."""
        sources: dict[str, RecordSource] = {}
        planned: list[PlanSource] = []
        configured = self._encoder.stage.data.sources
        for loaded in datasets:
            factory: ArrowDatasetFactory = loaded.dataset
            name = str(factory.subflavors[_SOURCE_KEY])
            count = min(len(factory), configured[name].limit or len(factory))
            sources[name] = RecordSource(name, factory.reader, count)
            tokens, patches = self._encoder.length_bounds(sources[name])
            planned.append(
                PlanSource(
                    name=name,
                    weight=configured[name].weight,
                    tokens=tokens,
                    patches=patches,
                    fingerprint=factory.reader.fingerprint,
                )
            )
        plan = StepPlan(
            sources=tuple(planned),
            batch_size=self._encoder.stage.batch_size,
            seed=self._run.seed,
            stage=self._encoder.stage_name,
            tokens_per_pack=self._run.data.tokens_per_pack,
            patches_per_pack=self._run.data.patches_per_pack,
        )
        return PlanDataset(
            plan=plan,
            sources=sources,
            encoder=self._encoder,
            start_step=self._start_step,
            worker_config=worker_config,
        )


class StageLoader:
    """One rank's steps of a stage: start_step, start_step + 1, ...

    Raises ValueError at once for a data set that is missing or damaged, and for a batch that the
    ranks cannot share. `folder` receives `<stage>.yaml`, the blend as energon reads it.
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
    ) -> None:
        stage = config.stages[stage_name]
        check_world_size(stage.batch_size, world_size, stage=stage_name)
        encoder = StepEncoder(
            config=config, stage_name=stage_name, vocabulary=vocabulary, geometry=geometry
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
            task_encoder=PlanTaskEncoder(config=config, encoder=encoder, start_step=start_step),
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


def _write_metadataset(stage: StageConfig, stage_name: str, folder: Path) -> Path:
    """Write the stage's blend in energon's format; every rank writes the same bytes."""
    blend = []
    for name, source in stage.data.sources.items():
        path = resolve_path(source.path).absolute()
        ShardReader(path)  # names what is missing; energon would only say "invalid dataset"
        blend.append(
            {"path": str(path), "weight": source.weight, "subflavors": {_SOURCE_KEY: name}}
        )
    content = {
        "__module__": "megatron.energon",
        "__class__": "MetadatasetV2",
        "splits": {"train": {"blend": blend}},
    }
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{stage_name}.yaml"
    write_atomic(file, yaml.safe_dump(content, sort_keys=False).encode())
    return file
