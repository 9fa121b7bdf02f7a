"""What a run folder says about its run: recipe, stages, steps, restarts, and a hash of it all.

Reads files only: no torch, so that a report that is up to date is known to be so in no time.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cocoa_dist.config import RunConfig, load_resolved, resolve_path
from cocoa_dist.events import EVENTS_NAME
from cocoa_dist.manifest import GUIDE_MARK, Manifest, newest, read_manifest, step_folder
from cocoa_dist.metrics import METRICS_NAME, read_json_lines

RESOLVED_NAME = "resolved.yaml"
INCARNATIONS_NAME = "incarnations.jsonl"
UNTRAINED = "untrained"
CONTRASTIVE = "contrastive"
_INTERRUPTIONS = {  # how an incarnation ended: what to call the restart after it
    "preempted": "preempted",
    "stopped": "stopped",
    "crash": "crash",
    "given_up": "crash",
    "bad_input": "bad input",
    "lost": "lost",
    None: "lost",
}


@dataclass(frozen=True)
class StageFacts:
    """A finished stage: its last checkpoint and that checkpoint's manifest."""

    name: str
    checkpoint: str  # relative to the run folder
    manifest: Manifest


@dataclass(frozen=True)
class RunFacts:
    """A finished run."""

    run_dir: Path
    config: RunConfig
    stages: tuple[StageFacts, ...]
    restarts: dict[str, int]  # by how the incarnation before had ended
    steps: tuple[dict[str, Any], ...]  # the objects of metrics.jsonl, in order

    @property
    def train_cpu_seconds(self) -> float:
        """CPU time of all ranks inside optimizer steps, over all stages of the run."""
        return sum(stage.manifest.train_cpu_seconds for stage in self.stages)

    def steps_of(self, stage: str) -> list[dict[str, Any]]:
        """Return the logged steps of one stage."""
        return [step for step in self.steps if step["stage"] == stage]


def read_run(run_dir: Path) -> RunFacts:
    """Read a finished run.

    Raises ValueError if the folder holds no run, or a stage of it is not finished.
    """
    resolved = run_dir / RESOLVED_NAME
    if not resolved.is_file():
        raise ValueError(f"{run_dir} is not a run folder: it has no {RESOLVED_NAME}")
    config = load_resolved(resolved)
    return RunFacts(
        run_dir=run_dir,
        config=config,
        stages=tuple(_finished_stage(run_dir, name) for name in config.stages),
        restarts=count_restarts(list(read_json_lines(run_dir / INCARNATIONS_NAME))),
        steps=tuple(read_json_lines(run_dir / METRICS_NAME)),
    )


def count_restarts(lines: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Count the starts that followed an interruption, by how the one before had ended.

    `lines` are those of incarnations.jsonl: one when ranks start, one when they have left.
    """
    verdicts = {str(line.get("epoch")): line.get("verdict") for line in lines}
    counts: dict[str, int] = {}
    for verdict in list(verdicts.values())[:-1]:
        if verdict != "finished":
            name = _INTERRUPTIONS.get(verdict, str(verdict))
            counts[name] = counts.get(name, 0) + 1
    return counts


def arm_names(run: RunFacts, control: RunFacts | None) -> tuple[str, ...]:
    """Names of the arms that a report compares: untrained, the run's method, the control.

    Raises ValueError if run and control would have the same name.
    """
    names = [UNTRAINED, run.config.method]
    if control is not None:
        names.append(CONTRASTIVE)
    if len(set(names)) != len(names):
        raise ValueError(
            f"the run in {run.run_dir} has method '{run.config.method}', which is the name of "
            "another arm of this report; the control belongs behind --control"
        )
    return tuple(names)


def best_run(run: RunFacts) -> RunFacts | None:
    """Return the run as it stood at the best checkpoint of its last stage.

    None if none is kept, or if it is the stage's end. Raises ValueError if it cannot be read.
    """
    last = run.stages[-1]
    best = last.manifest.best
    if best is None or best.step == last.manifest.step:
        return None
    folder = step_folder(run.run_dir, stage=last.name, step=best.step)
    there = StageFacts(last.name, str(folder.relative_to(run.run_dir)), read_manifest(folder))
    return replace(run, stages=(*run.stages[:-1], there))


def export_names(run: RunFacts, control: RunFacts | None) -> list[str]:
    """Names under export/ of the run folder: the run's own, the control's, the best one's."""
    names = [run.config.name]
    if control is not None:
        other = control.config.name
        names.append(f"{other}_control" if other == run.config.name else other)
    if best_run(run) is not None:
        names.append(f"{run.config.name}_best")
    return names


def _started_from(run: RunFacts) -> str:
    """Return what identifies the weights that a run began with, without a guide of its stage."""
    return run.stages[0].manifest.base_model.partition(GUIDE_MARK)[0]


def comparison_notes(run: RunFacts, control: RunFacts | None) -> list[str]:
    """Say what makes the control another thing than a control; empty if it is a fair one."""
    if control is None:
        return []
    notes = []
    if _started_from(run) != _started_from(control):
        notes.append("The two arms did not start from the same weights.")
    if run.config.data != control.config.data:
        notes.append("The two arms prepare texts or pictures differently (their `data` differs).")
    ratio = cpu_ratio(run, control)
    if not 0.8 <= ratio <= 1.25:
        notes.append(
            f"The two arms did not spend equal compute: {run.config.method} had {ratio:.2f} times "
            "the CPU time of the control. tools/equal_compute.py finds the steps for equal compute."
        )
    return notes


def cpu_ratio(run: RunFacts, control: RunFacts) -> float:
    """Training CPU time of the run over the control's."""
    return run.train_cpu_seconds / max(control.train_cpu_seconds, 1e-9)


def input_fingerprint(run: RunFacts, control: RunFacts | None) -> str:
    """Hash (sha256, hex) of everything a report is made from, the code that makes it included."""
    digest = hashlib.sha256()
    for facts in (run, control):
        digest.update(b"run" if facts else b"none")
        for path in _inputs(facts) if facts else ():
            digest.update(f"{path.name}\n".encode())
            digest.update(path.read_bytes() if path.is_file() else b"missing")
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _inputs(run: RunFacts) -> list[Path]:
    """Files that decide a report: the recipe, what was trained, and the held-out data."""
    manifests = [run.run_dir / stage.checkpoint / "manifest.json" for stage in run.stages]
    data = [
        resolve_path(source.path) / "manifest.json"
        for source in run.config.evaluation.sets.values()
    ]
    names = (METRICS_NAME, INCARNATIONS_NAME, EVENTS_NAME)
    record = [run.run_dir / name for name in names]
    return [run.run_dir / RESOLVED_NAME, *manifests, *record, *data]


def _finished_stage(run_dir: Path, name: str) -> StageFacts:
    found = newest(run_dir, stage=name)
    if found is None or not found[1].complete:
        where = (
            f"at step {found[1].step} of {found[1].target_step}"
            if found
            else "without a checkpoint"
        )
        raise ValueError(
            f"{run_dir} is not finished: stage '{name}' is {where}; go on with "
            "`python -m launcher run` (same command)"
        )
    return StageFacts(name, str(found[0].relative_to(run_dir)), found[1])
