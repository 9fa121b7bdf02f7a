#!/usr/bin/env python3
"""Score by MMEB's protocol: Precision@1 of each row's own candidates, means over sets.

    python tools/evaluate_mmeb.py --embeddings DIR [--json]

DIR holds a file <set>.npz a set with query (N, D), candidates (M, D) and candidate_index (N, C)
integers, column 0 the right one. Set names, groups, and which are in distribution come from
DIR/sets.yaml, or else from MMEB-V1's table.

Ends with 2 for input that cannot be scored, naming set and row; nothing wrong counts as a hit.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # works in a checkout that is not installed

from cocoa_dist.evaluation import SetInfo, read_vectors, score_set, summarise  # noqa: E402
from cocoa_dist.evaluation.vector_files import table_for, vector_files  # noqa: E402

EXIT_BAD_INPUT = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        result = score_folder(
            options.embeddings, only=options.sets, drop_duplicates=options.drop_duplicates
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    show(result, options)
    return 0


def score_folder(
    folder: Path, *, only: Sequence[str] = (), drop_duplicates: bool = False
) -> dict[str, Any]:
    """Score vectors made elsewhere; one set is in memory at a time."""
    table = table_for(folder)
    files = chosen(vector_files(folder), only)
    scores = {}
    for name in ordered(files, table):
        vectors = read_vectors(files[name], name=name, drop_duplicates=drop_duplicates)
        scores[name] = score_set(vectors)
    return summarise(scores, sets=table, expected=[] if only else list(table))


def ordered(names: Mapping[str, Any], table: Mapping[str, SetInfo]) -> list[str]:
    """Return the names in the order of the table, unknown ones last."""
    return [name for name in table if name in names] + [n for n in names if n not in table]


def chosen(found: Mapping[str, Path], only: Sequence[str]) -> dict[str, Path]:
    """Return the sets that were asked for. Raises ValueError for one that is not there."""
    absent = [name for name in only if name not in found]
    if absent:
        raise ValueError(f"no set {', '.join(absent)} (have: {', '.join(found)})")
    return {name: path for name, path in found.items() if not only or name in only}


def show(result: Mapping[str, Any], options: argparse.Namespace) -> None:
    """Print the result, and write the pages that were asked for."""
    title = options.title or "Precision@1"
    if options.json:
        print(json.dumps(result, indent=1))
    else:
        from rich.console import Console

        from cocoa_dist.evaluation.table import terminal_table

        width = None if sys.stdout.isatty() else 120
        Console(width=width).print(terminal_table(result, title=title))
    for warning in result["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    if options.page:
        write_page(result, options.page, title=title)


def write_page(result: Mapping[str, Any], path: Path, *, title: str) -> None:
    """Write a page; Markdown if its name ends in .md, else HTML."""
    from cocoa_dist.evaluation.table import html_page, markdown_page

    make = markdown_page if path.suffix == ".md" else html_page
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(make(result, title=title), encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--embeddings", type=Path, metavar="DIR", help="vectors made elsewhere")
    parser.add_argument("--sets", nargs="+", default=[], metavar="SET", help="only these")
    parser.add_argument(
        "--drop-duplicates",
        action="store_true",
        help="count a candidate that a row lists twice once; without it that is an error",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, not a table")
    parser.add_argument("--page", type=Path, help="write a page too, .html or .md")
    parser.add_argument("--title", default="", help="of the table and the page")
    return parser


if __name__ == "__main__":
    sys.exit(main())
