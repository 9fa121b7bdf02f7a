"""A trainer without torch that keeps the real one's promises, for scenarios that take seconds.

    steady_trainer.py RESOLVED --stage S --run-dir DIR

Ranks meet over the cluster's network at MASTER_ADDR:MASTER_PORT, agree on stop flags at every step,
and fail when one of them is gone. The loss of a step is a hash over everything that was trained
before, so one record lost, repeated or taken twice shows in all later losses. Stop requests, fence,
outcome and manifests are the project's own.

STEADY_IMPORT_SECONDS, STEADY_STEP_SECONDS, STEADY_SAVE_SECONDS: how long things take.
STEADY_CRASH=STAGE:STEP: a rank that raises there, every time.
"""

from cocoa_dist.runtime import Fence, StopRequest, adopt_ranks, stop_file_present, write_outcome

STOP = StopRequest()
STOP.install()

import hashlib  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import socket  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from pathlib import Path  # noqa: E402

from cocoa_dist.config import RunConfig, fingerprint, load_resolved, resolve_path  # noqa: E402
from cocoa_dist.manifest import (  # noqa: E402
    Manifest,
    newest,
    stage_end,
    step_folder,
    write_manifest,
)

RECORDS = 64
PEER_SECONDS = 60.0


def seconds(name: str, default: float) -> float:
    return float(os.environ.get(f"STEADY_{name}_SECONDS", default))


class Meeting:
    """All ranks' words at every step, through rank 0."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
        self.links: list[socket.socket] = []
        if rank == 0:
            with socket.create_server(address, backlog=size) as server:
                server.settimeout(PEER_SECONDS)
                self.links = [server.accept()[0] for _ in range(size - 1)]
        else:
            self.links = [connect(address)]
        self.files = [link.makefile("rw") for link in self.links]

    def agree(self, word: dict[str, object]) -> list[dict[str, object]]:
        if self.rank == 0:
            words = [word, *(json.loads(self.hear(file)) for file in self.files)]
            for file in self.files:
                self.tell(file, words)
            return words
        self.tell(self.files[0], word)
        return json.loads(self.hear(self.files[0]))

    def tell(self, file, word) -> None:
        try:
            file.write(json.dumps(word) + "\n")
            file.flush()
        except OSError as error:
            raise RuntimeError(f"Connection closed by peer: {error}") from error

    def hear(self, file) -> str:
        try:
            line = file.readline()
        except OSError as error:
            raise RuntimeError(f"Connection reset by peer: {error}") from error
        if not line:
            raise RuntimeError("Connection closed by peer")
        return line


def connect(address: tuple[str, int]) -> socket.socket:
    deadline = time.monotonic() + PEER_SECONDS
    while True:
        try:
            return socket.create_connection(address, timeout=PEER_SECONDS)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def main() -> int:
    if "--check-inputs" in sys.argv:
        return 0
    _, resolved, _, stage, _, folder = sys.argv
    time.sleep(seconds("IMPORT", 0.0))
    adopt_ranks()
    config, run_dir = load_resolved(Path(resolved)), Path(folder)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    data = data_folder(config, stage)
    if not data.is_dir():
        sys.stderr.write(f"error: {data} does not exist\n")
        return 2
    meeting = Meeting(rank, size)
    found = newest(run_dir, stage=stage)
    state = starting_state(config, stage, run_dir) if found is None else str(found[1].base_model)
    step = 0 if found is None else found[1].step
    fence = Fence(run_dir)
    if rank == 0:
        for name in ("metrics.jsonl", f"samples/{stage}.jsonl"):
            cut_back(run_dir / name, stage=stage, step=step)
    verdict = train(config, stage, run_dir, meeting, fence, state=state, step=step)
    if rank == 0:
        write_outcome(run_dir, stage=stage, step=step, verdict=verdict, reason="")
    meeting.agree({})
    return 0


def train(
    config: RunConfig,
    stage: str,
    run_dir: Path,
    meeting: Meeting,
    fence: Fence,
    *,
    state: str,
    step: int,
) -> str:
    settings, data = config.stages[stage], data_folder(config, stage)
    size = settings.batch_size
    while step < settings.steps:
        step += 1
        if os.environ.get("STEADY_CRASH") == f"{stage}:{step}":
            raise RuntimeError("boom")
        time.sleep(seconds("STEP", 0.1))
        records = [(step * size + index) % RECORDS for index in range(size)]
        mine = records[meeting.rank :: meeting.size]
        content = (data / "manifest.json").read_bytes()
        word = hashlib.sha256(f"{mine}".encode() + content).hexdigest()
        operator = meeting.rank == 0 and stop_file_present(run_dir)
        words = meeting.agree({"word": word, "stop": STOP.requested, "operator": operator})
        state = hashlib.sha256(f"{state}{step}{[w['word'] for w in words]}".encode()).hexdigest()
        if meeting.rank == 0:
            fence.check()  # a rank that was taken for dead must not write into the record either
            record(run_dir, stage, step, state, records, epoch=fence.epoch)
        asked = any(w["stop"] for w in words)
        stopped = any(w["operator"] for w in words)
        done = step == settings.steps
        if done or asked or stopped or step % config.checkpoint.every_steps == 0:
            if meeting.rank == 0:
                save(config, stage, run_dir, fence, step=step, state=state, world=meeting.size)
            meeting.agree({})
        if (asked or stopped) and not done:
            return "stopped" if stopped else "preempted"
    return "finished"


def data_folder(config: RunConfig, stage: str) -> Path:
    return resolve_path(next(iter(config.stages[stage].data.sources.values())).path)


def starting_state(config: RunConfig, stage: str, run_dir: Path) -> str:
    before = config.stages[stage].init_from
    return "start" if before == "model" else stage_end(run_dir, stage=before)[1].base_model


def record(run_dir: Path, stage: str, step: int, state: str, records, *, epoch: str) -> None:
    append(
        run_dir / "metrics.jsonl",
        {
            "stage": stage,
            "step": step,
            "epoch": epoch,
            "time": time.time(),
            "loss": int(state[:8], 16) / 2**32,
            "grad_norm": int(state[8:16], 16) / 2**32,
            "batch_digest": hashlib.sha256(f"{records}".encode()).hexdigest(),
            "step_seconds": seconds("STEP", 0.1),
        },
    )
    append(run_dir / f"samples/{stage}.jsonl", {"stage": stage, "step": step, "records": records})


def append(path: Path, fields: dict[str, object]) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(fields) + "\n")


def cut_back(path: Path, *, stage: str, step: int) -> None:
    kept = []
    for line in path.read_text().splitlines() if path.exists() else []:
        fields = json.loads(line)
        if fields["stage"] != stage or fields["step"] <= step:
            kept.append(line + "\n")
    if kept or path.exists():
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text("".join(kept))
        temporary.replace(path)


def save(
    config: RunConfig,
    stage: str,
    run_dir: Path,
    fence: Fence,
    *,
    step: int,
    state: str,
    world: int,
) -> None:
    final = step_folder(run_dir, stage=stage, step=step)
    staging = final.with_name(f".staging-{final.name}-{fence.epoch}")
    for old in final.parent.glob(".staging-*"):
        for path in old.iterdir():
            path.unlink()
        old.rmdir()
    staging.mkdir(parents=True)
    (run_dir / "saving").touch()  # so that a test can interrupt a save
    time.sleep(seconds("SAVE", 0.0))
    target = config.stages[stage].steps
    manifest = Manifest(
        run=config.name,
        recipe_fingerprint=fingerprint(config),
        stage=stage,
        step=step,
        target_step=target,
        complete=step == target,
        epoch=fence.epoch,
        parent=None,
        world_size=world,
        engine="steady",
        versions={},
        base_model=state,
        data_state={},
        samples=0,
        tokens=0,
        skipped_steps=0,
        wall_seconds=1.0,
        productive_seconds=1.0,
        train_cpu_seconds=1.0,
        loss={},
        files=(),
    )
    write_manifest(staging, manifest)
    fence.check()
    staging.rename(final)
    (run_dir / "saving").unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
