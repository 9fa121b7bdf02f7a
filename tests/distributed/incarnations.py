"""Runs incarnations of a stage on a few ranks, without the launcher, and reads what they left."""

import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from ranks import free_port
from warm import Rank

from cocoa_dist.manifest import Manifest, newest
from cocoa_dist.metrics import read_json_lines

TRAINER = Path(__file__).with_name("dying_trainer.py")
STAGE = "joint_reconstruction"
NEXT_STAGE = "eos_bridged_reconstruction"
LIMIT = 240  # seconds an incarnation may take on a busy machine


@dataclass(frozen=True)
class Moment:
    """When and where an incarnation is disturbed; see dying_trainer.py."""

    name: str = "never"
    rank: str = "0"
    count: int = 1


class Incarnation:
    """The ranks of one incarnation of a stage."""

    def __init__(
        self,
        run_dir: Path,
        *overrides: str,
        world_size: int = 2,
        moment: Moment | None = None,
        stage: str = STAGE,
        epoch: str = "",
    ) -> None:
        run_dir.mkdir(exist_ok=True, parents=True)
        moment = moment or Moment()
        port, number = free_port(), len(list(run_dir.parent.glob(f"{run_dir.name}.log*")))
        self.log = run_dir.parent / f"{run_dir.name}.log{number}"
        if epoch:
            (run_dir / "epoch").write_text(epoch)
        arguments = [
            *(moment.name, moment.rank, str(moment.count)),
            *("debug", "data.log_sample_ids=true", *overrides),
            *("--stage", stage, "--run-dir", str(run_dir)),
        ]
        self.ranks = []
        self.ended: set[int] = set()  # by us: their codes say nothing
        for rank in range(world_size):
            environment = {
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
                "COCOA_EPOCH": epoch,
            }
            self.ranks.append(Rank(TRAINER, arguments, environment=environment, log=self.log))

    def wait(self) -> list[int]:
        """Wait until all have left, or until one has died and the others are ended; exit codes."""
        deadline = time.monotonic() + LIMIT
        while True:
            codes = [rank.poll() for rank in self.ranks]
            if any(codes) or None not in codes or time.monotonic() > deadline:
                break
            time.sleep(0.05)
        for number, rank in enumerate(self.ranks):
            try:
                rank.wait(timeout=3 if any(codes) else LIMIT)
            except subprocess.TimeoutExpired:
                rank.kill()
                self.ended.add(number)
        return [rank.wait() for rank in self.ranks]

    def finish(self) -> str:
        """Wait, expect success, return what the ranks said."""
        codes = self.wait()
        text = self.log.read_text()
        assert codes == [0] * len(codes), f"{codes}\n{text[-4000:]}"
        return text

    def die(self) -> str:
        """Wait, expect that a rank was killed by kill -9 as planned, return what was said."""
        codes = self.wait()
        text = self.log.read_text()
        died = [code for rank, code in enumerate(codes) if rank not in self.ended]
        assert -signal.SIGKILL in died, f"{codes}, ended here: {self.ended}\n{text[-4000:]}"
        return text


def history(run_dir: Path) -> list[tuple[object, ...]]:
    """What must not change: order of steps, records, losses to the last bit."""
    return [
        (r["stage"], r["step"], r["batch_digest"], r["loss"], r["grad_norm"])
        for r in read_json_lines(run_dir / "metrics.jsonl")
    ]


def losses(run_dir: Path) -> list[float]:
    return [float(r["loss"]) for r in read_json_lines(run_dir / "metrics.jsonl")]


def records(run_dir: Path, *, stage: str = STAGE) -> list[list[int]]:
    return [r["records"] for r in read_json_lines(run_dir / "samples" / f"{stage}.jsonl")]


def end(run_dir: Path, *, stage: str = STAGE) -> tuple[Path, Manifest]:
    found = newest(run_dir, stage=stage)
    assert found is not None
    return found


def left_overs(run_dir: Path) -> list[str]:
    return sorted(p.name for p in (run_dir / "checkpoints").rglob(".staging-*"))


def assert_same_run(run_dir: Path, reference: Path, *, stages: tuple[str, ...] = (STAGE,)) -> None:
    wanted = [line for line in history(reference) if line[0] in stages]
    assert history(run_dir) == wanted
    for stage in stages:
        assert records(run_dir, stage=stage) == records(reference, stage=stage)
        weights = [end(d, stage=stage)[0] / "weights.safetensors" for d in (run_dir, reference)]
        assert weights[0].read_bytes() == weights[1].read_bytes()
