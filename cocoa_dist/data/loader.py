"""The loader of a stage: one StepBatch for each optimizer step, through megatron-energon.

energon brings the data sets, their weights and the worker processes; the order is our plan's, and
so is the state: a resume needs the next step alone. That is also how the loader goes on when one of
its worker processes dies: all are started again at the step that is due.
"""

import hashlib
import logging
import pickle
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from megatron.energon import (
    DefaultTaskEncoder,
    SavableDataset,
    WorkerConfig,
    get_savable_loader,
    get_train_dataset,
)

from cocoa_dist.batch import StepBatch
from cocoa_dist.config import RunConfig
from cocoa_dist.data.blend import blend_file, check_parts, loaded_name
from cocoa_dist.data.encoder import StepEncoder
from cocoa_dist.data.energon_leaf import ArrowDatasetFactory
from cocoa_dist.data.geometry import ImageGeometry
from cocoa_dist.data.order import PlanSource, StepPlan, check_world_size
from cocoa_dist.data.record_source import RecordSource, read_left_out
from cocoa_dist.data.samples import Vocabulary
from cocoa_dist.data.shuffle import Shuffle
from cocoa_dist.data.workers import end_at_once, first_death, unwatch, watched

MAX_DEATHS_IN_A_ROW = 5  # of workers, without a step between them: then it is not chance
log = logging.getLogger("cocoa_dist.data")
_ENDLESS = 10**9  # steps, or seconds: never
_COLLECT_EVERY_STEPS = 10  # garbage collection in a worker process
_WATCHDOG_SECONDS = 60.0  # a worker that takes longer over a step writes its stack to the log
# What waiting for a batch raises if the worker that made it is gone: torch, its queue, its sockets.
_BROKEN = (RuntimeError, OSError, EOFError, pickle.UnpicklingError)
_DEATH_SECONDS = 2.0  # from the first sign of it until the kernel says so
_IGNORED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


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

    def start_at(self, step: int) -> None:
        """Let workers that are started from now on begin at a step."""
        self._start_step = step
        self.reset_state_own()

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
        blend: Path,
    ) -> None:
        super().__init__()
        self._folder, self._blend = folder, blend
        self._run = config
        self._encoder = encoder
        self._start_step = start_step
        self._state = state

    def _check_names(self, left_out: Mapping[str, object]) -> None:
        """Raise ValueError for a data set to leave records out of that no stage has."""
        have = sorted({name for stage in self._run.stages.values() for name in stage.data.blend})
        for name in left_out:
            if name not in have:
                raise ValueError(
                    f"data.left_out '{self._run.data.left_out}' names the data set '{name}', no "
                    f"stage has one of that name (have: {', '.join(have)}): nothing would be left "
                    "out of it"
                )

    def build_train_datasets(
        self, *, datasets: list[Any], worker_config: WorkerConfig, **_unused: object
    ) -> PlanDataset:
        """Build the plan over the loaded data sets; energon calls this."""
        sources: dict[str, RecordSource] = {}
        planned: list[PlanSource] = []
        data = self._encoder.stage.data
        if data.metadataset is not None and self._blend == Path(data.metadataset.path):
            check_parts(data.metadataset, datasets)
        left_out = read_left_out(self._run.data.left_out)
        self._check_names(left_out)
        for loaded in datasets:
            factory: ArrowDatasetFactory = loaded.dataset
            name = loaded_name(loaded)
            count = data.blend[name].num_records(len(factory))
            unused = left_out.get(name, frozenset())
            sources[name] = RecordSource(name, factory.reader, count, left_out=unused)
            bounds = self._encoder.bounds(sources[name], folder=self._folder)
            planned.append(
                PlanSource(
                    name=name,
                    weight=data.blend[name].weight_of(count),
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
            task_block=data.task_block,
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
    receives `<stage>.yaml`, the blend as energon can read it.
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
        self._stage_name = stage_name
        check_world_size(stage.batch_size, world_size, stage=stage_name)
        encoder = StepEncoder(
            config=config,
            stage_name=stage_name,
            vocabulary=vocabulary,
            geometry=geometry,
            num_nodes=num_nodes,
        )
        blend = blend_file(stage.data, stage_name, folder)
        dataset = get_train_dataset(
            str(blend),
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
                blend=blend,
            ),
        )
        self._dataset = cast(PlanDataset, dataset)
        self._loader = self._new_loader()
        self._steps: Iterator[StepBatch] | None = None
        self._expected = start_step
        self.worker_deaths = 0  # so far; each is logged
        self._told: list[str] = []  # deaths that nobody has asked for yet

    def _new_loader(self) -> Any:
        in_process = self._dataset.worker_config.num_workers == 0
        loader = get_savable_loader(
            self._dataset,
            checkpoint_every_sec=_ENDLESS,  # energon's own state is not used
            gc_collect_every_n_steps=0 if in_process else _COLLECT_EVERY_STEPS,
            watchdog_timeout_seconds=None if in_process else _WATCHDOG_SECONDS,
        )
        loader.pin_memory = False  # its thread would warn without a GPU; batches are small
        return loader

    @property
    def plan(self) -> StepPlan:
        """The order of the stage."""
        return self._dataset.plan

    @property
    def fingerprint(self) -> str:
        """Hash of all that decides which records a step takes."""
        return self.plan.plan_hash

    def next_step(self) -> StepBatch:
        """Return the next step's part of this rank; the same number of packs on every rank.

        A worker process that dies costs a moment, not the run. Raises RuntimeError if workers die
        again and again over one step, and whatever an encoder raised: that is a fault of ours.
        """
        for attempt in range(1, MAX_DEATHS_IN_A_ROW + 1):
            try:
                batch = self._receive()
                break
            except _BROKEN as error:
                self._start_workers_again(error, attempt)
        assert batch.step == self._expected, f"step {batch.step}, expected {self._expected}"
        self._expected += 1
        return batch

    def _receive(self) -> StepBatch:
        """Take what the workers have for the next step. Raises one of _BROKEN if one is dead."""
        workers = self._loader._iterator
        # A DataLoader draws a seed when it starts: a resumed run's dropout would be another one.
        with torch.random.fork_rng(devices=[]):
            try:
                with watched(workers):
                    death = first_death(workers)
                    if death is not None:  # since the last step; its batches may be half written
                        raise RuntimeError(str(death))
                    self._steps = self._steps or iter(self._loader)
                    return next(self._steps)
            finally:
                unwatch(self._loader._iterator)  # which the first step has just made

    def _start_workers_again(self, error: Exception, attempt: int) -> None:
        """Put new workers in the place of all if one has died, else raise the error."""
        workers = self._loader._iterator
        death = first_death(workers, patience=_DEATH_SECONDS)
        if death is None:
            raise error
        self.worker_deaths += 1
        self._told.append(str(death))
        end_at_once(workers)
        where = f"stage '{self._stage_name}', waiting for step {self._expected}: loader {death}"
        if attempt == MAX_DEATHS_IN_A_ROW:
            raise RuntimeError(
                f"{where}; it was the {attempt}th death without a step between. Look for it in "
                "the kernel's log (dmesg); if memory ran out, lower data.num_workers, else run "
                "with data.num_workers=0 to see which record it is"
            ) from error
        log.warning("%s; the workers are started again, nothing is lost", where)
        self._dataset.start_at(self._expected)
        self._loader, self._steps = self._new_loader(), None

    def take_deaths(self) -> list[str]:
        """Return what killed worker processes since the last call, in words."""
        taken, self._told = self._told, []
        return taken

    def state(self, next_step: int) -> dict[str, Any]:
        """Return what a checkpoint keeps; `next_step` is the first one not yet trained."""
        return self.plan.state(next_step)

    def close(self) -> None:
        """End the worker processes and close the files. The loader cannot be used afterwards."""
        workers, self._loader._iterator, self._steps = self._loader._iterator, None, None
        if first_death(workers) is not None:
            end_at_once(workers)
        elif hasattr(workers, "_shutdown_workers"):  # a loader in process has none to end
            workers._shutdown_workers()
        self._dataset.close()


def _digest(numbers: frozenset[int]) -> str:
    if not numbers:
        return ""
    return hashlib.blake2b(str(sorted(numbers)).encode(), digest_size=16).hexdigest()


__all__ = ["ArrowDatasetFactory", "PlanDataset", "PlanTaskEncoder", "StageLoader"]
