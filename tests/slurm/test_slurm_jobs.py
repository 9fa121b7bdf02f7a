"""Submitting from the login node, nodes that are unfit, and what status says, on a real cluster."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from cluster import NODES, wait_for
from site_run import STAGES, Site, assert_whole, read_lines

pytestmark = pytest.mark.slurm
FIRST, SECOND, LAST = STAGES


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


def test_one_job_a_stage_of_its_own_size_submitted_once_and_explained(site, reference):
    site.write_recipe()
    path = site.write_cluster_file(STEADY_STEP_SECONDS=0.1)
    path.write_text(path.read_text() + "nodes: 2\ntasks_per_node: 2\ntime: '30'\n")
    words = ("submit", "debug.yaml", "--run-dir", "run", "--cluster", "cluster.yaml")
    done = launcher(site, *words, "--per-stage", f"{FIRST}=1,{LAST}=4")
    assert done.returncode == 0, done.stderr
    site.jobs += [word for word in done.stdout.split() if word.isdigit()]
    assert [site.cluster.job(job)["NumNodes"].partition("-")[0] for job in site.jobs] == [*"124"]
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
    assert_whole(site, reference)
    sizes = {line["stage"]: line["world_size"] for line in incarnations(site)}
    assert list(sizes.values()) == [2, 4, 8]
    assert status(site)["state"] == "done"
    listed = launcher(site, "list", ".", "--json").stdout.splitlines()
    assert [json.loads(line)["state"] for line in listed] == ["done"]


def test_jobs_that_wait_for_one_that_failed_leave_the_queue(site):
    site.write_recipe()
    path = site.write_cluster_file(steady=False)
    path.write_text(path.read_text() + "nodes: 2\ntime: '30'\n")
    shutil.rmtree(site.data)
    words = ("submit", "debug.yaml", "--run-dir", "run", "--cluster", "cluster.yaml")
    done = launcher(site, *words, "--per-stage", f"{FIRST}=2")
    site.jobs += [word for word in done.stdout.split() if word.isdigit()]
    assert site.wait_for_end(site.jobs[0]) == "FAILED"
    assert site.cluster.job(site.jobs[0])["ExitCode"] == "2:0"
    for job in site.jobs[1:]:
        assert site.wait_for_end(job) == "CANCELLED"
    assert "was cancelled" in status(site)["job"]["why"]


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
    began, before = time.monotonic(), os.times()
    status(site)
    after = os.times()
    spent = after.children_user + after.children_system
    spent -= before.children_user + before.children_system
    wall = time.monotonic() - began
    site.times.append(f"status {wall:.2f} s, of which CPU {spent:.2f} s, scontrol included")
    assert "to take it out at once: scancel" in launcher(site, "stop", "run").stdout


def test_a_node_that_does_not_share_the_run_folder_is_replaced(site, reference):
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
    assert_whole(site, reference)


def test_a_node_that_kills_its_rank_twice_is_exchanged(site, reference):
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
    assert_whole(site, reference)
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
    began = time.time()
    out = site.cluster.login(*command, cwd=site.folder, env={"COCOA_VENV": venv})
    site.jobs.append(out.strip())
    own, children = cpu_until_srun(site)
    site.times.append(f"launcher until srun {own:.2f} CPU s, what it waited for {children:.2f}")
    assert site.wait_for_end(site.jobs[-1]) == "COMPLETED", site.output()
    first = float(str(site.metrics()[0]["time"])) - began
    site.times.append(f"sbatch to first step {first:.1f} s")
    assert own < 1.0
    assert first < 25
    assert {item["world_size"] for item in incarnations(site)} == {4}
    logs = sorted(path.name for path in (site.run_dir / "logs").rglob(f"{FIRST}.rank*.log"))
    assert logs == [f"{FIRST}.rank{rank}.log" for rank in range(4)]


def incarnations(site: Site) -> list[dict[str, object]]:
    return read_lines(site.run_dir / "incarnations.jsonl")


def cpu_until_srun(site: Site) -> tuple[float, float]:
    """CPU seconds of the launcher, and of what it waited for, until the ranks' srun starts."""
    found: list[int] = []

    def started() -> bool:
        mine = [p for n in NODES for p in site.cluster.processes(n, f"--job-name={FIRST}")]
        found.extend(mine)
        return bool(mine)

    site.wait(started, "srun")
    parent = int(Path(f"/proc/{found[0]}/stat").read_text().rpartition(")")[2].split()[1])
    fields = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()
    ticks = os.sysconf("SC_CLK_TCK")
    user, system, child_user, child_system = (int(field) / ticks for field in fields[11:15])
    return user + system, child_user + child_system


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
