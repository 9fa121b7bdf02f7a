"""Learning curves as one SVG: validation retrieval over the CPU seconds that an arm has used."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from cocoa_dist.report.figures import Line, line_chart
from cocoa_dist.report.theme import NUM_GROUPS

_COLOURS = (
    *("#4477aa", "#d9803f", "#4f9e63", "#c44e52", "#8172b3"),
    *("#937860", "#cf72b1", "#9c952a", "#3a9dae"),
)
CURVE_STYLE = "\n".join(
    [
        ".chart .grid { stroke: #d9d3cb; } .chart text { font: 11px sans-serif; fill: #8a837b; }",
        ".chart polyline { fill: none; stroke-width: 2; } .chart .raw { opacity: .35; }",
        *(f".chart .c{n} {{ stroke: {colour}; }}" for n, colour in enumerate(_COLOURS)),
        ".chart .dashed { stroke-dasharray: 5 4; }",
        *(f".key i.c{n} {{ background: {colour}; }}" for n, colour in enumerate(_COLOURS)),
    ]
)


def mean_curves(group: Mapping[str, Any], split: str) -> dict[str, list[tuple[float, float]]]:
    """Return each row's curve, mean over its seeds: (CPU seconds, R@10 in per cent).

    Point k is the mean of the runs' points k; a row's seeds are evaluated at the same steps.
    """
    found = {}
    for row in group["rows"]:
        points: defaultdict[int, list[Sequence[float]]] = defaultdict(list)
        for run in row["runs"].values():
            for index, point in enumerate(run["curve"].get(split, ())):
                points[index].append(point)
        if points:
            found[row["label"]] = [
                (sum(p[0] for p in many) / len(many), sum(p[1] for p in many) / len(many))
                for many in points.values()
            ]
    return found


def curve_css(index: int) -> str:
    """Return the class of the n-th curve: nine colours, then the same ones dashed."""
    return f"c{index % NUM_GROUPS}{' dashed' * (index >= NUM_GROUPS)}"


def draw(curves: Mapping[str, Sequence[tuple[float, float]]], *, label: str) -> str:
    """Return an inline SVG; colours are `curve_css` of the curve's place."""
    lines = [
        Line(
            name=name,
            steps=tuple(point[0] for point in points),
            values=tuple(point[1] for point in points),
            css=curve_css(index),
        )
        for index, (name, points) in enumerate(curves.items())
    ]
    return line_chart(lines, label=label)


def standalone(svg: str, names: Sequence[str]) -> str:
    """Return the SVG as a file of its own: style inside, and a key below the chart."""
    width, height, row = 420, 230, 16
    total = height + row * len(names) + 8
    body = svg.removesuffix("</svg>").replace(f"0 0 {width} {height}", f"0 0 {width} {total}", 1)
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" width="{2 * width}" height="{2 * total}"'
    body = body.replace(f'width="{width}"', "", 1).replace("<svg", opening, 1)
    head, _, rest = body.partition(">")
    key = "".join(
        f'<line class="{curve_css(n)}" x1="44" x2="62" y1="{height + row * n + 4}" '
        f'y2="{height + row * n + 4}" stroke-width="2"/>'
        f'<text x="68" y="{height + row * n + 8}">{escape(name)}</text>'
        for n, name in enumerate(names)
    )
    return f"{head}><style>{CURVE_STYLE}</style>{rest}{key}</svg>\n"
