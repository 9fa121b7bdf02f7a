"""methods.html: methods.md as one page without scripts, curves inline, nothing fetched.

The Markdown is the source, so that the two never differ; only its own constructs are known here.
"""

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from cocoa_dist.comparison.curves import CURVE_STYLE, curve_css
from cocoa_dist.comparison.markdown import render as render_markdown
from cocoa_dist.report.theme import STYLE

_MORE_STYLE = """
main { max-width: 1280px; } th, td { text-align: left; white-space: nowrap; }
h2 { margin-top: 56px; }
h3 { margin-top: 28px; } pre { overflow-x: auto; font-size: 13px; }
.chart { max-width: 720px; }
"""


def render(content: Mapping[str, Any], *, curves: Mapping[str, tuple[str, Sequence[str]]]) -> str:
    """Return the page; `curves` has for each title an inline SVG and the names of its lines."""
    body = "\n".join(_blocks(render_markdown(content, curves=()).split("\n")))
    drawn = "".join(
        f"<h3>{escape(title)}</h3>{svg}{_key(names)}" for title, (svg, names) in curves.items()
    )
    heading = "<h2>Learning curves</h2>" if drawn else ""
    note = (
        '<p class="quiet">Validation R@10 in per cent, mean of both ways and of seeds, over CPU '
        "seconds inside steps.</p>"
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Methods compared</title><style>{STYLE}{CURVE_STYLE}{_MORE_STYLE}</style></head>"
        f"<body><main>{body}{heading}{drawn and note}{drawn}</main></body></html>\n"
    )


def _key(names: Sequence[str]) -> str:
    items = "".join(
        f'<li><i class="stroke {curve_css(n)}"></i>{escape(name)}</li>'
        for n, name in enumerate(names)
    )
    return f'<ul class="key">{items}</ul>'


def _blocks(lines: Sequence[str]) -> list[str]:
    """Return the HTML of headings, tables, lists, code and paragraphs."""
    parts: list[str] = []
    at = 0
    while at < len(lines):
        line = lines[at]
        if line.startswith("```"):
            stop = next(i for i in range(at + 1, len(lines)) if lines[i].startswith("```"))
            parts.append(f"<pre>{escape(chr(10).join(lines[at + 1 : stop]))}</pre>")
            at = stop + 1
            continue
        stop = at
        while stop < len(lines) and _kind(lines[stop]) == _kind(line):
            stop += 1
        parts.append(_block(_kind(line), lines[at:stop]))
        at = stop
    return parts


def _kind(line: str) -> str:
    for start, kind in (("#", "heading"), ("|", "table"), ("- ", "list"), ("```", "code")):
        if line.startswith(start):
            return kind
    return "text" if line else "empty"


def _block(kind: str, lines: Sequence[str]) -> str:
    if kind == "heading":
        found = []
        for line in lines:
            marks, _, words = line.partition(" ")
            found.append(f"<h{len(marks)}>{_inline(words)}</h{len(marks)}>")
        return "".join(found)
    if kind == "list":
        return f"<ul>{''.join(f'<li>{_inline(line[2:])}</li>' for line in lines)}</ul>"
    if kind == "table":
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
        head = "".join(f'<th scope="col">{_inline(cell)}</th>' for cell in rows[0])
        body = "".join(
            f"<tr>{''.join(f'<td>{_inline(cell)}</td>' for cell in row)}</tr>" for row in rows[2:]
        )
        return (
            f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>"
        )
    return "".join(f"<p>{_inline(line)}</p>" for line in lines if line)


def _inline(text: str) -> str:
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))
    return re.sub(r"\*\*([^*]+)\*\*", r"<b>\1</b>", text)
