"""The command line: run, status, top, stop, profile, plan; submit, render and list for SLURM."""

import argparse
import difflib
import errno
import getpass
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from cocoa_dist.config import ConfigError
from launcher.plan import command as plan
from launcher.process import process_began
from launcher.slurm.commands import JOB_COMMANDS, add_job_commands, run_job_command

USAGE_CODE = 2
_NOT_WRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
_DESCRIPTION = "Run staged training in a run folder, look at it, stop it."
_EXAMPLES = """\
examples:
  python -m launcher run quickstart --run-dir runs/first
      all stages of the recipe `quickstart`, in 2 processes on this machine
  python -m launcher run quickstart --run-dir runs/first
      the same command again goes on after an interruption; a finished run says so
  python -m launcher run my.yaml stages.contrastive.steps=50 seed=1 --run-dir runs/short --nproc 1
      a recipe of your own, with other values
  python -m launcher status runs/first
      where it is, how often it was restarted, how long it will take; --json for scripts,
      --watch to look on
  python -m launcher top runs
      all runs below a folder, those that need somebody first
  python -m launcher stop runs/first
      save and stop for good, until the STOP file in the folder is removed
  python -m launcher profile runs/first --steps 5
      traces of the next 5 steps of a run at work, one file a rank for Perfetto, and the operators
      that took longest
  python -m launcher plan cocoa_qwen2_vl_2b --gpus 8 --gpu h200
      memory, time and GPU hours of every stage, before a card is asked for
  python -m launcher submit cocoa_qwen2_vl_2b --run-dir /scratch/runs/a --cluster site.yaml
      queue all stages under SLURM; `render` prints the batch file instead
  python -m launcher list /scratch/runs
      all runs below a folder, and why they are not running

exit codes of run: 0 done or stopped; 2 something to change in what was given; 93 given up
(3 attempts in a row without a new checkpoint); 128+N interrupted by signal N after saving; in a
SLURM job 75 to be queued again, 76 another start of the job has taken over;
anything else is a fault of the launcher itself.
"""
_COMMANDS = ("run", "status", "top", "stop", "profile", "plan", *JOB_COMMANDS)
_FILE_COLUMNS = 200  # of a table that goes to a file or a pipe
_WITH_OVERRIDES = ("run", "plan", "submit", "render")


def main(argv: Sequence[str] | None = None, *, trainer: tuple[str, ...] | None = None) -> int:
    """Run a command and return its exit code; `trainer` replaces the command of a rank."""
    options = _parse(sys.argv[1:] if argv is None else argv)
    from launcher.backend import BadInputError
    from launcher.runfolder import RunFolderError

    try:
        if options.command == "run":
            began = process_began() if argv is None else None
            return _run(options, trainer=trainer, began=began)
        if options.command == "status":
            return _status(options)
        if options.command == "top":
            return _top(options)
        if options.command == "plan":
            return _plan(options)
        if options.command == "profile":
            return _profile(options)
        if options.command in JOB_COMMANDS:
            return run_job_command(options)
        return _stop(options)
    except (ConfigError, RunFolderError, BadInputError) as error:
        return _fail(str(error), code=USAGE_CODE)
    except OSError as error:
        if error.errno in _NOT_WRITABLE:
            remedy = "make room or give permission, then the same command goes on"
            return _fail(f"{error}; {remedy} from the last checkpoint", code=USAGE_CODE)
        return _fail(f"{type(error).__name__}: {error}", code=1)


def _run(
    options: argparse.Namespace, *, trainer: tuple[str, ...] | None, began: float | None
) -> int:
    from rich.console import Console

    from launcher.run import RunRequest, run

    request = RunRequest(
        recipe=options.recipe,
        overrides=tuple(options.overrides),
        run_dir=options.run_dir,
        until=options.until,
        began=began,
    )
    if options.backend == "slurm":
        from launcher.slurm.in_job import run_in_job

        return run_in_job(request, console=Console(), cluster_path=options.cluster)
    from launcher.backend_local import TRAINER, LocalBackend

    backend = LocalBackend(options.nproc, TRAINER if trainer is None else trainer)
    return run(request, console=Console(), backend=backend)


def _plan(options: argparse.Namespace) -> int:
    try:
        return plan.plan(options)
    except ValueError as error:
        return _fail(str(error), code=USAGE_CODE)


def _top(options: argparse.Namespace) -> int:
    from rich.console import Console

    from launcher.top import top

    console = Console() if sys.stdout.isatty() else Console(width=_FILE_COLUMNS)
    top(options.folder, console, every=options.every, once=options.once)
    return 0


def _watch(options: argparse.Namespace) -> int:
    from rich.console import Console

    from launcher.live import watch

    console = Console() if sys.stdout.isatty() else Console(width=_FILE_COLUMNS)
    watch(options.run_dir, console, every=options.every)
    return 0


def _status(options: argparse.Namespace) -> int:
    if options.watch:
        return _watch(options)
    from launcher.slurm.explain import job_status
    from launcher.status import read_status

    job = job_status(options.run_dir)
    live = job is not None and job.state in ("RUNNING", "COMPLETING")
    status = read_status(options.run_dir, held_elsewhere=live)
    if options.json:
        found = {**status.as_json(), "job": job.as_json() if job else None}
        sys.stdout.write(json.dumps(found) + "\n")
        return 0
    from rich.console import Console

    from launcher.table import show_status

    show_status(Console(), status, run_dir=options.run_dir, job=job)
    return 0


def _profile(options: argparse.Namespace) -> int:
    from launcher.profile import profile
    from launcher.slurm.explain import job_status
    from launcher.status import read_status

    run_dir: Path = options.run_dir

    def is_live() -> bool:
        job = job_status(run_dir)
        elsewhere = job is not None and job.state in ("RUNNING", "COMPLETING")
        return read_status(run_dir, held_elsewhere=elsewhere).state in ("running", "stalled")

    found = profile(run_dir, steps=options.steps, is_live=is_live)
    sys.stdout.write(
        f"{found.table}\n{found.ranks} traces of {found.steps} steps from step {found.first} on: "
        f"{found.folder}/rank_*.json.gz (open them in https://ui.perfetto.dev)\n"
    )
    return 0


def _stop(options: argparse.Namespace) -> int:
    from launcher.runfolder import STOP_NAME, is_held, read_holder, stop_note, write_stop
    from launcher.slurm.explain import job_status
    from launcher.status import read_status

    run_dir: Path = options.run_dir
    if read_status(run_dir).state == "done":
        sys.stdout.write(f"{run_dir} is finished: there is nothing to stop\n")
        return 0
    known = stop_note(run_dir)
    note = write_stop(run_dir, user=_user()) if known is None else f"already {known}"
    held, holder = is_held(run_dir), read_holder(run_dir)
    job = job_status(run_dir)
    if job is not None and job.state in ("PENDING", "RUNNING", "COMPLETING"):
        sys.stdout.write(f"job {job.job} {job.why}; to take it out at once: scancel {job.job}\n")
    where = f" (launcher: process {holder.pid} on {holder.host})" if holder else ""
    happens = (
        f"the ranks finish their step, save and leave{where}"
        if held
        else "no launcher is at work here; the next `run` will not start anything"
    )
    sys.stdout.write(
        f"{note}\n{happens}\nto go on later: rm {run_dir / STOP_NAME}, then the same `run` again\n"
    )
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = _parser()
    first = next((word for word in argv if not word.startswith("-")), None)
    if first is not None and first not in _COMMANDS:
        near = difflib.get_close_matches(first, _COMMANDS, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        parser.error(f"unknown command '{first}'{hint} (have: {', '.join(_COMMANDS)})")
    options, rest = parser.parse_known_args(argv)
    # argparse takes positionals in one go: overrides after an option come back here.
    late = [word for word in rest if "=" in word and not word.startswith("-")]
    unknown = [word for word in rest if word not in late]
    if unknown or (late and options.command not in _WITH_OVERRIDES):
        parser.error(f"unrecognized arguments: {' '.join(unknown or late)}")
    if late:
        options.overrides = [*options.overrides, *late]
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m launcher",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser(
        "run",
        help="start a run, or go on with it",
        description="Start a run, or go on with the one in the folder: the same command does both.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    run.add_argument("recipe", metavar="RECIPE", help="name of a recipe, or path of a .yaml file")
    run.add_argument(
        "overrides", metavar="key=value", nargs="*", help="values in place of the recipe's"
    )
    run.add_argument(
        "--run-dir", type=Path, required=True, metavar="DIR", help="folder of the run; made if new"
    )
    run.add_argument(
        "--backend",
        choices=["local", "slurm"],
        default="local",
        help="local: processes on this machine; slurm: tasks of the job it is called in",
    )
    run.add_argument(
        "--cluster", type=Path, metavar="FILE", help="cluster file, with --backend slurm"
    )
    run.add_argument(
        "--nproc",
        type=int,
        default=2,
        metavar="N",
        help="processes; must divide every stage's batch_size (default: %(default)s)",
    )
    run.add_argument("--until", metavar="STAGE", help="leave after this stage")
    status = commands.add_parser("status", help="how a run stands", allow_abbrev=False)
    status.add_argument("run_dir", type=Path, metavar="DIR", help="folder of the run")
    form = status.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="one JSON object, for scripts")
    form.add_argument("--watch", action="store_true", help="look on until it is over, or Ctrl-C")
    top = commands.add_parser("top", help="look on at all runs below a folder", allow_abbrev=False)
    top.add_argument("folder", type=Path, metavar="DIR", nargs="?", default=Path())
    top.add_argument("--once", action="store_true", help="show them once and leave")
    for command, seconds in ((status, 1.0), (top, 5.0)):
        command.add_argument(
            "--every",
            type=_seconds,
            default=seconds,
            metavar="SECONDS",
            help="between two looks (default: %(default)s)",
        )
    stop = commands.add_parser("stop", help="save and stop a run for good", allow_abbrev=False)
    stop.add_argument("run_dir", type=Path, metavar="DIR", help="folder of the run")
    profile = commands.add_parser("profile", help="trace steps of a live run", allow_abbrev=False)
    profile.add_argument("run_dir", type=Path, metavar="DIR", help="folder of the run")
    profile.add_argument(
        "--steps",
        type=_steps,
        default=5,
        metavar="N",
        help="how many, from the next one on (default: %(default)s)",
    )
    plan.add_arguments(
        commands.add_parser(
            "plan",
            help="memory, time and cost of a recipe before a GPU is asked for",
            description=plan.DESCRIPTION,
            epilog=plan.EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
    )
    add_job_commands(commands)
    return parser


def _steps(text: str) -> int:
    """Read how many steps are to be traced."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if not 1 <= value <= 100:
        raise argparse.ArgumentTypeError(f"'{text}': expected a number of steps from 1 to 100")
    return value


def _seconds(text: str) -> float:
    """Read the seconds between two looks."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.1 <= value <= 3600:
        raise argparse.ArgumentTypeError(f"'{text}': expected seconds from 0.1 to 3600, as in 2.5")
    return value


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user id without a name, as in containers
        return "an unnamed user"


def _fail(message: str, *, code: int) -> int:
    sys.stderr.write(f"{message}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
