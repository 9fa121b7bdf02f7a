"""Figures as inline SVG and pictures as data URIs, in colours that the page's scheme decides.

Every colour is a CSS class or variable of theme.py, so that one figure serves light and dark, and
nothing is fetched from anywhere.
"""

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cocoa_dist.data.images import Pixels, decode_image
from cocoa_dist.report.examples import Space, Visibility

_THUMBNAIL = 96  # pixels of the longer side, shown at most at 64
_INLINE_TYPES = {b"RIFF": "image/webp", b"\x89PNG": "image/png"}
_INLINE_BYTES = 6000  # small files go into the page as they are
_CHART_WIDTH, _CHART_HEIGHT = 420, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 12, 10, 30
_MAX_POINTS = 400  # of one line; longer ones are thinned, the eye sees no more

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Line:
    """One curve of a chart: values at steps, drawn raw (thin) and smoothed."""

    name: str
    steps: tuple[float, ...]
    values: tuple[float, ...]
    css: str = "line-a"


def picture_uri(data: bytes) -> str:
    """Return an encoded picture as a data URI, made smaller where it is large."""
    kind = _INLINE_TYPES.get(data[:4])
    if kind and len(data) <= _INLINE_BYTES:
        return _uri(data, kind)
    image = Image.fromarray(decode_image(data, max_pixels=100_000_000))
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    return _encoded(image, "WEBP")


def pixels_uri(image: Pixels, *, hidden: NDArray[np.bool_] | None = None) -> str:
    """Return pixels (H, W, 3) as a PNG data URI; `hidden` (H, W) becomes transparent."""
    if hidden is None:
        return _encoded(Image.fromarray(np.asarray(image)), "PNG")
    alpha = np.where(hidden, 0, 255).astype(np.uint8)[:, :, None]
    return _encoded(Image.fromarray(np.concatenate([image, alpha], axis=2)), "PNG")


def smoothed(values: Sequence[float]) -> Floats:
    """Return a centred moving mean over about a twentieth of the curve, one-sided at its ends."""
    data = np.asarray(values, dtype=np.float64)
    half = len(data) // 40
    sums = np.concatenate([[0.0], np.cumsum(data)])
    index = np.arange(len(data))
    first, stop = np.maximum(index - half, 0), np.minimum(index + half + 1, len(data))
    means: Floats = (sums[stop] - sums[first]) / (stop - first)
    return means


def line_chart(lines: Sequence[Line], *, label: str, guide: tuple[float, str] | None = None) -> str:
    """Draw curves over steps. `guide` is a level with its name, drawn where it is in range."""
    finite = [v for line in lines for v in line.values if math.isfinite(v)]
    if not finite:
        return '<p class="quiet">No finite values were logged.</p>'
    low, high = min(finite), max(finite)
    ticks = nice_ticks(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])
    last = max(step for line in lines for step in line.steps)
    x_ticks = [tick for tick in nice_ticks(0.0, last) if tick <= last]

    def place_x(step: Floats) -> Floats:
        return _LEFT + (_CHART_WIDTH - _LEFT - _RIGHT) * step / max(last, 1.0)

    def place_y(value: Floats) -> Floats:
        span = max(high - low, 1e-12)
        return _TOP + (_CHART_HEIGHT - _TOP - _BOTTOM) * (high - value) / span

    parts = [_svg_open(_CHART_WIDTH, _CHART_HEIGHT, label, css="chart")]
    for tick in ticks:
        y = place_y(np.array([tick])).item()
        parts.append(_rule(_LEFT, y, _CHART_WIDTH - _RIGHT, y))
        parts.append(_text(_LEFT - 7, y + 4, f"{tick:g}", anchor="end"))
    for tick in x_ticks:
        x = place_x(np.array([tick])).item()
        parts.append(_text(x, _CHART_HEIGHT - 10, f"{tick:g}", anchor="middle"))
    if guide is not None and low <= guide[0] <= high:
        y = place_y(np.array([guide[0]])).item()
        parts.append(_rule(_LEFT, y, _CHART_WIDTH - _RIGHT, y, css="guide"))
        parts.append(_text(_CHART_WIDTH - _RIGHT, y - 5, guide[1], anchor="end"))
    for line in lines:
        steps = place_x(np.asarray(line.steps, dtype=np.float64))
        raw = place_y(np.asarray(line.values, dtype=np.float64))
        calm = place_y(smoothed(line.values))
        parts.append(_polyline(steps, raw, css=f"{line.css} raw"))
        parts.append(_polyline(steps, calm, css=line.css))
    return "".join([*parts, "</svg>"])


def nice_ticks(low: float, high: float, *, count: int = 4) -> list[float]:
    """Return round numbers that cover [low, high], about `count` steps of 1, 2 or 5 times 10^n."""
    span = max(high - low, abs(high) * 1e-3, 1e-9)
    rough = span / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = min((1.0, 2.0, 5.0, 10.0), key=lambda m: abs(m * power - rough)) * power
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]


def scatter(space: Space, *, names: Sequence[str], groups: Sequence[int], size: int = 340) -> str:
    """Draw texts (rings) and pictures (dots), each pair joined by a line."""
    points = np.concatenate([space.text_N2, space.image_N2])
    low, high = points.min(axis=0), points.max(axis=0)
    span = float(max((high - low).max(), 1e-9))
    centre = (low + high) / 2
    scale = (size - 24) / span

    def place(point: NDArray[np.float32]) -> tuple[str, str]:
        x, y = size / 2 + (point - centre) * scale * np.array([1.0, -1.0])
        return f"{x:.1f}", f"{y:.1f}"

    joins, dots = [], []
    rows = zip(space.text_N2, space.image_N2, names, groups, strict=True)
    for text, image, name, group in rows:
        (tx, ty), (ix, iy) = place(text), place(image)
        joins.append(f'<line class="g{group}" x1="{tx}" y1="{ty}" x2="{ix}" y2="{iy}"/>')
        title = f"<title>{escape(name)}</title>"
        dots.append(f'<circle class="g{group} ring" cx="{tx}" cy="{ty}" r="3">{title}</circle>')
        dots.append(f'<circle class="g{group}" cx="{ix}" cy="{iy}" r="3">{title}</circle>')
    opening = _svg_open(size, size, f"Embeddings, {space.title}", css="space")
    return "".join([opening, *joins, *dots, "</svg>"])


def visibility_grid(view: Visibility, *, cell: int = 17) -> str:
    """Draw who sees whom: a row is a token that looks, a column one that is seen."""
    count = len(view.labels)
    margin = 8 + 7 * max(min(len(label), 12) for label in view.labels)
    side = margin + 10 + count * cell
    parts = [_svg_open(side, side, f"Attention of stage {view.stage}", css="mask")]
    origin = margin + 10
    for index, (label, role) in enumerate(zip(view.labels, view.roles, strict=True)):
        at = origin + index * cell
        short = escape(label if len(label) <= 12 else label[:11] + ".")
        css = f"role-{role.name.lower()}"
        middle = at + cell / 2
        parts.append(f'<rect class="{css}" x="{margin}" y="{at}" width="5" height="{cell - 1}"/>')
        parts.append(f'<rect class="{css}" x="{at}" y="{margin}" width="{cell - 1}" height="5"/>')
        parts.append(_text(margin - 5, middle + 4, short, anchor="end"))
        parts.append(
            f'<text x="0" y="0" transform="translate({middle + 4:.1f} {margin - 5}) rotate(-90)">'
            f"{short}</text>"
        )
    for row, column in np.ndindex(count, count):
        seen = bool(view.visible_TT[row, column])
        css = f"role-{view.roles[column].name.lower()}" if seen else "unseen"
        x, y = origin + column * cell, origin + row * cell
        parts.append(
            f'<rect class="{css}" x="{x}" y="{y}" width="{cell - 1}" height="{cell - 1}" rx="2"/>'
        )
    return "".join([*parts, "</svg>"])


def _svg_open(width: float, height: float, label: str, *, css: str) -> str:
    return (
        f'<svg class="{css}" width="{width:g}" viewBox="0 0 {width:g} {height:g}" role="img" '
        f'aria-label="{escape(label, quote=True)}">'
    )


def _rule(x1: float, y1: float, x2: float, y2: float, *, css: str = "grid") -> str:
    return f'<line class="{css}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, *, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _polyline(x: Floats, y: Floats, *, css: str) -> str:
    every = max(1, math.ceil(len(x) / _MAX_POINTS))
    kept = [i for i in range(len(x)) if i % every == 0 or i == len(x) - 1]
    points = " ".join(f"{x[i]:.1f},{y[i]:.1f}" for i in kept if math.isfinite(y[i]))
    return f'<polyline class="{css}" points="{points}"/>'


def _encoded(image: Image.Image, kind: str) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return _uri(buffer.getvalue(), f"image/{kind.lower()}")


def _uri(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
