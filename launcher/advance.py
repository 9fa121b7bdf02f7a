"""What comes next in a run: a pure function of the recipe and the run folder.

Reads manifests and the STOP file, writes nothing, keeps nothing; the same folder always gives the
same answer, whoever asks and however often the run was interrupted.
"""

from dataclasses import dataclass
from pathlib import Path

from cocoa_dist.config import RunConfig
from cocoa_dist.manifest import (
    Manifest,
    ManifestError,
    read_manifest,
    step_folder,
    step_folders,
)
from launcher.runfolder import stop_note


@dataclass(frozen=True)
class Start:
    """Stage `stage` goes on after `from_step` of `target_step` optimizer steps."""

    stage: str
    from_step: int
    target_step: int
    checkpoint: Path | None  # None: the stage has no usable checkpoint of its own yet
    skipped: tuple[str, ...]  # faults of newer checkpoint folders that cannot be used


@dataclass(frozen=True)
class Done:
    """Every stage has a complete checkpoint; `checkpoint` is the last stage's."""

    checkpoint: Path


@dataclass(frozen=True)
class Stopped:
    """Somebody wrote STOP; `note` is what the file says."""

    note: str


Decision = Start | Done | Stopped


@dataclass(frozen=True)
class StageState:
    """What the manifests say about one stage."""

    stage: str
    step: int  # of the newest readable manifest; 0 without one
    target_step: int
    folder: Path | None
    manifest: Manifest | None
    skipped: tuple[str, ...]

    @property
    def complete(self) -> bool:
        """Whether the stage has a checkpoint at its last step."""
        return self.manifest is not None and is_complete(self.manifest)


def decide(config: RunConfig, run_dir: Path) -> Decision:
    """Return the first stage without a complete, readable manifest, and where it goes on.

    A finished run is Done even if there is a STOP file.
    """
    states = stage_states(config, run_dir)
    for state in states:
        if state.complete:
            continue
        note = stop_note(run_dir)
        if note is not None:
            return Stopped(note)
        return Start(
            stage=state.stage,
            from_step=state.step,
            target_step=state.target_step,
            checkpoint=state.folder,
            skipped=state.skipped,
        )
    last = states[-1].folder
    assert last is not None, "a complete stage has a checkpoint"
    return Done(last)


def stage_states(config: RunConfig, run_dir: Path) -> tuple[StageState, ...]:
    """Read the manifests of all stages, in the order of the recipe."""
    return tuple(
        _stage_state(run_dir, stage=name, target_step=stage.steps)
        for name, stage in config.stages.items()
    )


def is_complete(manifest: Manifest) -> bool:
    """Whether a manifest ends its stage: it says so, and its step is the target."""
    return manifest.complete and manifest.step == manifest.target_step


def position(config: RunConfig, decision: Decision) -> tuple[int, int]:
    """Return (index of the stage, step): what a new checkpoint makes larger."""
    if isinstance(decision, Start):
        return list(config.stages).index(decision.stage), decision.from_step
    return len(config.stages), 0


def _stage_state(run_dir: Path, *, stage: str, target_step: int) -> StageState:
    """Take a complete checkpoint if there is one, else the newest readable one.

    Only the folder of the last step can be complete: of a thousand others one manifest is read.
    """
    newest: tuple[Path, Manifest] | None = None
    skipped: list[str] = []
    last_folder = step_folder(run_dir, stage=stage, step=target_step)
    for folder in step_folders(run_dir, stage=stage):
        if newest is not None and folder != last_folder:
            continue
        try:
            found = read_manifest(folder)
        except ManifestError as error:
            skipped += [str(error)] if newest is None else []
            continue
        if newest is None or is_complete(found):
            newest = (folder, found)
        if is_complete(found):
            break
    return StageState(
        stage=stage,
        step=newest[1].step if newest else 0,
        target_step=target_step,
        folder=newest[0] if newest else None,
        manifest=newest[1] if newest else None,
        skipped=tuple(skipped),
    )
