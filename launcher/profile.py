"""`launcher profile`: ask a run that is at work to trace its next steps, and wait for the traces.

The request is a file in the run folder; rank 0 takes it up at its next step and answers with
another one. Nothing here reaches into a process.
"""

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cocoa_dist.tracing import PROFILE_ANSWER, PROFILE_FOLDER, PROFILE_REQUEST
from launcher.backend import BadInputError

_LOOK_SECONDS = 0.2
_ALIVE_SECONDS = 5.0  # between two looks at the run itself: SLURM may have to be asked
_PATIENCE_SECONDS = 60.0  # for the traces of the other ranks, once rank 0 has written its own


@dataclass(frozen=True)
class Traces:
    """What a request has brought."""

    folder: Path  # one file a rank
    first: int  # step
    steps: int
    ranks: int
    table: str  # the operators that took longest, of rank 0


def profile(run_dir: Path, *, steps: int, is_live: Callable[[], bool]) -> Traces:
    """Have the next `steps` steps traced. Raises BadInputError if that cannot be asked for now.

    Waits as long as the run is live; a request that nobody has taken up is taken back.
    """
    if not is_live():
        raise BadInputError(
            f"{run_dir} is not at work: only a run that makes steps can be traced; start it with "
            "`python -m launcher run`, or give runtime.profile_steps in its recipe"
        )
    _ask(run_dir, steps)
    try:
        answer = _answer(run_dir, is_live)
    except BaseException:
        (run_dir / PROFILE_REQUEST).unlink(missing_ok=True)
        raise
    folder = run_dir / str(answer["folder"])
    ranks = int(str(answer["world_size"]))
    _wait_for_ranks(folder, ranks)
    return Traces(
        folder=folder,
        first=int(str(answer["first"])),
        steps=int(str(answer["steps"])),
        ranks=ranks,
        table=(folder / "top.txt").read_text(encoding="utf-8"),
    )


def _ask(run_dir: Path, steps: int) -> None:
    """Write the request. Raises BadInputError while another one is under way."""
    request = run_dir / PROFILE_REQUEST
    (run_dir / PROFILE_FOLDER).mkdir(exist_ok=True)
    try:
        descriptor = os.open(request, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        raise BadInputError(
            f"{run_dir}: a request is under way ({request}); wait for its traces, or remove the "
            "file if nobody does"
        ) from None
    with os.fdopen(descriptor, "w") as file:
        (run_dir / PROFILE_ANSWER).unlink(missing_ok=True)
        json.dump({"steps": steps}, file)


def _answer(run_dir: Path, is_live: Callable[[], bool]) -> dict[str, object]:
    """Wait for rank 0's answer."""
    live, looked = True, time.monotonic()
    while True:
        if time.monotonic() - looked > _ALIVE_SECONDS:
            live, looked = is_live(), time.monotonic()
        asked = (run_dir / PROFILE_REQUEST).exists()
        try:
            found: dict[str, object] = json.loads((run_dir / PROFILE_ANSWER).read_text())
            return found
        except FileNotFoundError:
            pass
        if not live:
            raise BadInputError(f"{run_dir}: the run has ended before its steps were traced")
        if not asked:
            raise BadInputError(
                f"{run_dir}: the run has no traces to give; its log says why (is the disk full?)"
            )
        time.sleep(_LOOK_SECONDS)


def _wait_for_ranks(folder: Path, ranks: int) -> None:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    wanted = [folder / f"rank_{rank}.json.gz" for rank in range(ranks)]
    while missing := [path.name for path in wanted if not path.exists()]:
        if time.monotonic() > deadline:
            raise BadInputError(
                f"{folder} lacks {', '.join(missing)}: do all nodes write into the same folder?"
            )
        time.sleep(_LOOK_SECONDS)
