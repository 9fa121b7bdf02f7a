"""The process itself: stop requests, seeds, and the files by which ranks and launcher agree.

Imports nothing heavy, so that signal handlers stand before torch is imported: a signal during the
seconds of import would otherwise kill the process by default action.
"""

import gc
import hashlib
import json
import os
import random
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from cocoa_dist.manifest import write_atomic

STOP_NAME = "STOP"  # an operator's file in the run folder: end the run for good
EPOCH_NAME = "epoch"  # names the one incarnation that may commit
OUTCOME_NAME = "outcome.json"  # the verdict of the last incarnation
EPOCH_VARIABLE = "COCOA_EPOCH"
EXIT_BAD_INPUT = 2
EXIT_HUNG = 94  # a rank that ended itself, see train/watchdog.py; the launcher knows it


class StopRequest:
    """Remembers that this process was asked to stop; the loop looks at step boundaries."""

    def __init__(self) -> None:
        self.requested = False

    def install(self) -> None:
        """Take SIGTERM, SIGUSR1 and SIGUSR2; do it before heavy imports."""
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.requested = True


class Fence:
    """Lets only the current incarnation of a run commit (a zombie rank must not)."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / EPOCH_NAME
        self.epoch = os.environ.get(EPOCH_VARIABLE, "")

    def check(self) -> None:
        """Raise RuntimeError if another incarnation has taken the run over."""
        if not self.epoch and not self.path.exists():
            return  # no launcher has ever held this folder
        try:
            current = self.path.read_text().strip()
        except OSError as error:
            raise RuntimeError(f"cannot read {self.path}: {error}; not committing") from error
        if current != self.epoch:
            raise RuntimeError(
                f"incarnation {self.epoch or 'by hand'} is fenced: {current} runs now; "
                "not committing"
            )


@contextmanager
def imports_that_stay() -> Iterator[None]:
    """Import without garbage collection, and exempt what exists afterwards from later ones.

    A million objects that never go: collections among them take a quarter of the imports' time,
    and half a second each later (tools/bench_restart.py); ZeRO-3 asks for one at start.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def adopt_ranks() -> None:
    """Set RANK and its relatives from SLURM's names, where the launcher says that srun started us.

    Inside a job SLURM_PROCID is set for everything, also for a batch script or a test by hand;
    only COCOA_RANKS=slurm means that these numbers are a rank's.
    """
    if os.environ.get("COCOA_RANKS") != "slurm":
        return
    per_node = os.environ["SLURM_STEP_TASKS_PER_NODE"]  # such as 8(x2): equal on all nodes
    os.environ.update(
        RANK=os.environ["SLURM_PROCID"],
        LOCAL_RANK=os.environ["SLURM_LOCALID"],
        WORLD_SIZE=os.environ["SLURM_STEP_NUM_TASKS"],
        LOCAL_WORLD_SIZE=per_node.partition("(")[0].partition(",")[0],
    )


def allow_many_files() -> None:
    """Raise this process's limit of open files as far as it may be raised.

    Loader processes hand over each tensor of a batch as a file descriptor: a step of 32 packs has
    822, and 1,024 is a common limit.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def write_outcome(run_dir: Path, *, stage: str, step: int, verdict: str, reason: str) -> None:
    """Leave the verdict of this incarnation: finished, preempted or stopped."""
    outcome = {
        "epoch": os.environ.get(EPOCH_VARIABLE, ""),
        "stage": stage,
        "step": step,
        "verdict": verdict,
        "reason": reason,
        "time": time.time(),
    }
    write_atomic(run_dir / OUTCOME_NAME, json.dumps(outcome).encode())


def stop_file_present(run_dir: Path) -> bool:
    """Say whether an operator asked the run to end."""
    return (run_dir / STOP_NAME).exists()


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch; data and corruption draw from generators of their own."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def seed_rank(seed: int, *, stage: str, step: int, rank: int) -> None:
    """Seed a rank that begins a stage, or goes on among another number of ranks.

    Each rank draws its own dropout.
    """
    key = f"{seed}/{stage}/{step}/{rank}"
    digest = hashlib.blake2b(key.encode(), digest_size=4).digest()
    seed_everything(int.from_bytes(digest, "little"))


def random_state() -> dict[str, Any]:
    """Return the state of every generator as tensors and plain values (safe to load)."""
    import numpy as np
    import torch

    version, internal, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    assert not isinstance(keys, str)
    state: dict[str, Any] = {
        "python": [version, list(internal), gauss],
        "numpy": [kind, torch.from_numpy(keys.copy()), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()  # of this rank's: another node may have fewer
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Put back what `random_state` returned."""
    import numpy as np
    import torch

    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy(), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
