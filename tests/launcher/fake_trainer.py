"""A trainer without torch: steps that sleep, and the rank protocol of the real one.

    fake_trainer.py SCRIPT.json RESOLVED --stage S --run-dir DIR

SCRIPT.json: {"step_seconds", "events": [{"kind", "stage", "step", "rank", "times"}]}. An event
fires before its step, at most `times` times over all incarnations.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

if "--check-inputs" in sys.argv:
    sys.exit(0)
RANK = int(os.environ["RANK"])
EPOCH = os.environ["COCOA_EPOCH"]
told: list[int] = []


def main() -> int:
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, lambda received, frame: told.append(received))
    script_path, resolved, _, stage, _, folder = sys.argv[1:]
    script, run_dir = Path(script_path), Path(folder)
    plan = json.loads(script.read_text())
    text = Path(resolved).read_text()  # a YAML parser would cost more than the whole run
    target = int(re.search(rf"^  {stage}:\n(?:    .*\n)*?    steps: (\d+)", text, re.M)[1])
    every = int(re.search(r"every_steps: (\d+)", text)[1])
    step = newest_step(run_dir, stage)
    for index, event in enumerate(plan["events"]):
        early = (event["kind"], event.get("stage"), RANK) == ("early", stage, 0)
        if early and step > 0 and count_down(script, index, event["times"]):
            raise RuntimeError("before the file was cut")
    meet(script.parent, run_dir)
    if RANK == 0:
        cut_metrics(run_dir, stage, step)
        with (script.parent / "starts.jsonl").open("a") as file:
            names = ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
            file.write(json.dumps({name: os.environ[name] for name in names}) + "\n")
    sys.stdout.write(f"rank {RANK} starts {stage} after step {step}\n")
    while step < target:
        step += 1
        for index, event in enumerate(plan["events"]):
            where = (event.get("stage", stage), event["step"], event.get("rank", 0))
            if where == (stage, step, RANK) and count_down(script, index, event.get("times", 1)):
                act(event["kind"], run_dir, script)
        time.sleep(plan["step_seconds"])
        verdict = meet(script.parent, run_dir)
        if RANK == 0:
            log_step(run_dir, stage, step, plan["step_seconds"])
        if step == target:
            verdict = "finished"
        if RANK == 0 and (verdict or step % every == 0):
            save(run_dir, stage, step, target)
        if verdict:
            if RANK == 0:
                leave(run_dir, stage, step, verdict)
            return 0
    if RANK == 0:
        leave(run_dir, stage, step, "finished")
    return 0


def meet(folder: Path, run_dir: Path) -> str:
    """Wait for all ranks, as a collective does, and agree: "preempted", "stopped" or ""."""
    said = b"p" if told else b"s" if (run_dir / "STOP").exists() else b"."
    with (folder / f"met-{EPOCH}-{RANK}").open("ab") as file:
        file.write(said)
        met = file.tell()
    (folder / f"pid-{EPOCH}-{RANK}").write_text(str(os.getpid()))
    heard = set()
    for rank in range(int(os.environ["WORLD_SIZE"])):
        path = folder / f"met-{EPOCH}-{rank}"
        while not path.exists() or path.stat().st_size < met:
            pid = folder / f"pid-{EPOCH}-{rank}"
            number = pid.read_text() if pid.exists() else ""
            gone = number and not Path(f"/proc/{number}").exists()
            if gone and path.stat().st_size < met:
                raise RuntimeError("Connection closed by peer")
            time.sleep(0.001)
        heard.add(path.read_bytes()[met - 1 : met])
    return "preempted" if b"p" in heard else "stopped" if b"s" in heard else ""


def act(kind: str, run_dir: Path, script: Path) -> None:
    if kind == "crash":
        raise RuntimeError("boom")
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "refuse":
        sys.stdout.write("starting up\nrecipe x:\n  stages.a.data: folder /nowhere is missing\n")
        sys.exit(2)
    elif kind == "worker":
        worker = subprocess.Popen(["sleep", "600"])
        (script.parent / f"worker{RANK}").write_text(str(worker.pid))
    elif kind == "lie":
        leave(run_dir, "a", 0, "finished")
        os._exit(0)
    elif kind == "silent":
        os._exit(0)
    elif kind == "hang":
        while True:
            time.sleep(600)
    elif kind == "tear":
        with (run_dir / "metrics.jsonl").open("a") as file:
            file.write('{"stage": "a", "step": 9')
        os.kill(os.getpid(), signal.SIGKILL)
    else:
        raise ValueError(kind)


def count_down(script: Path, index: int, times: int) -> bool:
    fired = len(list(script.parent.glob(f"fired-{index}-*")))
    if fired < times:
        (script.parent / f"fired-{index}-{fired}").touch()
    return fired < times


def newest_step(run_dir: Path, stage: str) -> int:
    steps = [0]
    for path in (run_dir / "checkpoints" / stage).glob("step_*/manifest.json"):
        try:
            steps.append(json.loads(path.read_text())["step"])
        except ValueError:
            continue
    return max(steps)


def cut_metrics(run_dir: Path, stage: str, step: int) -> None:
    path = run_dir / "metrics.jsonl"
    kept = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if record["stage"] != stage or record["step"] <= step:
            kept.append(line + "\n")
    replace(path, "".join(kept))


def log_step(run_dir: Path, stage: str, step: int, seconds: float) -> None:
    record = {
        "stage": stage,
        "step": step,
        "epoch": EPOCH,
        "time": time.time(),
        "loss": 1.0 / step,
        "step_seconds": seconds,
    }
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")


def save(run_dir: Path, stage: str, step: int, target: int) -> None:
    folder = run_dir / "checkpoints" / stage / f"step_{step:08d}"
    staging = folder.with_name(f"{folder.name}.{EPOCH}")
    staging.mkdir(parents=True, exist_ok=True)
    manifest = make_manifest(run_dir, stage, step, target)
    (staging / "manifest.json").write_text(json.dumps(manifest))
    staging.rename(folder)


def make_manifest(run_dir: Path, stage: str, step: int, target: int) -> dict[str, object]:
    return {
        "schema_version": 1,
        "run": run_dir.name,
        "recipe_fingerprint": "0" * 64,
        "stage": stage,
        "step": step,
        "target_step": target,
        "complete": step == target,
        "epoch": EPOCH,
        "parent": None,
        "world_size": int(os.environ["WORLD_SIZE"]),
        "engine": "fake",
        "versions": {},
        "base_model": "",
        "data_state": {},
        "samples": 8 * step,
        "tokens": 80 * step,
        "skipped_steps": 0,
        "wall_seconds": 0.02 * step,
        "productive_seconds": 0.01 * step,
        "train_cpu_seconds": 0.01 * step,
        "loss": {"total": 1.0 / step},
        "files": [],
        "created_at": time.time(),
    }


def leave(run_dir: Path, stage: str, step: int, verdict: str) -> None:
    outcome = {"epoch": EPOCH, "stage": stage, "step": step, "verdict": verdict, "reason": ""}
    replace(run_dir / "outcome.json", json.dumps(outcome))


def replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


if __name__ == "__main__":
    sys.exit(main())
