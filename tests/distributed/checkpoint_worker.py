"""A child process of the checkpoint tests: saves under different circumstances and reports."""

import json
import os
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from cocoa_dist import distributed
from cocoa_dist.config import load_recipe
from cocoa_dist.manifest import step_folders
from cocoa_dist.train import commit as commits
from cocoa_dist.train import shards
from cocoa_dist.train.build import build_parts, first_steps
from cocoa_dist.train.checkpoint import Checkpointer, SaveError
from cocoa_dist.train.session import _template, build_engine, quiet_known_warnings

STAGE = "contrastive"
SLOW_SECONDS = 1.0


class Disk:
    """Stands in for `shards.write_file`: full, or slow, when told so."""

    def __init__(self) -> None:
        self.full = self.slow = False
        self.write = shards.write_file

    def __call__(self, folder: Path, name: str, chunks: object):
        def through():
            for chunk in chunks:
                yield chunk
                if self.full and name.endswith(".safetensors"):
                    raise OSError(28, "No space left on device")

        time.sleep(SLOW_SECONDS if self.slow and name.endswith(".safetensors") else 0)
        return self.write(folder, name, through())


class Saves:
    """One process with an engine, a checkpointer and a disk that can be told to fail."""

    def __init__(self) -> None:
        config = load_recipe("debug", [f"stages.{STAGE}.init_from=model"])
        parts = build_parts(config, STAGE, run_dir=None)
        self.run_dir = Path(tempfile.mkdtemp())
        os.environ["COCOA_EPOCH"] = "first"
        self.own("first")
        self.engine = build_engine(config, STAGE, parts)
        first, self.second = first_steps(config, STAGE, parts, count=2)
        self.engine.train_step(first.packs, step=1)
        self.template = _template(config, STAGE, parts, run_dir=self.run_dir, world_size=1)
        self.checkpointer = Checkpointer(self.run_dir, stage=STAGE, keep_last=2, max_failed_saves=1)
        self.disk = shards.write_file = Disk()
        self.seen: dict[str, object] = {}
        self.beats: list[int] = []
        self.checkpointer.on_progress = lambda: self.beats.append(1)

    def own(self, epoch: str) -> None:
        """Say which incarnation has the run."""
        (self.run_dir / "epoch").write_text(epoch)

    def names(self) -> list[str]:
        return sorted(path.name for path in self.checkpointer.root.iterdir())

    def newest(self) -> Path:
        return step_folders(self.run_dir, stage=STAGE)[0]

    def save(self, step: int) -> str:
        try:
            manifest = self.template.model_copy(update={"step": step})
            self.checkpointer.save(self.engine, manifest)
        except SaveError as error:
            return str(error)
        return ""

    def begin(self, step: int) -> None:
        self.checkpointer.begin(self.engine, self.template.model_copy(update={"step": step}))

    def settle(self) -> None:
        while self.checkpointer._pending is not None:
            self.checkpointer.poll()
            time.sleep(0.01)


def keep_the_last_ones(saves: Saves) -> None:
    seen = saves.seen
    for step in (2, 4, 6, 8):
        assert saves.save(step) == ""
    seen["kept"] = saves.names()
    seen["progress of four saves"] = len(saves.beats)
    saves.own("second")
    seen["fenced"] = saves.save(10)
    seen["after fence"] = saves.names()
    saves.own("first")


def fill_the_disk(saves: Saves) -> None:
    seen, checkpointer = saves.seen, saves.checkpointer
    saves.disk.full = True
    seen["full"] = saves.save(12)
    seen["after full"] = saves.names()
    saves.disk.full = False
    newest = saves.newest()
    (newest / "manifest.json").unlink()
    seen["replaced"] = saves.save(8)
    seen["after replacing"] = saves.names()
    seen["files"] = sorted(str(p.relative_to(newest)) for p in newest.rglob("*") if p.is_file())
    listed = json.loads((newest / "manifest.json").read_text())["files"]
    seen["listed"] = sorted(entry["path"] for entry in listed)

    saves.disk.full = True
    saves.begin(12)  # fails once, is tried again at the next boundary, stands
    saves.settle()
    seen["after one failure"] = (checkpointer.must_retry, saves.names())
    saves.disk.full = False
    saves.begin(13)
    saves.settle()
    seen["after the retry"] = (checkpointer.must_retry, saves.names())


def slow_the_disk(saves: Saves) -> None:
    seen, checkpointer, engine = saves.seen, saves.checkpointer, saves.engine
    saves.disk.slow = True
    checkpointer.take_numbers()
    before = {s.name: s.values["weight"].clone() for s in engine_slices(engine)}
    saves.begin(14)
    seen["blocked by a slow disk"] = checkpointer.take_numbers().blocked_seconds
    engine.train_step(saves.second.packs, step=2)  # while the thread has yet to write
    moved = {s.name: s.values["weight"] for s in engine_slices(engine)}
    seen["training went on"] = any(not torch.equal(before[n], moved[n]) for n in before)
    saves.begin(15)  # has to wait for 14
    seen["waited"] = checkpointer.take_numbers().waited
    stored = load_file(saves.newest() / shards.shard_name(0))
    seen["stored what was copied"] = all(
        torch.equal(stored[f"weight/{name}"], value.reshape(-1)) for name, value in before.items()
    )
    saves.settle()
    seen["after slow saves"] = saves.names()
    seen["seconds"] = checkpointer.take_numbers().seconds
    seen["committed twice"] = saves.save(15)


def slow_the_copy(saves: Saves) -> None:
    seen, checkpointer, engine = saves.seen, saves.checkpointer, saves.engine
    saves.disk.slow = False
    take = shards.HostCopy.take
    shards.HostCopy.take = lambda *args: (time.sleep(SLOW_SECONDS), take(*args))[1]
    checkpointer.take_numbers()
    before = {s.name: s.values["weight"].clone() for s in engine_slices(engine)}
    saves.begin(16)
    seen["blocked by a copy's begin"] = checkpointer.take_numbers().blocked_seconds
    engine.train_step(saves.second.packs, step=3)
    seen["blocked before the update"] = checkpointer.take_numbers().blocked_seconds
    saves.settle()
    stored = load_file(saves.newest() / shards.shard_name(0))
    seen["stored the weights before the update"] = all(
        torch.equal(stored[f"weight/{name}"], value.reshape(-1)) for name, value in before.items()
    )
    shards.HostCopy.take = take


def slow_the_commit(saves: Saves) -> None:
    """Old checkpoints are large: to delete one may take as long as many steps."""
    seen, checkpointer, engine = saves.seen, saves.checkpointer, saves.engine
    retire = commits.retire
    commits.retire = lambda *args, **options: (
        time.sleep(SLOW_SECONDS),
        retire(*args, **options),
    )
    saves.begin(17)
    while not checkpointer._pending.committing:
        checkpointer.poll()
        time.sleep(0.01)
    checkpointer.take_numbers()
    engine.train_step(saves.second.packs, step=4)
    seen["committing beside the update"] = checkpointer._pending is not None
    seen["blocked by a commit"] = checkpointer.take_numbers().blocked_seconds
    saves.settle()
    commits.retire = retire


def main(out: str) -> None:
    quiet_known_warnings()
    torch.set_num_threads(1)
    distributed.start(timeout_seconds=60)
    saves = Saves()
    for tell in (keep_the_last_ones, fill_the_disk, slow_the_disk, slow_the_copy, slow_the_commit):
        tell(saves)
    Path(out).write_text(json.dumps(saves.seen))


def engine_slices(engine):
    from cocoa_dist.train.zero_state import parameter_slices

    return parameter_slices(engine.deepspeed, engine.module)


if __name__ == "__main__":
    main(sys.argv[1])
