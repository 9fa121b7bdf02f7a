"""A child process of the checkpoint tests: saves under different circumstances and reports."""

import json
import os
import sys
import tempfile
from pathlib import Path

import torch

from cocoa_dist import distributed
from cocoa_dist.config import load_recipe
from cocoa_dist.data.loader import StageLoader
from cocoa_dist.manifest import step_folders
from cocoa_dist.train.build import build_parts
from cocoa_dist.train.checkpoint import Checkpointer, SaveError
from cocoa_dist.train.session import _template, build_engine, quiet_known_warnings

STAGE = "contrastive"


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
    loader.close()
    template = _template(config, STAGE, parts, run_dir=run_dir, world_size=1)
    checkpointer = Checkpointer(run_dir, stage=STAGE, keep_last=2)
    seen: dict[str, object] = {}

    def names() -> list[str]:
        return sorted(path.name for path in checkpointer.root.iterdir())

    def save(step: int) -> str:
        try:
            checkpointer.save(engine, template.model_copy(update={"step": step}))
        except SaveError as error:
            return str(error)
        return ""

    for step in (2, 4, 6, 8):
        assert save(step) == ""
    seen["kept"] = names()
    (run_dir / "epoch").write_text("second")
    seen["fenced"] = save(10)
    seen["after fence"] = names()
    (run_dir / "epoch").write_text("first")
    original = torch.save

    def full_disk(content: object, file: object) -> None:
        original(content, file)
        raise OSError(28, "No space left on device")

    torch.save = full_disk
    seen["full"] = save(12)
    torch.save = original
    seen["after full"] = names()
    newest = step_folders(run_dir, stage=STAGE)[0]
    (newest / "manifest.json").unlink()
    seen["replaced"] = save(8)
    seen["after replacing"] = names()
    seen["files"] = sorted(str(p.relative_to(newest)) for p in newest.rglob("*") if p.is_file())
    listed = json.loads((newest / "manifest.json").read_text())["files"]
    seen["listed"] = sorted(entry["path"] for entry in listed)
    Path(out).write_text(json.dumps(seen))


if __name__ == "__main__":
    main(sys.argv[1])
