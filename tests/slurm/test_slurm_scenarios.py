"""What happens to a run on a real cluster: it ends as if nothing had happened, or stays ended.

The ranks here are `steady_trainer.py`, whose losses are hashes over everything before; the real
trainer is in test_slurm_training.py.
"""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
from cluster import GRACE_SECONDS, REQUEUE_HOLD, SLURMD_TIMEOUT
from site_run import STAGES, STEPS, Site, aside, assert_whole, read_lines

pytestmark = pytest.mark.slurm
FIRST, SECOND, LAST = STAGES
PACE = 0.15  # seconds a step


def finish(site: Site, job: str, reference, *, restarts: int, seconds: float = 90) -> None:
    """The job ends well after so many requeues, and the run is the undisturbed one."""
    assert site.wait_for_end(job, seconds=seconds) == "COMPLETED", site.output()
    assert site.restarts(job) == restarts, site.output()
    assert_whole(site, reference)


def test_an_undisturbed_pipeline_walks_all_stages(undisturbed, reference):
    site = undisturbed
    assert site.steps() == [(stage, step) for stage in STAGES for step in range(1, STEPS + 1)]
    assert site.ends() == ["finished"] * 3
    assert_whole(site, reference)
    recorded = (site.run_dir / f"submit/{site.jobs[0]}.0.txt").read_text()
    assert f"SLURM_JOB_ID={site.jobs[0]}" in recorded
    sys.stderr.write(f"\n  {'; '.join(site.times)}\n")


def test_all_four_nodes_with_two_ranks_each_make_the_same_run(site, reference):
    site.write_recipe()
    site.write_cluster_file(STEADY_STEP_SECONDS=0.02)
    finish(site, site.submit(nodes=4), reference, restarts=0)


def test_preemption_with_grace_saves_within_a_step_and_goes_on(site, reference):
    save = 0.5
    job = site.start(STEADY_STEP_SECONDS=PACE, STEADY_SAVE_SECONDS=save)
    site.wait_for_step(SECOND, 6)
    high = site.occupy()
    waited = site.wait(lambda: site.state(high) == "RUNNING", "nodes released")
    released = time.time()
    assert waited < GRACE_SECONDS / 2  # as soon as the save is done
    left = read_lines(site.run_dir / "left.jsonl")[0]
    took = released - float(str(left["told"]))
    site.times.append(
        f"signal to release {took:.1f} s, a step of {PACE} and a save of {save} in it"
    )
    assert took < PACE + save + 2
    finish(site, job, reference, restarts=1)
    assert site.ends().count("preempted") == 1
    assert replayed(site) == 0


def test_preemption_without_grace_goes_on(site, reference):
    job = site.start("-p", "nograce", STEADY_STEP_SECONDS=PACE)
    site.wait_for_step(FIRST, 6)
    site.occupy()
    finish(site, job, reference, restarts=1)
    assert replayed(site) == 0


def test_preemption_during_a_save_lets_the_save_finish(site, reference):
    job = site.start(STEADY_STEP_SECONDS=0.1, STEADY_SAVE_SECONDS=1.2)
    saving = site.run_dir / "saving"
    site.wait(saving.exists, "save under way")
    site.occupy()
    finish(site, job, reference, restarts=1, seconds=150)
    assert replayed(site) == 0


def test_preemption_while_one_stage_hands_over_to_the_next(site, reference):
    job = site.start(STEADY_STEP_SECONDS=0.1, STEADY_IMPORT_SECONDS=2.5)
    end = site.run_dir / f"checkpoints/{FIRST}/step_{STEPS:08d}/manifest.json"
    site.wait(end.exists, "end of the first stage")
    site.occupy()
    finish(site, job, reference, restarts=1)


def test_sigterm_during_imports_is_no_crash(site, reference):
    job = site.start("-p", "nograce", STEADY_STEP_SECONDS=0.1, STEADY_IMPORT_SECONDS=2.5)
    site.wait(lambda: len(site.ranks()) >= 2, "ranks importing")
    time.sleep(1.0)
    assert site.steps() == []
    site.occupy()
    finish(site, job, reference, restarts=1)
    assert "crash" not in site.ends()


def test_a_cancelled_job_stays_dead_and_a_new_one_goes_on(site, reference):
    job = site.start(STEADY_STEP_SECONDS=PACE)
    site.wait_for_step(FIRST, 6)
    site.cluster.login("scancel", job)
    assert site.wait_for_end(job) == "CANCELLED"
    site.wait(lambda: site.ranks() == [], "no rank left")
    steps = len(site.steps())
    time.sleep(REQUEUE_HOLD + 2)
    assert site.state(job) == "CANCELLED"
    assert site.restarts(job) == 0
    assert len(site.steps()) == steps < 3 * STEPS
    finish(site, site.submit(), reference, restarts=0)
    assert replayed(site) == 0


def test_stop_ends_the_job_for_good(site, reference):
    job = site.start(STEADY_STEP_SECONDS=PACE)
    site.wait_for_step(FIRST, 6)
    (site.run_dir / "STOP").write_text("the operator said so\n")
    assert site.wait_for_end(job) == "COMPLETED", site.output()
    assert "the operator said so" in site.output()
    assert site.restarts(job) == 0
    assert len(site.steps()) < 3 * STEPS
    assert site.wait_for_end(site.submit()) == "COMPLETED"  # and starts nothing
    assert len(site.steps()) < 3 * STEPS
    (site.run_dir / "STOP").unlink()
    finish(site, site.submit(), reference, restarts=0)


@pytest.mark.parametrize("which", ["worker", "batch host"])
def test_a_power_cut_of_a_node_is_survived_on_others(site, reference, which):
    job = site.start(STEADY_STEP_SECONDS=PACE)
    site.wait_for_step(SECOND, 2)
    node = site.batch_host(job) if which == "batch host" else "n2"
    began = time.monotonic()
    site.cluster.cut_power(node)
    try:
        site.wait(lambda: site.restarts(job) == 1, f"requeue after the loss of {node}")
        before = len(site.steps())
        site.wait(lambda: len(site.steps()) > before, "next step", seconds=60)
        took = time.monotonic() - began
        assert took < SLURMD_TIMEOUT + REQUEUE_HOLD + 25
        assert node not in site.cluster.job(job)["NodeList"]
        finish(site, job, reference, restarts=1)
    finally:
        site.cluster.boot(node)


def test_a_rank_killed_for_memory_is_started_again_in_the_same_job(site, reference):
    job = site.start(STEADY_STEP_SECONDS=PACE)
    site.wait_for_step(SECOND, 6)
    os.kill(site.cluster.processes("n2", str(site.run_dir / "resolved.yaml"))[-1], signal.SIGKILL)
    finish(site, job, reference, restarts=0)
    assert site.ends().count("crash") == 1
    assert "was killed by SIGKILL (out of memory?)" in site.output()


def test_another_number_of_nodes_goes_on_from_the_last_checkpoint(site, reference):
    job = site.start(STEADY_STEP_SECONDS=PACE)
    site.wait_for_step(SECOND, 6)
    site.cluster.login("scancel", job)
    assert site.wait_for_end(job) == "CANCELLED"
    finish(site, site.submit(nodes=3), reference, restarts=0)
    lines = read_lines(site.run_dir / "incarnations.jsonl")
    assert {line["world_size"] for line in lines} == {4, 6}


def test_a_second_submission_is_refused_and_names_the_first(site, reference):
    job = site.start(STEADY_STEP_SECONDS=PACE)
    site.wait_for_step(FIRST, 2)
    second = site.submit()
    assert site.wait_for_end(second) == "FAILED"
    assert site.cluster.job(second)["ExitCode"] == "2:0"
    text = (site.folder / f"cocoa-{second}.out").read_text()
    assert f"belongs to job {job} (RUNNING)" in text
    finish(site, job, reference, restarts=0)


def test_an_operator_may_requeue_and_gets_what_was_submitted(site, reference, tmp_path):
    mine = copy_checkout(site, tmp_path / "mine")
    site.checkout = mine
    job = site.start("--hold", STEADY_STEP_SECONDS=PACE)
    time.sleep(2.1)  # SLURM knows the time of submission to a second
    (mine / "slurm/cocoa_pipeline.sh").write_text("exit 1  # edited after submission\n")
    site.cluster.login("scontrol", "release", job)
    site.wait_for_step(FIRST, 3)
    assert "changed since this job was submitted: slurm/cocoa_pipeline.sh" in site.output()
    (mine / "launcher/progress.py").write_text("raise SystemExit('edited after submission')\n")
    site.write_recipe(steps=99)
    (site.folder / "cluster.yaml").write_text("no: cluster file\n")
    site.cluster.login("scontrol", "requeue", job)
    finish(site, job, reference, restarts=1)
    assert f"{mine} has moved on since this job was submitted" in site.output()


# The following mostly wait, and so run beside all others.


@aside
def test_the_time_limit_is_passed_by_two_requeues(site, reference):
    # a limit of a minute and a warning of 20 s: SLURM warns after 10 to 40 s
    site.write_recipe()
    site.write_cluster_file(STEADY_STEP_SECONDS=2.0)
    job = site.submit("--time=1", "--signal=B:USR2@20")
    assert site.wait_for_end(job, seconds=240) == "COMPLETED", site.output()
    assert site.restarts(job) >= 2, site.output()
    assert "the time limit is near" in site.output()
    assert_whole(site, reference)
    assert replayed(site) == 0


@aside
def test_a_node_cut_off_in_the_middle_of_a_save_cannot_commit_it_any_more(site, reference):
    job = site.start(STEADY_STEP_SECONDS=PACE)
    site.wait((site.run_dir / "resolved.yaml").exists, "start")
    (site.run_dir / "hold").write_text(f"{job}.0-")  # the first save waits
    site.wait((site.run_dir / "saving").exists, "save under way")
    node = site.batch_host(job)
    site.cluster.cut_network(node)  # its two ranks live on, and they see the shared folder
    began, reached = time.monotonic(), len(site.steps())
    try:
        site.wait(lambda: site.restarts(job) == 1, "requeue")
        site.wait(lambda: len(site.steps()) > reached, "next step")
        site.times.append(f"next step after {time.monotonic() - began:.1f} s")
        assert site.cluster.processes(node, str(site.run_dir / "resolved.yaml")) != []
        (site.run_dir / "hold").unlink()
        site.wait(lambda: "is fenced" in zombie_logs(site, job), "late save refused")
        assert site.wait_for_end(job) == "COMPLETED", site.output()
    finally:
        site.cluster.mend_network(node)
    site.wait(lambda: site.ranks() == [], "no zombie left", seconds=120)
    finish(site, job, reference, restarts=1)
    for stage in STAGES:
        manifests = (site.run_dir / "checkpoints" / stage).glob("step_*/manifest.json")
        epochs = {json.loads(path.read_text())["epoch"].partition("-")[0] for path in manifests}
        assert epochs == {f"{job}.1"}


@aside
def test_data_that_is_gone_for_20_seconds_is_waited_for(site, reference):
    job = site.start(STEADY_STEP_SECONDS=PACE)
    site.wait_for_step(SECOND, 6)
    hidden = site.data.with_name("hidden")
    site.data.rename(hidden)
    time.sleep(20)
    hidden.rename(site.data)
    finish(site, job, reference, restarts=0)
    assert f"waiting for {site.data}" in site.output()


@aside
def test_a_crash_loop_is_given_up_after_three_attempts_and_goes_on_once_mended(site, reference):
    began = time.monotonic()
    job = site.start(STEADY_STEP_SECONDS=0.05, STEADY_CRASH=f"{SECOND}:3")
    assert site.wait_for_end(job) == "FAILED"
    site.times.append(f"gave up after {time.monotonic() - began:.0f} s")
    assert site.cluster.job(job)["ExitCode"] == "93:0"
    assert site.restarts(job) == 0
    assert site.ends() == ["finished", "crash", "crash", "given_up"]
    assert "RuntimeError: boom" in site.output()
    assert site.ranks() == []
    site.write_cluster_file(STEADY_STEP_SECONDS=0.05)
    finish(site, site.submit(), reference, restarts=0)


def zombie_logs(site: Site, job: str) -> str:
    logs = (site.run_dir / "logs").glob(f"{job}.0-*/*.log")
    return "".join(path.read_text() for path in logs)


def copy_checkout(site: Site, target: Path) -> Path:
    """A checkout that can be written to."""
    shutil.copytree(site.checkout, target, copy_function=shutil.copyfile)
    for path in (target, *target.rglob("*")):
        path.chmod(0o755)
    return target


def replayed(site: Site) -> int:
    """Steps that had to be made again."""
    lines = read_lines(site.run_dir / "incarnations.jsonl")
    return sum(line["replayed_steps"] for line in lines if line["verdict"])
