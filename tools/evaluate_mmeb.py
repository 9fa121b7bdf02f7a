#!/usr/bin/env python3
"""Score by MMEB's protocol: Precision@1 of each row's own candidates, means over sets.

    python tools/evaluate_mmeb.py --data FOLDER --model FOLDER [--nproc 2]
    python tools/evaluate_mmeb.py --embeddings DIR [--json]

--data holds rows in the published format, <set>/*.parquet or <set>.jsonl with qry_text,
qry_img_path, tgt_text and tgt_img_path (lists, the right one first), pictures below images/.
--model is an exported folder, loaded by plain sentence-transformers. Vectors are kept by content
in --cache: a run that was killed goes on, and what two sets share is embedded once.

--embeddings scores vectors made elsewhere: DIR holds a file <set>.npz a set with query (N, D),
candidates (M, D) and candidate_index (N, C) integers, column 0 the right one; --save-embeddings
writes such a folder.

Set names, groups, and which are in distribution come from the folder's sets.yaml, or else from
MMEB-V1's table.

Ends with 2 for input that cannot be scored, naming set and row; nothing wrong counts as a hit.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # works in a checkout that is not installed

from cocoa_dist.evaluation import SetInfo, read_vectors, score_set, summarise  # noqa: E402
from cocoa_dist.evaluation.sets import expected_sets  # noqa: E402
from cocoa_dist.evaluation.vector_files import table_for, vector_files  # noqa: E402

EXIT_BAD_INPUT = 2
EXIT_DIED = 1
DEFAULT_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cocoa_dist/mmeb"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if (options.embeddings is None) == (options.data is None and options.model is None):
        parser.error("give either --embeddings, or --data and --model")
    if options.embeddings is None and (options.data is None or options.model is None):
        parser.error("--data and --model belong together")
    try:
        result = score_folder(options) if options.embeddings else evaluate_model(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_DIED
    show(result, options)
    return 0


def score_folder(options: argparse.Namespace) -> dict[str, Any]:
    """Score vectors made elsewhere; one set is in memory at a time."""
    folder, only = options.embeddings, options.sets
    table = table_for(folder)
    files = chosen(vector_files(folder), only)
    scores = {}
    for name in ordered(files, table):
        vectors = read_vectors(files[name], name=name, drop_duplicates=options.drop_duplicates)
        scores[name] = score_set(vectors)
    return summarise(scores, sets=table, expected=expected_sets(scores, table, only=only))


def evaluate_model(options: argparse.Namespace) -> dict[str, Any]:
    """Embed a data folder with a model folder, and score it."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a folder is all there is to look at
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from cocoa_dist.evaluation.embed import EmbedSettings
    from cocoa_dist.evaluation.rows import RowRules
    from cocoa_dist.evaluation.run import Evaluation, evaluate

    evaluation = Evaluation(
        data=options.data,
        images=options.images,
        only=tuple(options.sets),
        rules=RowRules(
            limit=options.limit,
            instructions=not options.no_instructions,
            drop_duplicates=options.drop_duplicates,
        ),
        cache=options.cache,
        save_vectors=options.save_embeddings,
        embed=EmbedSettings(
            model=options.model,
            device=options.device,
            batch_size=options.batch_size,
            nproc=options.nproc,
            threads=options.threads,
        ),
    )
    with progress_bar() as progress:
        return evaluate(evaluation, progress=progress)


@contextmanager
def progress_bar() -> Iterator[Callable[[int, int], None]]:
    """Yield a function that shows how many items are embedded, on a terminal alone."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True)
    columns = ("embedding", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        task = bars.add_task("", total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


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
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="rows and pictures")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="an exported model")
    parser.add_argument("--embeddings", type=Path, metavar="DIR", help="vectors made elsewhere")
    parser.add_argument("--save-embeddings", type=Path, metavar="DIR", help="write vectors here")
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="default: images/ of --data")
    parser.add_argument(
        "--no-instructions",
        action="store_true",
        help="texts without the instructions of their sets, for models trained without any",
    )
    parser.add_argument("--limit", type=_positive, metavar="ROWS", help="of each set, to try it")
    parser.add_argument("--nproc", type=_positive, default=1, help="processes (default 1)")
    parser.add_argument("--threads", type=_positive, default=1, help="of each (default 1)")
    parser.add_argument("--batch-size", type=_positive, default=32, help="(default 32)")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1")
    parser.add_argument(
        "--cache", type=_cache, default=DEFAULT_CACHE, help="folder, or none (default %(default)s)"
    )
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


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}, expected 1 or more")
    return value


def _cache(text: str) -> Path | None:
    return None if text == "none" else Path(text)


if __name__ == "__main__":
    sys.exit(main())
