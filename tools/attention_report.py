"""The report of tools/bench_attention.py: rows and claims, on a terminal, as Markdown and JSON."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """One arm of one case. None: not there to be measured."""

    case: str
    arm: str
    kind: str  # ours, limit or baseline
    forward_ms: float
    both_ms: float | None  # forward and backward; None: no backward pass here
    spread: float  # of both_ms, else of forward_ms: per cent between the quartiles
    forward_tflops: float  # of visible pairs
    both_tflops: float | None
    peak_mib: float
    prepare_ms: float | None
    host_ms: float | None
    times_limit: float | None = None  # forward and backward, in times of the best limit


@dataclass(frozen=True)
class Claim:
    """A sentence that the project makes, and what was found."""

    text: str
    found: float
    sign: str  # "<=" or ">="
    limit: float

    @property
    def passed(self) -> bool:
        """Whether it holds."""
        return self.found <= self.limit if self.sign == "<=" else self.found >= self.limit

    def __str__(self) -> str:
        verdict = "PASS" if self.passed else "FAIL"
        return f"{verdict}  {self.found:.3g} (wanted {self.sign} {self.limit:g})  {self.text}"


@dataclass
class Report:
    """All of one run."""

    device: str
    command: str
    note: str = ""
    cases: dict[str, str] = field(default_factory=dict)  # title -> what kind of pack
    rows: list[Row] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)  # time was up
    faults: list[str] = field(default_factory=list)  # did not run, or gave other numbers

    def rows_of(self, case: str) -> list[Row]:
        """Rows of one case in the order measured."""
        return [row for row in self.rows if row.case == case]


def _number(value: float | None, digits: int = 3) -> str:
    if value is None:
        return "-"
    text = f"{value:.{digits}g}"
    return f"{value:.0f}" if "e" in text else text


COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("arm", lambda row: row.arm),
    ("", lambda row: row.kind),
    ("forward ms", lambda row: _number(row.forward_ms)),
    ("fwd+bwd ms", lambda row: _number(row.both_ms)),
    ("spread %", lambda row: _number(row.spread, 2)),
    ("x limit", lambda row: _number(row.times_limit)),
    ("TFLOP/s fwd", lambda row: _number(row.forward_tflops)),
    ("TFLOP/s both", lambda row: _number(row.both_tflops)),
    ("peak MiB", lambda row: _number(row.peak_mib)),
    ("prepare ms", lambda row: _number(row.prepare_ms)),
    ("host ms", lambda row: _number(row.host_ms)),
)


def _columns(rows: Sequence[Row]) -> list[tuple[str, Callable[[Row], str]]]:
    """Leave out a column that says nothing on this device."""
    return [c for c in COLUMNS if c[0] != "host ms" or any(r.host_ms is not None for r in rows)]


def with_limits(rows: Sequence[Row]) -> list[Row]:
    """Fill in how many times the best limit of its case each row takes."""
    best: dict[str, float] = {}
    for row in rows:
        if row.kind == "limit" and row.both_ms:
            best[row.case] = min(row.both_ms, best.get(row.case, row.both_ms))
    return [
        replace(row, times_limit=row.both_ms / best[row.case])
        if row.both_ms and row.case in best
        else row
        for row in rows
    ]


def print_report(report: Report) -> None:
    """Print tables where somebody looks at a terminal, Markdown elsewhere."""
    if sys.stdout.isatty():
        _print_rich(report)
    else:
        print(markdown(report), end="")


def _print_rich(report: Report) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    console.print(f"[bold]{report.device}[/bold]")
    for case, about in report.cases.items():
        table = Table(title=case, caption=about, title_justify="left", caption_justify="left")
        rows = report.rows_of(case)
        columns = _columns(rows)
        for number, (name, _) in enumerate(columns):
            table.add_column(name, justify="left" if number < 2 else "right")
        for row in rows:
            style = {"ours": "bold", "limit": "cyan"}.get(row.kind, "dim")
            table.add_row(*(text(row) for _, text in columns), style=style)
        console.print(table)
    for claim in report.claims:
        console.print(Text(str(claim), style="green" if claim.passed else "bold red"))
    for line in _remarks(report):
        console.print(Text(line, style="yellow"))


def _remarks(report: Report) -> list[str]:
    return [
        *(f"NOTE  {line}" for line in report.remarks),
        *(f"NOT MEASURED  {line}" for line in report.skipped),
        *(f"FAULT  {line}" for line in report.faults),
    ]


def markdown(report: Report) -> str:
    """Return the whole report; `tools/bench_attention.py --help` says how to read it."""
    passed = sum(claim.passed for claim in report.claims)
    lines = [
        "# Segment attention",
        "",
        f"Measured on: {report.device}.",
        f"Made by `{report.command}`.",
        "Its `--help` explains the columns; times are medians.",
        *([report.note] if report.note else []),
        "",
        f"Claims: {passed} of {len(report.claims)} hold.",
    ]
    for case, about in report.cases.items():
        rows = report.rows_of(case)
        columns = _columns(rows)
        lines += ["", f"## {case}", "", f"{about}", ""]
        lines.append("| " + " | ".join(name for name, _ in columns) + " |")
        lines.append("| " + " | ".join(["---"] * 2 + ["---:"] * (len(columns) - 2)) + " |")
        lines += ["| " + " | ".join(text(row) for _, text in columns) + " |" for row in rows]
    lines += ["", "## Claims", "", "```"]
    lines += [*map(str, report.claims), *_remarks(report), "```", ""]
    return "\n".join(lines)


def write_report(report: Report, name: Path) -> tuple[Path, Path]:
    """Write NAME.md and NAME.json; return both paths."""
    paths = name.with_name(name.name + ".md"), name.with_name(name.name + ".json")
    paths[0].write_text(markdown(report), encoding="utf-8")
    whole = asdict(report)
    for entry, claim in zip(whole["claims"], report.claims, strict=True):
        entry["passed"] = claim.passed
    paths[1].write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    return paths
