"""Traces of a few steps, by the recipe or on request while a run goes on.

A request is a file in the run folder: rank 0 sees it, the step's reduction tells the others, so all
ranks trace the same steps. Nothing of it changes a number.
"""

import gzip
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from cocoa_dist.manifest import write_atomic
from cocoa_dist.tracing import PROFILE_ANSWER, PROFILE_FOLDER, PROFILE_REQUEST

log = logging.getLogger("cocoa_dist.train")

MOST_STEPS = 100  # of a request: a trace of more is too large to be opened
_ROWS = 20  # of the table
_SNAPSHOT_ENTRIES = 100_000


class Profiling:
    """Traces steps of one stage on this rank; call `begin` and `end` around each."""

    def __init__(
        self, run_dir: Path, *, stage: str, rank: int, world_size: int, device: torch.device
    ) -> None:
        self.run_dir, self.stage, self.device = run_dir, stage, device
        self.rank, self.world_size = rank, world_size
        self._request = str(run_dir / PROFILE_REQUEST)
        self._first, self._count, self._last = 0, 0, 0
        self._after_request = (0, 0)  # first step and steps of the recipe's plan
        self._profiler: Any = None
        self._is_request = False

    def plan(self, first: int, count: int, *, is_request: bool = False) -> None:
        """Trace steps [first, first + count); the same on all ranks. A request goes first."""
        if is_request:
            self._after_request = (self._first, self._count)
        self._first, self._count, self._is_request = first, count, is_request

    def asked(self) -> int:
        """Return how many steps the request in the run folder is for; 0 without one.

        It waits while steps are traced, not while those of the recipe are yet to come.
        """
        taken_up = self._profiler is not None or (self._count and self._is_request)
        if taken_up or not os.path.exists(self._request):
            return 0
        try:
            request = json.loads((self.run_dir / PROFILE_REQUEST).read_text(encoding="utf-8"))
            return min(max(int(request["steps"]), 1), MOST_STEPS)
        except (OSError, ValueError, KeyError, TypeError, OverflowError):
            return 0  # half written: the next step sees it whole

    def begin(self, step: int) -> None:
        """Start to trace if `step` is the first one, or one behind it that a resume came to."""
        if not self._count or self._profiler is not None:
            return
        if step >= self._first + self._count:  # of the recipe, done before an interruption
            self._count = 0
        elif step >= self._first:
            self._first, self._count = step, self._first + self._count - step
            self._start()

    def end(self, step: int) -> None:
        """Stop after the last step and write what was seen; what fails is told."""
        self._last = step
        if self._profiler is not None and step >= self._first + self._count - 1:
            self.finish()

    def finish(self) -> None:
        """Stop and write now: the stage ends, or the process was asked to leave.

        A request that no step was traced for stays: the next incarnation or stage takes it up.
        """
        profiler, self._profiler, self._count = self._profiler, None, 0
        if profiler is None:
            return
        profiler.__exit__(None, None, None)
        folder = self.run_dir / PROFILE_FOLDER / self.stage / f"step_{self._first}"
        try:
            self._write(profiler, folder)
        except (OSError, RuntimeError) as error:
            log.warning("no trace of step %d: %s; the run goes on", self._first, error)
        if self.rank == 0 and self._is_request:
            (self.run_dir / PROFILE_REQUEST).unlink(missing_ok=True)
        if self._is_request:
            self.plan(*self._after_request)

    def _start(self) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=_SNAPSHOT_ENTRIES)
        self._profiler = torch.profiler.profile(activities=activities, profile_memory=True)
        self._profiler.__enter__()

    def _write(self, profiler: Any, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        name = f"rank_{self.rank}"
        if self.device.type == "cuda":
            memory: Any = torch.cuda.memory
            memory._dump_snapshot(str(folder / f"{name}.memory.pickle"))
            memory._record_memory_history(enabled=None)
        plain, packed = folder / f".{name}.json", folder / f".{name}.json.gz"
        profiler.export_chrome_trace(str(plain))
        with plain.open("rb") as source, gzip.open(packed, "wb", compresslevel=3) as target:
            shutil.copyfileobj(source, target)
        plain.unlink()
        packed.rename(folder / f"{name}.json.gz")
        if self.rank == 0:
            self._tell(profiler, folder)

    def _tell(self, profiler: Any, folder: Path) -> None:
        """Write the table of operators, and where it all is for the one who asked."""
        by = "self_cuda_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=by, row_limit=_ROWS, max_name_column_width=40)
        steps = f"steps {self._first} to {self._last}"
        title = f"{self.stage}, {steps}, rank 0 of {self.world_size}\n"
        write_atomic(folder / "top.txt", (title + table).encode())
        answer = {
            "folder": os.path.relpath(folder, self.run_dir),
            "first": self._first,
            "steps": self._last - self._first + 1,
            "world_size": self.world_size,
        }
        if self._is_request:
            write_atomic(self.run_dir / PROFILE_ANSWER, json.dumps(answer).encode())
        log.info("traced %s: %s", steps, folder)
