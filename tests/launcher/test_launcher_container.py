"""Ranks in a container: how they are started, what is refused before, and the image's own check."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from launcher_harness import put_checkpoint

from cocoa_dist.config import PACKAGE_DIR, load_recipe
from launcher.__main__ import main
from launcher.backend import BadInputError, Order
from launcher.history import Verdict, end_incarnation, start_incarnation
from launcher.runfolder import prepare
from launcher.slurm.allocation import read_allocation
from launcher.slurm.backend import SlurmBackend
from launcher.slurm.cluster_file import ClusterFile, check_mounts

CHECKOUT = PACKAGE_DIR.parent
RUN = Path("/scratch/runs/first")
JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_GPUS_ON_NODE": "4"}


def examples() -> dict[str, dict[str, object]]:
    """The containers that the example shows as comments."""
    text = (CHECKOUT / "slurm/clusters/example.yaml").read_text()
    blocks = text.split("# container:\n")[1:]
    found = {}
    for block in blocks:
        lines = [line[4:] for line in block.splitlines() if line.startswith("#   ")][:4]
        container = yaml.safe_load("\n".join(lines))
        found[container["kind"]] = container
    return found


def step_command(container: dict[str, object]) -> list[str]:
    backend = SlurmBackend(
        allocation=read_allocation(JOB),
        cluster=ClusterFile.model_validate({"container": container}),
        say=lambda text: None,
        keep=lambda run_dir: pytest.fail("nothing is kept here"),
    )
    order = Order(
        run_dir=RUN,
        stage="contrastive",
        epoch="7.0-1",
        world_size=8,
        threads=1,
        trainer=backend.trainer,
    )
    return backend.step_command(order)


def test_pyxis_gets_image_and_mounts_from_srun_and_the_command_runs_inside():
    command = step_command(examples()["pyxis"])
    assert "--container-image=/shared/images/cocoa.sqsh" in command
    assert "--container-mounts=/shared:/shared,/scratch:/scratch" in command
    assert "--no-container-mount-home" in command
    inside = command.index("/opt/venv/bin/python")
    assert command[inside : inside + 3] == ["/opt/venv/bin/python", "-m", "cocoa_dist.train"]
    assert all(word.startswith("-") or word == "srun" for word in command[:inside])


def test_without_mounts_pyxis_is_not_given_an_empty_list():
    command = step_command({"kind": "pyxis", "image": "x.sqsh"})
    assert not any(word.startswith("--container-mounts") for word in command)


def test_apptainer_stands_between_srun_and_the_rank():
    command = step_command(examples()["apptainer"])
    begin = command.index("apptainer")
    assert command[begin : begin + 3] == ["apptainer", "exec", "--nv"]
    binds = ["--bind", "/shared:/shared", "--bind", "/scratch:/scratch"]
    assert command[begin + 3 : begin + 7] == binds
    assert command[begin + 7 : begin + 9] == ["/shared/images/cocoa.sif", "/opt/venv/bin/python"]
    assert not any("container" in word for word in command[:begin])


@pytest.mark.parametrize(
    "mounts",
    [
        ["/scratch"],
        ["/data:/data", "/scratch/runs:/scratch/runs"],
        ["/scratch/runs/first:/scratch/runs/first:rw"],
    ],
)
def test_a_run_folder_below_a_mount_is_there(mounts):
    container = {"kind": "pyxis", "image": "x", "mounts": mounts}
    check_mounts(ClusterFile.model_validate({"container": container}), run_dir=RUN)


@pytest.mark.parametrize(
    "mounts",
    [[], ["/scratch:/mnt"], ["/scratch:/scratch:ro"], ["/scratch/runs/fir:/scratch/runs/fir"]],
)
def test_a_run_folder_that_the_container_would_not_see_is_refused(mounts):
    container = {"kind": "apptainer", "image": "x", "mounts": mounts}
    cluster = ClusterFile.model_validate({"container": container})
    with pytest.raises(BadInputError, match="add /scratch/runs:/scratch/runs to container"):
        check_mounts(cluster, run_dir=RUN)


def test_a_submission_into_a_blind_container_is_refused_with_nothing_written(tmp_path, capsys):
    cluster = tmp_path / "site.yaml"
    cluster.write_text("container: {kind: pyxis, image: x.sqsh, mounts: ['/data:/data']}\n")
    run_dir = tmp_path / "run"
    arguments = ["render", "debug", "--cluster", str(cluster), "--run-dir", str(run_dir)]
    assert main(arguments) == 2
    assert f"the run folder {run_dir} would not be there" in capsys.readouterr().err
    assert not run_dir.exists()


def health(run_dir: Path | None) -> "subprocess.CompletedProcess[str]":
    own = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(CHECKOUT),
        **({"COCOA_RUN_DIR": str(run_dir)} if run_dir else {}),
    }
    return subprocess.run(
        ["bash", str(CHECKOUT / "docker/health.sh")],
        capture_output=True,
        text=True,
        env={**os.environ, **own},
        check=False,
    )


def test_the_health_check_follows_the_state_of_the_run(tmp_path):
    assert health(None).returncode == 0
    assert health(tmp_path / "nowhere").returncode == 1
    config = load_recipe("debug", ())
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    prepare(run_dir, config=config, recipe_file=PACKAGE_DIR / "recipes/debug.yaml")
    assert (health(run_dir).returncode, health(run_dir).stdout) == (0, "pending\n")
    item = start_incarnation(
        run_dir, epoch="1", stage="joint_reconstruction", from_step=0, world_size=1
    )
    end_incarnation(run_dir, item, verdict=Verdict.GIVEN_UP, reason="boom")
    assert (health(run_dir).returncode, health(run_dir).stdout) == (1, "given_up\n")
    for stage, settings in config.stages.items():
        put_checkpoint(run_dir, stage=stage, step=settings.steps, target_step=settings.steps)
    assert (health(run_dir).returncode, health(run_dir).stdout) == (0, "done\n")
