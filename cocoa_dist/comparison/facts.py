"""What a finished run of a comparison used, saw and scored, as plain values for methods.json.

Scores are kept beside the runs with the hash of the weights they are of. Torch is loaded where
something has to be scored, and not before.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cocoa_dist.comparison.arms import Preset
from cocoa_dist.config import RunConfig, differences, resolve_path
from cocoa_dist.manifest import Manifest, newest, write_atomic
from cocoa_dist.report.facts import RunFacts, read_run

WEIGHTS_NAME = "weights.safetensors"  # train/checkpoint.py's, which loads torch


def run_facts(run_dir: Path, *, expected: RunConfig, seed: int) -> dict[str, Any]:
    """Return what a finished run used and saw, by stage and in all.

    Raises ValueError if it is not finished, or not of the recipe that was expected.
    """
    run = read_run(run_dir)
    wanted = expected.model_copy(update={"seed": seed})
    changed = differences(run.config, wanted, free=False)
    if changed:
        listed = "\n".join(f"  {line}" for line in changed)
        raise ValueError(f"{run_dir} was trained by another recipe:\n{listed}\nmove it away")
    stages = {
        stage.name: _stage_facts(run.config, stage.name, stage.manifest) for stage in run.stages
    }
    totals = {
        key: sum(found[key] for found in stages.values())
        for key in ("steps", "cpu_seconds", "tokens", "samples", "skipped_steps", "bad_records")
    }
    return {
        **totals,
        "wall_seconds": sum(stage.manifest.wall_seconds for stage in run.stages),
        "restarts": sum(run.restarts.values()),
        "stages": stages,
        "curve": learning_curve(run),
        "losses": _losses(run),
    }


def learning_curve(run: RunFacts) -> dict[str, list[list[float]]]:
    """Return validation retrieval while it trained: set to [CPU seconds so far, R@10 in %]."""
    curves: dict[str, list[list[float]]] = {}
    spent = 0.0
    for step in run.steps:
        spent += float(step.get("cpu_seconds") or 0.0)
        for key, value in step.items():
            name = key.removeprefix("held_out_recall/")
            if name != key and value is not None:
                curves.setdefault(name, []).append([round(spent, 3), round(100.0 * value, 3)])
    return curves


def scores(
    place_of_score: Path, *, run_dir: Path, config: RunConfig, preset: Preset
) -> dict[str, Any]:
    """Return retrieval scores of a finished run on all sets; scored once, then read.

    Raises ValueError if an embedding is not finite.
    """
    last = list(config.stages)[-1]
    found = newest(run_dir, stage=last)
    assert found is not None, "asked for finished runs"
    sets = preset.held_out | preset.validation
    wanted = {
        "weights": next(e.sha256 for e in found[1].files if e.path == WEIGHTS_NAME),
        "sets": {
            name: [source.model_dump(), _records_hash(source.path)] for name, source in sets.items()
        },
    }
    kept = _read(place_of_score)
    if kept is not None and kept.get("of") == wanted:
        return dict(kept["splits"])
    splits = _score(run_dir, config=config, preset=preset)
    content = json.dumps({"of": wanted, "splits": splits}, indent=1)
    place_of_score.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(place_of_score, content.encode())
    return splits


def _score(run_dir: Path, *, config: RunConfig, preset: Preset) -> dict[str, Any]:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed searches one, and says so
    import torch

    from cocoa_dist.train.evaluate import evaluate_sets, load_embedder

    torch.set_num_threads(config.runtime.threads)
    sets = preset.held_out | preset.validation
    scored = config.model_copy(
        update={"evaluation": config.evaluation.model_copy(update={"sets": sets})}
    )
    embedder = load_embedder(scored, run_dir=run_dir)
    return dict(evaluate_sets(scored, embedder))


def _stage_facts(config: RunConfig, name: str, manifest: Manifest) -> dict[str, Any]:
    blend = config.stages[name].data.blend
    records = {key: source.num_records(_count(source.path)) for key, source in blend.items()}
    return {
        "steps": manifest.step,
        "cpu_seconds": manifest.train_cpu_seconds,
        "tokens": manifest.tokens,
        "samples": manifest.samples,
        "skipped_steps": manifest.skipped_steps,
        "bad_records": manifest.bad_records,
        "data": {
            key: {"path": source.path, "records": records[key]} for key, source in blend.items()
        },
        "passes": manifest.samples / max(sum(records.values()), 1),
        "view": config.stages[name].data.view,
    }


def _losses(run: RunFacts) -> dict[str, list[float | None]]:
    """Return first and last tenth's mean loss of each stage."""
    found: dict[str, list[float | None]] = {}
    for name in run.config.stages:
        values = [float(s["loss"]) for s in run.steps_of(name) if s.get("loss") is not None]
        part = max(1, len(values) // 10)
        ends = (values[:part], values[-part:])
        found[name] = [sum(v) / len(v) if v else None for v in ends]
    return found


def _count(path: str) -> int:
    content = _read(resolve_path(path) / "manifest.json")
    return int(content["count"]) if content and "count" in content else 0


def _records_hash(path: str) -> str:
    content = _read(resolve_path(path) / "manifest.json")
    return str(content.get("fingerprint", "")) if content else ""


def _read(path: Path) -> Mapping[str, Any] | None:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
