#!/usr/bin/env python3
"""Find hard negatives for a data set of pairs, and write it again with them.

  mine_hard_negatives.py OUT --data DATA --model RUN/export/NAME    by an exported model
  mine_hard_negatives.py OUT --data DATA --vectors FOLDER           queries.npy and targets.npy

Every record's query is compared with the targets (first positives) of all records. The --count most
similar become its negatives, without: targets with its own identity or content, and targets more
similar than its own one less --margin, which are likely to be right as well (arXiv 2407.15831).
Train on the result with

  stages.STAGE.data.sources.NAME.path=OUT  stages.STAGE.data.negatives=4

OUT says which weights and which revision of DATA it is from; a training that finds DATA changed
since refuses it. Started again after a kill, the same command goes on: vectors, neighbours and
shards that are done are kept in OUT.mining and OUT until all is there.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from command_line import run_command
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cocoa_dist.config import is_remote, resolve_path
from cocoa_dist.data.shards import ShardReader
from cocoa_dist.data.writing.build import BuildOptions
from cocoa_dist.mining.mine import MiningOptions, MiningReport, mine
from cocoa_dist.mining.vectors import ExportedModel, GivenVectors, Vectoriser

_DONE = {"embed": "embedding", "search": "searching", "write": "writing"}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return what was asked for; argparse leaves with 2 if it makes no sense."""
    default = MiningOptions()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the new data set")
    parser.add_argument("--data", required=True, help="folder of shards, asset:NAME or msc://...")
    vectors = parser.add_mutually_exclusive_group(required=True)
    vectors.add_argument("--model", type=Path, help="exported folder (sentence-transformers)")
    vectors.add_argument("--vectors", type=Path, help="folder with queries.npy and targets.npy")
    parser.add_argument("--instruction", default="", help="in front of queries, with --model")
    parser.add_argument("--batch-size", type=int, default=32, help="of the model (%(default)s)")
    parser.add_argument(
        "--count", type=int, default=default.count, help="negatives of each record (%(default)s)"
    )
    parser.add_argument(
        "--margin",
        type=float,
        default=default.margin,
        help="leave out what comes this close to the own target's similarity (%(default)s)",
    )
    parser.add_argument(
        "--skip", type=int, default=default.skip, help="nearest ones to pass over (%(default)s)"
    )
    parser.add_argument(
        "--append", action="store_true", help="keep the negatives that records have"
    )
    parser.add_argument(
        "--search", choices=("torch", "faiss"), default=default.search, help="exact, or by cells"
    )
    parser.add_argument(
        "--probes", type=int, default=default.probes, help="cells faiss looks into (%(default)s)"
    )
    parser.add_argument(
        "--block", type=int, default=default.block, help="records between checkpoints (%(default)s)"
    )
    parser.add_argument(
        "--check", type=int, default=default.check, help="queries for the recall (%(default)s)"
    )
    parser.add_argument("--tokenizer", help="model folder whose tokenizer counts the texts")
    parser.add_argument("--work", type=Path, help="where to keep what is done (OUT.mining)")
    parser.add_argument("--processes", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--restart", action="store_true", help="throw another mining's work away")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace, console: Console) -> MiningReport:
    """Mine, or go on."""
    chosen = MiningOptions(
        count=options.count,
        margin=options.margin,
        skip=options.skip,
        search=options.search,
        probes=options.probes,
        block=options.block,
        check=options.check,
        append=options.append,
    )
    data = options.data if is_remote(options.data) else resolve_path(options.data)
    bars = Progress(
        TextColumn("{task.description:9s}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    with bars:
        tasks = {step: bars.add_task(name, total=None) for step, name in _DONE.items()}
        return mine(
            data,
            options.out,
            _vectoriser(options, data),
            work=options.work or options.out.with_name(f"{options.out.name}.mining"),
            options=chosen,
            build=BuildOptions(
                processes=options.processes,
                tokenizer=None if options.tokenizer is None else resolve_path(options.tokenizer),
                restart=options.restart,
            ),
            restart=options.restart,
            on_progress=lambda step, done, total: bars.update(
                tasks[step], completed=done, total=total
            ),
        )


def _vectoriser(options: argparse.Namespace, data: str | Path) -> Vectoriser:
    if options.model is not None:
        return ExportedModel(
            options.model, instruction=options.instruction, batch_size=options.batch_size
        )
    reader = ShardReader(data)
    try:
        return GivenVectors(options.vectors, count=len(reader))
    finally:
        reader.close()


def show(report: MiningReport, options: argparse.Namespace, console: Console) -> None:
    """Say what came out, and what to do next."""
    info, found = report.built.info, report.measured
    console.print(
        f"{options.out}: {info.count:,} records with up to {options.count} negatives, "
        f"{info.bytes / 1e6:,.1f} MB, {report.seconds:.1f} s"
    )
    console.print(
        f"recall {100 * found.recall:.1f} % of brute force over {found.checked} queries; own "
        f"target ahead of the first negative by {found.mean_gap:.3f} on average"
    )
    if found.without or found.fewer:
        console.print(
            f"{found.without:,} records have none, {found.fewer:,} fewer than {options.count}: a "
            "smaller --margin lets nearer ones in",
            style="yellow",
        )
    if report.built.rejected:
        console.print(
            f"{report.built.rejected} records left out, see {options.out}/rejected.jsonl",
            style="yellow",
        )
    if not info.tokenizer_sha256:
        console.print("tokens were not counted: give --tokenizer for tight packs", style="yellow")
    console.print(f"fingerprint {info.fingerprint}", style="dim")


def mine_and_show(options: argparse.Namespace, console: Console) -> int:
    """Mine, and say what came out."""
    show(run(options, console), options, console)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what was asked; 2 for bad input."""
    return run_command(mine_and_show, parse(arguments))


if __name__ == "__main__":
    sys.exit(main())
