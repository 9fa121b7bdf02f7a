"""What the tools have in common: their exit codes, their progress bar, their work folders."""

import argparse
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def run_command(
    do: Callable[[argparse.Namespace, Console], int], options: argparse.Namespace
) -> int:
    """Do what was asked; returns the exit code (2: bad input, 130: stopped by hand)."""
    try:
        return do(options, Console(soft_wrap=True))
    except (ValueError, OSError) as error:
        Console(stderr=True, soft_wrap=True).print(
            str(error), style="red", markup=False, highlight=False
        )
        return 2
    except KeyboardInterrupt:
        Console(stderr=True).print("stopped; the same command goes on", style="yellow")
        return 130


def progress_with_note(console: Console) -> Progress:
    """Return bars whose tasks have a field `note`; they are drawn on a terminal alone."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


@contextmanager
def work_folder(given: Path | None) -> Iterator[Path]:
    """Give the folder that was asked for, made and kept; without one, one that goes at the end."""
    if given is None:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
        return
    given.mkdir(parents=True, exist_ok=True)
    yield given.resolve()
