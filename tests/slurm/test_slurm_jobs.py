"""Submitting from the login node, nodes that are unfit, and what status says, on a real cluster."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from cluster import wait_for
from site_run import STAGES, STEPS, Site, assert_whole, history

pytestmark = pytest.mark.slurm
FIRST, SECOND, LAST = STAGES
ALL_STEPS = [(stage, step) for stage in STAGES for step in range(1, STEPS + 1)]


def launcher(site: Site, *words: str) -> "subprocess.CompletedProcess[str]":
    """Call the launcher on the login node."""
    return site.cluster.login_process(
        *(str(site.python), "-m", "launcher", *words),
        cwd=site.folder,
        env={
            "PYTHONPATH": str(site.checkout),
            "PYTHONSAFEPATH": "1",
            "COCOA_VENV": str(site.python.parents[1]),
            "COLUMNS": "200",
        },
    )


def status(site: Site) -> dict[str, object]:
    return json.loads(launcher(site, "status", "run", "--json").stdout)


def test_one_job_a_stage_submitted_once_and_explained_all_the_way(site):
    site.write_recipe()
    path = site.write_cluster_file(STEADY_STEP_SECONDS=0.1)
    path.write_text(path.read_text() + "nodes: 2\ntime: '30'\n")
    words = ("submit", "debug.yaml", "--run-dir", "run", "--cluster", "cluster.yaml")
    done = launcher(site, *words, "--per-stage", f"{FIRST}=2")
    assert done.returncode == 0, done.stderr
    site.jobs += [word for word in done.stdout.split() if word.isdigit()]
    assert len(site.jobs) == 3
    again = launcher(site, *words)
    assert again.returncode == 2
    assert "nothing was submitted" in again.stderr
    waiting = site.cluster.job(site.jobs[-1])
    assert waiting["Dependency"].startswith("afterok:")
    assert "Dependency" in waiting["Reason"]
    (site.folder / "debug.yaml").write_text("edited: after submission\n")
    site.wait_for_step(FIRST, 2)
    found = status(site)
    assert (found["state"], found["stage"]) == ("running", FIRST)
    for job in site.jobs:
        assert site.wait_for_end(job) == "COMPLETED", site.output()
    assert site.steps() == ALL_STEPS
    assert_whole(site, history(site.run_dir))
    assert status(site)["state"] == "done"
    listed = launcher(site, "list", ".", "--json").stdout.splitlines()
    assert [json.loads(line)["state"] for line in listed] == ["done"]


def test_what_sbatch_refuses_is_passed_on_in_its_words(site):
    site.write_recipe()
    path = site.write_cluster_file()
    path.write_text(path.read_text() + "partition: nosuch\n")
    words = ("submit", "debug.yaml", "--run-dir", "run", "--cluster", "cluster.yaml")
    done = launcher(site, *words, "--nodes", "2")
    assert done.returncode == 2
    assert "invalid partition specified: nosuch" in done.stderr


def test_a_queued_job_says_what_it_waits_for(site):
    site.write_recipe()
    path = site.write_cluster_file()
    path.write_text(path.read_text() + "time: '30'\nmore: [--hold]\n")
    done = launcher(
        site, *("submit", "debug.yaml", "--run-dir", "run", "--cluster", "cluster.yaml")
    )
    site.jobs += [word for word in done.stdout.split() if word.isdigit()]
    found = status(site)
    assert found["state"] == "pending"
    assert "is held by its user: scontrol release" in found["job"]["why"]
    began = time.monotonic()
    status(site)
    site.times.append(f"status {time.monotonic() - began:.2f} s")
    assert "to take it out at once: scancel" in launcher(site, "stop", "run").stdout


def test_a_node_that_does_not_share_the_run_folder_is_replaced(site):
    site.run_dir.mkdir()
    pid = site.cluster.machine_pid("n2")
    enter = ["nsenter", "-t", str(pid), "-m"]
    hide = [*enter, "mount", "-t", "tmpfs", "none", str(site.run_dir)]
    subprocess.run(hide, check=True)
    try:
        job = site.start(STEADY_STEP_SECONDS=0.05)
        assert site.wait_for_end(job) == "COMPLETED", site.output()
    finally:
        subprocess.run([*enter, "umount", str(site.run_dir)], check=True)
    assert "node n2 is unfit" in site.output()
    assert site.restarts(job) == 1
    assert site.cluster.job(job)["ExcNodeList"] == "n2"
    assert "2" not in site.cluster.job(job)["NodeList"]
    assert site.steps() == ALL_STEPS


def test_a_node_that_kills_its_rank_twice_is_exchanged(site):
    job = site.start(STEADY_STEP_SECONDS=0.25)
    for stage in (FIRST, SECOND):
        site.wait_for_step(stage, 6)
        rank = site.cluster.processes("n2", str(site.run_dir / "resolved.yaml"))[-1]
        os.kill(rank, signal.SIGKILL)
        wait_for(lambda pid=rank: not Path(f"/proc/{pid}").exists(), what="death of the rank")
    assert site.wait_for_end(job) == "COMPLETED", site.output()
    assert "asks for other nodes than n2" in site.output()
    assert site.restarts(job) == 1
    assert "n2" not in site.cluster.job(job)["NodeList"]
    assert site.steps() == ALL_STEPS
    assert site.ends().count("crash") == 2


def test_one_rank_a_gpu_and_a_launcher_that_takes_under_a_second(site):
    site.write_recipe(steps=2)
    site.write_cluster_file(STEADY_STEP_SECONDS=0.01)
    command = [
        *("sbatch", "--parsable", "-N2", "--gpus-per-node=2"),
        str(site.checkout / "slurm/cocoa_pipeline.sh"),
        *("recipe=debug.yaml", "run_dir=run", "cluster=cluster.yaml"),
    ]
    venv = str(site.python.parents[1])
    out = site.cluster.login(*command, cwd=site.folder, env={"COCOA_VENV": venv})
    site.jobs.append(out.strip())
    assert site.wait_for_end(site.jobs[-1]) == "COMPLETED", site.output()
    starts = [
        json.loads(line) for line in (site.run_dir / "incarnations.jsonl").read_text().splitlines()
    ]
    assert {item["world_size"] for item in starts} == {4}
    logs = sorted(path.name for path in (site.run_dir / "logs").rglob(f"{FIRST}.rank*.log"))
    assert logs == [f"{FIRST}.rank{rank}.log" for rank in range(4)]


def test_data_that_was_never_there_is_refused_before_anything_is_written(site):
    site.write_recipe()
    site.write_cluster_file(steady=False)
    shutil.rmtree(site.data)
    job = site.submit()
    assert site.wait_for_end(job) == "FAILED"
    assert site.cluster.job(job)["ExitCode"] == "2:0"
    text = (site.folder / f"cocoa-{job}.out").read_text()
    assert str(site.data) in text
    assert "srun" not in text
    assert not site.run_dir.exists()


def test_an_inherited_interpreter_is_the_one_that_was_asked_for(site):
    site.write_recipe(steps=2)
    site.write_cluster_file()
    job = site.submit(env={"COCOA_VENV": "/nowhere"})
    assert site.wait_for_end(job) == "FAILED"
    text = (site.folder / f"cocoa-{job}.out").read_text()
    assert "/nowhere/bin/python is not there: run tools/setup_env.sh, or set COCOA_VENV" in text
    assert not site.run_dir.exists()
