"""Other readers of a run's numbers: TensorBoard and Weights & Biases, both off by default.

They take the very records of metrics.jsonl, on rank 0. A sink that fails is told once, counted and
left: the run goes on without it.
"""

import hashlib
import importlib
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from cocoa_dist.config import RunConfig
from cocoa_dist.config.loading import flatten
from cocoa_dist.manifest import write_atomic
from cocoa_dist.metrics import METRICS_NAME, read_json_lines

log = logging.getLogger("cocoa_dist.sinks")

TENSORBOARD_FOLDER = "tensorboard"
WANDB_FOLDER = "wandb"
_SENT_NAME = "cocoa_sent.json"  # in wandb's folder: what is safe there
_NO_NUMBERS = ("stage", "step", "epoch", "time", "batch_digest")


class Sink(Protocol):
    """One reader of records; each method may raise anything."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Take the record of a step."""

    def flush(self) -> None:
        """Make what was taken safe from the death of this process."""

    def close(self) -> None:
        """Take no more."""


class Sinks:
    """The sinks of a recipe; nothing here raises."""

    def __init__(self, fault: Callable[[str], None]) -> None:
        """`fault` is called for every failure, with what to tell; no sink is open yet."""
        self._fault = fault
        self._open: dict[str, Sink] = {}

    def start(self, config: RunConfig, stage: str, *, run_dir: Path, step: int) -> None:
        """Open the sinks of a stage that goes on after `step`; 0: from its beginning."""
        settings = config.metrics
        if settings.tensorboard:
            folder = run_dir / TENSORBOARD_FOLDER / stage
            self._try("tensorboard", lambda: TensorBoard(folder, after=step))
        if settings.wandb is not None:
            self._try("wandb", lambda: Wandb(config, run_dir=run_dir))

    def write(self, record: Mapping[str, Any]) -> None:
        """Give a step's record to all."""
        self._each(lambda sink: sink.write(record))

    def flush(self) -> None:
        """Keep what was written; called when a step is about to be saved."""
        self._each(lambda sink: sink.flush())

    def close(self) -> None:
        """Close all."""
        self._each(lambda sink: sink.close())
        self._open = {}

    def _try(self, name: str, make: Callable[[], Sink]) -> None:
        try:
            self._open[name] = make()
        except Exception as error:  # whatever a third party's package raises ends here
            extra = f"pip install 'cocoa_dist[{name}]', or " if _is_missing(error) else ""
            self._fault(f"no numbers go to {name}: {error}; {extra}leave metrics.{name} out")

    def _each(self, act: Callable[[Sink], None]) -> None:
        for name, sink in list(self._open.items()):
            try:
                act(sink)
            except Exception as error:
                del self._open[name]
                self._fault(f"numbers go to {name} no more: {type(error).__name__}: {error}")


class TensorBoard:
    """Event files of one stage, one more for every incarnation.

    Steps that are done again replace those before: readers drop what was written behind the step
    at which a later file begins (`purge_step`).
    """

    def __init__(self, folder: Path, *, after: int) -> None:
        """Write into `folder`, from the step behind `after` on."""
        library: Any = importlib.import_module("torch.utils.tensorboard")
        self._writer = library.SummaryWriter(log_dir=str(folder), purge_step=after + 1)

    def write(self, record: Mapping[str, Any]) -> None:
        """Write every number of a record."""
        for name, value in numbers(record).items():
            self._writer.add_scalar(name, value, record["step"], walltime=record["time"])

    def flush(self) -> None:
        """Write the file."""
        self._writer.flush()

    def close(self) -> None:
        """Write the file and close it."""
        self._writer.close()


class Wandb:
    """One run of Weights & Biases for all stages and incarnations of a run folder.

    Its history only grows, so a step is sent once. What a process that died had sent offline may
    not have reached the disk: its folder is removed, and its steps are sent again from
    metrics.jsonl. Steps count on over the stages; names begin with the stage.
    """

    def __init__(self, config: RunConfig, *, run_dir: Path) -> None:
        """Start or go on with the run; its id is made from the path of the folder."""
        wandb: Any = importlib.import_module("wandb")
        settings = config.metrics.wandb
        assert settings is not None
        self._before = _steps_before(config)
        self._folder = run_dir / WANDB_FOLDER
        self._folder.mkdir(parents=True, exist_ok=True)
        number = hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:16]
        self._sent = _safely_sent(self._folder, number) if settings.mode == "offline" else 0
        quiet = {"console": "off", "silent": True, "x_disable_stats": True, "disable_git": True}
        self._run: Any = wandb.init(
            project=settings.project,
            mode=settings.mode,
            name=run_dir.name,
            id=number,
            resume="allow",
            dir=str(run_dir),
            config=flatten(config),
            settings=wandb.Settings(**quiet, init_timeout=30),
        )
        if settings.mode == "online" and self._run.resumed:
            self._sent = int(self._run.step) - 1  # it says which one comes next
        for record in read_json_lines(run_dir / METRICS_NAME):
            self.write(record)

    def write(self, record: Mapping[str, Any]) -> None:
        """Send every number of a record, unless its step was sent before."""
        step = self._before.get(record["stage"], 0) + int(record["step"])
        if step > self._sent:
            values = {f"{record['stage']}/{name}": v for name, v in numbers(record).items()}
            self._run.log(values, step=step)
            self._sent = step

    def flush(self) -> None:
        """Do nothing: it cannot be asked for, see above."""

    def close(self) -> None:
        """End the run, so that it may go on later."""
        self._run.finish()
        whole = {"step": self._sent, "folders": [path.name for path in _folders(self._folder)]}
        write_atomic(self._folder / _SENT_NAME, json.dumps(whole).encode())


def _steps_before(config: RunConfig) -> dict[str, int]:
    """Return how many steps all stages before a stage have."""
    found, total = {}, 0
    for name, stage in config.stages.items():
        found[name] = total
        total += stage.steps
    return found


def _folders(folder: Path) -> list[Path]:
    return sorted(folder.glob("offline-run-*"))


def _safely_sent(folder: Path, number: str) -> int:
    """Return the last step of the incarnations that closed; remove what others have left."""
    whole: dict[str, Any] = {"step": 0, "folders": []}
    if (folder / _SENT_NAME).exists():
        whole = json.loads((folder / _SENT_NAME).read_text(encoding="utf-8"))
    for path in _folders(folder):
        ours = path.name.endswith(f"-{number}")
        if ours and path.name not in whole["folders"] and not list(path.glob("*.synced")):
            shutil.rmtree(path)
    return int(whole["step"])


def numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a record of metrics.jsonl, yes and no as 1 and 0."""
    return {
        name: float(value)
        for name, value in record.items()
        if name not in _NO_NUMBERS and isinstance(value, bool | int | float)
    }


def _is_missing(error: Exception) -> bool:
    return isinstance(error, ImportError)
