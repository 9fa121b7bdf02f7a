"""The cluster file: what is different from site to site, in one YAML file with no unknown keys."""

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from cocoa_dist.config.errors import nearest
from launcher.backend import BadInputError

Positive = Annotated[int, Field(gt=0)]
_OWN_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "COCOA_EPOCH")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Container(_Strict):
    """The container that ranks run in; the launcher itself stays outside, beside srun."""

    kind: Literal["pyxis", "apptainer"]
    image: str  # path of a .sqsh or .sif file, or what the container tool takes as a name
    mounts: tuple[str, ...] = ()  # OUTSIDE:INSIDE; run, data and code under their own names
    python: str = "python3"  # inside


class HealthLimits(_Strict):
    """What a node must have before ranks are started on it."""

    enabled: bool = True
    min_free_disk_mb: int = 2000  # of the run folder
    min_free_memory_mb: int = 500
    max_clock_skew_seconds: float = 5.0  # against the first node
    network_seconds: float = 10.0  # to reach the first node and the next one
    timeout_seconds: Positive = 60  # for all of it


class ClusterFile(_Strict):
    """One site. What `launcher submit` asks of sbatch, and what ranks need on its nodes."""

    # for sbatch
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    reservation: str | None = None
    time: str = "24:00:00"
    nodes: Positive = 1
    gpus_per_node: int | None = None
    tasks_per_node: Positive | None = None  # where there are no GPUs to count
    cpus_per_task: Positive | None = None
    memory: str | None = None  # of a node; `0` is all of it
    exclusive: bool = False
    signal_seconds: Positive = 180  # warning before the time limit: a step, a save and 60 s
    exclude: tuple[str, ...] = ()
    more: tuple[str, ...] = ()  # options of sbatch as they are, such as --licenses=scratch
    # for the ranks
    venv: str | None = None  # environment on the nodes; default: COCOA_VENV, else .venv
    rank_command: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    container: Container | None = None
    environment: dict[str, str] = {}
    network_interface: str | None = None  # what ranks talk over, such as ib0
    srun_options: tuple[str, ...] = ()
    # for the launcher
    health: HealthLimits = HealthLimits()
    input_wait_seconds: float = 900.0  # for data that was there and is gone
    failures_until_excluded: Positive = 2  # of a node; then another one is asked for

    @field_validator("environment")
    @classmethod
    def _leaves_our_variables_alone(cls, value: dict[str, str]) -> dict[str, str]:
        taken = sorted(set(value) & set(_OWN_VARIABLES))
        if taken:
            raise ValueError(f"{taken[0]} is set by the launcher; remove it here")
        return value


def load_cluster_file(path: Path | None) -> ClusterFile:
    """Read a cluster file; the defaults if there is none.

    Raises BadInputError with every fault on a line of its own.
    """
    if path is None:
        return ClusterFile()
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise BadInputError(f"cluster file {path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise BadInputError(f"cluster file {path} is not YAML: {error}") from None
    if not isinstance(tree, dict | None):
        raise BadInputError(f"cluster file {path} holds {type(tree).__name__}, expected key: value")
    try:
        return ClusterFile.model_validate(tree or {})
    except ValidationError as error:
        faults = "\n".join(f"  {_explain(dict(item))}" for item in error.errors())
        raise BadInputError(f"cluster file {path}:\n{faults}") from None


def check_mounts(cluster: ClusterFile, *, run_dir: Path) -> None:
    """Raise BadInputError if ranks in a container would not see the run folder under its name.

    They would not find the recipe there, and would run the image's code for the run's copy.
    """
    if cluster.container is None:
        return
    for mount in cluster.container.mounts:
        outside, _, inside = mount.partition(":")
        place, _, flags = inside.partition(":")
        same = Path(place or outside) == Path(outside)
        if same and "ro" not in flags.split(",") and run_dir.is_relative_to(outside):
            return
    mounts = ", ".join(cluster.container.mounts) or "none"
    raise BadInputError(
        f"the run folder {run_dir} would not be there in the container (container.mounts: {mounts})"
        f"; add {run_dir.parent}:{run_dir.parent} to container.mounts"
    )


def _explain(fault: dict[str, Any]) -> str:
    where = ".".join(str(part) for part in fault["loc"])
    if fault["type"] != "extra_forbidden":
        message = str(fault["msg"]).removeprefix("Value error, ")
        return f"{where}: {message}, found {fault['input']!r}"
    models: dict[str, type[BaseModel]] = {"health": HealthLimits, "container": Container}
    known = list(models.get(str(fault["loc"][0]), ClusterFile).model_fields)
    return f"{where}: unknown key{nearest(str(fault['loc'][-1]), known)}; have: {', '.join(known)}"
