"""The content of methods.json: rows with scores over seeds, what each arm used and saw.

What is missing is in it by name. Markdown and HTML are written from this and nothing else.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cocoa_dist.comparison.arms import Preset, Variant
from cocoa_dist.comparison.budget import Costs
from cocoa_dist.comparison.statistics import (
    Summary,
    as_json,
    metric,
    metric_names,
    paired,
    spread_in_per_cent,
    summarise,
)

SCHEMA_VERSION = 1
CHOSEN_BY = ("both", "r10")  # the mean over the validation sets of this
_USED = ("cpu_seconds", "tokens", "samples", "steps", "wall_seconds")


@dataclass(frozen=True)
class Row:
    """One row: a variant with what is known of its runs, by seed."""

    variant: Variant
    steps: Mapping[str, int]  # of each stage; empty if the budget leaves none
    expected_cpu_seconds: float | None
    runs: Mapping[int, Mapping[str, Any]]  # run_facts, with `splits`; finished runs alone
    missing: Mapping[int, str]  # why a seed has no scores

    @property
    def scores(self) -> dict[int, Mapping[str, Any]]:
        """Scores by seed."""
        return {seed: run["splits"] for seed, run in self.runs.items()}


def build(
    rows: Sequence[Row],
    *,
    preset: Preset,
    settings: Mapping[str, Any],
    sizes: Mapping[float, Mapping[str, Any]],
    costs: Costs,
    commands: Sequence[str],
    choose: bool,
) -> dict[str, Any]:
    """Return the content of methods.json."""
    splits = [*preset.held_out, *preset.validation]
    groups = []
    for factor in dict.fromkeys(row.variant.factor for row in rows):
        group = [row for row in rows if row.variant.factor == factor]
        content = [_row(row, _control_of(row, group, preset), splits) for row in group]
        cpu = [found["used"]["cpu_seconds"]["mean"] for found in content if found["used"]]
        tokens = [found["used"]["tokens"]["mean"] for found in content if found["used"]]
        groups.append(
            {
                "reconstruction": factor,
                "budget": sizes.get(factor, {}).get("amount"),
                "budget_before": sizes.get(factor, {}).get("before"),
                "control": preset.control,
                "cpu_within_per_cent": spread_in_per_cent(cpu),
                "tokens_within_per_cent": spread_in_per_cent(tokens),
                "rows": content,
                "chosen": _chosen(group, content, preset) if choose else None,
            }
        )
    return {
        "schema_version": SCHEMA_VERSION,
        "settings": dict(settings),
        "held_out": list(preset.held_out),
        "validation": list(preset.validation),
        "queries": {name: int(found["n"]) for name, found in _any_scores(rows).items()},
        "chance": {name: dict(found["chance"]) for name, found in _any_scores(rows).items()},
        "groups": groups,
        "pilots": [asdict(cost) for cost in costs.values()],
        "missing": [
            {"row": row.variant.name, "seed": seed, "why": why}
            for row in rows
            for seed, why in row.missing.items()
        ],
        "commands": list(commands),
    }


def _row(row: Row, control: Row | None, splits: Sequence[str]) -> dict[str, Any]:
    variant = row.variant
    scored = row.scores
    numbers, differences = {}, {}
    for name in metric_names(splits):
        own = {seed: metric(found, name) for seed, found in scored.items()}
        key = "/".join(name)
        numbers[key] = as_json(summarise(list(own.values())))
        if control is not None:
            other = {seed: metric(found, name) for seed, found in control.scores.items()}
            differences[key] = as_json(paired(own, other))
    return {
        "name": variant.name,
        "label": variant.label,
        "arm": variant.arm,
        "about": variant.about,
        "method": variant.config.method,
        "ablation": variant.ablation,
        "value": variant.value,
        "steps": dict(row.steps),
        "expected_cpu_seconds": row.expected_cpu_seconds,
        "used": _used(row),
        "scores": numbers,
        "control": None if control is None else control.variant.name,
        "differences": differences if control is not None else None,
        "runs": {str(seed): run for seed, run in row.runs.items()},
        "missing": {str(seed): why for seed, why in row.missing.items()},
    }


def _used(row: Row) -> dict[str, Any] | None:
    if not row.runs:
        return None
    return {
        key: as_json(summarise([float(run[key]) for run in row.runs.values()])) for key in _USED
    }


def _control_of(row: Row, group: Sequence[Row], preset: Preset) -> Row | None:
    """Return the control's row: with the same ablated value where there is one (same data)."""
    if row.variant.arm == preset.control and row.variant.ablation is None:
        return None
    rows = [other for other in group if other.variant.arm == preset.control and other is not row]
    same = [
        other
        for other in rows
        if (other.variant.ablation, other.variant.value)
        == (row.variant.ablation, row.variant.value)
    ]
    plain = [other for other in rows if other.variant.ablation is None]
    return next(iter(same or plain), None)


def validation_score(row: Row, preset: Preset) -> Summary | None:
    """Return what settings are chosen by: R@10, mean of ways and validation sets, over seeds."""
    if not preset.validation:
        return None
    way, cut = CHOSEN_BY
    values = [
        sum(metric(found, (split, way, cut)) for split in preset.validation)
        / len(preset.validation)
        for found in row.scores.values()
    ]
    return summarise(values)


def _chosen(
    group: Sequence[Row], content: Sequence[Mapping[str, Any]], preset: Preset
) -> list[dict[str, Any]]:
    """Return, for each method, its row with the best validation score; held-out plays no part.

    Only rows with the same seeds as the method's best-covered row take part.
    """
    found = []
    for method in dict.fromkeys(row.variant.config.method for row in group):
        rows = [
            (score, row)
            for row in group
            if row.variant.config.method == method
            and (score := validation_score(row, preset)) is not None
        ]
        most = max((score.n for score, _ in rows), default=0)
        rows = [(score, row) for score, row in rows if score.n == most]
        if not rows:
            continue
        score, best = max(rows, key=lambda pair: pair[0].mean)
        name = best.variant.name
        found.append(
            {
                "method": method,
                "row": name,
                "validation": as_json(score),
                "candidates": {row.variant.name: one.mean for one, row in rows},
                "scores": next(r["scores"] for r in content if r["name"] == name),
                "differences": next(r["differences"] for r in content if r["name"] == name),
            }
        )
    return found


def _any_scores(rows: Sequence[Row]) -> Mapping[str, Any]:
    """Return the scores of the first run that has any, by set: sizes and chance are all runs'."""
    return next((scores for row in rows for scores in row.scores.values()), {})
