#!/usr/bin/env python3
r"""Have a multimodal model write training records about pictures, and put them into Arrow shards.

  synthesize.py OUT pictures/ --prompt coma_dialogue --endpoint http://localhost:8000/v1 \
      --model Qwen/Qwen2.5-VL-7B-Instruct                 dialogues for CoMa
  synthesize.py OUT data_set/ --prompt cocoa_records ...  query, picture and target for CoCoA
  synthesize.py OUT pictures/ ... --dry-run               one request and the bill; nothing is sent
  synthesize.py OUT pictures/ ... --limit 100             the first rows; more of them later

A SOURCE is a data set of shards, or what build_shards.py reads: a folder of pictures, with texts
beside them or not, CSV, JSONL, Parquet, Arrow or tar files. The key to the endpoint is read from
the environment variable COCOA_API_KEY (--api-key-env names another one), and is never written down.

Started again after a kill, the same command goes on: OUT/journal.jsonl has every call and answer,
nothing that was answered is asked again. When all rows are done, OUT/shards is the data set, with
rejected.jsonl in it for the rows that became no record; OUT/sheet.html shows it and OUT/bill.json
says what it took. Exit 0: done; 1: not all rows are done, start it again; 2: bad input or an
endpoint that refuses everything; 130: stopped by hand.
"""

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from command_line import progress_with_note
from rich.console import Console
from rich.table import Table

from cocoa_dist.config import resolve_path
from cocoa_dist.data.shards import remove_dataset
from cocoa_dist.data.synthesis.assemble import SynthesisSource
from cocoa_dist.data.synthesis.bill import Bill, Prices
from cocoa_dist.data.synthesis.endpoint import EndpointStopError, endpoint_address
from cocoa_dist.data.synthesis.estimate import estimate
from cocoa_dist.data.synthesis.journal import JOURNAL_NAME, read_bill
from cocoa_dist.data.synthesis.pace import NothingWorksError, Patience
from cocoa_dist.data.synthesis.pictures import open_source
from cocoa_dist.data.synthesis.plan import Plan
from cocoa_dist.data.synthesis.prompts import load_prompt, prompt_names
from cocoa_dist.data.synthesis.run import Outcome, RunOptions, Stop, synthesise
from cocoa_dist.data.writing.build import BuildOptions, BuildReport, build_dataset
from cocoa_dist.data.writing.layouts import Layout
from cocoa_dist.data.writing.source import Source
from cocoa_dist.data.writing.summary import summarise
from cocoa_dist.manifest import write_atomic
from cocoa_dist.report.contact_sheet import render_sheet

_KEY_NAME = "COCOA_API_KEY"
_NOT_STATED = "not stated"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return what was asked for; argparse leaves with 2 if it makes no sense."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the journal and shards")
    parser.add_argument(
        "sources", nargs="+", metavar="SOURCE", help="files, folders, and ROLE=COLUMN (image, text)"
    )
    _add_questions(parser)
    _add_calls(parser)
    _add_output(parser)
    options = parser.parse_intermixed_args(arguments)
    for name, least in (("concurrency", 1), ("asks", 1), ("tries", 1), ("max_pixels", 784)):
        if getattr(options, name) < least:
            parser.error(f"--{name.replace('_', '-')}: expected {least} or more")
    for name in ("requests_per_minute", "pause", "price_in", "price_out", "timeout"):
        if getattr(options, name) < 0:
            parser.error(f"--{name.replace('_', '-')}: expected 0 or more")
    if options.limit is not None and options.limit < 1:
        parser.error("--limit: expected 1 or more")
    if options.budget is not None and not (options.price_in or options.price_out):
        parser.error("--budget needs --price-in and --price-out: without them nothing costs")
    return options


def _add_questions(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is asked; a change needs another OUT")
    group.add_argument(
        "--prompt", required=True, help=f"{', '.join(prompt_names())}, or a .yaml file"
    )
    group.add_argument("--endpoint", required=True, help="such as http://localhost:8000/v1")
    group.add_argument("--model", required=True, help="as the endpoint calls it")
    group.add_argument("--images", type=Path, help="where relative picture paths start")
    group.add_argument(
        "--max-pixels", type=int, default=2**20, help="of a picture as it is sent (%(default)s)"
    )
    group.add_argument(
        "--asks", type=int, default=3, help="of one thing, until its answer is usable (%(default)s)"
    )
    group.add_argument(
        "--response-format",
        choices=("schema", "object", "none"),
        default="schema",
        help="how JSON is asked for, where the endpoint can (%(default)s)",
    )
    group.add_argument("--token-field", default="max_tokens", help="or max_completion_tokens")
    group.add_argument("--body", type=_json_object, default={}, help="JSON: more of every request")


def _add_calls(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how it is asked; free to change")
    group.add_argument("--api-key-env", default=_KEY_NAME, help="variable (%(default)s)")
    group.add_argument("--limit", type=int, help="rows of the source")
    group.add_argument("--concurrency", type=int, default=8, help="calls at a time (%(default)s)")
    group.add_argument("--requests-per-minute", type=float, default=0.0, help="0: no limit")
    group.add_argument("--timeout", type=float, default=120.0, help="seconds (%(default)s)")
    group.add_argument("--tries", type=int, default=6, help="of a call that fails (%(default)s)")
    group.add_argument(
        "--pause", type=float, default=1.0, help="seconds after a failure, then doubled"
    )
    group.add_argument("--price-in", type=float, default=0.0, help="of 10^6 prompt tokens")
    group.add_argument("--price-out", type=float, default=0.0, help="of 10^6 tokens of answers")
    group.add_argument("--budget", type=float, help="stop before it is exceeded")
    group.add_argument("--dry-run", action="store_true", help="show a request and the bill")


def _add_output(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is written")
    group.add_argument("--name", help="of the data set; default: OUT's")
    group.add_argument("--source", default=_NOT_STATED, help="where the pictures are from")
    group.add_argument("--licence", default=_NOT_STATED, help="of the whole")
    group.add_argument("--tokenizer", help="model folder whose tokenizer counts the texts")
    group.add_argument(
        "--max-rejected", type=float, default=0.2, help="share of records (%(default)s)"
    )
    group.add_argument("--accept-missing", action="store_true", help="do without unanswered rows")
    group.add_argument("--replace", action="store_true", help="write OUT/shards again")
    group.add_argument("--processes", type=int, default=min(4, os.cpu_count() or 1))


def _json_object(text: str) -> dict[str, Any]:
    tree = json.loads(text)
    if not isinstance(tree, dict):
        raise ValueError(f"expected a JSON object, found {text}")
    return tree


def plan_of(options: argparse.Namespace) -> tuple[Plan, Source]:
    """Return what is to be done. Raises ValueError for what cannot be."""
    columns = dict(text.split("=", 1) for text in options.sources if _is_column(text))
    paths = [Path(text) for text in options.sources if not _is_column(text)]
    if not paths:
        raise ValueError("name at least one SOURCE, a file or a folder")
    layout = Layout("pictures", columns=columns, images=options.images)
    plan = Plan(
        prompt=load_prompt(options.prompt),
        model=options.model,
        address=endpoint_address(options.endpoint),
        max_pixels=options.max_pixels,
        max_decoded_pixels=layout.max_pixels,
        asks=options.asks,
        response_format=options.response_format,
        token_field=options.token_field,
        body=options.body,
    )
    return plan, open_source(paths, layout)


def _is_column(text: str) -> bool:
    role, equals, _ = text.partition("=")
    return bool(equals) and role.isidentifier() and not Path(text).exists()


def ask(options: argparse.Namespace, plan: Plan, source: Source, console: Console) -> Outcome:
    """Ask until all rows are done, or one says stop."""
    stop = Stop()
    run = RunOptions(
        key=os.environ.get(options.api_key_env, "").strip(),
        key_name=options.api_key_env,
        limit=options.limit,
        concurrency=options.concurrency,
        requests_per_minute=options.requests_per_minute,
        timeout=options.timeout,
        prices=_prices(options),
        budget=options.budget,
        patience=Patience(tries=options.tries, pause=options.pause),
    )
    before = {
        number: signal.signal(number, _stopper(stop, console))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        with progress_with_note(console) as progress:
            task = progress.add_task("pictures", total=None, note="")
            return synthesise(
                plan,
                source,
                options.out,
                options=run,
                stop=stop,
                on_progress=lambda now: progress.update(
                    task, total=now.rows, completed=now.ended, note=_note(now, run.prices)
                ),
            )
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _prices(options: argparse.Namespace) -> Prices:
    return Prices(options.price_in, options.price_out)


def _stopper(stop: Stop, console: Console) -> Any:
    def stop_or_leave(number: int, frame: object) -> None:
        if stop.reason:
            raise KeyboardInterrupt
        stop.request(signal.Signals(number).name)
        console.print("waiting for the answers under way; once more leaves at once", style="yellow")

    return stop_or_leave


def _note(now: Outcome, prices: Prices) -> str:
    bill = now.bill
    note = f"{bill.calls:,} calls  {now.in_flight} under way"
    if prices != Prices():
        note += f"  cost {bill.total(prices):,.2f}"
    rejected = sum(now.rejected.values())
    return (
        note
        + (f"  {rejected} left out" if rejected else "")
        + (f"  {now.waiting[:60]}" if now.waiting else "")
    )


def save_bill(bill: Bill, options: argparse.Namespace) -> dict[str, Any]:
    """Write OUT/bill.json, and return what it says."""
    facts = bill.facts(_prices(options))
    write_atomic(options.out / "bill.json", (json.dumps(facts, indent=1) + "\n").encode())
    return facts


def show(outcome: Outcome, options: argparse.Namespace, console: Console) -> None:
    """Write the bill, and print it with what became of the rows."""
    prices = _prices(options)
    facts = save_bill(outcome.bill, options)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("pictures done", f"{outcome.ended:,} of {outcome.rows:,}")
    if outcome.rejected:
        table.add_row("left out", _listed(outcome.rejected))
    if outcome.unanswered:
        table.add_row("not answered", _listed(outcome.unanswered))
    table.add_row("calls answered", f"{facts['calls']:,} of {facts['sendings']:,} sent")
    if facts["failures"]:
        table.add_row("calls failed", _listed(facts["failures"]))
    if facts["unconfirmed"]:
        kinds = _listed(facts["unconfirmed_by_kind"])
        table.add_row("unconfirmed", f"{kinds}; sent again under the same idempotency key")
    tokens = f"{facts['prompt_tokens']:,} in, {facts['completion_tokens']:,} out"
    silent = facts["calls_without_usage"]
    table.add_row("tokens", tokens + (f"; {silent} calls did not say" if silent else ""))
    if prices != Prices():
        most = facts["cost_at_most"]
        also = f" ({most:,.4f} if all unconfirmed count)" if most > facts["cost"] else ""
        table.add_row("cost", f"{facts['cost']:,.4f}{also}")
    console.print(table, highlight=False)


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {kind}" for kind, count in counts.items())


def write(
    options: argparse.Namespace, plan: Plan, source: Source, rows: int, console: Console
) -> BuildReport:
    """Write the shards and their contact sheet."""
    made = SynthesisSource.of(plan, source, options.out, rows=rows)
    if not made.num_records:
        reasons = {place.reason for place in made.places}
        raise ValueError(f"no row became a record, for reasons such as {sorted(reasons)[:3]}")
    shards = options.out / "shards"
    if options.replace and shards.is_dir():
        remove_dataset(shards)
    bill = json.loads((options.out / "bill.json").read_bytes())
    report = build_dataset(
        made,
        shards,
        info={
            "name": options.name or options.out.absolute().name,
            "source": options.source,
            "licence": options.licence,
            "model": plan.model,
            "endpoint": plan.address,
            "prompt": f"{plan.prompt.name}@{plan.prompt.version}",
            "pictures": rows,
            "calls": bill["calls"],
            "prompt_tokens": bill["prompt_tokens"],
            "completion_tokens": bill["completion_tokens"],
        },
        options=BuildOptions(
            processes=options.processes,
            tokenizer=None if options.tokenizer is None else resolve_path(options.tokenizer),
            max_rejected=options.max_rejected,
        ),
    )
    sheet = options.out / "sheet.html"
    write_atomic(sheet, render_sheet(summarise(shards)).encode())
    console.print(
        f"{shards}: {report.info.count:,} records in {report.info.num_shards} shards, "
        f"{report.info.bytes / 1e6:,.1f} MB; look at {sheet}",
        highlight=False,
    )
    if report.rejected:
        console.print(f"left out: {_listed(report.reasons)} (see {shards}/rejected.jsonl)")
    return report


def show_dry(plan: Plan, source: Source, options: argparse.Namespace, console: Console) -> None:
    """Print one request and what all would cost."""
    found, prices = estimate(plan, source, limit=options.limit), _prices(options)
    console.print(f"POST {plan.address}/chat/completions", style="bold", highlight=False)
    console.print_json(json.dumps(found.request, ensure_ascii=True))
    console.print(
        f"{found.rows:,} pictures, up to {found.calls:,} calls: about {found.prompt_tokens:,.0f} "
        f"tokens in, at most {found.completion_tokens:,} out",
        highlight=False,
    )
    if prices != Prices():
        console.print(f"cost: at most about {found.cost(prices):,.2f}", highlight=False)
    console.print("nothing was sent or written", style="dim")


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what was asked; exit codes as in the module's first lines."""
    options = parse(arguments)
    console = Console(soft_wrap=True)
    errors = Console(stderr=True, soft_wrap=True, style="red", markup=False, highlight=False)
    try:
        plan, source = plan_of(options)
        if options.dry_run:
            show_dry(plan, source, options, console)
            return 0
        try:
            outcome = ask(options, plan, source, console)
        except (EndpointStopError, NothingWorksError):
            save_bill(read_bill(options.out / JOURNAL_NAME), options)
            raise
        show(outcome, options, console)
        if outcome.stopped:
            errors.print(f"stopped: {outcome.stopped}; the same command goes on")
            return 130 if outcome.stopped in ("SIGINT", "SIGTERM") else 1
        if outcome.ended < outcome.rows and not options.accept_missing:
            errors.print(
                f"{outcome.rows - outcome.ended} pictures have no answer yet; start the same "
                "command again, or do without them (--accept-missing)"
            )
            return 1
        write(options, plan, source, outcome.rows, console)
    except (ValueError, OSError) as error:
        errors.print(str(error))
        return 2
    except KeyboardInterrupt:
        errors.print("stopped at once; the same command goes on")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
