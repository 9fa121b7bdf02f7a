"""Stands in for `python -m launcher run` in tests: writes what a finished run leaves.

Steps of the k-th stage take 0.1 * k CPU seconds and 100 * k tokens. FAKE_FAIL names a recipe whose
run fails, FAKE_SLEEP one whose run waits for a signal.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from cocoa_dist.config import RunConfig, dump_yaml, load_recipe
from cocoa_dist.manifest import FileEntry, Manifest, step_folder, write_manifest

FIRST_STEP_EXTRA = 2.0  # CPU seconds, once a stage


def main(recipe: str, *words: str) -> int:
    overrides = [word for word in words if "=" in word]
    run_dir = Path(words[words.index("--run-dir") + 1])
    config = load_recipe(recipe, overrides)
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / "starts").open("a") as file:
        file.write("start\n")
    if config.name == os.environ.get("FAKE_SLEEP"):
        signal.signal(signal.SIGTERM, lambda *_: sys.exit((run_dir / "told").write_text("TERM")))
        (run_dir / "waits").touch()
        time.sleep(60)
    if config.name == os.environ.get("FAKE_FAIL"):
        sys.stderr.write("a rank had a bad day\n")
        return 93
    write_finished_run(run_dir, config)
    return 0


def write_finished_run(run_dir: Path, config: RunConfig) -> None:
    """Write recipe, steps and stage ends."""
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "resolved.yaml").write_text(dump_yaml(config))
    lines = []
    for number, (name, stage) in enumerate(config.stages.items(), start=1):
        spent = [0.0, 0.1 * number + FIRST_STEP_EXTRA, *[0.1 * number] * (stage.steps - 2)]
        spent = spent[: stage.steps]  # a line has the CPU time of the step before
        for step, cpu in enumerate(spent, start=1):
            line = {"stage": name, "step": step, "loss": 1.0 / step, "cpu_seconds": cpu}
            line |= {"tokens": 100 * number, "samples": stage.batch_size}
            if step == stage.steps:
                line["held_out_recall/validation"] = 0.1 * number + 0.01 * config.seed
            lines.append(line)
        folder = step_folder(run_dir, stage=name, step=stage.steps)
        folder.mkdir(parents=True, exist_ok=True)
        write_manifest(folder, _manifest(config, name, cpu=sum(spent), tokens=100 * number))
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _manifest(config: RunConfig, name: str, *, cpu: float, tokens: int) -> Manifest:
    stage = config.stages[name]
    return Manifest(
        run=config.name,
        recipe_fingerprint="f",
        stage=name,
        step=stage.steps,
        target_step=stage.steps,
        complete=True,
        epoch="local-1-test",
        parent=None,
        world_size=1,
        engine="test",
        versions={},
        base_model="b",
        data_state={},
        samples=stage.steps * stage.batch_size,
        tokens=tokens * stage.steps,
        skipped_steps=0,
        wall_seconds=1.0,
        productive_seconds=1.0,
        train_cpu_seconds=cpu,
        loss={},
        files=(FileEntry(path="weights.safetensors", bytes=1, sha256="w"),),
    )


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
