"""Command line of the report. Says so at once, without torch, if the report is up to date."""

import argparse
import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cocoa_dist.manifest import write_atomic
from cocoa_dist.report.facts import (
    RunFacts,
    arm_names,
    export_names,
    input_fingerprint,
    read_run,
)

EXIT_BAD_INPUT = 2
INPUTS_NAME = "inputs.json"
_COLUMNS = ("r1", "r5", "r10")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (2 for bad input)."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    logging.getLogger("cocoa_dist").setLevel(logging.INFO)
    try:
        run = read_run(arguments.run_dir.absolute())
        control = read_run(arguments.control.absolute()) if arguments.control else None
        arm_names(run, control)
        retrieval = _up_to_date(run, control) if not arguments.force else None
        if retrieval is None:
            retrieval = _make(run, control)
        else:
            sys.stdout.write("the report is up to date (--force makes it again)\n")
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return EXIT_BAD_INPUT
    sys.stdout.write(score_lines(retrieval))
    sys.stdout.write(f"\nlook at {arguments.run_dir / 'report' / 'index.html'}\n")
    for name in export_names(run, control):
        sys.stdout.write(f"model in {arguments.run_dir / 'export' / name}\n")
    return 0


def score_lines(retrieval: Mapping[str, Any]) -> str:
    """Return the scores as a plain table, with chance and the training CPU time."""
    arms = retrieval["arms"]
    width = max(len(name) for name in (*arms, "chance"))
    lines = []
    splits = next(iter(arms.values()))["splits"]
    for split, first in splits.items():
        lines.append(f"\n{split}, {first['n']} pairs, per cent of queries")
        heads = [f"{way} R@{cut[1:]}" for way in ("text>pic", "pic>text") for cut in _COLUMNS]
        lines.append(" " * (width + 2) + "  ".join(f"{head:>13}" for head in heads))
        rows = {name: arm["splits"][split] for name, arm in arms.items()}
        for name, row in rows.items():
            cells = [row[way][cut] for way in ("t2i", "i2t") for cut in _COLUMNS]
            lines.append(_row(name, cells, width))
        lines.append(_row("chance", [first["chance"][cut] for cut in _COLUMNS] * 2, width))
    lines.append("\ntraining CPU seconds")
    lines += [f"  {name:<{width}}{arm['train_cpu_seconds']:10.1f}" for name, arm in arms.items()]
    if "cpu_ratio" in retrieval:
        lines.append(f"  ratio to the control: {retrieval['cpu_ratio']:.3f}")
    lines += [f"note: {note}" for note in retrieval["notes"]]
    return "\n".join(lines) + "\n"


def _row(name: str, cells: Sequence[float], width: int) -> str:
    return f"{name:<{width}}  " + "  ".join(f"{cell:13.1f}" for cell in cells)


def _make(run: RunFacts, control: RunFacts | None) -> dict[str, Any]:
    (run.run_dir / "report" / INPUTS_NAME).unlink(missing_ok=True)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed searches one, and says so
    from cocoa_dist.report.assemble import make_report  # loads torch

    retrieval = make_report(run, control)
    record = {"fingerprint": input_fingerprint(run, control)}
    write_atomic(run.run_dir / "report" / INPUTS_NAME, json.dumps(record).encode())
    return retrieval


def _up_to_date(run: RunFacts, control: RunFacts | None) -> dict[str, Any] | None:
    """Return the scores of the report that is there, if it was made from these inputs."""
    folder = run.run_dir / "report"
    try:
        record = json.loads((folder / INPUTS_NAME).read_bytes())
        retrieval: dict[str, Any] = json.loads((folder / "retrieval.json").read_bytes())
    except (OSError, ValueError):
        return None
    exported = [run.run_dir / "export" / name for name in export_names(run, control)]
    files = [folder / "index.html", *(path / "selftest.json" for path in exported)]
    whole = all(file.is_file() for file in files)
    if not whole or record.get("fingerprint") != input_fingerprint(run, control):
        return None
    return retrieval


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m cocoa_dist.report", description=__doc__)
    parser.add_argument("run_dir", type=Path, help="folder of a finished run")
    parser.add_argument("--control", type=Path, help="folder of the contrastive-only control")
    parser.add_argument("--force", action="store_true", help="make it even if it is up to date")
    return parser


if __name__ == "__main__":
    sys.exit(main())
