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
from cocoa_dist.data.loader import StageLoader
from cocoa_dist.manifest import step_folders
from cocoa_dist.train import shards
from cocoa_dist.train.build import build_parts
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


def main(out: str) -> None:
    quiet_known_warnings()
    torch.set_num_threads(1)
    distributed.start(timeout_seconds=60)
    config = load_recipe("debug", [f"stages.{STAGE}.init_from=model"])
    parts = build_parts(config, STAGE, run_dir=None)
    run_dir = Path(tempfile.mkdtemp())
    os.environ["COCOA_EPOCH"] = "first"
    (run_dir / "epoch").write_text("first")
    engine = build_engine(config, STAGE, parts)
    loader = StageLoader(
        config, STAGE, vocabulary=parts.vocabulary, geometry=parts.geometry, rank=0, world_size=1,
        start_step=1, folder=run_dir / "data",
    )  # fmt: skip
    engine.train_step(loader.next_step().packs, step=1)
    template = _template(config, STAGE, parts, run_dir=run_dir, world_size=1)
    checkpointer = Checkpointer(run_dir, stage=STAGE, keep_last=2, max_failed_saves=1)
    disk = shards.write_file = Disk()
    seen: dict[str, object] = {}
    beats: list[int] = []
    checkpointer.on_progress = lambda: beats.append(1)

    def names() -> list[str]:
        return sorted(path.name for path in checkpointer.root.iterdir())

    def save(step: int) -> str:
        try:
            checkpointer.save(engine, template.model_copy(update={"step": step}))
        except SaveError as error:
            return str(error)
        return ""

    def begin(step: int) -> None:
        checkpointer.begin(engine, template.model_copy(update={"step": step}))

    def settle() -> None:
        while checkpointer._pending is not None:
            checkpointer.poll()
            time.sleep(0.01)

    for step in (2, 4, 6, 8):
        assert save(step) == ""
    seen["kept"] = names()
    seen["progress of four saves"] = len(beats)
    (run_dir / "epoch").write_text("second")
    seen["fenced"] = save(10)
    seen["after fence"] = names()
    (run_dir / "epoch").write_text("first")

    disk.full = True
    seen["full"] = save(12)
    seen["after full"] = names()
    disk.full = False
    newest = step_folders(run_dir, stage=STAGE)[0]
    (newest / "manifest.json").unlink()
    seen["replaced"] = save(8)
    seen["after replacing"] = names()
    seen["files"] = sorted(str(p.relative_to(newest)) for p in newest.rglob("*") if p.is_file())
    listed = json.loads((newest / "manifest.json").read_text())["files"]
    seen["listed"] = sorted(entry["path"] for entry in listed)

    disk.full = True
    begin(12)  # fails once, is tried again at the next boundary, stands
    settle()
    seen["after one failure"] = (checkpointer.must_retry, names())
    disk.full = False
    begin(13)
    settle()
    seen["after the retry"] = (checkpointer.must_retry, names())

    disk.slow = True
    checkpointer.take_numbers()
    before = {s.name: s.values["weight"].clone() for s in engine_slices(engine)}
    begin(14)
    numbers = checkpointer.take_numbers()
    seen["blocked by a slow disk"] = numbers.blocked_seconds
    engine.train_step(loader.next_step().packs, step=2)  # while the thread has yet to write
    moved = {s.name: s.values["weight"] for s in engine_slices(engine)}
    seen["training went on"] = any(not torch.equal(before[n], moved[n]) for n in before)
    begin(15)  # has to wait for 14
    seen["waited"] = checkpointer.take_numbers().waited
    stored = load_file(step_folders(run_dir, stage=STAGE)[0] / shards.shard_name(0))
    seen["stored what was copied"] = all(
        torch.equal(stored[f"weight/{name}"], value.reshape(-1)) for name, value in before.items()
    )
    settle()
    seen["after slow saves"] = names()
    seen["seconds"] = checkpointer.take_numbers().seconds
    seen["committed twice"] = save(15)
    loader.close()
    Path(out).write_text(json.dumps(seen))


def engine_slices(engine):
    from cocoa_dist.train.zero_state import parameter_slices

    return parameter_slices(engine.deepspeed, engine.module)


if __name__ == "__main__":
    main(sys.argv[1])
