"""A trainer without torch that keeps the real one's promises, for scenarios that take seconds.

    steady_trainer.py RESOLVED --stage S --run-dir DIR

Ranks meet over the cluster's network at MASTER_ADDR:MASTER_PORT, agree on stop flags at every step,
and fail when one of them is gone. The loss of a step is a hash over all records that were trained
before, in order, so one record lost, repeated or taken twice shows in all later losses; the number
of ranks does not. Stop requests, fence, outcome, manifests and names of targets are the project's
own.

STEADY_IMPORT_SECONDS, STEADY_STEP_SECONDS, STEADY_SAVE_SECONDS: how long things take.
STEADY_CRASH=STAGE:STEP: a rank that raises there, every time.
RUN/hold: the beginning of an epoch, whose saves wait before they commit while the file is there.
RUN/left.jsonl: when rank 0 was told to leave, and when its save was done.
"""

from cocoa_dist.runtime import Fence, StopRequest, adopt_ranks, stop_file_present, write_outcome

STOP = StopRequest()
STOP.install()

import atexit  # noqa: E402
import hashlib  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import signal  # noqa: E402
import socket  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from pathlib import Path  # noqa: E402

from cocoa_dist.config import RunConfig, fingerprint, load_resolved, resolve_path  # noqa: E402
from cocoa_dist.exporter import target_name  # noqa: E402
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
    note_when_told()
    adopt_ranks()
    config, run_dir = load_resolved(Path(resolved)), Path(folder)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    data = data_folder(config, stage)
    if not data.is_dir():
        sys.stderr.write(f"error: {data} does not exist\n")
        return 2
    announce(run_dir, rank)
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
        content = (data / "manifest.json").read_bytes()
        mine = {
            place: hashlib.sha256(f"{records[place]}".encode() + content).hexdigest()
            for place in range(meeting.rank, size, meeting.size)
        }
        operator = meeting.rank == 0 and stop_file_present(run_dir)
        words = meeting.agree({"mine": mine, "stop": STOP.requested, "operator": operator})
        whole = sorted((int(p), found) for word in words for p, found in word["mine"].items())
        assert [place for place, _ in whole] == list(range(size))
        state = hashlib.sha256(f"{state}{step}{whole}".encode()).hexdigest()
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
            if meeting.rank == 0 and TOLD:
                append(run_dir / "left.jsonl", {"told": TOLD[0], "saved": time.time()})
            return "stopped" if stopped else "preempted"
    return "finished"


TOLD: list[float] = []  # when this process was told to leave


def note_when_told() -> None:
    """Note the first signal's time; the project's own handler does the rest."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        known = signal.getsignal(number)

        def both(number, frame, known=known):
            TOLD.append(time.time())
            known(number, frame)

        signal.signal(number, both)


def announce(run_dir: Path, rank: int) -> None:
    """Write a target file like the exporter's; a rank that is killed leaves it behind."""
    name = target_name(run_dir, epoch=os.environ["COCOA_EPOCH"], who=f"r{rank:05d}")
    target = run_dir / "sd" / name
    target.parent.mkdir(exist_ok=True)
    target.write_text("[]")
    atexit.register(target.unlink, missing_ok=True)


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
    while is_held_back(run_dir, fence.epoch):
        time.sleep(0.05)
    fence.check()
    staging.rename(final)
    (run_dir / "saving").unlink(missing_ok=True)


def is_held_back(run_dir: Path, epoch: str) -> bool:
    try:
        return epoch.startswith((run_dir / "hold").read_text())
    except OSError:
        return False


if __name__ == "__main__":
    sys.exit(main())
