"""methods.md: the tables of methods.json in words that can be read as they are."""

from collections.abc import Mapping, Sequence
from typing import Any

from cocoa_dist.comparison.statistics import CUTOFFS, WAYS, sampling_error

WAY_WORDS = {"t2i": "text to picture", "i2t": "picture to text", "both": "mean of both ways"}
_HOW = {
    "equal-compute": "All arms of a table were given equal CPU time over all stages, by pilots.",
    "equal-tokens": "All arms of a table were given equal tokens over all stages, by pilots.",
    "equal-steps": "All arms had equal contrastive steps; reconstruction came on top, so that CPU "
    "time differs.",
}


def render(content: Mapping[str, Any], *, curves: Sequence[str]) -> str:
    """Return methods.md; `curves` are pictures to show, as paths relative to it."""
    settings = content["settings"]
    parts = ["# Methods compared", "", *introduction(content), ""]
    if content["missing"]:
        parts += ["## Missing", "", "This table is partial. It lacks:", ""]
        parts += [f"- {m['row']}, seed {m['seed']}: {m['why']}" for m in content["missing"]]
        parts.append("")
    for group in content["groups"]:
        parts += [f"## {group_title(group, settings)}", "", *equality(group), ""]
        for split in (*content["held_out"], *content["validation"]):
            parts += _scores(content, group, split)
        parts += ["### In words", "", *(f"- {line}" for line in statements(content, group)), ""]
        if group["chosen"]:
            parts += _chosen(content, group)
        parts += _used(group)
    for path in curves:
        parts += [f"![Validation retrieval while the arms trained]({path})", ""]
    parts += ["## Data that each arm saw", "", *_data(content), ""]
    parts += ["## Pilots", "", *_pilots(content), ""]
    parts += ["## To repeat", "", "```", *content["commands"], "```", ""]
    return "\n".join(parts)


def introduction(content: Mapping[str, Any]) -> list[str]:
    """Return the lines that say how to read the tables."""
    settings = content["settings"]
    lines = [
        f"Preset `{settings['preset']}`, budget `{settings['budget']}`, "
        f"{settings['nproc']} process(es) a run.",
        _HOW[settings["budget"]],
        "Recall in per cent, mean ± standard deviation over seeds; in brackets the difference to "
        "the control on the same seeds with its standard deviation, bold where it is larger than "
        "that. One seed has no spread.",
    ]
    for split, count in content["queries"].items():
        lines.append(
            f"`{split}` has {count} pairs: near 50 % a share of them has a sampling error of "
            f"{sampling_error(50.0, count):.1f} points, which seeds do not show."
        )
    if content["validation"]:
        names = ", ".join(f"`{name}`" for name in content["validation"])
        lines.append(f"Settings may be chosen by {names} alone; numbers from there are no result.")
    return lines


def group_title(group: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Return what the rows of a group have in common."""
    unit = {"equal-compute": "CPU seconds", "equal-tokens": "tokens"}.get(
        settings["budget"], "contrastive steps"
    )
    amount = "" if group["budget"] is None else f", {group['budget']:.0f} {unit}"
    if group["budget_before"] is not None:
        kind = "tokens" if settings["budget"] == "equal-tokens" else "CPU seconds"
        amount += f" ({group['budget_before']:.0f} {kind} before the contrastive stage)"
    return f"Reconstruction {group['reconstruction']:g}x{amount}"


def equality(group: Mapping[str, Any]) -> list[str]:
    """Return what was used alike, as measured."""
    cpu, tokens = group["cpu_within_per_cent"], group["tokens_within_per_cent"]
    if cpu is None:
        return ["Fewer than two arms have finished: nothing to compare yet."]
    return [
        f"Measured: CPU time of the arms is equal within {cpu:.1f} %, tokens within {tokens:.1f} % "
        "(largest less smallest, of the mean)."
    ]


def number(summary: Mapping[str, Any] | None, *, digits: int = 1, sign: bool = False) -> str:
    """Return `mean ± spread`, the mean alone for one seed, a dash for none."""
    if summary is None:
        return "-"
    mean = f"{summary['mean']:{'+' if sign else ''}.{digits}f}"
    if summary["spread"] is None:
        return mean
    return f"{mean} ± {summary['spread']:.{digits}f}"


def statements(content: Mapping[str, Any], group: Mapping[str, Any]) -> list[str]:
    """Say of each arm and held-out set whether it differs from the control by more than chance."""
    lines = []
    for row in group["rows"]:
        for split in content["held_out"]:
            found = (row["differences"] or {}).get(f"{split}/both/r10")
            if found is None:
                continue
            side = "above" if found["mean"] > 0 else "below"
            if found["exceeds_spread"] is None:
                verdict = "one seed, so its spread is unknown"
            elif found["exceeds_spread"]:
                verdict = f"more than the spread of {found['spread']:.1f}"
            else:
                verdict = f"within the spread of {found['spread']:.1f}"
            lines.append(
                f"{row['label']}, {split}, R@10 (mean of both ways): {abs(found['mean']):.1f} "
                f"points {side} {row['control']} over {found['n']} seed(s), {verdict}."
            )
    return lines or ["No differences yet: an arm and its control have no seed in common."]


def _scores(content: Mapping[str, Any], group: Mapping[str, Any], split: str) -> list[str]:
    note = " (for choosing settings)" if split in content["validation"] else ""
    heads = [f"{WAY_WORDS[way]} R@{cut[1:]}" for way in WAYS for cut in CUTOFFS]
    rows = [["arm", "seeds", *heads]]
    for row in group["rows"]:
        cells = []
        for way in WAYS:
            for cut in CUTOFFS:
                key = f"{split}/{way}/{cut}"
                cells.append(_cell(row["scores"][key], (row["differences"] or {}).get(key)))
        rows.append([row["label"], str(len(row["runs"])), *cells])
    chance = content["chance"].get(split)
    if chance:
        levels = [f"{chance[cut]:.1f}" for _ in WAYS for cut in CUTOFFS]
        rows.append(["(chance)", "", *levels])
    return [f"### {split}{note}", "", *table(rows), ""]


def _cell(own: Mapping[str, Any] | None, difference: Mapping[str, Any] | None) -> str:
    text = number(own)
    if difference is None:
        return text
    said = number(difference, sign=True)
    return f"{text} (**{said}**)" if difference["exceeds_spread"] else f"{text} ({said})"


def _chosen(content: Mapping[str, Any], group: Mapping[str, Any]) -> list[str]:
    rows = [["method", "chosen of", "chosen", "validation R@10", *content["held_out"]]]
    for found in group["chosen"]:
        cells = [
            _cell(
                found["scores"][f"{split}/both/r10"],
                (found["differences"] or {}).get(f"{split}/both/r10"),
            )
            for split in content["held_out"]
        ]
        candidates, validation = str(len(found["candidates"])), number(found["validation"])
        rows.append([found["method"], candidates, found["row"], validation, *cells])
    title = "### Chosen by validation (R@10, mean of both ways)"
    return [title, "", *table(rows), ""]


def _used(group: Mapping[str, Any]) -> list[str]:
    rows = [["arm", "what it is", "steps", "CPU seconds", "expected", "tokens", "samples", "wall"]]
    for row in group["rows"]:
        used = row["used"] or {}
        expected = row["expected_cpu_seconds"]
        rows.append(
            [
                row["label"],
                row["about"],
                ", ".join(f"{name} {steps}" for name, steps in row["steps"].items()) or "none",
                number(used.get("cpu_seconds")),
                "-" if expected is None else f"{expected:.1f}",
                number(used.get("tokens"), digits=0),
                number(used.get("samples"), digits=0),
                f"{number(used.get('wall_seconds'), digits=0)} s",
            ]
        )
    return ["### What each arm used", "", *table(rows), ""]


def _data(content: Mapping[str, Any]) -> list[str]:
    heads = [
        "data sets (records)",
        "samples",
        "passes",
        "skipped, bad",
        "loss, first to last tenth",
    ]
    rows = [["arm", "stage", "view", *heads]]
    for group in content["groups"]:
        for row in group["rows"]:
            run = next(iter(row["runs"].values()), None)
            if run is None:
                continue
            for stage, facts in run["stages"].items():
                sets = ", ".join(
                    f"{one['path']} ({one['records']})" for one in facts["data"].values()
                )
                faults = f"{facts['skipped_steps']}, {facts['bad_records']}"
                ends = (f"{x:.2f}" if x is not None else "-" for x in run["losses"][stage])
                counts = [
                    str(facts["samples"]),
                    f"{facts['passes']:.1f}",
                    faults,
                    " to ".join(ends),
                ]
                rows.append([row["name"], stage, facts["view"], sets, *counts])
    return table(rows) if len(rows) > 1 else ["No run has finished yet."]


def _pilots(content: Mapping[str, Any]) -> list[str]:
    rows = [
        ["arm", "stage", "pilots", "CPU s a step", "of a pilot", "first steps", "tokens a step"]
    ]
    for cost in content["pilots"]:
        each = f"{cost['cpu_step']:.3f} ± {cost['cpu_spread']:.3f}"
        between = f"{cost['cpu_low']:.3f} to {cost['cpu_high']:.3f}"
        numbers = [each, between, f"+{cost['cpu_first']:.2f}", f"{cost['tokens_step']:.0f}"]
        pilots = f"{cost['rounds']} x {cost['steps']} steps"
        rows.append([cost["arm"], cost["stage"], pilots, *numbers])
    return table(rows) if len(rows) > 1 else ["None: this budget needs none."]


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows, the first being the head, as lines of Markdown."""
    lines = [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]
    return [lines[0], f"|{' --- |' * len(rows[0])}", *lines[1:]]
