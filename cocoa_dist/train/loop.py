"""The loop of one stage: next batch, step, record, checkpoint; and who it answers to.

Returns how it ended: the stage is finished, the process was asked to leave, or an operator
stopped the run. All ranks decide alike, because every flag rides on the step's reduction.
"""

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

from cocoa_dist.batch import StepBatch
from cocoa_dist.config import RunConfig
from cocoa_dist.data.fullest import fuller_packs, fullest_pack, most_packs
from cocoa_dist.data.loader import StageLoader
from cocoa_dist.distributed import rank, world_size
from cocoa_dist.manifest import Manifest
from cocoa_dist.metrics import METRICS_NAME, JsonLines
from cocoa_dist.model.compiled import compilation_of
from cocoa_dist.monitor import Monitor
from cocoa_dist.runtime import StopRequest, stop_file_present
from cocoa_dist.train.checkpoint import Checkpointer
from cocoa_dist.train.engine import StepStats, TrainEngine
from cocoa_dist.train.guards import SpikeDetector, check_skips, name_records, recent_losses
from cocoa_dist.train.held_out import HeldOut
from cocoa_dist.train.preflight import Trial, preflight
from cocoa_dist.train.profiling import Profiling
from cocoa_dist.train.resources import StepFlops, gpu_memory, peak_flops
from cocoa_dist.train.watchdog import TIMEOUT_SHARE, Watchdog

log = logging.getLogger("cocoa_dist.train")


class StageEnd(Enum):
    """How a stage's incarnation ended; the value is its verdict in `outcome.json`."""

    FINISHED = "finished"
    PREEMPTED = "preempted"
    STOPPED = "stopped"


@dataclass
class Progress:
    """Running totals of a stage over all its incarnations."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    bad_records: int = 0
    productive_seconds: float = 0.0
    cpu_seconds: float = 0.0
    wall_seconds_before: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    @staticmethod
    def after(manifest: Manifest | None) -> "Progress":
        """Go on from a checkpoint, or from nothing."""
        if manifest is None:
            return Progress()
        return Progress(
            step=manifest.step,
            samples=manifest.samples,
            tokens=manifest.tokens,
            skipped=manifest.skipped_steps,
            bad_records=manifest.bad_records,
            productive_seconds=manifest.productive_seconds,
            cpu_seconds=manifest.train_cpu_seconds,
            wall_seconds_before=manifest.wall_seconds,
            parts=dict(manifest.loss),
        )

    @property
    def wall_seconds(self) -> float:
        """Wall time of the stage so far."""
        return self.wall_seconds_before + time.monotonic() - self.started


@dataclass(frozen=True)
class _Extras:
    """What the ranks share in each step's reduction, beside the losses."""

    stop: float  # ranks asked to leave
    operator_stop: float  # rank 0 saw the STOP file
    samples: float
    tokens: float
    fill: float  # sum over ranks of fill ratios
    bad_records: float
    cpu_seconds: float  # of the step before; an incarnation's last step rides on nothing
    truncated: float  # texts that were cut
    shrunk: float  # pictures that had too many pixels
    worker_deaths: float  # of loaders, since the step before
    flops: float  # of the model
    profile: float  # steps that rank 0 was asked to trace
    ranks: float  # one each

    def values(self) -> list[float]:
        return list(vars(self).values())


class StageRun:
    """One incarnation of one stage on this rank."""

    def __init__(
        self,
        config: RunConfig,
        stage_name: str,
        *,
        run_dir: Path,
        engine: TrainEngine,
        loader: StageLoader,
        checkpointer: Checkpointer,
        template: Manifest,
        progress: Progress,
        stop: StopRequest,
        monitor: Monitor,
        held_out: HeldOut | None = None,
        flops: StepFlops | None = None,
    ) -> None:
        """`template` holds the fields of the manifest that do not change from step to step."""
        self.config, self.stage_name, self.run_dir = config, stage_name, run_dir
        self.stage = config.stages[stage_name]
        self.engine, self.loader, self.checkpointer = engine, loader, checkpointer
        self.template, self.progress, self.stop = template, progress, stop
        self.monitor, self.held_out, self.flops = monitor, held_out, flops
        self.peak_flops = peak_flops(engine.device)
        self.profiling = self._profiling()
        checkpointer.on_saved, checkpointer.on_failed = monitor.saved, monitor.save_failed
        checkpointer.on_progress = lambda: self.watchdog.beat(f"saving step {self.progress.step}")
        self.metrics = JsonLines(run_dir / METRICS_NAME)
        self.sample_log = JsonLines(run_dir / "samples" / f"{stage_name}.jsonl")
        self.quarantine = JsonLines(run_dir / "quarantine" / f"{stage_name}.rank{rank()}.jsonl")
        self.skipped = JsonLines(run_dir / "skipped" / f"{stage_name}.rank{rank()}.jsonl")
        self.spikes = self._spike_detector()
        self.watchdog = self._watchdog()
        self.step_cpu = 0.0
        self.compilation = compilation_of(engine.module)
        self.value: float | None = None  # of the last step: evaluation.keep_best

    def _spike_detector(self) -> SpikeDetector:
        guards = self.config.guards
        history: list[float] = []
        if rank() == 0 and self.progress.step:
            history = recent_losses(
                self.metrics.path, stage=self.stage_name, count=guards.spike_window
            )
        return SpikeDetector(guards, history=history)

    def _profiling(self) -> Profiling:
        found = Profiling(
            self.run_dir,
            stage=self.stage_name,
            rank=rank(),
            world_size=world_size(),
            device=self.engine.device,
        )
        wanted = self.config.runtime.profile_steps
        if wanted is not None:
            found.plan(wanted.first, wanted.count)
        return found

    def _watchdog(self) -> Watchdog:
        limit = TIMEOUT_SHARE * self.config.engine.timeout_seconds
        name = f"{self.stage_name}.rank{rank()}.stacks"
        return Watchdog(
            seconds=limit if self.config.guards.watchdog else math.inf,
            stacks=self.run_dir / "logs" / (self.template.epoch or "by_hand") / name,
            rank=rank(),
        )

    def train(self) -> StageEnd:
        """Run the stage to its end or until asked to leave. Collective: call on all ranks."""
        with self.watchdog:
            if self.config.guards.preflight:
                self._preflight()
            with self.monitor.phase("train"):
                end = self._steps()
                self.profiling.finish()
                return end

    def _preflight(self) -> None:
        self.watchdog.beat("pre-flight")
        trial = None
        if not self.progress.step:  # a stage that goes on has run its packs
            size = world_size()
            trial = Trial(
                partial(fullest_pack, self.loader, world_size=size),
                packs_a_step=most_packs(self.loader.plan, world_size=size),
                fuller=partial(fuller_packs, self.loader, world_size=size),
                smaller=lambda room: fullest_pack(self.loader, world_size=size, room=room),
                budgets=(self.config.data.tokens_per_pack, self.config.data.patches_per_pack),
            )
        preflight(
            self.engine,
            run_dir=self.run_dir,
            keep_last=self.config.checkpoint.keep_last,
            keeps_best=self.config.evaluation.keep_best is not None,
            trial=trial,
        )

    def _steps(self) -> StageEnd:
        every = self.config.checkpoint.every_steps
        while self.progress.step < self.stage.steps:
            asked = self._one_step(self.progress.step + 1)
            done = self.progress.step == self.stage.steps
            self.checkpointer.poll()
            if done or asked is not None:
                self.save(wait=True)
            elif (
                self.progress.step % every == 0
                or self.checkpointer.must_retry
                or self.checkpointer.is_best(self.value)
            ):
                self.save(wait=False)
            if asked is not None and not done:
                return asked
        return StageEnd.FINISHED

    def save(self, *, wait: bool) -> None:
        """Start to save the current step, or `wait` until it is committed. Collective."""
        progress = self.progress
        self.watchdog.beat(f"saving step {progress.step}")
        manifest = self.template.model_copy(
            update={
                "step": progress.step,
                "complete": progress.step == self.stage.steps,
                "data_state": self.loader.state(progress.step + 1),
                "samples": progress.samples,
                "tokens": progress.tokens,
                "skipped_steps": progress.skipped,
                "bad_records": progress.bad_records,
                "wall_seconds": progress.wall_seconds,
                "productive_seconds": progress.productive_seconds,
                "train_cpu_seconds": progress.cpu_seconds,
                "loss": progress.parts,
            }
        )
        start = self.checkpointer.save if wait else self.checkpointer.begin
        with self.monitor.phase("checkpoint"):
            start(
                self.engine,
                manifest,
                logs=(self.metrics, self.sample_log, self.quarantine, self.skipped),
                value=self.value,
            )

    def _one_step(self, step: int) -> StageEnd | None:
        self.profiling.begin(step)
        begin, cpu_begin = time.monotonic(), time.process_time()
        peers = self.engine.peer_wait_seconds
        self.watchdog.beat(f"loading step {step}")
        batch = self.loader.next_step()
        waited = time.monotonic() - begin
        self.watchdog.beat(f"step {step}")
        stats = self.engine.train_step(batch.packs, step=step, extras=self._extras(batch).values())
        shared = _Extras(*stats.extras)
        seconds = time.monotonic() - begin
        self.step_cpu = time.process_time() - cpu_begin + batch.cpu_seconds
        self._count(step, stats, shared, seconds)
        bad = len(batch.bad_records)
        peer_wait = self.engine.peer_wait_seconds - peers
        self.monitor.step(
            step, seconds=seconds, waited=waited, peer_wait=peer_wait, bad_records=bad
        )
        self._trace(step, shared)
        if batch.bad_records:
            self._quarantine(step, batch)
        if stats.skipped:
            self._note_skip(batch, stats)
        scores = self._evaluate(step)
        if rank() == 0:
            self._record(batch, stats, shared, scores=scores, seconds=seconds, waited=waited)
        self._check_limits(batch)
        if shared.operator_stop:
            return StageEnd.STOPPED
        return StageEnd.PREEMPTED if shared.stop else None

    def _trace(self, step: int, shared: _Extras) -> None:
        """End a trace, plan one that was asked for; the GPU's memory now and then."""
        self.watchdog.beat(f"after step {step}")
        self.profiling.end(step)
        if shared.profile:
            self.profiling.plan(step + 1, round(shared.profile), is_request=True)
        if step % self.config.metrics.measure_every_steps == 0 or step == 1:
            memory = gpu_memory(self.engine.device)
            if memory is not None:
                self.monitor.gpu(memory.by_kind, retries=memory.retries)

    def _extras(self, batch: StepBatch) -> _Extras:
        operator_stop = rank() == 0 and stop_file_present(self.run_dir)
        return _Extras(
            stop=float(self.stop.requested),
            operator_stop=float(operator_stop),
            samples=batch.num_samples,
            tokens=batch.num_tokens,
            fill=batch.fill_ratio,
            bad_records=len(batch.bad_records),
            cpu_seconds=self.step_cpu,
            truncated=batch.num_truncated,
            shrunk=batch.num_shrunk,
            worker_deaths=self._note_deaths(batch.step),
            flops=self.flops.of_packs(batch.packs) if self.flops else 0.0,
            profile=self.profiling.asked() if rank() == 0 else 0,
            ranks=1.0,
        )

    def _count(self, step: int, stats: StepStats, shared: _Extras, seconds: float) -> None:
        progress = self.progress
        progress.step = step
        progress.samples += round(shared.samples)
        progress.tokens += round(shared.tokens)
        progress.skipped += bool(stats.skipped)
        progress.skipped_in_a_row = progress.skipped_in_a_row + 1 if stats.skipped else 0
        progress.bad_records += round(shared.bad_records)
        progress.productive_seconds += seconds
        progress.cpu_seconds += shared.cpu_seconds
        progress.parts = {"loss": stats.loss, **stats.parts}

    def _note_deaths(self, step: int) -> int:
        """Write down what killed this rank's loader processes since the step before; how many."""
        deaths = self.loader.take_deaths()
        if deaths:
            name = f"{self.stage_name}.rank{rank()}.jsonl"
            lines = JsonLines(self.run_dir / "loader_deaths" / name)
            for death in deaths:
                lines.append(
                    {"stage": self.stage_name, "step": step, "time": time.time(), "what": death}
                )
            lines.close()
        return len(deaths)

    def _quarantine(self, step: int, batch: StepBatch) -> None:
        for fault in batch.bad_records:
            self.quarantine.append({"stage": self.stage_name, "step": step, **asdict(fault)})
            log.warning("step %d: record left out: %s", step, fault)

    def _note_skip(self, batch: StepBatch, stats: StepStats) -> None:
        """Name the records of a step that moved no weight; each rank its own."""
        self.skipped.append(
            {
                "stage": self.stage_name,
                "step": batch.step,
                "not_finite": stats.skipped,
                "here": not stats.finite_here,  # this rank's own part of the loss
                "dataset": batch.dataset,
                "records": list(batch.record_keys),
            }
        )
        blame = "its own part of the loss is not" if not stats.finite_here else "its own part is"
        log.warning(
            "step %d was skipped: its %s is not finite; rank %d (%s finite) had %s of %s",
            *(batch.step, stats.skipped, rank(), blame),
            *(name_records(batch.record_keys), batch.dataset),
        )

    def _check_limits(self, batch: StepBatch) -> None:
        """Raise ValueError, on every rank alike, for what must not go on unseen."""
        limit, bad = self.config.data.bad_record_limit, self.progress.bad_records
        if bad > limit:
            raise ValueError(
                f"records could not be used {bad} times in stage {self.stage_name}, more than "
                f"data.bad_record_limit={limit}; they are listed in {self.quarantine.path.parent}: "
                "repair or remove them, or raise the limit"
            )
        check_skips(
            self.config.guards,
            stage=self.stage_name,
            step=batch.step,
            in_a_row=self.progress.skipped_in_a_row,
            in_stage=self.progress.skipped,
            records=batch.record_keys,
            listed_in=self.skipped.path.parent,
        )

    def _evaluate(self, step: int) -> dict[str, float]:
        """Score the held-out sets if they are due; {} where they are not. Collective."""
        self.value = None
        if self.held_out is None or not self.held_out.due(step, last=self.stage.steps):
            return {}
        with self.monitor.phase("evaluation"):
            beat = partial(self.watchdog.beat, f"evaluating step {step}")
            scores = self.held_out.scores(self.engine, beat=beat, stop=lambda: self.stop.requested)
        if scores:  # else it was left for a stop
            self.monitor.evaluated(step, scores)
        self.value = self.held_out.kept_value(scores)
        return scores

    def _utilisation(self, shared: _Extras, seconds: float) -> dict[str, float]:
        """Return the share of the GPUs' peak that was used; {} where it is not known."""
        if self.peak_flops is None:
            return {}
        return {"mfu": shared.flops / (seconds * shared.ranks * self.peak_flops)}

    def _record(
        self,
        batch: StepBatch,
        stats: StepStats,
        shared: _Extras,
        *,
        scores: Mapping[str, float],
        seconds: float,
        waited: float,
    ) -> None:
        """Write the step's line of metrics.jsonl (rank 0), and a log line now and then."""
        saving = self.checkpointer.take_numbers()
        above = self.spikes.deviations(stats.loss)
        spike = self.spikes.is_spike(above)
        record: dict[str, Any] = {
            "stage": self.stage_name,
            "step": batch.step,
            "epoch": self.template.epoch,
            "time": time.time(),
            "loss": _finite(stats.loss),
            **{f"loss/{name}": _finite(value) for name, value in stats.parts.items()},
            **{name: _finite(value) for name, value in {**stats.health, **scores}.items()},
            "grad_norm": None if stats.skipped else _finite(stats.grad_norm),
            "learning_rate": stats.learning_rate,
            "samples": round(shared.samples),
            "tokens": round(shared.tokens),
            "fill_ratio": shared.fill / shared.ranks,
            "data_wait_seconds": waited,
            "step_seconds": seconds,
            "cpu_seconds": shared.cpu_seconds,
            "model_flops": shared.flops,
            **self._utilisation(shared, seconds),
            "compiled_graphs": self.compilation.graphs if self.compilation else 0,
            "compile_stopped": bool(self.compilation and self.compilation.stopped),
            "truncated_texts": round(shared.truncated),
            "shrunk_pictures": round(shared.shrunk),
            "loader_restarts": round(shared.worker_deaths),
            "skipped": bool(stats.skipped),
            "loss_deviations": above,  # robust sigmas above the median of the steps before
            "loss_spike": spike,
            "batch_digest": batch.digest,
            "checkpoint_blocked_seconds": saving.blocked_seconds,  # since the line before
            "checkpoint_seconds": saving.seconds,  # of a save committed since then, else null
            "saves_waited": saving.waited,
        }
        self.checkpointer.fence.check()  # one taken for dead must not write into the record either
        self.metrics.append(record)
        progress = self.progress
        self.monitor.record(record, samples=progress.samples, tokens=progress.tokens)
        if spike:
            log.warning(
                "step %d: the loss jumped to %.4f, %.1f robust deviations above the median of the "
                "last %d steps; records of this rank: %s",
                *(batch.step, stats.loss, above, len(self.spikes.recent) - 1),
                name_records(batch.record_keys),
            )
        if self.config.data.log_sample_ids:
            blocks = {"blocks": batch.blocks} if self.stage.data.task_block else {}
            self.sample_log.append(
                {
                    "step": batch.step,
                    "dataset": batch.dataset,
                    **blocks,
                    "records": list(batch.record_ids),
                }
            )
        if batch.step % self.config.metrics.log_every_steps == 0 or batch.step == 1:
            log.info(
                "%s %d/%d loss %.4f lr %.2e %.0f tokens/s",
                self.stage_name,
                batch.step,
                self.stage.steps,
                stats.loss,
                stats.learning_rate,
                shared.tokens / seconds,
            )


def _finite(value: float) -> float | None:
    """Return the value, or None where JSON has no word for it."""
    return value if math.isfinite(value) else None
