"""Draws who sees whom, as text and as PNG, from the intervals of an attention plan.

A pack that is too large to draw token by token is drawn in cells: each holds the exact share of
its pairs that are visible, and the picture says how many tokens a cell stands for.
"""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cocoa_dist.segments import Role, Segment

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from cocoa_dist.attention import AttentionPlan

Samples = Sequence[Sequence[Segment]]
Edges = npt.NDArray[np.int64]

LETTERS = {Role.CONTEXT: "c", Role.BRIDGE: "b", Role.TARGET: "t"}
# At least 23 apart in CIELAB with normal, protan, deutan and tritan vision (a test simulates them),
# and of three lightnesses, for print in grey.
COLOURS = {Role.CONTEXT: "#7DB9E8", Role.BRIDGE: "#E08214", Role.TARGET: "#1B8A6B"}
MEANINGS = {
    Role.CONTEXT: "context: image and query text",
    Role.BRIDGE: "bridge: EOS or compression tokens",
    Role.TARGET: "target: rebuilt or answered",
}
UNSEEN = "#F3F0EB"
INK, FAINT_INK = "#2B2B2B", "#6E6A64"

MAX_TEXT_CELLS = 72  # a terminal's width
MAX_DRAWN_CELLS = 512  # a cell is then about two dots of a PNG
MAX_LABELLED_TOKENS = 60
MAX_RULED_TOKENS = 80  # with a line between any two tokens
# Inches: the roles along the edges and their distance, room for title, legend, words, and margins.
_STRIP, _GAP, _HEAD, _LEGEND, _WORDS, _MARGIN = 0.17, 0.045, 0.78, 0.95, 1.0, 0.12
_THIN = 0.1  # segments narrower than this have no room for a letter or a border
_PANEL = 3.4  # side of one of several pictures


@dataclass(frozen=True)
class Picture:
    """One plan to draw, with the segments that it was made from."""

    title: str
    subtitle: str
    plan: "AttentionPlan"
    samples: Samples
    words: tuple[str, ...] = ()  # of each token, if they are to be written on the axes


@dataclass(frozen=True)
class Cells:
    """A mask cut into N x N cells."""

    edges: Edges  # (N + 1,) first token of each cell, and T
    shares: npt.NDArray[np.float64]  # (N, N, roles): visible pairs by the role seen, over all pairs

    @property
    def exact(self) -> bool:
        """Whether a cell is one token by one token."""
        return len(self.edges) - 1 == int(self.edges[-1])

    @property
    def size(self) -> str:
        """How many tokens a cell stands for."""
        sizes = sorted({int(n) for n in np.diff(self.edges)})
        return f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"


def parse_pack(text: str) -> list[list[Segment]]:
    """Read a pack as `C6 B1 T4 | C3 B1 T5`: samples of segments, each a role's letter and a length.

    Raises ValueError for a word that is none, naming it.
    """
    samples: list[list[Segment]] = []
    start = 0
    by_letter = {letter: role for role, letter in LETTERS.items()}
    for number, part in enumerate(text.split("|"), start=1):
        samples.append([])
        for word in part.split():
            match = re.fullmatch(r"([cbt])([1-9][0-9]*)", word.lower())
            if match is None:
                raise ValueError(
                    f"--pack: '{word}' in sample {number} is not a segment; expected C (context), "
                    "B (bridge) or T (target) and a length of at least 1, such as C6"
                )
            stop = start + int(match[2])
            samples[-1].append(Segment(start, stop, by_letter[match[1]]))
            start = stop
        if not samples[-1]:
            raise ValueError(f"--pack '{text}': sample {number} has no segments; write C6 B1 T4")
    return samples


def cut(plan: "AttentionPlan", samples: Samples, max_cells: int) -> Cells:
    """Cut a plan into at most `max_cells` squared cells, exactly: O(T x cells), never T x T."""
    tokens = plan.num_tokens
    num = min(tokens, max_cells)
    edges = np.linspace(0, tokens, num + 1).round().astype(np.int64)
    before_RT = np.zeros((len(Role), tokens + 1), dtype=np.int64)  # tokens of a role before t
    before_RT[:, 1:] = (_roles(samples)[None] == np.arange(len(Role))[:, None]).cumsum(axis=1)
    lo, hi = plan.lo.cpu().numpy().astype(np.int64), plan.hi.cpu().numpy().astype(np.int64)
    seen = np.zeros((num, num, len(Role)))
    for row, (a, b) in enumerate(_spans(edges)):
        for m in range(len(lo)):
            begin = lo[m, a:b, None].clip(edges[:-1], edges[1:])
            end = np.maximum(begin, hi[m, a:b, None].clip(edges[:-1], edges[1:]))
            for role in Role:
                counts = before_RT[role][end] - before_RT[role][begin]
                seen[row, :, role] += counts.sum(axis=0)
    sizes = np.diff(edges)
    return Cells(edges, seen / (sizes[:, None] * sizes[None, :])[..., None])


def text_lines(plan: "AttentionPlan", samples: Samples) -> list[str]:
    """Draw with letters: a row's own role, then the role of what it sees; '.' is not seen."""
    cells = cut(plan, samples, MAX_TEXT_CELLS)
    letters = list(LETTERS.values())
    roles = _roles(samples)
    starts = {sample[0].start for sample in samples[1:]}
    # the role of most tokens of a cell stands for it
    heads = [
        letters[np.bincount(roles[a:b], minlength=len(Role)).argmax()]
        for a, b in _spans(cells.edges)
    ]
    bars = [any(a <= s < b for s in starts) for a, b in _spans(cells.edges)]
    total = cells.shares.sum(axis=2)
    most = cells.shares.argmax(axis=2)
    lines = []
    if not cells.exact:
        lines += [
            f"  cells       {plan.num_tokens} tokens, {cells.size} a letter; a letter: more than "
            "half of its pairs are",
            "              visible, most of that role; + fewer; . none; | before a sample begins",
        ]
    legend = "a row sees: c context, b bridge, t target"
    lines.append(f"  mask        {_barred(heads, bars)}   {legend}")
    for row, head in enumerate(heads):
        marks = [
            "." if share == 0 else letters[role] if share > 0.5 else "+"
            for share, role in zip(total[row], most[row], strict=True)
        ]
        if bars[row]:
            lines.append(f"              {_barred(['-'] * len(heads), bars)}".replace("|", "+"))
        lines.append(f"            {head} {_barred(marks, bars)}")
    return lines


def draw(pictures: Sequence[Picture], path: Path, *, columns: int = 1) -> None:
    """Draw the pictures as one PNG with one legend. Raises ValueError if it cannot be written.

    The legend stands below, or in the first row's last place where one place is left over.
    """
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    side = _PANEL if len(pictures) > 1 else _side(pictures[0])
    rows = -(-len(pictures) // columns)
    places = [(row, column) for row in range(rows) for column in range(columns)]
    free = places.pop(columns - 1) if len(pictures) == len(places) - 1 else None
    words = _WORDS if any(_words(picture) for picture in pictures) else 0.0
    left = _MARGIN + words + _STRIP + _GAP
    wide, high = left + side + _MARGIN, _HEAD + side + words + _MARGIN
    size = columns * wide, rows * high + (0.0 if free else _LEGEND)
    figure = plt.figure(figsize=size)
    shown = []
    for picture, (row, column) in zip(pictures, places, strict=False):
        bottom = size[1] - row * high - _HEAD - side
        corner = (column * wide + left) / size[0], bottom / size[1]
        axes = figure.add_axes((*corner, side / size[0], side / size[1]))
        shown.append(_draw_panel(axes, picture, side))
    if free is None:
        _draw_legend(figure, (_MARGIN / size[0], _LEGEND / size[1]), shown, columns=2)
    else:
        corner = (free[1] * wide + left) / size[0], 1 - _HEAD / size[1]
        _draw_legend(figure, corner, shown, columns=1)
    try:
        figure.savefig(path, dpi=160, facecolor="white")
    except (OSError, ValueError) as error:
        raise ValueError(f"--png {path} cannot be written: {error}") from error
    finally:
        plt.close(figure)


def _side(picture: Picture) -> float:
    """Inches of a picture that stands alone."""
    tokens = picture.plan.num_tokens
    return max(4.5, 0.125 * tokens) if _words(picture) else min(4.0 + 0.1 * tokens, 7.0)


def _words(picture: Picture) -> tuple[str, ...]:
    """Words for the axes, if there is room for them."""
    return picture.words if picture.plan.num_tokens <= MAX_LABELLED_TOKENS else ()


def _draw_panel(axes: "Axes", picture: Picture, side: float) -> Cells:
    """Draw one mask, `side` inches wide, with the roles of its tokens along two edges."""
    from matplotlib.colors import to_rgb

    tokens = picture.plan.num_tokens
    cells = cut(picture.plan, picture.samples, MAX_DRAWN_CELLS)
    palette = np.array([to_rgb(COLOURS[role]) for role in Role])
    unseen = np.array(to_rgb(UNSEEN))
    total = cells.shares.sum(axis=2, keepdims=True)
    image = cells.shares @ palette + (1 - total) * unseen
    axes.imshow(image.clip(0, 1), extent=(0, tokens, tokens, 0), interpolation="none")
    if tokens <= MAX_RULED_TOKENS:
        for at in range(1, tokens):
            axes.axhline(at, color="white", linewidth=0.6)
            axes.axvline(at, color="white", linewidth=0.6)
    thin = _THIN * tokens / side
    _draw_borders(axes, picture.samples, thin)
    _draw_roles(axes, picture.samples, side, thin)
    axes.set_xticks([])
    axes.set_yticks([])
    if words := _words(picture):
        middles = np.arange(tokens) + 0.5
        axes.set_xticks(middles, words, rotation=90, fontsize=7, parse_math=False)
        axes.set_yticks(middles, words, fontsize=7, parse_math=False)
        axes.tick_params(length=0, labelcolor=FAINT_INK)
        axes.tick_params(axis="y", pad=72 * (_STRIP + _GAP) + 2)
    axes.spines[:].set_visible(False)
    above: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points"}
    axes.annotate(picture.title, (0, 1), (0, 40), **above, fontsize=10, weight="bold", color=INK)
    axes.annotate(picture.subtitle, (0, 1), (0, 28), **above, fontsize=8, color=FAINT_INK)
    return cells


def _draw_borders(axes: "Axes", samples: Samples, thin: float) -> None:
    """Draw a dark line between samples, and a dotted one between the segments of a sample.

    None at a segment of fewer than `thin` tokens: the lines would hide it.
    """
    style: dict[str, Any] = {"color": INK, "linewidth": 0.7, "linestyle": (0, (1, 2))}
    for sample in samples:
        inside = (sample[0].start, sample[-1].stop)
        for left, right in itertools.pairwise(sample):
            if min(left.stop - left.start, right.stop - right.start) >= thin:
                axes.plot([right.start] * 2, inside, **style)
                axes.plot(inside, [right.start] * 2, **style)
    for sample in samples[1:]:
        axes.axhline(sample[0].start, color=INK, linewidth=1.1)
        axes.axvline(sample[0].start, color=INK, linewidth=1.1)


def _draw_roles(axes: "Axes", samples: Samples, side: float, thin: float) -> None:
    """Draw a strip of role colours with letters along the top and the left edge.

    A thin segment is drawn wide enough to be seen in the strip, its letter above the strip.
    """
    from matplotlib.patches import Rectangle

    thick, gap = _STRIP / side, _GAP / side  # shares of the axes
    across = axes.get_xaxis_transform()  # x in tokens, y in shares of the axes
    down = axes.get_yaxis_transform()
    segments = [s for sample in samples for s in sample]
    for segment in sorted(segments, key=lambda s: s.start - s.stop):  # thin ones on top
        length = segment.stop - segment.start
        middle = (segment.start + segment.stop) / 2
        shown = max(length, 0.3 * thin)
        begin = middle - shown / 2
        style: dict[str, Any] = {"facecolor": COLOURS[segment.role], "edgecolor": "white"}
        style |= {"clip_on": False, "linewidth": 0.8 if length >= thin else 0.0}
        top = Rectangle((begin, 1 + gap), shown, thick, transform=across, **style)
        axes.add_patch(top)
        left = Rectangle((-gap - thick, begin), thick, shown, transform=down, **style)
        axes.add_patch(left)
        letter = LETTERS[segment.role].upper()
        text: dict[str, Any] = {"ha": "center", "va": "center_baseline", "clip_on": False}
        if length >= thin:
            ink = "white" if segment.role is Role.TARGET else INK
            text |= {"fontsize": 8, "weight": "bold", "color": ink}
            axes.text(middle, 1 + gap + thick / 2, letter, transform=across, **text)
            axes.text(-gap - thick / 2, middle, letter, transform=down, **text)
        elif len(segments) <= MAX_LABELLED_TOKENS:
            text |= {"fontsize": 6, "weight": "bold", "color": INK}
            axes.text(middle, 1 + gap + 1.35 * thick, letter, transform=across, **text)


def _draw_legend(
    figure: "Figure", corner: tuple[float, float], shown: Sequence[Cells], *, columns: int
) -> None:
    """Say what the colours mean and how to read rows and columns; `corner` is its upper left."""
    from matplotlib.patches import Patch

    handles = [
        Patch(facecolor=COLOURS[role], label=f"{LETTERS[role].upper()}  {MEANINGS[role]}")
        for role in Role
    ]
    handles.append(Patch(facecolor=UNSEEN, edgecolor="#CFC9C0", label="not seen"))
    notes = ["A row is the token that looks,", "a column the token it sees."]
    sampled = [cells for cells in shown if not cells.exact]
    if sampled:
        notes += [
            f"Down-sampled: a cell is {sampled[0].size} tokens wide,",
            "its strength is the share of visible pairs.",
        ]
    else:
        notes += ["Dark lines part samples,", "dotted ones segments."]
    joined = [" ".join(notes[:2]), " ".join(notes[2:])] if columns > 1 else notes
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=corner,
        borderaxespad=0.0,
        borderpad=0.0,
        frameon=False,
        ncols=columns,
        fontsize=8.5,
        labelcolor=INK,
        title="\n".join(joined) + "\n",
        title_fontproperties={"size": 8.5},
        alignment="left",
    )


def _roles(samples: Samples) -> npt.NDArray[np.int64]:
    flat = [s for sample in samples for s in sample]
    return np.repeat([int(s.role) for s in flat], [s.stop - s.start for s in flat])


def _spans(edges: Edges) -> list[tuple[int, int]]:
    return list(itertools.pairwise(edges.tolist()))


def _barred(marks: Sequence[str], bars: Sequence[bool]) -> str:
    """Join marks, with a bar before each cell in which a further sample begins."""
    return "".join("|" * bar + mark for mark, bar in zip(marks, bars, strict=True))
