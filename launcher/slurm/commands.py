"""The commands about jobs: submit, render, list; and what `status` says of a job."""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cocoa_dist.config import ConfigError
from launcher.runfolder import RESOLVED_NAME, RunFolderError

JOB_COMMANDS = ("submit", "render", "list")
_DEPTH = 4  # folders below the one that is listed
_NO_RUNS_BELOW = ("checkpoints", "code", "logs", "submit", "samples", "data", "export", "report")


def add_job_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the commands."""
    submit = commands.add_parser(
        "submit", help="queue a run under SLURM", allow_abbrev=False, description=_submit.__doc__
    )
    render = commands.add_parser("render", help="print what submit would queue", allow_abbrev=False)
    for parser in (submit, render):
        parser.add_argument("recipe", metavar="RECIPE", help="name of a recipe, or path of a .yaml")
        parser.add_argument("overrides", metavar="key=value", nargs="*", help="change the recipe")
        parser.add_argument("--run-dir", type=Path, required=True, metavar="DIR")
        parser.add_argument("--cluster", type=Path, metavar="FILE", help="cluster file")
        parser.add_argument("--nodes", type=int, metavar="N", help="default: the cluster file's")
        parser.add_argument(
            "--per-stage",
            metavar="STAGE=N,...",
            help="one job a stage, each waiting for the one before; nodes where they differ",
        )
    listing = commands.add_parser("list", help="all runs below a folder", allow_abbrev=False)
    listing.add_argument("folder", type=Path, metavar="DIR", nargs="?", default=Path())
    listing.add_argument("--json", action="store_true", help="one JSON object a run")


def run_job_command(options: argparse.Namespace) -> int:
    """Run submit, render or list; return the exit code."""
    if options.command == "list":
        return _list(options.folder, as_json=options.json)
    return _submit(options)


def _submit(options: argparse.Namespace) -> int:
    """Check recipe, cluster file and run folder, keep a copy of the code, and queue the run."""
    from launcher.slurm.submit import Submission, render, submit

    submission = Submission(
        recipe=options.recipe,
        overrides=tuple(options.overrides),
        run_dir=options.run_dir,
        cluster_path=options.cluster,
        nodes=options.nodes,
        per_stage=_per_stage(options.per_stage),
    )
    if options.command == "render":
        sys.stdout.write(render(submission))
        return 0
    for job in submit(submission):
        sys.stdout.write(f"submitted job {job}\n")
    sys.stdout.write(f"how it stands: python -m launcher status {options.run_dir}\n")
    return 0


def _per_stage(text: str | None) -> dict[str, int] | None:
    from launcher.backend import BadInputError

    if text is None:
        return None
    nodes: dict[str, int] = {}
    for word in filter(None, text.split(",")):
        stage, equals, number = word.partition("=")
        if not equals or not number.isdigit() or int(number) < 1:
            raise BadInputError(f"--per-stage has '{word}', expected STAGE=NODES")
        nodes[stage] = int(number)
    return nodes


def run_folders(folder: Path, *, depth: int = _DEPTH) -> Iterator[Path]:
    """Yield the run folders at and below `folder`; does not look into them for others."""
    if (folder / RESOLVED_NAME).is_file():
        yield folder
        return
    if depth == 0 or not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        hidden = path.name.startswith(".") or path.name in _NO_RUNS_BELOW
        if path.is_dir() and not path.is_symlink() and not hidden:
            yield from run_folders(path, depth=depth - 1)


def describe_run(run_dir: Path) -> dict[str, Any]:
    """Return how a run and its job stand, as `status --json` prints it."""
    from launcher.slurm.explain import job_status
    from launcher.status import read_status

    job = job_status(run_dir)
    live = job is not None and job.state in ("RUNNING", "COMPLETING")
    status = read_status(run_dir, held_elsewhere=live)
    return {**status.as_json(), "job": job.as_json() if job else None}


def _list(folder: Path, *, as_json: bool) -> int:
    from rich.console import Console
    from rich.table import Table

    if not folder.is_dir():
        raise RunFolderError(f"{folder} is not a folder: expected one with runs below it")
    table = Table("run", "recipe", "state", "stage", "step", "job")
    for run_dir in run_folders(folder):
        try:
            about = describe_run(run_dir)
        except (ConfigError, RunFolderError) as error:
            about = {"run": run_dir.name, "state": "unreadable", "job": None, "fault": str(error)}
        if as_json:
            sys.stdout.write(json.dumps({"folder": str(run_dir), **about}) + "\n")
            continue
        job = about["job"]
        table.add_row(
            str(run_dir),
            str(about.get("recipe", "-")),
            str(about["state"]),
            str(about.get("stage", "-")),
            f"{about.get('step', '-')}/{about.get('target_step', '-')}",
            f"{job['job']} {job['why']}" if job else "-",
        )
    if not as_json:
        Console().print(table)
    return 0
