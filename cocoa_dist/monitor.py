"""What a rank tells the outside while it trains: one object the loop talks to.

It turns steps, phases and saves into values for Prometheus (exporter.py) and into the run's diary
(events.py, rank 0). Nothing here is a collective, moves a weight or ends a run.
"""

import math
import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from cocoa_dist.config import RunConfig, fingerprint
from cocoa_dist.events import Events
from cocoa_dist.exporter import Exporter, Values, target_folder, target_labels, target_name
from cocoa_dist.manifest import Manifest, ManifestError, read_manifest
from cocoa_dist.metrics import METRICS, PHASES, Kind, Source
from cocoa_dist.sinks import Sinks

_WINDOW = 64  # steps the median is taken over
_TRAIN = "train"


class Monitor:
    """One incarnation of one stage on one rank, as seen from outside."""

    def __init__(
        self, config: RunConfig, stage: str, *, run_dir: Path, rank: int, epoch: str
    ) -> None:
        """Set up values and diary; `start` opens the endpoint."""
        self.config, self.stage, self.run_dir = config, stage, run_dir
        self.rank, self.epoch = rank, epoch
        sources = (Source.EVERY_RANK, Source.RANK_0) if rank == 0 else (Source.EVERY_RANK,)
        self.values = Values(*sources)
        self.exporter = Exporter(self.values)
        self.events: Events | None = None
        if rank == 0:
            every = config.metrics.heartbeat_seconds
            self.events = Events(run_dir, stage=stage, epoch=epoch, every_seconds=every)
        self.sinks = Sinks(lambda what: self._sink_fault(what))
        self._phase = "start"
        self._since = time.monotonic()  # when the phase began, or its time was last counted
        self._step = 0
        self._recent: deque[float] = deque(maxlen=_WINDOW)

    @staticmethod
    def start(
        config: RunConfig, stage: str, *, run_dir: Path, rank: int, world_size: int, epoch: str
    ) -> "Monitor":
        """Open the endpoint of this rank and say that it starts."""
        monitor = Monitor(config, stage, run_dir=run_dir, rank=rank, epoch=epoch)
        for phase in ("step", "data_wait", *PHASES):
            if phase != _TRAIN:
                monitor.values.add("cocoa_train_phase_seconds_total", 0.0, phase=phase)
        monitor.values.set("cocoa_train_stepping", 0.0)
        monitor.values.add("cocoa_data_bad_records_total", 0.0)
        if rank == 0:
            monitor._introduce(world_size=world_size)
        monitor._write(lambda events: events.phase("start", step=0))
        if config.metrics.exporter:
            local = int(os.environ.get("LOCAL_RANK", "0"))
            monitor.exporter.start(
                config.metrics,
                port=config.metrics.port + local if config.metrics.port else 0,
                folder=target_folder(run_dir, config.metrics),
                name=target_name(run_dir, epoch=epoch, who=f"r{rank:05d}"),
                labels=target_labels(run_dir, who=f"r{rank}", stage=stage, rank=str(rank)),
            )
        return monitor

    def resumed(self, manifest: Manifest | None) -> None:
        """Say where the stage goes on; None from its beginning."""
        self._step = manifest.step if manifest else 0
        if self.rank == 0:
            self.sinks.start(self.config, self.stage, run_dir=self.run_dir, step=self._step)
            self.values.set("cocoa_train_step", self._step)
            self.values.set("cocoa_checkpoint_last_success_step", self._step)
            if manifest is not None:
                when = "cocoa_checkpoint_last_success_timestamp_seconds"
                self.values.set(when, manifest.created_at)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Be in a phase (see metrics.PHASES), then again in the one before."""
        before = self._phase
        self._enter(name)
        try:
            yield
        finally:
            self._enter(before)

    def step(
        self,
        step: int,
        *,
        seconds: float,
        waited: float,
        peer_wait: float = 0.0,
        bad_records: int = 0,
    ) -> None:
        """Say that this rank has done a step.

        Of its seconds it `waited` for data, and `peer_wait` for other ranks in their sums.
        """
        self._step = step
        self._recent.append(seconds)
        self._since = time.monotonic()  # the step's time is counted as such, not as a phase's
        values = self.values
        values.add("cocoa_train_phase_seconds_total", seconds - waited, phase="step")
        values.add("cocoa_train_phase_seconds_total", waited, phase="data_wait")
        values.add("cocoa_train_peer_wait_seconds_total", peer_wait)
        values.set("cocoa_train_last_step_timestamp_seconds", time.time())
        values.set("cocoa_train_stepping", 1.0)
        values.later("median", partial(self._export_median, tuple(self._recent)))
        if bad_records:
            values.add("cocoa_data_bad_records_total", bad_records)
        self._write(lambda events: events.step(step, seconds=seconds, waited=waited))

    def record(self, fields: Mapping[str, Any], *, samples: int, tokens: int) -> None:
        """Export the step's line of metrics.jsonl (rank 0); totals are of the stage so far."""
        for name, field in _ADDED.items():
            value = fields.get(field)
            if value is not None:
                self._take(name, float(value))
        families = {name: value for name, value in fields.items() if "/" in name}
        rare = {name: v for name, v in families.items() if not name.startswith("loss/")}
        if rare:  # not in every record: the next one must not hide them
            self._export_families(rare)
        self.values.later("record", partial(self._export_record, fields, samples, tokens))
        self.sinks.write(fields)
        if fields.get("step", 0) % self.config.checkpoint.every_steps == 0:
            self.sinks.flush()  # the step is saved next: none behind it is lost with the process

    def _export_record(self, fields: Mapping[str, Any], samples: int, tokens: int) -> None:
        """Export what is replaced by the next record."""
        self.values.set("cocoa_train_consumed_samples", samples)
        self.values.set("cocoa_train_consumed_tokens", tokens)
        for name, field in _REPLACED.items():
            value = fields.get(field)
            if value is not None or not METRICS[name].needs_gpu:
                self.values.set(name, _number(value))
        self._export_families({name: v for name, v in fields.items() if name.startswith("loss/")})
        if "loss" in fields:
            self.values.set("cocoa_train_loss", _number(fields["loss"]), name="loss")

    def _export_families(self, fields: Mapping[str, Any]) -> None:
        for field, value in fields.items():
            family, _, member = field.partition("/")
            if f"{family}/" in _FAMILIES:
                name, label = _FAMILIES[f"{family}/"]
                self.values.set(name, _number(value), **{label: member})

    def _export_median(self, recent: tuple[float, ...]) -> None:
        self.values.set("cocoa_train_median_step_seconds", statistics.median(recent))

    def gpu(self, by_kind: Mapping[str, int], *, retries: int) -> None:
        """Say what this rank holds of its GPU's memory, in bytes."""
        for kind, size in by_kind.items():
            self.values.set("cocoa_gpu_memory_bytes", size, kind=kind)
        self.values.set("cocoa_gpu_alloc_retries_total", retries)

    def evaluated(self, step: int, scores: Mapping[str, float]) -> None:
        """Say what an evaluation after `step` found (rank 0); the step's record exports it."""
        known = {name: None if math.isnan(v) else round(v, 4) for name, v in scores.items()}
        self._write(lambda events: events.note("evaluated", step=step, **known))

    def saved(self, folder: Path) -> None:
        """Say that a checkpoint was committed (rank 0)."""
        if self.rank != 0:
            return
        self.sinks.flush()
        try:
            manifest = read_manifest(folder)
        except ManifestError:
            return  # retired or fenced in between; the next save says more
        self.values.set("cocoa_checkpoint_last_success_step", manifest.step)
        when = "cocoa_checkpoint_last_success_timestamp_seconds"
        self.values.set(when, manifest.created_at)
        size = sum(entry.bytes for entry in manifest.files)
        self.values.set("cocoa_checkpoint_bytes", size)
        self._write(lambda events: events.note("saved", step=manifest.step, bytes=size))

    def save_failed(self, reason: str) -> None:
        """Say that a save failed (rank 0); it will be tried again."""
        if self.rank == 0:
            self.values.add("cocoa_checkpoint_failures_total")
            self._write(lambda events: events.note("save_failed", step=self._step, reason=reason))

    def stop(self) -> None:
        """Say that this rank leaves, and take its target away."""
        self._enter("start")
        self.sinks.close()
        self._write(lambda events: events.close())
        self.events = None
        self.exporter.stop()

    def _sink_fault(self, what: str) -> None:
        if not self.values.get("cocoa_exporter_faults_total", reason="sinks"):
            self.exporter.fault("sinks", what)
        else:
            self.values.add("cocoa_exporter_faults_total", reason="sinks")

    def _introduce(self, *, world_size: int) -> None:
        job, _, restart = self.epoch.partition("-")[0].partition(".")
        self.values.set(
            "cocoa_run_info",
            1.0,
            recipe=self.config.name,
            method=self.config.method,
            epoch=self.epoch,
            restart=restart if job else "",
            world_size=str(world_size),
            config=fingerprint(self.config)[:12],
        )
        stage = self.config.stages[self.stage]
        self.values.set("cocoa_train_target_steps", stage.steps)
        self.values.set("cocoa_checkpoint_every_steps", self.config.checkpoint.every_steps)
        for name in _RANK_0_COUNTERS:  # `increase()` needs to see them at 0
            self.values.add(name, 0.0)
        self.values.choose("cocoa_train_phase", self._phase, among=PHASES, label="phase")

    def _enter(self, phase: str) -> None:
        now = time.monotonic()
        if self._phase != _TRAIN:
            spent = now - self._since
            self.values.add("cocoa_train_phase_seconds_total", spent, phase=self._phase)
        self._since, before, self._phase = now, self._phase, phase
        if before == phase:
            return
        if phase == _TRAIN:
            self.values.set("cocoa_train_last_step_timestamp_seconds", time.time())
        # Not before the first step of the incarnation: it compiles, and takes as long as it takes.
        self.values.set("cocoa_train_stepping", float(phase == _TRAIN and bool(self._recent)))
        if self.rank == 0:
            self.values.choose("cocoa_train_phase", phase, among=PHASES, label="phase")
        self._write(lambda events: events.phase(phase, step=self._step))

    def _take(self, name: str, value: float) -> None:
        kind = METRICS[name].kind
        if kind is Kind.COUNTER:
            self.values.add(name, value)
        else:
            self.values.observe(name, value)

    def _write(self, write: Callable[[Events], None]) -> None:
        """Write to the diary; a disk that is full costs the diary, not the run."""
        if self.events is None:
            return
        try:
            write(self.events)
        except OSError as error:
            first = not self.values.get("cocoa_exporter_faults_total", reason="events")
            if first:
                self.exporter.fault("events", f"events.jsonl cannot be written: {error}")
            else:
                self.values.add("cocoa_exporter_faults_total", reason="events")


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


_FIELDS = {
    metric.name: metric.record
    for metric in METRICS.values()
    if metric.record is not None and not metric.labels
}
_REPLACED = {n: field for n, field in _FIELDS.items() if METRICS[n].kind is Kind.GAUGE}
_ADDED = {n: field for n, field in _FIELDS.items() if METRICS[n].kind is not Kind.GAUGE}
_FAMILIES = {  # of fields: what is before the slash, to a metric and its label
    f"{metric.record.rstrip('/')}/": (metric.name, next(iter(metric.labels)))
    for metric in METRICS.values()
    if metric.record is not None and metric.labels
}
_RANK_0_COUNTERS = tuple(
    metric.name
    for metric in METRICS.values()
    if metric.source is Source.RANK_0 and metric.kind is Kind.COUNTER and not metric.labels
)
