"""The scores as people read them: a table by group on a terminal, the same as Markdown and HTML."""

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from rich.table import Table

BAR_WIDTH = 20  # characters, for 100 per cent
_STYLE = """
:root { color-scheme: light dark; --ink: #262320; --soft: #6b655f; --line: #e8e3dc; --bg: #fbfaf8;
  --bar: #6b97bf; --chance: #8f4a24; }
@media (prefers-color-scheme: dark) { :root { --ink: #ece7e1; --soft: #a59d94; --line: #37332e;
  --bg: #191715; --bar: #6f9fca; --chance: #e0a177; } }
body { background: var(--bg); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; margin: 0; }
main { max-width: 900px; margin: 0 auto; padding: 40px 20px; }
h1 { font-weight: 500; } p, td.quiet { color: var(--soft); font-size: 14px; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; }
th, td { padding: 5px 8px; text-align: right; border-bottom: 1px solid var(--line);
  font-variant-numeric: tabular-nums; white-space: nowrap; }
th { font-weight: 500; color: var(--soft); font-size: 13px; }
th:first-child, td:first-child { text-align: left; } tr.mean td { font-weight: 600; }
.track { position: relative; width: 180px; height: 12px; background: var(--line); }
.track i { position: absolute; inset: 0 auto 0 0; background: var(--bar); }
.track b { position: absolute; top: -2px; bottom: -2px; width: 2px; background: var(--chance); }
"""


def rows_by_group(result: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Yield (kind, label, values) in the order of the table; kind is `set` or `mean`.

    Values have `score`, `chance`, and for sets `rows`, `tied_rows`, `candidates`, `domain`.
    """
    for group, mean in result["groups"].items():
        for name, entry in result["sets"].items():
            if (entry["group"] or "other") == group:
                domain = {True: "IND", False: "OOD"}.get(entry["in_distribution"], "")
                score = entry["precision_at_1"]
                yield "set", name, {**entry, "score": score, "domain": domain}
        yield "mean", group, {"score": mean, "chance": result["chance"]["groups"][group]}
    for label in ("ind", "ood", "overall"):
        if result[label] is not None:
            name = label.upper() if label != "overall" else label
            yield "mean", name, {"score": result[label], "chance": result["chance"][label]}


def terminal_table(result: Mapping[str, Any], *, title: str) -> Table:
    """Return the table for a rich console."""
    table = Table(title=title, title_justify="left", pad_edge=False)
    table.add_column("set", no_wrap=True)
    for head in ("P@1", "chance", "rows", "tied", "candidates"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("")
    table.add_column("", no_wrap=True)
    last = ""
    for kind, label, values in rows_by_group(result):
        if last == "mean" and kind == "set":
            table.add_section()
        last = kind
        cells = _cells(values) if kind == "set" else [_number(values["score"]), *_chance(values)]
        cells += [""] * (5 - len(cells)) + [values.get("domain", ""), _bar(values["score"])]
        table.add_row(label, *cells, style="bold" if kind == "mean" else None)
    return table


def markdown_page(result: Mapping[str, Any], *, title: str) -> str:
    """Return a Markdown page with the table, its bars, and the warnings."""
    lines = [f"# {title}", "", _EXPLANATION, ""]
    lines += ["| set | | P@1 | chance | rows | tied | candidates | |"]
    lines += ["| --- | --- | ---: | ---: | ---: | ---: | ---: | --- |"]
    for kind, label, values in rows_by_group(result):
        bar = _bar(values["score"])
        if kind == "set":
            cells = " | ".join(_cells(values))
            lines.append(f"| {label} | {values['domain']} | {cells} | {bar} |")
        else:
            chance = _number(values["chance"])
            lines.append(
                f"| **{label}** | | **{_number(values['score'])}** | {chance} | | | | {bar} |"
            )
    lines += ["", *(f"- {warning}" for warning in result["warnings"])]
    return "\n".join(lines).rstrip() + "\n"


def html_page(result: Mapping[str, Any], *, title: str) -> str:
    """Return a page that stands alone: the table with bars, chance marked in each."""
    heads = "".join(f"<th>{h}</th>" for h in ("set", "", "P@1", "chance", "rows", "tied", "of", ""))
    body = []
    for kind, label, values in rows_by_group(result):
        cells = _cells(values) if kind == "set" else [_number(values["score"]), *_chance(values)]
        cells += [""] * (5 - len(cells))
        track = (
            f'<div class="track"><i style="width:{values["score"]:.2f}%"></i>'
            f'<b style="left:{values["chance"]:.2f}%"></b></div>'
        )
        inner = [escape(label), values.get("domain", ""), *cells, track]
        body.append(f'<tr class="{kind}">' + "".join(f"<td>{c}</td>" for c in inner) + "</tr>")
    notes = "".join(f"<p>{escape(warning)}</p>" for warning in result["warnings"])
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style><main><h1>{escape(title)}</h1><p>{escape(_EXPLANATION)}</p>"
        f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{"".join(body)}</tbody>'
        f"</table></div>{notes}</main></html>\n"
    )


_EXPLANATION = (
    "Precision@1 in per cent against each row's own candidates; ties count at their expected value "
    "under random order. Every mean is over sets."
)


def _cells(values: Mapping[str, Any]) -> list[str]:
    low, high = values["candidates"]
    of = str(low) if low == high else f"{low}-{high}"
    numbers = [_number(values["score"]), _number(values["chance"])]
    return [*numbers, str(values["rows"]), str(values["tied_rows"]), of]


def _chance(values: Mapping[str, Any]) -> list[str]:
    return [_number(values["chance"])]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _bar(value: float) -> str:
    return "\u2588" * round(value / 100 * BAR_WIDTH)
