"""Parts of the page: score tables, query rows, cards, loss charts, and the table of the run.

Pure functions from values to markup; every text from data is escaped.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from cocoa_dist.config import ContrastiveConfig
from cocoa_dist.report.arms import Exported, HeldOut
from cocoa_dist.report.examples import Found
from cocoa_dist.report.facts import CONTRASTIVE, UNTRAINED, RunFacts
from cocoa_dist.report.figures import Line, line_chart, picture_uri, pixels_uri
from cocoa_dist.report.filling import Masked, Piece

SET_WORDS = {
    "unseen_picture": "This drawing was never trained; what it shows was, drawn by others.",
    "unseen_concept": "Neither the name nor any drawing of it was trained.",
    "validation": "For choosing settings; a number from here is no result.",
}
_NAMES = {"eos_bridged_reconstruction": "EOS-bridged reconstruction"}
_TERMS = {
    "text": "hidden words: cross-entropy, nats each",
    "image": "hidden pixels: squared error, normalised units",
    "contrastive": "own target among all candidates, nats a query",
    "distillation": "from a teacher's scores, nats a query",
}
_CUTOFFS = ("r1", "r5", "r10")


def plain_name(name: str) -> str:
    """Return a name of a recipe as people write it, escaped."""
    words = _NAMES.get(name) or name.replace("_", " ")
    return escape(words[:1].upper() + words[1:])


def lower_name(name: str) -> str:
    """Return `plain_name` for the middle of a sentence."""
    words = plain_name(name)
    return words if words[:2].isupper() else words[:1].lower() + words[1:]


def listed(parts: Sequence[str]) -> str:
    """Join as people do: a, b and c."""
    if len(parts) < 2:
        return "".join(parts)
    return f"{', '.join(parts[:-1])} and {parts[-1]}"


def score_table(arms: Mapping[str, Any], split: str, direction: str, *, caption: str) -> str:
    """One direction of one set: a row for each arm, chance beside each number."""
    scores = {name: arm["splits"][split] for name, arm in arms.items()}
    rows = []
    for name, score in scores.items():
        cells = []
        for cutoff in _CUTOFFS:
            column = [other[direction][cutoff] for other in scores.values()]
            value = score[direction][cutoff]
            is_best = len(column) > 1 and value == max(column) and value > min(column)
            chance = score["chance"].get(cutoff, math.nan)
            cells.append(
                f'<td class="num{" best" * is_best}"><b>{value:.1f}</b><i>{chance:.1f}</i></td>'
            )
        rows.append(f'<tr><th scope="row">{escape(name)}</th>{"".join(cells)}</tr>')
    head = "".join(f'<th scope="col">R@{cutoff[1:]} <i>chance</i></th>' for cutoff in _CUTOFFS)
    return (
        f'<table class="scores"><caption>{caption}</caption><thead><tr><th scope="col">model</th>'
        f"{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    )


def compute_table(run: RunFacts, control: RunFacts | None, arms: Mapping[str, Any]) -> str:
    """Who the arms are and what their training cost."""
    about = {
        UNTRAINED: "the weights that both start from" if control else "the weights it starts from",
        run.config.method: _steps_in_words(run),
    }
    if control is not None:
        about[CONTRASTIVE] = f"control: {_steps_in_words(control)}"
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{about[name]}</td>'
        f'<td class="num">{arm["train_cpu_seconds"]:.0f}&nbsp;s</td></tr>'
        for name, arm in arms.items()
    )
    if control is not None:
        ratio = run.train_cpu_seconds / max(control.train_cpu_seconds, 1e-9)
        rows += (
            f"<tr><td></td><td>{escape(run.config.method)} over control</td>"
            f'<td class="num">{ratio:.2f}&nbsp;&times;</td></tr>'
        )
    return (
        '<table class="facts"><thead><tr><th>model</th><th>training</th>'
        f'<th class="num">CPU time</th></tr></thead><tbody>{rows}</tbody></table>'
    )


def query_row(held_out: HeldOut, found: Found) -> str:
    """One text with its nearest pictures, the right one framed."""
    images = [_picture(held_out, index, right=index == found.right) for index in found.top]
    if found.right not in found.top:
        images.append('<span class="gap">&hellip;</span>')
        images.append(_picture(held_out, found.right, right=True, missed=True))
    others = "".join(f", {escape(name)} {rank}" for name, rank in found.other_ranks.items())
    beside = f" ({others.removeprefix(', ')})" if others else ""
    hit = " hit" if found.rank == 1 else ""
    name, words = escape(found.name, quote=True), escape(found.keywords, quote=True)
    return (
        f'<div class="query"><p class="ask" title="{name}">{name}</p>'
        f'<p class="words" title="{words}">{words or "&nbsp;"}</p>'
        f'<div class="answers">{"".join(images)}</div>'
        f'<p class="rank{hit}"><b>rank {found.rank}</b> of {len(held_out.records)}{beside}'
        "</p></div>"
    )


def rebuilt_card(example: Masked) -> str:
    """Show a picture with holes, as the model fills it, and as it was; then its text."""
    rebuilt = example.rebuilt
    assert rebuilt is not None, "chosen for what was hidden in its picture"
    pictures = (
        ("hidden", pixels_uri(rebuilt.original, hidden=rebuilt.hidden), "holes"),
        ("filled in", pixels_uri(rebuilt.rebuilt), ""),
        ("original", pixels_uri(rebuilt.original), ""),
    )
    cells = "".join(
        f'<span><img class="{css}" src="{uri}" alt="{words}">{words}</span>'
        for words, uri, css in pictures
    )
    return f'<figure><div class="triple">{cells}</div>{filled_text(example.pieces)}</figure>'


def bridged_card(example: Masked) -> str:
    """Show what was given (picture or text) beside the text that was read back."""
    if example.picture is not None:
        uri = pixels_uri(example.picture)
        given = f'<div class="single"><img src="{uri}" alt="the given picture"></div>'
        if example.context:
            given += f'<span class="given">{escape(example.context)}</span>'
        css = ""
    else:
        given = f'<div class="given">{escape(example.context)}</div>'
        css = " texts"
    return f'<div class="card bridge{css}">{given}{filled_text(example.pieces)}</div>'


def filled_text(pieces: Sequence[Piece]) -> str:
    """Text with the model's guesses in place of what was hidden."""
    parts = []
    for piece in pieces:
        if piece.guess is None:
            parts.append(escape(piece.text))
        elif piece.guess == piece.text:
            parts.append(_chip("ok", piece.text))
        else:
            parts.append(_chip("no", piece.guess, truth=piece.text))
    return f'<p class="filled">{"".join(parts)}</p>'


def fill_legend() -> str:
    """Say what the colours of filled-in text mean."""
    return (
        '<p class="filled quiet legend"><span class="ok">green</span>: hidden, and guessed right. '
        '<span class="no">red<s>right</s></span>: hidden, and guessed wrong; the right one '
        "in small. A word may be several pieces.</p>"
    )


def losses(run: RunFacts, control: RunFacts | None) -> str:
    """Charts of every term of every stage; the control's curve beside the same stage and term."""
    figures = []
    for name, stage in run.config.stages.items():
        steps = run.steps_of(name)
        for term in _terms(steps):
            lines = [_line(run.config.method, steps, term, css="line-a")]
            beside = control.steps_of(name) if control is not None else []
            if term in _terms(beside):
                lines.append(_line(CONTRASTIVE, beside, term, css="line-b"))
            guide = None
            if isinstance(stage.objective, ContrastiveConfig):
                guide = (math.log(stage.batch_size), f"guessing: ln {stage.batch_size}")
            chart = line_chart(lines, label=f"{name}, {term}", guide=guide)
            words = _TERMS.get(term, term)
            figures.append(
                f"<figure><h3>{plain_name(name)}</h3><p class='quiet'>{escape(words)}</p>{chart}"
                f"{_line_key(lines) if len(lines) > 1 else ''}</figure>"
            )
    if not figures:
        return ""
    return (
        "<h2>Losses</h2><p>Every step (thin) and a moving mean (bold), over the optimizer steps of "
        f'each stage.</p><div class="grid two">{"".join(figures)}</div>'
    )


def stage_table(run: RunFacts) -> str:
    """Give steps, samples and time of every stage."""
    rows = []
    for stage in run.stages:
        found = stage.manifest
        rows.append(
            f'<tr><th scope="row">{plain_name(stage.name)}</th>'
            f'<td class="num">{found.step:,}</td><td class="num">{found.samples:,}</td>'
            f'<td class="num">{found.tokens:,}</td>'
            f'<td class="num">{found.train_cpu_seconds:.0f}&nbsp;s</td>'
            f'<td class="num">{found.wall_seconds:.0f}&nbsp;s</td></tr>'
        )
    heads = ("steps", "samples", "tokens", "CPU time", "wall time")
    head = "".join(f'<th class="num" scope="col">{words}</th>' for words in heads)
    return (
        f'<table class="facts"><thead><tr><th scope="col">stage</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def run_table(run: RunFacts, exports: Sequence[Exported]) -> str:
    """Where the run comes from and where its results lie."""
    last = run.stages[-1].manifest
    restarts = listed([f"{count} after {reason}" for reason, count in run.restarts.items()])
    facts = [
        ("recipe", f"{escape(run.config.name)} (method {escape(run.config.method)})"),
        ("fingerprint", f"<code>{escape(last.recipe_fingerprint[:16])}</code>"),
        ("starts from", f"<code>{escape(_shortened(last.base_model))}</code>"),
        ("processes", f"{last.world_size} ({escape(last.engine)})"),
        ("restarts", escape(restarts) or "none"),
        ("skipped steps", str(sum(stage.manifest.skipped_steps for stage in run.stages))),
        (
            "checkpoints",
            "<br>".join(f"<code>{escape(stage.checkpoint)}</code>" for stage in run.stages),
        ),
        (
            "exported",
            "<br>".join(
                f"<code>export/{escape(one.path.name)}</code> {_self_test(one)}" for one in exports
            )
            or "nothing",
        ),
        ("versions", escape(", ".join(f"{k} {v}" for k, v in last.versions.items()))),
    ]
    rows = "".join(f'<tr><th scope="row">{key}</th><td>{value}</td></tr>' for key, value in facts)
    return f'<table class="facts pairs"><tbody>{rows}</tbody></table>'


def _chip(css: str, text: str, *, truth: str | None = None) -> str:
    """Mark a guess; its leading space stays outside of the coloured box."""
    space = " " if text.startswith(" ") or (truth or "").startswith(" ") else ""
    word = escape(text.strip()) or "&nbsp;"
    small = "" if truth is None else f"<s>{escape(truth.strip()) or '&nbsp;'}</s>"
    return f'{space}<span class="{css}">{word}{small}</span>'


def _picture(held_out: HeldOut, index: int, *, right: bool, missed: bool = False) -> str:
    record = held_out.records[index]
    name = escape(str(record.meta.get("name") or record.key), quote=True)
    css = "missed" if missed else "right" if right else ""
    return (
        f'<img class="{css}" src="{picture_uri(record.images[0])}" alt="{name}" title="{name}" '
        'loading="lazy">'
    )


def _terms(steps: Sequence[Mapping[str, Any]]) -> list[str]:
    """Terms of the loss that a stage logged."""
    return [key.removeprefix("loss/") for key in (steps[0] if steps else {}) if "loss/" in key]


def _line(name: str, steps: Sequence[Mapping[str, Any]], term: str, *, css: str) -> Line:
    kept = [(s["step"], s[f"loss/{term}"]) for s in steps if s.get(f"loss/{term}") is not None]
    return Line(
        name=name,
        steps=tuple(float(step) for step, _ in kept),
        values=tuple(float(value) for _, value in kept),
        css=css,
    )


def _line_key(lines: Sequence[Line]) -> str:
    colours = {"line-a": "var(--accent)", "line-b": "var(--context)"}
    items = "".join(
        f'<li><i class="stroke" style="background:{colours[line.css]}"></i>{escape(line.name)}</li>'
        for line in lines
    )
    return f'<ul class="key">{items}</ul>'


def _steps_in_words(run: RunFacts) -> str:
    return ", ".join(f"{s.manifest.step} steps {lower_name(s.name)}" for s in run.stages)


def _self_test(export: Exported) -> str:
    if export.difference is None:
        return "(self-test not run: sentence-transformers is not installed)"
    return (
        "loads in sentence-transformers; self-test differs from training by at most "
        f"{export.difference:.0e}"
    )


def _shortened(digest: str) -> str:
    return digest if len(digest) <= 24 else f"{digest[:23]}..."
