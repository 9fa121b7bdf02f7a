"""The page of tools/bench_peers.py: tables, ratios within rounds, and whether targets are met."""

from statistics import median
from typing import Any

MB = 1e6
TOLERANCE = 1e-5  # of gradients: float32, sums in another order
OURS, CACHED_OURS = "ours", "ours, GradCache"
MNRL, CACHED = "MNRL", "Cached MNRL"
TARGETS = {(MNRL, "short"): 1.1, (MNRL, "mixed"): 1.1, (CACHED, "short"): 1.5, (CACHED, "mixed"): 2}

Turn = dict[str, float]


def page(figures: dict[str, Any]) -> str:
    """Return the page as Markdown."""
    lines = [
        "# Beside the peers",
        "",
        f"`python tools/bench_peers.py` on {figures['machine']}. Peers: {_pins(figures)}.",
        "",
        _settings(figures),
        "",
        "## Equal work",
        "",
        *_proofs(figures),
        "",
        "## Rates and memory",
        "",
        "Rate: pairs a CPU second over all processes, median of the rounds (smallest to largest). "
        "Ratio: that of ours, or of ours with GradCache for Cached MNRL, over this arm's within a "
        "round, median (smallest to largest). Wall: pairs a second, on a machine that others used "
        "too. Memory: what rank 0 grew at most, from before the model was loaded to the end of the "
        "last step.",
    ]
    for case, turns in figures["turns"].items():
        lines += ["", *_case(case, turns, figures)]
    lines += ["", *figures.get("notes", [])]
    lines += ["", "## Targets", "", *verdicts(figures), ""]
    if figures["why"]:
        lines += ["## What did not run", ""]
        lines += [f"- {name}: {why}" for name, why in figures["why"].items()]
        lines.append("")
    return "\n".join(lines)


def verdicts(figures: dict[str, Any]) -> list[str]:
    """Say of each target whether it is met."""
    lines = []
    for case, turns in figures["turns"].items():
        kind = case.partition(" ")[0]
        for peer, ours in ((MNRL, OURS), (CACHED, CACHED_OURS)):
            if not turns.get(peer) or not turns.get(ours):
                continue
            ratio = median(_ratios(turns[ours], turns[peer]))
            lines.append(_verdict(f"{case}, {ours} over {peer}", ratio, TARGETS[peer, kind]))
        if turns.get(CACHED) and turns.get(CACHED_OURS):
            least = _memory(turns[CACHED]) / _memory(turns[CACHED_OURS])
            lines.append(_verdict(f"{case}, memory of {CACHED} over {CACHED_OURS}", least, 1.0))
    return lines


def _verdict(what: str, value: float, target: float) -> str:
    word = "met" if value >= target else "**missed**"
    return f"- {what}: {value:.2f} (target: at least {target:g}): {word}"


def _pins(figures: dict[str, Any]) -> str:
    return ", ".join(pin for pins in figures["pins"].values() for pin in pins)


def _settings(figures: dict[str, Any]) -> str:
    sets = figures["sets"]
    texts = {
        kind: "{0} to {2} text tokens, {1:.0f} in the mean".format(*sets[kind]["text_tokens"])
        for kind in sets
    }
    return (
        "A Qwen2-VL of 4.7 M random weights (patches of 14, causal), float32, one thread a "
        "process; rows of the shipped data, a text against a picture, InfoNCE at temperature 0.05, "
        f"AdamW. `short`: {texts['short']}, 4 visual ones; `mixed`: {texts['mixed']}, 1 to 16 "
        "visual ones. Pictures are PNG at the model's size, so that nobody resizes. "
        "sentence-transformers and the plain loop load our export, which has no chat template to "
        "pay for; colpali-engine and ms-swift add the tokens of theirs. Cached MNRL has its "
        "default mini-batch of 32, ours packs of 1,024 tokens for GradCache and of 8,192 without. "
        "Batch 64: two steps a turn behind one that is not counted; above: one step, the first, "
        "with all that happens once."
    )


def _proofs(figures: dict[str, Any]) -> list[str]:
    lines = [
        "Loss and gradient of step 1 (all parameters as one vector, before clipping) on the same "
        f"weights and rows, causal attention on both sides. Equal: within {TOLERANCE:g} of the "
        "norm.",
        "",
        "| case | arm | loss | parameters | norm | difference / norm | equal |",
        "| --- | --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for case, rows in figures["proofs"].items():
        for arm, row in rows.items():
            off = row["difference"]
            equal = off is not None and off < TOLERANCE
            told = "other parameters" if off is None else f"{off:.1e}"
            lines.append(
                f"| {case} | {arm} | {row['loss']:.6f} | {row['parameters']} | {row['norm']:.4f} "
                f"| {told} | {'yes' if equal else '**no**'} |"
            )
    return lines


def _case(case: str, turns: dict[str, list[Turn]], figures: dict[str, Any]) -> list[str]:
    kind, batch, processes = case.split()
    some = "one process" if processes == "x1" else f"{processes[1:]} processes"
    lines = [
        f"### {kind}, batch {batch}, {some}",
        "",
        "| arm | rounds | rate | ratio | wall | memory, MB |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for arm, told in turns.items():
        if not told:
            why = figures["why"].get(f"{arm}, {case}", "not run")
            lines.append(f"| {arm} | 0 | {why} | | | |")
            continue
        rates = [_rate(turn) for turn in told]
        base = turns.get(CACHED_OURS if arm == CACHED else OURS) or []
        ratio = "" if arm.startswith(OURS) or not base else _spread(_ratios(base, told), "{:.2f}")
        wall = median(turn["pairs"] / turn["seconds"] for turn in told)
        lines.append(
            f"| {arm} | {len(told)} | {_spread(rates, '{:.1f}')} | {ratio} | {wall:.1f} "
            f"| {_memory(told) / MB:.0f} |"
        )
    return lines


def _rate(turn: Turn) -> float:
    return turn["pairs"] / turn["cpu_seconds"]


def _memory(turns: list[Turn]) -> float:
    return median(turn["grown"] for turn in turns)


def _ratios(ours: list[Turn], peers: list[Turn]) -> list[float]:
    return [_rate(a) / _rate(b) for a, b in zip(ours, peers, strict=False)]


def _spread(values: list[float], form: str) -> str:
    least, most = form.format(min(values)), form.format(max(values))
    return f"{form.format(median(values))} ({least} to {most})"
