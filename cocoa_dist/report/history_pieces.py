"""The page's section on how the run went: a bar of its wall time, its timeline, its throughput.

Pure functions from values to markup; every text from files is escaped. Widths are shares of the
page, so that a phone shows the same figure smaller and the words at the size of words.
"""

import statistics
from collections.abc import Mapping, Sequence
from html import escape

from cocoa_dist.report.figures import Line, line_chart
from cocoa_dist.report.history import History, Stretch, told
from cocoa_dist.report.pieces import lower_name, plain_name
from cocoa_dist.timeline import Moment, MomentKind

_MEANINGS = {
    "productive": "inside steps whose result was kept",
    "queue": "waiting for somebody, or SLURM, to start it",
    "start": "processes starting and leaving, building the model",
    "restore": "finding, checking and loading checkpoints",
    "data_wait": "steps waiting for their data",
    "checkpoint": "standing still for saves",
    "evaluation": "held-out evaluation",
    "replay": "steps that were lost and done again",
    "hang": "no step for long",
    "unknown": "between steps, outside all of these",
}
_MARKS = {
    MomentKind.CHECKPOINT: "saved",
    MomentKind.INTERRUPTED: "broken",
    MomentKind.FAILED: "bad",
    MomentKind.SAVE_FAILED: "bad",
    MomentKind.LEFT_OUT: "warn",
}
_LEAST_SHARE = 0.001  # of the bar; what is less has no place in it, but a row in the table


def history_section(history: History) -> str:
    """Return the section; empty if the folder tells nothing of how the run went."""
    parts = [
        goodput_part(history.seconds, history.goodput),
        timeline_part(history.moments, history.stretches),
        throughput_part(history.throughput),
    ]
    body = "".join(part for part in parts if part)
    return f"<h2>How it went</h2>{body}" if body else ""


def goodput_part(seconds: Mapping[str, float], goodput: float | None) -> str:
    """Return the wall time as one bar, and a table of its causes; empty without any."""
    wall = sum(seconds.values())
    if wall <= 0:
        return ""
    css = {cause: _colour(number) for number, cause in enumerate(_MEANINGS)}
    bars = "".join(
        f'<i class="{css.get(cause, "g8")}" style="width:{100 * spent / wall:.2f}%" '
        f'title="{escape(_words(cause))}: {100 * spent / wall:.1f} %"></i>'
        for cause, spent in seconds.items()
        if spent / wall >= _LEAST_SHARE
    )
    rows = "".join(
        f'<tr><th scope="row"><i class="dot {css.get(cause, "g8")}"></i>{escape(_words(cause))}'
        f"</th><td>{escape(_MEANINGS.get(cause, ''))}</td>"
        f'<td class="num">{duration(spent)}</td><td class="num">{100 * spent / wall:.1f}&nbsp;%'
        "</td></tr>"
        for cause, spent in sorted(seconds.items(), key=lambda item: -item[1])
        if spent > 0
    )
    share = "" if goodput is None else f": {100 * goodput:.1f}&nbsp;% of it was productive"
    return (
        f"<p>From its submission to its end the run took {duration(wall)}{share}.</p>"
        f'<div class="share" role="img" aria-label="wall time by cause">{bars}</div>'
        f'<table class="facts causes"><tbody>{rows}</tbody></table>'
    )


def timeline_part(moments: Sequence[Moment], stretches: Sequence[Stretch]) -> str:
    """Return a strip of the whole time and a list of what happened; empty without moments."""
    if not moments:
        return ""
    begin = moments[0].time
    span = max(moments[-1].time - begin, 1e-9)
    stages = list(dict.fromkeys(stretch.stage for stretch in stretches))

    def share(seconds: float) -> str:
        return f"{100 * seconds / span:.2f}%"

    bars = "".join(
        f'<i class="{_colour(stages.index(one.stage) + 1)}" style="left:{share(one.begin - begin)};'
        f'width:{share(one.end - one.begin)}" title="{lower_name(one.stage)}"></i>'
        for one in stretches
    )
    ticks = "".join(
        f'<b class="{_MARKS[one.kind]}" style="left:{share(one.time - begin)}" '
        f'title="{escape(_line(one), quote=True)}"></b>'
        for one in moments
        if one.kind in _MARKS
    )
    keys = "".join(
        f'<li><i class="{_colour(number)}"></i>{plain_name(stage)}</li>'
        for number, stage in enumerate(stages, start=1)
    )
    rows = "".join(
        f'<li class="{_MARKS.get(one.kind, "plain")}"><time>{duration(one.time - begin)}</time>'
        f"<span><b>{escape(one.kind.value)}</b> {_where(one)}"
        f"<small>{escape(one.text)}</small></span></li>"
        for one in told(moments)
    )
    return (
        "<h3 class='gap'>What happened</h3><p class='quiet'>Ranks at work, over the time since the "
        "submission; a tick is a checkpoint, or what broke in.</p>"
        f'<div class="strip" role="img" aria-label="ranks at work">{bars}{ticks}</div>'
        f'<ul class="key">{keys}</ul><ol class="moments">{rows}</ol>'
    )


def throughput_part(throughput: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Return a chart of tokens a second for every stage that logged any."""
    figures = []
    for stage, points in throughput.items():
        if not points:
            continue
        values = tuple(value for _, value in points)
        line = Line("tokens/s", tuple(step for step, _ in points), values)
        middle = statistics.median(values)
        chart = line_chart([line], label=f"{stage}, tokens a second")
        figures.append(
            f"<figure><h3>{plain_name(stage)}</h3><p class='quiet'>tokens a second of all ranks, "
            f"median {middle:,.0f}</p>{chart}</figure>"
        )
    if not figures:
        return ""
    return f"<h3 class='gap'>Throughput</h3><div class='grid two'>{''.join(figures)}</div>"


def duration(seconds: float) -> str:
    """Return seconds as people read them: 41 s, 3 min 20 s, 7 h 05 min."""
    whole = round(max(0.0, seconds))
    if whole < 60:
        return f"{whole}&nbsp;s"
    if whole < 3600:
        return f"{whole // 60}&nbsp;min&nbsp;{whole % 60:02d}&nbsp;s"
    return f"{whole // 3600:,}&nbsp;h&nbsp;{whole % 3600 // 60:02d}&nbsp;min"


def _colour(number: int) -> str:
    """Return the class of a part: the first is what one wants to see."""
    return "want" if number == 0 else f"g{(number - 1) % 9}"


def _words(cause: str) -> str:
    return cause.replace("_", " ")


def _where(moment: Moment) -> str:
    return f"{lower_name(moment.stage)}, step {moment.step} " if moment.stage else ""


def _line(moment: Moment) -> str:
    return f"{moment.kind.value}, {moment.stage} step {moment.step}: {moment.text}"
