"""What a run of two ranks does about steps that are not finite, and about a rank that hangs."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from ranks import free_port

from cocoa_dist.manifest import newest
from cocoa_dist.metrics import read_json_lines
from cocoa_dist.runtime import EXIT_HUNG
from launcher.faults import Departure, choose_culprit

TRAINER = Path(__file__).with_name("guarded_trainer.py")
STAGE = "eos_bridged_reconstruction"
WORLD = 2


@dataclass(frozen=True)
class Run:
    """What a run left: exit codes and logs by rank, and its folder."""

    codes: list[int]
    logs: list[Path]
    folder: Path

    def metrics(self) -> list[dict]:
        return list(read_json_lines(self.folder / "metrics.jsonl"))

    def skipped(self, rank: int) -> list[dict]:
        return list(read_json_lines(self.folder / "skipped" / f"{STAGE}.rank{rank}.jsonl"))


def train(folder: Path, *overrides: str, faults: str = "") -> Run:
    folder.mkdir(parents=True, exist_ok=True)
    port, ranks = free_port(), []
    logs = [folder / f"rank{rank}.log" for rank in range(WORLD)]
    for rank, path in enumerate(logs):
        environment = {
            **os.environ,
            "FAULTS": faults,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(WORLD),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        command = [
            *(sys.executable, str(TRAINER), "debug", f"stages.{STAGE}.init_from=model"),
            *("--stage", STAGE, "--run-dir", str(folder), *overrides),
        ]
        with path.open("w") as log:
            ranks.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    try:
        codes = [process.wait(timeout=200) for process in ranks if "stop" not in faults]
        codes = codes or [ranks[0].wait(timeout=200)]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    return Run(codes, logs, folder)


def losses(run: Run) -> list[float | None]:
    return [line["loss"] for line in run.metrics()]


@pytest.mark.slow
def test_a_preflight_changes_no_number_of_the_run(tmp_path) -> None:
    adapter = (
        f"stages.{STAGE}.adapter="
        "{kind: lora, rank: 2, alpha: 4, dropout: 0.5, targets: [q_proj, v_proj]}"
    )
    runs = [
        train(tmp_path / word, adapter, f"guards.preflight={word}", f"stages.{STAGE}.steps=4")
        for word in ("true", "false")
    ]
    for run in runs:
        assert run.codes == [0, 0], run.logs[0].read_text()[-3000:]
    assert losses(runs[0]) == losses(runs[1])
    assert "pre-flight in" in runs[0].logs[0].read_text()
    assert "pre-flight" not in runs[1].logs[0].read_text()


@pytest.mark.slow
def test_steps_that_are_not_finite_are_left_out_and_their_records_are_named(tmp_path) -> None:
    run = train(tmp_path / "run", faults="loss:1:3 gradient:1:5")
    assert run.codes == [0, 0], run.logs[1].read_text()[-3000:]
    assert [line["step"] for line in run.metrics() if line["skipped"]] == [3, 5]
    assert run.metrics()[2]["grad_norm"] is None
    end = newest(run.folder, stage=STAGE)
    assert end is not None
    assert end[1].skipped_steps == 2
    for rank in range(WORLD):
        loss, gradient = run.skipped(rank)
        assert (loss["step"], loss["not_finite"]) == (3, "loss")
        assert loss["here"] == (rank == 1)
        assert (gradient["step"], gradient["not_finite"]) == (5, "gradient")
        assert not gradient["here"]
        for line in (loss, gradient):
            assert len(line["records"]) == 12
            assert line["records"][0] in run.logs[rank].read_text()
    assert losses(run)[-1] < losses(run)[0]


@pytest.mark.slow
def test_too_many_steps_that_are_not_finite_end_the_run_by_name(tmp_path) -> None:
    run = train(
        tmp_path / "run", "guards.max_skipped_in_a_row=2", faults="loss:0:3 loss:0:4 loss:0:5"
    )
    assert run.codes == [2, 2]
    for rank in range(WORLD):
        last = run.logs[rank].read_text().splitlines()[-1]
        assert "error: 2 steps in a row were skipped, up to step 4" in last
        assert run.skipped(rank)[-1]["records"][0] in last


UNMOVED = """
import torch
from pathlib import Path
from cocoa_dist import distributed
from cocoa_dist.config import load_recipe
from cocoa_dist.objectives.reconstruction import Reconstruction
from cocoa_dist.runtime import seed_everything
from cocoa_dist.train.rehearsal import _first_batch
from cocoa_dist.train.session import build_engine, quiet_known_warnings

quiet_known_warnings()
config = load_recipe("debug", [])
distributed.start(timeout_seconds=60)
seed_everything(0)
first = _first_batch(config, "joint_reconstruction", run_dir=None)
engine = build_engine(config, "joint_reconstruction", first.parts)
whole = Reconstruction.sums


def broken(kind):
    def sums(self, outputs, packs):
        found = whole(self, outputs, packs)
        if kind == "loss":
            found["text"] = found["text"] + torch.inf  # its gradient is finite
        else:
            found["text"].register_hook(lambda gradient: gradient * torch.nan)
        return found
    return sums


def moved(before):
    after = engine.gathered_weights()
    return [name for name in before if not torch.equal(before[name], after[name])]


engine.train_step(first.batch.packs, step=1)
for kind in ("loss", "gradient"):
    before = engine.gathered_weights()
    Reconstruction.sums = broken(kind)
    stats = engine.train_step(first.batch.packs, step=2)
    Reconstruction.sums = whole
    assert stats.skipped == kind, (kind, stats)
    assert moved(before) == [], kind
stats = engine.train_step(first.batch.packs, step=3)
assert not stats.skipped and stats.finite_here and moved(before)
"""


@pytest.mark.slow
def test_no_weight_moves_in_a_step_that_is_left_out() -> None:
    command = [sys.executable, "-c", UNMOVED]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_a_full_disk_is_seen_before_step_1(tmp_path) -> None:
    code = (
        "import os, types\n"
        "whole = os.statvfs\n"
        "def few(path):\n"
        "    f = whole(path)\n"
        "    return types.SimpleNamespace(f_blocks=f.f_blocks, f_bfree=10, f_bavail=10, "
        "f_frsize=1)\n"
        "os.statvfs = few\n"
    )
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(code)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(site), prepend=os.pathsep)
        run = train(tmp_path / "run")
    assert run.codes == [2, 2]
    assert "has 0.00 GiB free, 2 checkpoints need 0.0" in run.logs[0].read_text().splitlines()[-1]
    assert run.metrics() == []


def stacks(run: Run, rank: int) -> str:
    return (run.folder / "logs" / "by_hand" / f"{STAGE}.rank{rank}.stacks").read_text()


@pytest.mark.slow
def test_a_rank_that_sleeps_ends_itself_and_is_named(tmp_path) -> None:
    run = train(tmp_path / "run", "engine.timeout_seconds=10", faults="sleep:1:3")
    assert run.codes[1] == EXIT_HUNG, run.logs[1].read_text()[-3000:]
    assert run.codes[0] != 0  # of its own watchdog, or of the peer it has lost
    assert "fall_asleep" in stacks(run, 1)
    assert "in step 3: rank 1 is in fall_asleep" in run.logs[1].read_text().splitlines()[-1]
    left = [Departure(rank, code, run.logs[rank]) for rank, code in enumerate(run.codes)]
    culprit = choose_culprit(left)
    assert culprit.rank == 1
    assert culprit.describe().startswith("rank 1 hung and ended itself: HangError: no progress")


@pytest.mark.slow
def test_a_rank_that_waits_in_vain_names_the_collective(tmp_path) -> None:
    run = train(tmp_path / "run", "engine.timeout_seconds=10", faults="stop:1:3")
    assert run.codes == [EXIT_HUNG], run.logs[0].read_text()[-3000:]
    line = run.logs[0].read_text().splitlines()[-1]
    assert "in step 3: rank 0 waits for the other ranks in " in line
    assert "distributed_c10d.py" in stacks(run, 0)
