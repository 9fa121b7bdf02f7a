"""Submitting, rendering and asking about jobs, with a fake sbatch, squeue, scontrol and scancel."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cocoa_dist.config import PACKAGE_DIR
from launcher.__main__ import main

CHECKOUT = PACKAGE_DIR.parent
GOLDEN = Path(__file__).parents[1] / "golden" / "render"
LINE = (
    "JobId=12 JobName=my job UserId=me(1) Restarts=2 JobState={state} Reason={reason} "
    "Dependency=(null) TimeLimit=1-00:00:00 StartTime={start} EndTime=2026-11-22T01:00:00 "
    "PreemptTime={preempt} Partition=gpu NodeList=n[1-2] NumNodes=2 ExitCode={code} "
    "Command=/a b/x.sh k=v WorkDir=/tmp"
)


@pytest.mark.parametrize("case", ["defaults", "example", "per_stage"])
def test_the_rendered_batch_file_is_the_golden_one(case, capsys):
    arguments = {
        "defaults": [],
        "example": [
            *("--cluster", str(CHECKOUT / "slurm/clusters/example.yaml")),
            *("--nodes", "3", "seed=1"),
        ],
        "per_stage": ["--per-stage", "joint_reconstruction=2,contrastive=1", "--nodes", "3"],
    }[case]
    assert main(["render", "debug", *arguments, "--run-dir", "/runs/first run"]) == 0
    text = capsys.readouterr().out.replace(str(CHECKOUT), "CHECKOUT")
    golden = GOLDEN / f"{case}.sbatch"
    if os.environ.get("COCOA_UPDATE_GOLDEN"):
        golden.parent.mkdir(parents=True, exist_ok=True)
        golden.write_text(text)
    assert text == golden.read_text()
    linter = ["shellcheck", "-"] if shutil.which("shellcheck") else ["bash", "-n"]
    first = "#!/usr/bin/env bash\n"
    for script in text.split(first)[1:]:
        checked = subprocess.run(
            linter, input=first + script, capture_output=True, text=True, check=False
        )
        assert checked.returncode == 0, checked.stdout


SBATCH = """\
#!/bin/bash
echo "$@" >> {log}
[ -e {log}.refuse ] && {{ echo "sbatch: error: invalid account" >&2; exit 1; }}
echo $((100 + $(wc -l < {log})))
"""


@pytest.fixture
def fake_cluster(tmp_path, monkeypatch):
    """`sbatch`, `squeue`, `scontrol` and `scancel` that write down how they were called."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    log = tmp_path / "calls"
    scripts = {
        "sbatch": SBATCH.format(log=log),
        "squeue": f"#!/bin/bash\ncat {tmp_path}/state 2>/dev/null\n",
        "scontrol": f"#!/bin/bash\ncat {tmp_path}/job 2>/dev/null\n",
        "scancel": f'#!/bin/bash\necho "scancel $@" >> {log}.cancelled\n',
    }
    for name, text in scripts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return tmp_path


def submit(folder: Path, *more: str) -> int:
    return main(["submit", "debug", *more, "--run-dir", str(folder / "run")])


def test_submit_keeps_code_and_recipe_and_queues_once(fake_cluster, capsys):
    assert submit(fake_cluster, "seed=3") == 0
    assert "submitted job 101" in capsys.readouterr().out
    text = (fake_cluster / "run/submit/000.sbatch").read_text()
    assert f"recipe={fake_cluster}/run/resolved.yaml" in text
    assert f"export COCOA_CODE={fake_cluster}/run/code/" in text
    (fake_cluster / "state").write_text("PENDING\n")
    assert submit(fake_cluster, "seed=3") == 2
    assert "belongs to job 101 (PENDING); nothing was submitted" in capsys.readouterr().err
    assert len((fake_cluster / "calls").read_text().splitlines()) == 1


def test_one_job_a_stage_waits_for_the_one_before_and_cannot_hang(fake_cluster):
    assert submit(fake_cluster, "--per-stage", "contrastive=4") == 0
    calls = (fake_cluster / "calls").read_text().splitlines()
    assert len(calls) == 3
    assert "--dependency" not in calls[0]
    assert "--dependency=afterok:101 --kill-on-invalid-dep=yes" in calls[1]
    assert "until=joint_reconstruction" in (fake_cluster / "run/submit/000.sbatch").read_text()


def test_what_sbatch_refuses_is_passed_on(fake_cluster, capsys):
    (fake_cluster / "calls.refuse").touch()
    assert submit(fake_cluster) == 2
    assert "invalid account" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--nodes", "5"], "does not divide every batch size"),
        (["--per-stage", "nosuch=2"], "'nosuch' is not a stage"),
        (["--per-stage", "contrastive"], "expected STAGE=NODES"),
        (["seeed=3"], "seeed"),
    ],
)
def test_bad_submissions_write_nothing(fake_cluster, capsys, arguments, words):
    assert submit(fake_cluster, *arguments) == 2
    assert words in capsys.readouterr().err
    assert not (fake_cluster / "run").exists()
    assert not (fake_cluster / "calls").exists()


def test_without_sbatch_submit_says_where_to_go(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("launcher.slurm.submit.shutil.which", lambda _: None)
    assert submit(tmp_path) == 2
    assert "login node" in capsys.readouterr().err


def test_status_says_why_a_queued_run_does_not_run(fake_cluster, capsys):
    assert submit(fake_cluster) == 0
    line = LINE.format(state="PENDING", reason="Priority", start="T", preempt="None", code="0:0")
    (fake_cluster / "job").write_text(line + "\n")
    capsys.readouterr()
    assert main(["status", str(fake_cluster / "run"), "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert status["state"] == "pending"
    assert "behind jobs of higher priority" in status["job"]["why"]
    assert main(["list", str(fake_cluster), "--json"]) == 0
    listed = [json.loads(text) for text in capsys.readouterr().out.splitlines()]
    assert [item["folder"] for item in listed] == [str(fake_cluster / "run")]


def test_stop_names_the_job_that_waits(fake_cluster, capsys):
    assert submit(fake_cluster) == 0
    line = LINE.format(state="PENDING", reason="Priority", start="T", preempt="None", code="0:0")
    (fake_cluster / "job").write_text(line + "\n")
    assert main(["stop", str(fake_cluster / "run")]) == 0
    assert "scancel 101" in capsys.readouterr().out


def test_status_of_a_job_does_not_import_torch(fake_cluster):
    assert submit(fake_cluster) == 0
    code = (
        "import sys; from launcher.__main__ import main; "
        f"main(['status', {str(fake_cluster / 'run')!r}]); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_batch_script_refuses_what_it_does_not_understand():
    script = str(CHECKOUT / "slurm/cocoa_pipeline.sh")
    environment = {**os.environ, "SLURM_JOB_ID": "1", "COCOA_ROOT": str(CHECKOUT)}
    for words, said in {
        (): "recipe= is missing",
        ("recipe=debug",): "run_dir= is missing",
        ("recipe=debug", "oops"): "'oops' is not key=value",
        ("--nodes=2", "recipe=debug"): "options of sbatch stand before the script",
    }.items():
        done = subprocess.run(
            ["bash", script, *words], capture_output=True, text=True, env=environment, check=False
        )
        assert (done.returncode, said in done.stderr) == (2, True)


def test_the_batch_script_outside_of_slurm_says_how_it_is_used():
    environment = {k: v for k, v in os.environ.items() if k != "SLURM_JOB_ID"}
    done = subprocess.run(
        ["bash", str(CHECKOUT / "slurm/cocoa_pipeline.sh")],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 2
    assert "sbatch" in done.stderr
