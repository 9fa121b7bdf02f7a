"""One stage of `debug` on two ranks, from the base model, in a folder of its own."""

import os
from dataclasses import dataclass
from pathlib import Path

from ranks import free_port
from safetensors.torch import load_file
from warm import Rank

from cocoa_dist.manifest import stage_end
from cocoa_dist.metrics import read_json_lines

TRAINER = Path(__file__).with_name("guarded_trainer.py")
WORLD = 2
_TIMES = ("time", "step_seconds", "data_wait_seconds", "cpu_seconds", "saves_waited")


@dataclass
class StageRun:
    """The ranks of a run, living or ended."""

    stage: str
    folder: Path
    ranks: list[Rank]

    def wait(self) -> "StageRun":
        """Wait for all ranks; the end must be a good one."""
        try:
            codes = [process.wait(timeout=200) for process in self.ranks]
        finally:
            self.kill()
        assert codes == [0] * WORLD, self.log(0)[-3000:] + self.log(1)[-3000:]
        return self

    def kill(self) -> None:
        for process in self.ranks:
            process.kill()
            process.wait()

    def log(self, rank: int) -> str:
        return (self.folder / f"rank{rank}.log").read_text()

    def records(self) -> list[dict]:
        return list(read_json_lines(self.folder / "metrics.jsonl"))

    def events(self, kind: str) -> list[dict]:
        lines = read_json_lines(self.folder / "events.jsonl")
        return [line for line in lines if line["kind"] == kind]

    def numbers(self) -> list[dict]:
        """Return the records without times, and without what only some steps have."""
        return [
            {
                name: value
                for name, value in record.items()
                if name not in _TIMES and "checkpoint" not in name and "held_out" not in name
            }
            for record in self.records()
        ]

    def weights(self):
        end, _ = stage_end(self.folder, stage=self.stage)
        return load_file(end / "weights.safetensors")


def start(folder: Path, stage: str, *overrides: str, **variables: str) -> StageRun:
    """Start the ranks; `overrides` are of the recipe, `variables` of the environment."""
    folder.mkdir(parents=True, exist_ok=True)
    port, ranks = free_port(), []
    for rank in range(WORLD):
        environment = {
            **os.environ,
            "FAULTS": "",
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(WORLD),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            **variables,
        }
        arguments = ["debug", f"stages.{stage}.init_from=model", "--stage", stage]
        arguments += ["--run-dir", str(folder), *overrides]
        log = folder / f"rank{rank}.log"
        log.touch()
        ranks.append(Rank(TRAINER, arguments, environment=environment, log=log))
    return StageRun(stage, folder, ranks)
