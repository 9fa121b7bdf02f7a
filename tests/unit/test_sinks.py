"""TensorBoard and Weights & Biases: what they get, over a resume, and when they fail."""

import importlib.util
import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from cocoa_dist.config import ConfigError, load_recipe
from cocoa_dist.monitor import Monitor
from cocoa_dist.sinks import Sinks, numbers

TENSORBOARD = pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None,
    reason="tensorboard is not installed (pip install 'cocoa_dist[tensorboard]')",
)
WANDB = pytest.mark.skipif(
    importlib.util.find_spec("wandb") is None,
    reason="wandb is not installed (pip install 'cocoa_dist[wandb]')",
)
BOARD = "metrics.tensorboard=true"
FAULTS = "cocoa_exporter_faults_total"


def record(step: int, *, loss: float | None = None, stage: str = "contrastive") -> dict:
    return {
        "stage": stage,
        "step": step,
        "epoch": "1.0-1",
        "time": 1000.0 + step,
        "loss": float(step) if loss is None else loss,
        "grad_norm": None,
        "skipped": step == 3,
        "batch_digest": "ab",
    }


def test_numbers_leave_out_what_is_none() -> None:
    assert numbers(record(3)) == {"loss": 3.0, "skipped": 1.0}


def sinks(run_dir: Path, *overrides: str, step: int = 0, stage: str = "contrastive") -> Sinks:
    found = Sinks(lambda what: pytest.fail(what))
    found.start(load_recipe("debug", [*overrides]), stage, run_dir=run_dir, step=step)
    return found


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    names = found.Tags()["scalars"]
    return {name: [(e.step, e.value) for e in found.Scalars(name)] for name in names}


@TENSORBOARD
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_has_each_step_once_after_a_death_and_a_resume(tmp_path: Path) -> None:
    first = sinks(tmp_path, BOARD)
    for step in range(1, 8):
        first.write(record(step))
        if step % 4 == 0:
            first.flush()
    first.flush()  # steps 5 to 7 reach the disk, too; the process dies without closing
    second = sinks(tmp_path, BOARD, step=4)
    for step in range(5, 11):
        second.write(record(step, loss=-float(step)))
    second.close()
    first.close()
    found = scalars(tmp_path / "tensorboard" / "contrastive")
    again = [(step, -float(step)) for step in range(5, 11)]
    assert found["loss"] == [(step, float(step)) for step in range(1, 5)] + again
    assert found["skipped"][2] == (3, 1.0)
    assert "grad_norm" not in found


READ_WANDB = """
import json, sys
from pathlib import Path
from wandb.proto import wandb_internal_pb2

def records(data):  # a LevelDB log behind a header of 7 bytes: blocks of 32 KiB, parts of records
    at, whole = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        if kind == 0:
            return
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield whole
            whole = b""

rows, runs = [], []
for path in sys.argv[1:]:
    for data in records(Path(path).read_bytes()):
        one = wandb_internal_pb2.Record()
        one.ParseFromString(data)
        if one.WhichOneof("record_type") == "run":
            runs.append([one.run.run_id, one.run.project])
        if one.WhichOneof("record_type") == "history":
            row = {(i.key or "/".join(i.nested_key)): json.loads(i.value_json)
                   for i in one.history.item}
            rows.append([one.history.step.num, row])
print(json.dumps([rows, runs]))
"""
WRITE_WANDB = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_sinks import record, sinks
from cocoa_dist.metrics import JsonLines, cut_back
stage, begin, end, how = sys.argv[2:]
lines = Path(sys.argv[1]) / "metrics.jsonl"
cut_back(lines, stage=stage, step=int(begin))
found = sinks(Path(sys.argv[1]), "metrics.wandb={{project: tests}}", step=int(begin), stage=stage)
for step in range(int(begin) + 1, int(end) + 1):
    JsonLines(lines).append(record(step, stage=stage))
    found.write(record(step, stage=stage))
if how == "dies":
    import os, time
    time.sleep(1)
    os._exit(9)
found.close()
"""


def wandb_incarnation(run_dir: Path, *arguments: str) -> None:
    code = WRITE_WANDB.format(tests=str(Path(__file__).parent))
    command = [sys.executable, "-c", code, str(run_dir), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == (9 if arguments[-1] == "dies" else 0), done.stderr[-2000:]


@WANDB
@pytest.mark.slow
def test_wandb_offline_has_each_step_once_over_deaths_and_stages(tmp_path: Path) -> None:
    import json

    for arguments in (
        ("joint_reconstruction", "0", "6", "dies"),
        ("joint_reconstruction", "4", "8", "leaves"),
        ("eos_bridged_reconstruction", "0", "2", "leaves"),
    ):
        wandb_incarnation(tmp_path, *arguments)
    files = sorted(map(str, tmp_path.glob("wandb/offline-run-*/*.wandb")))
    assert len(files) == 2  # what the dead one left is sent again
    read = [sys.executable, "-c", READ_WANDB, *files]
    done = subprocess.run(read, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]
    rows, runs = json.loads(done.stdout)
    assert len({tuple(run) for run in runs}) == 1  # one run for all incarnations
    assert runs[0][1] == "tests"
    assert [step for step, _ in rows] == list(range(1, 11))
    assert [row.get("joint_reconstruction/loss") for _, row in rows[:8]] == list(range(1, 9))
    assert [row.get("eos_bridged_reconstruction/loss") for _, row in rows[8:]] == [1, 2]


def test_wandb_needs_a_project() -> None:
    with pytest.raises(ConfigError, match="project"):
        load_recipe("debug", ["metrics.wandb={mode: offline}"])


def monitor(run_dir: Path, *overrides: str) -> Monitor:
    config = load_recipe("debug", ["metrics.exporter=false", *overrides])
    started = Monitor.start(
        config, "contrastive", run_dir=run_dir, rank=0, world_size=1, epoch="1.0-1"
    )
    started.resumed(None)
    return started


def told(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


def test_a_sink_whose_package_is_missing_costs_a_warning(tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    started = monitor(tmp_path, BOARD)
    for step in (1, 2):
        started.record(record(step), samples=1, tokens=1)
    started.stop()
    assert started.values.get(FAULTS, reason="sinks") == 1.0
    (line,) = told(caplog)
    assert "pip install 'cocoa_dist[tensorboard]'" in line
    assert line.endswith("the run goes on")


def test_a_sink_that_fails_is_left_and_the_others_go_on(tmp_path, monkeypatch, caplog) -> None:
    taken = []

    class Full:
        def __init__(self, **settings) -> None:
            pass

        def add_scalar(self, *_, **__) -> None:
            raise OSError(28, "No space left on device")

    run = SimpleNamespace(
        log=lambda values, step: taken.append(step), finish=lambda: None, resumed=False
    )
    wandb = SimpleNamespace(init=lambda **_: run, Settings=lambda **_: None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Full))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    started = monitor(tmp_path, BOARD, "metrics.wandb={project: tests}")
    for step in (1, 2, 3):
        started.record(record(step), samples=1, tokens=1)
    started.stop()
    assert started.values.get(FAULTS, reason="sinks") == 1.0
    assert [line for line in told(caplog) if "No space left on device" in line] == told(caplog)
    offset = 8 + 8  # steps of the two stages before
    assert (tmp_path / "wandb" / "cocoa_sent.json").exists()
    assert taken == [offset + step for step in (1, 2, 3)]


def test_without_sinks_nothing_is_imported(tmp_path: Path) -> None:
    before = set(sys.modules)
    started = monitor(tmp_path)
    started.record(record(1), samples=1, tokens=1)
    started.stop()
    assert not {name for name in set(sys.modules) - before if "tensorboard" in name}
