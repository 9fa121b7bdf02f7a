"""The blend of a stage as energon reads it: a file of ours, or the metadataset of a user.

A user's file is read by energon itself, and has to give what the recipe was resolved to. If it has
been changed since, the run goes on with the copy in its folder, as it does with its recipe.
"""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from cocoa_dist.config import (
    NAME_KEY,
    BlendPartConfig,
    ConfigError,
    MetadatasetConfig,
    StageDataConfig,
    part_name,
    read_metadataset,
    resolve_path,
)
from cocoa_dist.data.energon_leaf import plain_path
from cocoa_dist.data.revision import check_origin
from cocoa_dist.data.shards import check_dataset
from cocoa_dist.data.store import absolute
from cocoa_dist.manifest import write_atomic

log = logging.getLogger("cocoa_dist.data")


def blend_file(data: StageDataConfig, stage_name: str, folder: Path) -> Path:
    """Return the metadataset of a stage; `folder` receives one that says the same.

    Every rank writes the same bytes. Raises ValueError for a data set that is not there, or whose
    hard negatives were mined from another revision of its data.
    """
    written = _write(data, stage_name, folder)
    given = data.metadataset
    if given is None:
        return written
    try:
        now = read_metadataset(Path(given.path))
        same = given == MetadatasetConfig.model_validate({"path": given.path, "parts": now})
    except ConfigError as error:
        log.warning("%s", error)
        same = False
    if not same:
        log.warning(
            "%s does not say what it said when the run was started: going on with %s, which does; "
            "give the command of the run again to take the new one up",
            *(given.path, written),
        )
        return written
    return Path(given.path)


def loaded_name(loaded: Any) -> str:
    """Return what a data set that energon has loaded is called in the plan."""
    factory = loaded.dataset
    return part_name(factory.subflavors, str(factory.path))


def check_parts(metadataset: MetadatasetConfig, datasets: Sequence[Any]) -> None:
    """Compare what energon loaded with what the recipe was resolved to.

    Raises ValueError for one that energon reads otherwise.
    """
    found = {loaded_name(loaded): loaded for loaded in datasets}
    if list(found) != list(metadataset.parts):
        raise ValueError(
            f"{metadataset.path}: energon finds {', '.join(found)}, the recipe has "
            f"{', '.join(metadataset.parts)}"
        )
    whole = sum(loaded.weight or 0.0 for loaded in datasets) or 1.0
    for name, part in metadataset.parts.items():
        for what, here, there in _compared(part, found[name], whole=whole):
            if here != there and not (isinstance(here, float) and math.isclose(here, there)):
                raise ValueError(
                    f"{metadataset.path}: energon reads {what} {there} of '{name}', the recipe "
                    f"was resolved to {here}; is another energon than 7.4.1 installed?"
                )


def _compared(part: BlendPartConfig, loaded: Any, *, whole: float) -> list[tuple[str, Any, Any]]:
    factory = loaded.dataset
    factor: tuple[str, Any, Any] = ("weight", part.weight, (loaded.weight or whole) / whole)
    if part.repetitions is not None:
        factor = ("repetitions", part.repetitions, float(loaded.repetitions))
    used = factory.num_records if factory.subset is not None else part.num_records(len(factory))
    return [
        ("path", part.path, plain_path(factory.path)),
        ("number of records", part.num_records(len(factory)), used),
        factor,
    ]


def _write(data: StageDataConfig, stage_name: str, folder: Path) -> Path:
    """Write the blend in energon's format."""
    blend = []
    for name, source in data.blend.items():
        path = absolute(resolve_path(source.path))
        info = check_dataset(path)  # names what is missing; energon would say "invalid dataset"
        check_origin(info, path)
        blend.append({"path": path, "weight": source.weight, "subflavors": {NAME_KEY: name}})
    content = {
        "__module__": "megatron.energon",
        "__class__": "MetadatasetV2",
        "splits": {"train": {"blend": blend}},
    }
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{stage_name}.yaml"
    write_atomic(file, yaml.safe_dump(content, sort_keys=False).encode())
    return file
