"""Makes a report: scores every arm, exports it, and writes the page with what the models do.

The only module of the report that loads models. Writes `report/` and `export/` of the run folder.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from cocoa_dist.config import FROM_MODEL
from cocoa_dist.manifest import write_atomic
from cocoa_dist.report import page
from cocoa_dist.report.arms import (
    Arm,
    Exported,
    HeldOut,
    SetVectors,
    embed_sets,
    export_arm,
    read_held_out,
)
from cocoa_dist.report.examples import (
    Found,
    Space,
    Visibility,
    found_pictures,
    hash_order,
    project,
    stage_visibility,
)
from cocoa_dist.report.facts import (
    CONTRASTIVE,
    UNTRAINED,
    RunFacts,
    best_run,
    comparison_notes,
    cpu_ratio,
    export_names,
)
from cocoa_dist.report.filling import MaskedStage, fill_in, reconstruction_stages
from cocoa_dist.report.history import read_history
from cocoa_dist.report.pieces import lower_name
from cocoa_dist.report.theme import NUM_GROUPS
from cocoa_dist.train.evaluate import Embedder, load_embedder, stage_weights

log = logging.getLogger("cocoa_dist.report")

QUERIES_PER_SET = 9
TOP_PICTURES = 5
FILLED_EXAMPLES = 8
POINTS = 160  # held-out pairs drawn in each projection


def make_report(run: RunFacts, control: RunFacts | None) -> dict[str, Any]:
    """Write retrieval.json, index.html and the exported folders; return retrieval.json's content.

    Raises ValueError if an exported model does not give the vectors of training.
    """
    torch.set_num_threads(run.config.runtime.threads)
    transformers_logging.disable_progress_bar()  # files of a few MB
    transformers_logging.set_verbosity_error()
    folder = run.run_dir / "report"
    folder.mkdir(exist_ok=True)
    log.info("embedding held-out pairs with the base model")
    base = load_embedder(run.config, run_dir=None, after_stage=FROM_MODEL)
    sets = read_held_out(run.config, base)
    arms = [Arm(UNTRAINED, 0.0, embed_sets(sets, base))]
    spaces = [_space("Before training", arms[0].vectors, sets)]
    masks = _visibilities(run, base, sets)
    num_parameters = sum(p.numel() for p in base.model.backbone.parameters())
    filled: list[MaskedStage] = []
    embedder, vectors = base, arms[0].vectors
    for stage in run.config.stages:
        log.info("looking at the model after %s", stage)
        embedder = load_embedder(run.config, run_dir=run.run_dir, after_stage=stage)
        vectors = embed_sets(sets, embedder)
        spaces.append(_space(f"After {lower_name(stage)}", vectors, sets))
        if stage in reconstruction_stages(run.config) and sets:
            filled.append(_fill(run, stage, sets))
    arms.append(Arm(run.config.method, run.train_cpu_seconds, vectors))
    paths = [run.run_dir / "export" / name for name in export_names(run, control)]
    exports = [_export(run, embedder, paths[0], sets, arms)]
    if control is not None:
        log.info("embedding held-out pairs with the control")
        other = load_embedder(control.config, run_dir=control.run_dir)
        arms.append(Arm(CONTRASTIVE, control.train_cpu_seconds, embed_sets(sets, other)))
        exports.append(_export(control, other, paths[1], sets, [arms[0], arms[2]]))
    retrieval = _retrieval(run, control, arms)
    best = best_run(run)
    if best is not None:
        exports.append(_export_best(best, paths[-1], sets, arms[0]))
    shown = _shown(sets)
    names, groups, group_names = _points(sets, shown)
    content = page.Content(
        run=run,
        control=control,
        retrieval=retrieval,
        notes=comparison_notes(run, control),
        num_parameters=num_parameters,
        found=_queries(sets, arms),
        filled=filled,
        masks=masks,
        spaces=[space for space in spaces if space is not None],
        point_names=names,
        point_groups=groups,
        group_names=group_names,
        exports=exports,
        history=read_history(run),
    )
    write_atomic(folder / "index.html", page.render(content).encode())
    write_atomic(folder / "retrieval.json", json.dumps(retrieval, indent=1).encode())
    return retrieval


def _retrieval(run: RunFacts, control: RunFacts | None, arms: Sequence[Arm]) -> dict[str, Any]:
    content: dict[str, Any] = {
        "recipe": run.config.name,
        "arms": {arm.name: arm.scores() for arm in arms},
        "notes": comparison_notes(run, control),
    }
    if control is not None:
        content["control"] = control.config.name
        content["cpu_ratio"] = cpu_ratio(run, control)
    return content


def _export(
    arm: RunFacts, embedder: Embedder, path: Path, sets: Sequence[HeldOut], arms: Sequence[Arm]
) -> Exported:
    log.info("exporting %s", path)
    return export_arm(arm, embedder, destination=path, sets=sets, scores=score_rows(arms))


def _export_best(best: RunFacts, path: Path, sets: Sequence[HeldOut], untrained: Arm) -> Exported:
    """Export the best checkpoint of the last stage beside its end."""
    embedder = load_embedder(best.config, run_dir=best.run_dir, best=True)
    step = best.stages[-1].manifest.step
    arm = Arm(
        f"{best.config.method}, step {step}", best.train_cpu_seconds, embed_sets(sets, embedder)
    )
    return _export(best, embedder, path, sets, [untrained, arm])


def score_rows(arms: Sequence[Arm]) -> list[Mapping[str, str | float]]:
    """Return the scores of arms as rows of one table, for a model card."""
    rows: list[Mapping[str, str | float]] = []
    for arm in arms:
        splits: Any = arm.scores()["splits"]
        for split, score in splits.items():
            row: dict[str, str | float] = {"model": arm.name, "set": split}
            for direction, words in (("t2i", "text to picture"), ("i2t", "picture to text")):
                for cutoff in ("r1", "r10"):
                    row[f"{words} R@{cutoff[1:]} (%)"] = f"{score[direction][cutoff]:.1f}"
            row["chance R@1 (%)"] = f"{score['chance']['r1']:.1f}"
            rows.append(row)
    return rows


def _fill(run: RunFacts, stage: str, sets: Sequence[HeldOut]) -> MaskedStage:
    embedder = load_embedder(run.config, run_dir=run.run_dir, after_stage=stage)
    return fill_in(
        run.config,
        stage,
        embedder=embedder,
        weights=stage_weights(run.run_dir, stage),
        records=sets[0].records,
        count=FILLED_EXAMPLES,
    )


def _queries(sets: Sequence[HeldOut], arms: Sequence[Arm]) -> list[tuple[HeldOut, Sequence[Found]]]:
    """Answer the queries with the run's model; the other trained arms give their ranks."""
    own, others = arms[1], arms[2:]
    return [
        (
            held_out,
            found_pictures(
                held_out,
                vectors=own.vectors[held_out.name],
                others={arm.name: arm.vectors[held_out.name] for arm in others},
                count=QUERIES_PER_SET,
                top=TOP_PICTURES,
            ),
        )
        for held_out in sets
    ]


def _visibilities(run: RunFacts, base: Embedder, sets: Sequence[HeldOut]) -> list[Visibility]:
    """Draw each stage's rule on the held-out record with the shortest name: it fits the page."""
    records = [record for held_out in sets for record in held_out.records]
    if not records:
        return []
    lengths = [len(base.vocabulary.encode(str(record.meta.get("name", "")))) for record in records]
    fitting = [i for i, length in enumerate(lengths) if length >= min(4, max(lengths))]
    record = records[min(fitting, key=lambda i: lengths[i])]
    return [
        stage_visibility(run.config, stage, embedder=base, record=record)
        for stage in run.config.stages
    ]


def _space(title: str, vectors: Mapping[str, SetVectors], sets: Sequence[HeldOut]) -> Space | None:
    return project(title, vectors=vectors, shown=_shown(sets)) if sets else None


def _shown(sets: Sequence[HeldOut]) -> list[int]:
    """Rows of all sets together that the projections draw."""
    return hash_order([record for held_out in sets for record in held_out.records])[:POINTS]


def _points(
    sets: Sequence[HeldOut], shown: Sequence[int]
) -> tuple[list[str], list[int], list[str]]:
    """Return name and group of the points that are drawn, and the names of the groups."""
    records = [record for held_out in sets for record in held_out.records]
    names = [str(records[i].meta.get("name") or records[i].key) for i in shown]
    groups = [str(records[i].meta.get("group") or "all") for i in shown]
    common = sorted(set(groups), key=lambda group: (-groups.count(group), group))
    kept = common if len(common) <= NUM_GROUPS else [*common[: NUM_GROUPS - 1], "other"]
    numbers = [kept.index(group) if group in kept else len(kept) - 1 for group in groups]
    return names, numbers, [group.replace("-", " and ") for group in kept]
