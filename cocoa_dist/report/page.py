"""The HTML page: sections in order, each a pure function from values to markup.

One file without scripts and without anything fetched: style inline, figures as SVG, pictures as
data URIs. All texts from data are escaped here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from cocoa_dist.report import pieces
from cocoa_dist.report.arms import Exported, HeldOut
from cocoa_dist.report.examples import Found, Space, Visibility
from cocoa_dist.report.facts import CONTRASTIVE, UNTRAINED, RunFacts
from cocoa_dist.report.figures import scatter, visibility_grid
from cocoa_dist.report.filling import MaskedStage
from cocoa_dist.report.history import History
from cocoa_dist.report.history_pieces import history_section
from cocoa_dist.report.pieces import lower_name, plain_name
from cocoa_dist.report.theme import STYLE

_RULE_WORDS = {
    "bidirectional": "Every token sees every token of its own sample.",
    "causal": "Every token sees itself and what stands before it.",
    "eos_bridged": "The target never sees the picture or the query, only EOS and itself: what it "
    "needs to know must pass through EOS, the bridge.",
    "compression": "The answer never sees the picture, only the compression tokens and itself.",
}
_PAIR_WORDS = " Query and picture are two samples: neither sees the other."
_EMOJI_CREDIT = """Pictures: <a href="https://github.com/googlefonts/noto-emoji">Noto Emoji</a>
(copyright Google LLC and the Noto Emoji authors, Apache-2.0),
<a href="https://github.com/jdecked/twemoji">Twemoji</a> (copyright Twitter, Inc and other
contributors, <a href="https://creativecommons.org/licenses/by/4.0/">CC BY 4.0</a>), and
<a href="https://github.com/microsoft/fluentui-emoji">Fluent Emoji</a> (copyright Microsoft
Corporation, MIT). They were changed: put on white, resized, re-encoded. Names and keywords:
<a href="https://github.com/milesj/emojibase">emojibase</a> (copyright Miles Johnson, MIT) with
Unicode CLDR data (copyright Unicode, Inc., Unicode-3.0). Full texts:
<code>cocoa_dist/assets/emoji/LICENSES.md</code>."""
_EQUAL = 0.05  # a difference of training CPU time that is called none


@dataclass(frozen=True)
class Content:
    """Everything that the page shows."""

    run: RunFacts
    control: RunFacts | None
    retrieval: Mapping[str, Any]  # as in retrieval.json
    notes: Sequence[str]  # what limits the comparison
    num_parameters: int
    found: Sequence[tuple[HeldOut, Sequence[Found]]]
    filled: Sequence[MaskedStage]
    masks: Sequence[Visibility]
    spaces: Sequence[Space]
    point_names: Sequence[str]
    point_groups: Sequence[int]  # below theme.NUM_GROUPS
    group_names: Sequence[str]
    exports: Sequence[Exported]
    history: History


def render(content: Content) -> str:
    """Return the whole page."""
    sections = [
        ("result", "Retrieval", _result(content)),
        ("found", "Queries", _found(content)),
        ("space", "The space", _space(content)),
        ("pictures", "Filling in pictures", _pictures(content)),
        ("words", "Filling in words", _words(content)),
        ("attention", "Attention", _attention(content)),
        ("losses", "Losses", pieces.losses(content.run, content.control)),
        ("history", "How it went", history_section(content.history)),
        ("run", "The run", _run(content)),
    ]
    kept = [(key, title, body) for key, title, body in sections if body]
    links = "".join(f'<a href="#{key}">{title}</a>' for key, title, _ in kept)
    bodies = "".join(f'<section id="{key}">{body}</section>' for key, _, body in kept)
    name = escape(content.run.config.name)
    lead = " ".join(lead_sentences(content))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name}: report</title>
<style>{STYLE}</style>
</head>
<body><main>
<header>
<p class="eyebrow">Report of the run &ldquo;{name}&rdquo;</p>
<h1>One space for pictures and words</h1>
<p class="lead">{lead}</p>
<nav>{links}</nav>
</header>
{bodies}
<footer>{_footer(content)}</footer>
</main></body>
</html>
"""


def lead_sentences(content: Content) -> list[str]:
    """Return three sentences: what was trained, what it finds, what the control finds."""
    run, arms = content.run, content.retrieval["arms"]
    stages = pieces.listed([lower_name(stage.name) for stage in run.stages])
    count = len(run.stages)
    first = (
        f"A Qwen2-VL with {_millions(content.num_parameters)} parameters was trained in "
        f"{count} stage{'s' * (count > 1)} ({stages}) to give a text and its picture one vector."
    )
    splits = arms[run.config.method]["splits"]
    if not splits:
        return [first, "The recipe names no held-out sets, so nothing was scored."]

    shares = {
        arm: pieces.listed([_share(s["t2i"]["r1"]) for s in arms[arm]["splits"].values()])
        for arm in arms
    }
    asked = pieces.listed([f"{s['n']} texts of {lower_name(n)}" for n, s in splits.items()])
    chances = pieces.listed([_share(split["chance"]["r1"]) for split in splits.values()])
    second = (
        f"For {asked} it puts the right picture first in {shares[run.config.method]} of all "
        f"cases; guessing would in {chances}."
    )
    if content.control is None:
        return [first, second, f"Before training it was {shares[UNTRAINED]}."]
    ratio = 1.0 / content.retrieval["cpu_ratio"]
    compute = f"{ratio:.2f} times the training CPU time"
    if abs(ratio - 1.0) <= _EQUAL:
        compute = f"the same training CPU time (within {100 * abs(ratio - 1.0):.0f}&nbsp;%)"
    third = f"A contrastive-only control with {compute} reaches {shares[CONTRASTIVE]}."
    return [first, second, third]


def _result(content: Content) -> str:
    arms = content.retrieval["arms"]
    splits = arms[content.run.config.method]["splits"]
    tables = [
        pieces.score_table(arms, split, direction, caption=caption)
        for split in splits
        for direction, caption in (
            ("t2i", f"{plain_name(split)}: text to picture"),
            ("i2t", f"{plain_name(split)}: picture to text"),
        )
    ]
    explain = "".join(
        f"<p class='quiet'><b>{plain_name(name)}</b> ({split['n']} pairs): "
        f"{pieces.SET_WORDS.get(name, 'a held-out set of the recipe.')} One query more or less "
        f"moves a number by {100.0 / split['n']:.1f} points.</p>"
        for name, split in splits.items()
    )
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in content.notes)
    seeds = " One run of each arm: what another seed would change was not measured."
    seeds = seeds if content.control is not None else ""
    return f"""<h2>Retrieval on held-out pairs</h2>
<p>How often the right one of all candidates is among the first 1, 5 or 10, in per cent. The small
number is what guessing gives; the best arm of a column is tinted.{seeds}</p>
{notes}
<div class="grid two">{"".join(tables)}</div>
<div class="grid">{pieces.compute_table(content.run, content.control, arms)}</div>
<div class="grid two">{explain}</div>"""


def _found(content: Content) -> str:
    parts = []
    for held_out, found in content.found:
        rows = "".join(pieces.query_row(held_out, one) for one in found)
        parts.append(
            f"<h3 style='margin-top:28px'>{plain_name(held_out.name)}</h3>"
            f"<div class='queries'>{rows}</div>"
        )
    if not parts:
        return ""
    return f"""<h2>Texts, and the pictures they find</h2>
<p>Each text with its five nearest pictures, nearest first. The right one has a green frame; where
it is not among the five, it stands apart with a dashed frame. The queries are the first in the
order of a hash, not the ones that went well.</p>{"".join(parts)}"""


def _space(content: Content) -> str:
    if not content.spaces:
        return ""
    panels = "".join(
        f"<figure>{scatter(space, names=content.point_names, groups=content.point_groups)}"
        f"<figcaption><b>{escape(space.title)}</b><br>right picture first: "
        f"{space.recall_at_1:.1f} %<br>variance on these axes: {100 * space.explained:.0f} %"
        "</figcaption></figure>"
        for space in content.spaces
    )
    legend = "".join(
        f'<li><i class="dot g{number}"></i>{escape(name)}</li>'
        for number, name in enumerate(content.group_names)
    )
    return f"""<h2>How the space comes together</h2>
<p>Held-out pairs on the two main axes of variance, before training and after each stage. A ring is
a text, a dot its picture, and a line joins the two: short lines are what training is for.</p>
<div class="grid four wide">{panels}</div>
<ul class="key"><li><i class="hollow"></i>text</li><li><i class="full"></i>picture</li>
{legend}</ul>"""


def _pictures(content: Content) -> str:
    shown = [stage for stage in content.filled if stage.num_patches and stage.examples]
    parts = []
    for stage in shown:
        cards = "".join(pieces.rebuilt_card(one) for one in stage.examples)
        parts.append(
            f"<p>At the end of the stage <b>{lower_name(stage.stage)}</b>: parts of a "
            "held-out picture and of its text are hidden, the model fills in both. Over "
            f"{stage.num_patches} hidden parts it explains {100 * stage.explained:.0f} % of the "
            "variance of their pixels.</p>"
            f'<div class="grid four">{cards}</div>{pieces.fill_legend()}'
        )
    return f"<h2>Filling in pictures</h2>{''.join(parts)}" if parts else ""


def _words(content: Content) -> str:
    parts = []
    for stage in content.filled:
        if stage.num_patches or not stage.examples:
            continue
        cards = "".join(pieces.bridged_card(one) for one in stage.examples)
        parts.append(
            f"<p>At the end of the stage <b>{lower_name(stage.stage)}</b>: what is given "
            "stands on the left; the hidden pieces of the text on the right can draw on it only "
            "through EOS.</p>"
            f'<div class="grid two cards">{cards}</div>{pieces.fill_legend()}'
        )
    if not parts:
        return ""
    rates = pieces.listed(
        [
            f"{100 * stage.right_share:.0f} % of {stage.num_tokens} hidden tokens exactly right "
            f"in {lower_name(stage.stage)}"
            for stage in content.filled
            if stage.num_tokens
        ]
    )
    return f"<h2>Filling in words</h2>{''.join(parts)}<p class='quiet'>Over all: {rates}.</p>"


def _attention(content: Content) -> str:
    if not content.masks:
        return ""
    figures = []
    for view in content.masks:
        paired = content.run.config.stages[view.stage].data.view == "pair"
        words = _RULE_WORDS.get(view.rule, "") + (_PAIR_WORDS if paired else "")
        figures.append(
            f"<figure><h3>{plain_name(view.stage)}</h3>{visibility_grid(view)}"
            f"<figcaption>{words}</figcaption></figure>"
        )
    return f"""<h2>Who may see whom</h2>
<p>One small sample under the rule of each stage. A row is a token that looks, a column a token that
is seen; a cell has the colour of what is seen, and is blank where nothing may be seen.</p>
<ul class="key"><li><i style="background:var(--context)"></i>context: picture and query</li>
<li><i style="background:var(--bridge)"></i>bridge: EOS, where the embedding is read</li>
<li><i style="background:var(--target)"></i>target: what must be rebuilt</li></ul>
<div class="grid three">{"".join(figures)}</div>"""


def _run(content: Content) -> str:
    return f"""<h2>The run</h2>
<div class="scroll">{pieces.stage_table(content.run)}</div>
<div class="grid">{pieces.run_table(content.run, content.exports)}</div>"""


def _footer(content: Content) -> str:
    sources = [
        source.path
        for config in content.run.config.stages.values()
        for source in config.data.blend.values()
    ]
    sources += [source.path for source in content.run.config.evaluation.sets.values()]
    if any(path.startswith("asset:emoji") for path in sources):
        return f"<p>{_EMOJI_CREDIT}</p>"
    return "<p>Pictures and texts belong to the data sets named in the recipe.</p>"


def _share(value: float) -> str:
    return f"{value:.1f}&nbsp;%"


def _millions(count: int) -> str:
    if count >= 1e9:
        return f"{count / 1e9:.2f} billion"
    return f"{count / 1e6:.2f} million"
