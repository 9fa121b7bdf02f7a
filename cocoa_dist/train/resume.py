"""Goes on from a checkpoint: is it this run's, load it, and cut the run's record back to it.

What a checkpoint was trained with has to be what training goes on with: recipe, base model, parent
stage. Each difference that would change the numbers is refused by name, nothing is touched then.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from cocoa_dist import distributed
from cocoa_dist import manifest as manifests
from cocoa_dist.config import RunConfig, differences, load_resolved
from cocoa_dist.manifest import Manifest
from cocoa_dist.metrics import METRICS_NAME, cut_back
from cocoa_dist.train.checkpoint import RECIPE_NAME, WEIGHTS_NAME, Checkpointer, Found
from cocoa_dist.train.engine import TrainEngine
from cocoa_dist.train.verify import deal

log = logging.getLogger("cocoa_dist.train")


def refuse_other_recipe(found: Found, config: RunConfig) -> None:
    """Raise ValueError if the recipe differs in a key that decides the numbers.

    Keys that are safe to change are told on rank 0, and training goes on with the new values.
    """
    if found.folder is None or not (found.folder / RECIPE_NAME).is_file():
        return
    before = load_resolved(found.folder / RECIPE_NAME)
    unsafe = differences(before, config, free=False)
    if unsafe:
        listed = "\n".join(f"  {line}" for line in unsafe)
        raise ValueError(
            f"checkpoint {found.folder} was trained with other settings:\n{listed}\n"
            "go on with the old values, or start another run folder"
        )
    if distributed.rank() == 0:
        for line in differences(before, config, free=True):
            log.info("changed since checkpoint %s: %s", found.folder.name, line)


def refuse_other_base(found: Found, template: Manifest) -> None:
    """Raise ValueError if the weights below the checkpoint are not those it was trained on.

    Frozen parameters are not in a checkpoint: they come from the base model or the parent stage.
    """
    old = found.manifest
    if old is None:
        return
    pairs = [
        ("base model (model.path or model.random), or guide", old.base_model, template.base_model),
        ("parent stage", old.parent, template.parent),
    ]
    if old.parent_sha256 is not None:
        what = f"version of its parent stage's weights ({template.parent})"
        pairs.append((what, old.parent_sha256, template.parent_sha256))
    for what, before, now in pairs:
        if before != now:
            raise ValueError(
                f"checkpoint {found.folder} was trained on another {what}: it says {before}, "
                f"found {now}; put the old one back, or start another run folder"
            )


def parent_sha256(run_dir: Path, parent: str | None) -> str | None:
    """Return the digest of a parent stage's weights, as its manifest has it."""
    if parent is None:
        return None
    files = manifests.read_manifest(run_dir / parent).files
    return next((entry.sha256 for entry in files if entry.path == WEIGHTS_NAME), None)


def hash_files_together(paths: Sequence[Path]) -> list[str]:
    """Return the sha256 (hex) of files that all ranks see, each read by one rank. Collective."""
    sizes = [path.stat().st_size for path in paths]
    mine = deal(sizes, num_lanes=distributed.world_size())[distributed.rank()]
    digests = {index: manifests.sha256_file(paths[index]) for index in mine}
    together: dict[int, str] = {}
    for part in distributed.gather_objects(digests):
        together.update(part)
    return [together[index] for index in range(len(paths))]


def resume(
    checkpointer: Checkpointer,
    engine: TrainEngine,
    found: Found,
    *,
    config: RunConfig,
    stage_name: str,
    run_dir: Path,
) -> None:
    """Load what was found and cut the run's record back to it. Collective: call on all ranks."""
    for note in found.notes if distributed.rank() == 0 else ():
        log.warning("%s", note)
    if found.manifest is not None:
        checkpointer.load(engine, found, seed=config.seed)
    checkpointer.prepare(engine)
    if distributed.rank() == 0:
        _cut_record_back(found, stage_name=stage_name, run_dir=run_dir)
    distributed.barrier()


def _cut_record_back(found: Found, *, stage_name: str, run_dir: Path) -> None:
    step = found.manifest.step if found.manifest else 0
    dropped = cut_back(run_dir / METRICS_NAME, stage=stage_name, step=step)
    for path in (
        run_dir / "samples" / f"{stage_name}.jsonl",
        *(run_dir / "quarantine").glob(f"{stage_name}.rank*.jsonl"),
        *(run_dir / "skipped").glob(f"{stage_name}.rank*.jsonl"),
    ):
        cut_back(path, stage=stage_name, step=step)
    origin = f"from {found.folder.name}" if found.folder else "from its beginning"
    log.info("%s goes on %s; %d recorded steps will be redone", stage_name, origin, dropped)
    if found.manifest is not None and found.manifest.world_size != distributed.world_size():
        log.info(
            "%d processes go on with what %d wrote: the shards are cut anew",
            distributed.world_size(),
            found.manifest.world_size,
        )
