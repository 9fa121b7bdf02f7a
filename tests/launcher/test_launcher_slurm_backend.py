"""What the launcher makes of SLURM's signals before a rank has started: with fake answers."""

import json
from pathlib import Path

import pytest

from cocoa_dist.config import load_recipe
from launcher.backend import BadInputError
from launcher.history import Verdict
from launcher.run import RunRequest, check_inputs
from launcher.signals import Interrupts
from launcher.slurm.allocation import read_allocation
from launcher.slurm.backend import SlurmBackend
from launcher.slurm.cluster_file import ClusterFile
from launcher.slurm.nodes import NODES_NAME
from launcher.slurm.scheduler import parse_job

JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NTASKS": "2"}
JOB["SLURM_TASKS_PER_NODE"] = "1(x2)"
RUNNING = "JobId=7 JobState=RUNNING PreemptTime=None"
PREEMPTED = "JobId=7 JobState=RUNNING PreemptTime=2026-11-21T01:00:00"
CANCELLED = "JobId=7 JobState=COMPLETING PreemptTime=None"


@pytest.fixture
def backend(monkeypatch) -> SlurmBackend:
    """Two nodes, of which the health check finds one unfit."""
    monkeypatch.setattr(
        "launcher.slurm.backend.check_health", lambda *_, **__: {"n1": "it left no word"}
    )
    return SlurmBackend(
        allocation=read_allocation(JOB),
        cluster=ClusterFile(),
        say=lambda text: None,
        keep=lambda run_dir: pytest.fail("nothing is kept here"),
    )


def prepare(backend: SlurmBackend, run_dir: Path, interrupts: Interrupts):
    config = load_recipe("debug", ())
    return backend.prepare(config, run_dir=run_dir, interrupts=interrupts)


@pytest.mark.parametrize("line", [PREEMPTED, CANCELLED])
def test_a_health_check_that_slurm_ended_says_nothing_about_nodes(
    backend, tmp_path, monkeypatch, line
):
    monkeypatch.setattr("launcher.slurm.backend.show_job", lambda *_, **__: parse_job(line))
    ending = prepare(backend, tmp_path, Interrupts())
    assert ending.verdict is Verdict.PREEMPTED
    assert not (tmp_path / NODES_NAME).exists()


def test_a_health_check_during_which_the_launcher_was_told_to_leave_says_nothing(
    backend, tmp_path, monkeypatch
):
    monkeypatch.setattr("launcher.slurm.backend.show_job", lambda *_, **__: None)
    interrupts = Interrupts()
    interrupts.count = 1
    assert prepare(backend, tmp_path, interrupts).verdict is Verdict.PREEMPTED
    assert not (tmp_path / NODES_NAME).exists()


@pytest.mark.parametrize("line", [RUNNING, None])
def test_otherwise_the_node_is_unfit_and_another_one_asked_for(
    backend, tmp_path, monkeypatch, line
):
    answer = parse_job(line) if line else None
    monkeypatch.setattr("launcher.slurm.backend.show_job", lambda *_, **__: answer)
    ending = prepare(backend, tmp_path, Interrupts())
    assert ending.reason == "asks for other nodes than n1"
    notes = [json.loads(text) for text in (tmp_path / NODES_NAME).read_text().splitlines()]
    assert {note["node"] for note in notes} == {"n1"}


REQUEST = RunRequest(recipe="debug", overrides=(), run_dir=Path("/nowhere"))


@pytest.mark.parametrize(("code", "answered"), [(143, False), (140, False), (0, True)])
def test_inputs_that_nobody_could_look_at_are_not_bad_inputs(tmp_path, monkeypatch, code, answered):
    srun = tmp_path / "srun"
    srun.write_text(f"#!/bin/bash\nexit {code}\n")
    srun.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert check_inputs(REQUEST, trainer=("srun",)) is answered


@pytest.mark.parametrize("trainer", [("bash", "-c", "kill $$"), ("bash", "-c", "exit 2")])
def test_elsewhere_a_trainer_that_dies_is_reported(trainer):
    with pytest.raises(BadInputError, match="exit code"):
        check_inputs(REQUEST, trainer=trainer)
