"""The launcher's own endpoint: what only the run folder knows, for Prometheus.

Read from the files again every few seconds, in the launcher's main thread; a scrape reads no file.
It also takes away the targets of ranks that have died. Nothing here ends a run.
"""

import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from cocoa_dist.config import RunConfig
from cocoa_dist.exporter import (
    Exporter,
    Values,
    collect_stale_targets,
    target_folder,
    target_labels,
    target_name,
)
from cocoa_dist.metrics import RESTART_REASONS, RUN_STATES, Source
from launcher.history import Verdict, count_failures, read_incarnations
from launcher.ledger import read_ledger
from launcher.signals import Interrupts
from launcher.status import Status, read_status

log = logging.getLogger("launcher")

REFRESH_SECONDS = 15.0
_MOST_LOAD = 0.01  # of the launcher's time: a long history is read less often


class RunExporter:
    """Serves the run-level metrics while it is entered; call `tick` often."""

    def __init__(self, config: RunConfig, run_dir: Path, *, interrupts: Interrupts) -> None:
        self.config, self.run_dir, self.interrupts = config, run_dir, interrupts
        self.values = Values(Source.LAUNCHER)
        self.exporter = Exporter(self.values)
        self._folder = target_folder(run_dir, config.metrics)
        who = f"launcher-{socket.gethostname()}-{os.getpid()}"  # two may live while one is fenced
        self._name = target_name(run_dir, epoch="run", who=who)
        self._due = 0.0
        self._told = False

    def __enter__(self) -> Self:
        collect_stale_targets(self._folder, self.run_dir)
        if self.config.metrics.exporter:
            self.exporter.start(
                self.config.metrics,
                port=0,
                folder=self._folder,
                name=self._name,
                labels=target_labels(self.run_dir, who="launcher"),
            )
            self.refresh()
        return self

    def __exit__(self, *_: object) -> None:
        if self.exporter.port is not None:
            self._linger()
        self.exporter.stop()

    def tick(self) -> None:
        """Read the files again if it is time to."""
        if self.config.metrics.exporter and time.monotonic() >= self._due:
            self.refresh()

    @contextmanager
    def ranks(self, epoch: str) -> Iterator[None]:
        """Be entered while the ranks of an incarnation live; takes away the targets they leave."""
        self._due = 0.0  # how it began and how it ended are shown with the next tick
        try:
            yield
        finally:
            collect_stale_targets(self._folder, self.run_dir, epoch=epoch)
            self._due = 0.0

    def _linger(self) -> None:
        """Let Prometheus see that somebody is needed, before nobody is left to say so."""
        ended = read_incarnations(self.run_dir)
        if not ended or ended[-1].verdict not in (Verdict.GIVEN_UP, Verdict.BAD_INPUT):
            return
        self.values.choose("cocoa_run_state", "given_up", among=RUN_STATES, label="state")
        deadline = time.monotonic() + self.config.metrics.linger_seconds
        while time.monotonic() < deadline and not self.interrupts.count:
            time.sleep(0.1)

    def refresh(self) -> None:
        """Read the files now; what cannot be read is told once and counted."""
        began = time.monotonic()
        try:
            self._read()
        except (OSError, ValueError) as error:
            if not self._told:
                self._told = True
                log.warning("run metrics stay as they are: %s; the run goes on", error)
            self.values.add("cocoa_exporter_faults_total", reason="files")
        now = time.monotonic()
        self._due = now + max(REFRESH_SECONDS, (now - began) / _MOST_LOAD)

    def _read(self) -> None:
        status = read_status(self.run_dir)
        values = self.values
        values.choose("cocoa_run_state", status.state, among=RUN_STATES, label="state")
        for stage in status.stages:
            values.set("cocoa_stage_step", stage.step, name=stage.stage)
            values.set("cocoa_stage_target_steps", stage.target_step, name=stage.stage)
        for reason in RESTART_REASONS:
            restarts = status.restarts.get(reason, 0)
            values.set("cocoa_run_restarts_total", restarts, reason=reason)
        values.set("cocoa_run_replayed_steps_total", status.replayed_steps)
        values.set("cocoa_run_failed_attempts", self._failed_attempts(status))
        ledger = read_ledger(self.run_dir, self.config, now=time.time(), live=True)
        for cause, seconds in ledger.seconds.items():
            values.set("cocoa_run_seconds", seconds, cause=cause)
        values.set("cocoa_run_wall_seconds", ledger.wall_seconds)
        if ledger.goodput is not None:
            values.set("cocoa_run_goodput_ratio", ledger.goodput)
        values.set("cocoa_run_rank_seconds", ledger.rank_seconds)
        if self.config.budget_gpu_hours is not None:
            values.set("cocoa_run_budget_rank_seconds", 3600.0 * self.config.budget_gpu_hours)

    def _failed_attempts(self, status: Status) -> int:
        ended = [item for item in read_incarnations(self.run_dir) if not item.running]
        if not ended:
            return 0
        done = next((s.step for s in status.stages if s.stage == ended[-1].stage), 0)
        if status.last_checkpoint and status.last_checkpoint.stage == ended[-1].stage:
            done = status.last_checkpoint.step
        return count_failures(ended, stage=ended[-1].stage, from_step=done)
