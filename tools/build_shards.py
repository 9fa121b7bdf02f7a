#!/usr/bin/env python3
"""Build a data set of Arrow shards from files that are there, check one, or look into one.

  build_shards.py OUT --layout captions pictures/                 a text beside each picture
  build_shards.py OUT --layout captions cats.csv text=title       a table that names pictures
  build_shards.py OUT --layout captions hf_folder/                Parquet or Arrow files
  build_shards.py OUT --layout captions 'shard-0.tar' shard-1.tar WebDataset
  build_shards.py OUT --layout mmeb MMEB-train/ --images MMEB-train/images
  build_shards.py OUT --layout interleaved documents.jsonl
  build_shards.py OUT --layout dialogues llava.json --images coco/
  build_shards.py OUT --verify --tokenizer DIR                    every byte, record and count
  build_shards.py OUT --inspect --html sheet.html                 numbers, histograms, pictures

Started again after a kill, the same command goes on: whole shards are never written twice. Rows
that cannot be used (no text, missing or broken picture) are listed in OUT/rejected.jsonl with file,
row and reason; too many of them end the build. Nothing is a data set before OUT/manifest.json is
there. Train on it with stages.STAGE.data.sources.NAME.path=OUT.
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from command_line import progress_with_note, run_command
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table

from cocoa_dist.config import resolve_path
from cocoa_dist.data.writing.build import (
    BuildOptions,
    BuildProgress,
    BuildReport,
    build_dataset,
)
from cocoa_dist.data.writing.layouts import CARRIED, LAYOUTS, Layout, LayoutSource
from cocoa_dist.data.writing.open import open_table
from cocoa_dist.data.writing.summary import Histogram, Summary, summarise
from cocoa_dist.data.writing.verify import MOST_PROBLEMS, verify_dataset
from cocoa_dist.report.contact_sheet import bin_name, render_sheet

_BAR = 32  # characters


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return what was asked for; argparse leaves with 2 if it makes no sense."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, epilog=_roles()
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the data set")
    parser.add_argument(
        "sources", nargs="*", metavar="SOURCE", help="files, folders, and ROLE=COLUMN"
    )
    parser.add_argument("--layout", choices=LAYOUTS, help="what a row means")
    parser.add_argument("--images", type=Path, help="where relative picture paths start")
    parser.add_argument("--task", default="", help="task of all records; default: the row's own")
    parser.add_argument("--name", help="of the data set; default: OUT's")
    parser.add_argument("--source", default="", help="where it is from, for those who come later")
    parser.add_argument("--licence", default="", help="of the whole, where rows do not say")
    parser.add_argument("--carry", default="", help="more columns to keep in meta, with commas")
    parser.add_argument("--tokenizer", help="model folder whose tokenizer counts the texts")
    parser.add_argument("--processes", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--records-per-batch", type=int, help="default: about 2 MiB")
    parser.add_argument("--records-per-shard", type=int, help="default: about 512 MiB")
    parser.add_argument(
        "--max-rejected", type=float, default=0.05, help="share of rows (default: %(default)s)"
    )
    parser.add_argument(
        "--max-pixels", type=int, default=10**8, help="of a picture (default: %(default)s)"
    )
    parser.add_argument("--restart", action="store_true", help="throw another build's shards away")
    parser.add_argument("--verify", action="store_true", help="check OUT, build nothing")
    parser.add_argument("--inspect", action="store_true", help="look into OUT, build nothing")
    parser.add_argument("--html", type=Path, help="with --inspect: write a page with pictures")
    options = parser.parse_intermixed_args(arguments)
    building = not (options.verify or options.inspect)
    if building and (not options.layout or not options.sources):
        parser.error("to build, say --layout and at least one SOURCE (or --verify, or --inspect)")
    if options.html and not options.inspect:
        parser.error("--html belongs to --inspect")
    if options.processes < 1:
        parser.error(f"--processes {options.processes}: expected 1 or more")
    return options


def _roles() -> str:
    lines = ["roles of each layout, and the columns that are looked for (* must be there):"]
    for name, kind in LAYOUTS.items():
        lines.append(f"  {name}")
        for role, columns in kind.roles.items():
            star = "*" if role in kind.required else " "
            lines.append(f"   {star}{role:15s} {', '.join(columns)}")
    return "\n".join([*lines, f"kept in meta: {', '.join(CARRIED)}"])


def build(options: argparse.Namespace, console: Console) -> BuildReport:
    """Build, or go on."""
    columns = dict(text.split("=", 1) for text in options.sources if _is_column(text))
    paths = [Path(text) for text in options.sources if not _is_column(text)]
    more = tuple(name for name in options.carry.split(",") if name)
    layout = Layout(
        options.layout,
        task=options.task,
        columns=columns,
        images=options.images,
        carried=(*CARRIED, *more),
        max_pixels=options.max_pixels,
    )
    console.print(f"looking at {', '.join(map(str, paths))} ...", style="dim", highlight=False)
    source = LayoutSource.of(open_table(paths), layout)
    info = {
        "name": options.name or options.out.absolute().name,
        "source": options.source or "not stated",
        "licence": options.licence or "not stated",
        "layout": options.layout,
        "rows": len(source),
    }
    with progress_with_note(console) as progress:
        task = progress.add_task("rows", total=len(source), note="")
        return build_dataset(
            source,
            options.out,
            info=info,
            options=BuildOptions(
                processes=options.processes,
                tokenizer=_tokenizer(options),
                records_per_batch=options.records_per_batch,
                records_per_shard=options.records_per_shard,
                max_rejected=options.max_rejected,
                restart=options.restart,
            ),
            on_progress=lambda now: _show(progress, task, now),
        )


def _is_column(text: str) -> bool:
    role, equals, _ = text.partition("=")
    return bool(equals) and role.isidentifier() and not Path(text).exists()


def _tokenizer(options: argparse.Namespace) -> Path | None:
    return None if options.tokenizer is None else resolve_path(options.tokenizer)


def _show(progress: Progress, task: TaskID, now: BuildProgress) -> None:
    if now.rows == now.kept_rows:  # the rate is that of this call
        progress.reset(task, total=now.total_rows, completed=now.rows, start=True)
    seconds = progress.tasks[0].elapsed or 0.0
    rate = (now.rows - now.kept_rows) / seconds if seconds > 0.5 else 0.0
    note = f"{rate:,.0f}/s  {now.bytes / 1e6:,.0f} MB  shard {now.shards} of {now.total_shards}"
    if now.kept_shards:
        note += f" ({now.kept_shards} kept)"
    if now.rejected:
        note += f"  {now.rejected} left out"
    progress.update(task, completed=now.rows, note=note)


def show_built(report: BuildReport, options: argparse.Namespace, console: Console) -> None:
    """Say what came out, and what to do next."""
    info = report.info
    written = info.num_shards - report.kept_shards
    console.print(
        f"{options.out}: {info.count:,} records in {info.num_shards} shards "
        f"({report.kept_shards} were there, {written} written), {info.bytes / 1e6:,.1f} MB, "
        f"{report.seconds:.1f} s"
    )
    if report.rejected:
        kinds = ", ".join(f"{count} {kind}" for kind, count in report.reasons.items())
        rows = f"{report.rejected} row{'s' * (report.rejected != 1)}"
        console.print(f"{rows} left out: {kinds} (see {options.out}/rejected.jsonl)")
    if not info.tokenizer_sha256:
        console.print("tokens were not counted: give --tokenizer for tight packs", style="yellow")
    if "not stated" in (info.info["source"], info.info["licence"]):
        console.print(
            "say --source and --licence, so that others know where it is from and what they may do",
            style="yellow",
        )
    console.print(f"fingerprint {info.fingerprint}", style="dim")


def verify(options: argparse.Namespace, console: Console) -> int:
    """Check everything; 1 if there is a problem."""
    with progress_with_note(console) as progress:
        task = progress.add_task("records", total=None, note="")
        report = verify_dataset(
            options.out,
            tokenizer=_tokenizer(options),
            processes=options.processes,
            on_progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    for problem in report.problems:
        console.print(f"wrong: {problem}", style="red", highlight=False)
    if report.num_problems > MOST_PROBLEMS:
        console.print(f"... and {report.num_problems - MOST_PROBLEMS} more", style="red")
    tokens = "counted again" if report.tokens_counted_again else "not counted again"
    console.print(
        f"{options.out}: {report.records:,} records and {report.files} files "
        f"({report.bytes / 1e6:,.1f} MB) checked, tokens {tokens}: "
        f"{report.num_problems or 'no'} problem{'s' * (report.num_problems != 1)}"
    )
    return 1 if report.num_problems else 0


def inspect(options: argparse.Namespace, console: Console) -> None:
    """Show what is in a data set, and write the page that was asked for."""
    summary = summarise(options.out)
    facts = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in _facts(summary).items():
        facts.add_row(name, value)
    console.print(facts)
    for histogram in summary.histograms:
        console.print(_bars(histogram), highlight=False)
    if options.html:
        options.html.write_text(render_sheet(summary), encoding="utf-8")
        console.print(f"{options.html}: {len(summary.examples)} examples")


def _facts(summary: Summary) -> Mapping[str, str]:
    info = asdict(summary.info)
    said = info.pop("info")
    facts = {**{name: str(value) for name, value in said.items()}, "records": f"{info['count']:,}"}
    facts["pictures"] = f"{summary.pictures:,}, {summary.unreadable_pictures} unreadable"
    facts["shards"] = f"{info['num_shards']} of {info['records_per_shard']:,} rows"
    facts["batches"] = f"{info['num_batches']:,} of {info['records_per_batch']} records"
    facts["size"] = f"{info['bytes'] / 1e6:,.1f} MB"
    facts["tokenizer"] = info["tokenizer_sha256"] or "none"
    facts["fingerprint"] = info["fingerprint"]
    for title in ("tasks", "formats", "licences", "sources", "rejected"):
        counts: dict[str, int] = getattr(summary, title)
        if counts:
            listed = ", ".join(f"{count:,} {name}" for name, count in counts.items())
            sampled = title != "rejected" and summary.sampled < summary.info.count
            facts[title] = f"{listed} (of {summary.sampled:,} looked at)" if sampled else listed
    return facts


def _bars(histogram: Histogram) -> str:
    most = max(histogram.counts)
    lines = [f"\n{histogram.title}, {histogram.unit} (mean {histogram.mean:,.1f})"]
    for place, count in enumerate(histogram.counts):
        bar = "#" * round(_BAR * count / most)
        lines.append(f"{bin_name(histogram, place):>18s} {bar or '.':{_BAR}s} {count:,}")
    return "\n".join(lines)


def build_or_look(options: argparse.Namespace, console: Console) -> int:
    """Build, verify or inspect; 1 for a data set that is not what was written."""
    if options.verify:
        return verify(options, console)
    if options.inspect:
        inspect(options, console)
    else:
        show_built(build(options, console), options, console)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what was asked; 2 for bad input, 1 for a data set that is not what was written."""
    return run_command(build_or_look, parse(arguments))


if __name__ == "__main__":
    sys.exit(main())
