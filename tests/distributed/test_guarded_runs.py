"""What a run of two ranks does about steps that are not finite, and about a rank that hangs."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import free_port
from safetensors.torch import load_file
from warm import Rank

from cocoa_dist.config import load_recipe, resolve_path
from cocoa_dist.data.loader import StageLoader
from cocoa_dist.manifest import newest
from cocoa_dist.metrics import read_json_lines
from cocoa_dist.runtime import EXIT_HUNG
from cocoa_dist.train.build import StageParts, build_parts
from launcher.faults import Departure, choose_culprit

TRAINER = Path(__file__).with_name("guarded_trainer.py")
STAGE = "eos_bridged_reconstruction"
WORLD = 2


@dataclass(frozen=True)
class Run:
    """What a run left: exit codes and logs by rank, and its folder."""

    codes: list[int]
    logs: list[Path]
    folder: Path

    def metrics(self) -> list[dict]:
        return list(read_json_lines(self.folder / "metrics.jsonl"))

    def skipped(self, rank: int) -> list[dict]:
        return list(read_json_lines(self.folder / "skipped" / f"{STAGE}.rank{rank}.jsonl"))


def train(folder: Path, *overrides: str, faults: str = "", fresh: bool = False) -> Run:
    """Train on two ranks; `fresh`: in new interpreters, for what is patched as they start."""
    folder.mkdir(parents=True, exist_ok=True)
    port, ranks = free_port(), []
    logs = [folder / f"rank{rank}.log" for rank in range(WORLD)]
    for rank, path in enumerate(logs):
        environment = {
            **os.environ,
            "FAULTS": faults,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(WORLD),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        arguments = [
            *("debug", f"stages.{STAGE}.init_from=model"),
            *("--stage", STAGE, "--run-dir", str(folder), *overrides),
        ]
        path.touch()
        if not fresh:
            ranks.append(Rank(TRAINER, arguments, environment=environment, log=path))
            continue
        command = [sys.executable, str(TRAINER), *arguments]
        with path.open("w") as log:
            ranks.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    try:
        codes = [process.wait(timeout=200) for process in ranks if "stop" not in faults]
        codes = codes or [ranks[0].wait(timeout=200)]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    return Run(codes, logs, folder)


def losses(run: Run) -> list[float | None]:
    return [line["loss"] for line in run.metrics()]


@pytest.mark.slow
def test_a_preflight_changes_no_number_of_the_run(tmp_path) -> None:
    adapter = (
        f"stages.{STAGE}.adapter="
        "{kind: lora, rank: 2, alpha: 4, dropout: 0.5, targets: [q_proj, v_proj]}"
    )
    runs = [
        train(tmp_path / word, adapter, f"guards.preflight={word}", f"stages.{STAGE}.steps=4")
        for word in ("true", "false")
    ]
    for run in runs:
        assert run.codes == [0, 0], run.logs[0].read_text()[-3000:]
    assert losses(runs[0]) == losses(runs[1])
    assert "pre-flight in" in runs[0].logs[0].read_text()
    assert "pre-flight" not in runs[1].logs[0].read_text()


@pytest.mark.slow
def test_steps_that_are_not_finite_are_left_out_and_their_records_are_named(tmp_path) -> None:
    run = train(tmp_path / "run", faults="loss:1:3 gradient:1:5")
    assert run.codes == [0, 0], run.logs[1].read_text()[-3000:]
    assert [line["step"] for line in run.metrics() if line["skipped"]] == [3, 5]
    assert run.metrics()[2]["grad_norm"] is None
    end = newest(run.folder, stage=STAGE)
    assert end is not None
    assert end[1].skipped_steps == 2
    for rank in range(WORLD):
        loss, gradient = run.skipped(rank)
        assert (loss["step"], loss["not_finite"]) == (3, "loss")
        assert loss["here"] == (rank == 1)
        assert (gradient["step"], gradient["not_finite"]) == (5, "gradient")
        assert not gradient["here"]
        for line in (loss, gradient):
            assert len(line["records"]) == 12
            assert line["records"][0] in run.logs[rank].read_text()
    assert losses(run)[-1] < losses(run)[0]


@pytest.mark.slow
def test_too_many_steps_that_are_not_finite_end_the_run_by_name(tmp_path) -> None:
    run = train(
        tmp_path / "run", "guards.max_skipped_in_a_row=2", faults="loss:0:3 loss:0:4 loss:0:5"
    )
    assert run.codes == [2, 2]
    for rank in range(WORLD):
        last = run.logs[rank].read_text().splitlines()[-1]
        assert "error: 2 steps in a row were skipped, up to step 4" in last
        assert run.skipped(rank)[-1]["records"][0] in last


class OneBadRow:
    """A base model in which one token overflows, and where that token comes in the stage's steps.

    Its head is not tied to the embedding, so that every record without the token is sound.
    """

    TWICE = 2  # steps that the token comes in

    def __init__(self, folder: Path, *, value: float) -> None:
        self.config = load_recipe("debug", [f"stages.{STAGE}.init_from=model"])
        parts = build_parts(self.config, STAGE, run_dir=None)
        self.token, self.places = self._rare_token(parts, folder / "data")
        backbone = parts.model.backbone
        backbone.config.tie_word_embeddings = False
        backbone.config.text_config.tie_word_embeddings = False
        backbone.lm_head.weight = torch.nn.Parameter(backbone.lm_head.weight.detach().clone())
        with torch.no_grad():
            backbone.model.language_model.embed_tokens.weight[self.token] = value
        backbone.save_pretrained(folder / "model")
        tokenizer = resolve_path("asset:tokenizer")
        shutil.copy(tokenizer / "tokenizer.json", folder / "model")
        self.overrides = ("model.random=null", f"model.path={folder / 'model'}")

    def _rare_token(self, parts: StageParts, folder: Path) -> tuple[int, list[tuple[int, int]]]:
        """Return a token that one record alone has, in two steps; and (step, rank) of these."""
        loader = StageLoader(
            *(self.config, STAGE),
            **{"vocabulary": parts.vocabulary, "geometry": parts.geometry, "rank": 0},
            **{"world_size": WORLD, "start_step": 1, "folder": folder},
        )
        encoder, source = loader._dataset._encoder, loader._dataset._sources["emoji"]
        found: dict[int, list[tuple[int, int, str]]] = {}
        for step in range(1, 9):
            for rank, packs in enumerate(loader.plan.step(step, WORLD).ranks):
                for slot in (slot for pack in packs for slot in pack):
                    keys: list[str] = []
                    draft = encoder._encode_pack((slot,), lambda _: source, keys=keys, bad=[])
                    for token in {*np.concatenate([s.input_ids for s in draft.samples]).tolist()}:
                        found.setdefault(token, []).append((step, rank, keys[0]))
        loader.close()
        token = min(
            token
            for token, places in found.items()
            if len({key for *_, key in places}) == 1 and len(places) == self.TWICE
            if places[0][0] > 1
        )
        self.key = found[token][0][2]
        return token, [(step, rank) for step, rank, _ in found[token]]


def assert_named(bad: OneBadRow, run: Run, *, kinds: tuple[str, ...]) -> None:
    """The steps that the token comes in are left out, and its record is named by its own rank."""
    steps = [step for step, _ in bad.places]
    assert [line["step"] for line in run.metrics() if line["skipped"]] == steps
    for rank in range(WORLD):
        lines = run.skipped(rank)
        assert [line["step"] for line in lines] == steps
        assert tuple(line["not_finite"] for line in lines) == kinds
        for line, place in zip(lines, bad.places, strict=True):
            assert (bad.key in line["records"]) == (place[1] == rank)
            assert line["here"] == (line["not_finite"] == "loss" and place[1] == rank)


@pytest.mark.slow
def test_a_record_that_overflows_is_left_out_and_the_stage_ends_well(tmp_path) -> None:
    """Read from its shard, tokenised, packed and multiplied: nothing stands in for anything.

    The loss is finite (a norm makes 0 of 3e38), the gradient is not.
    """
    bad = OneBadRow(tmp_path, value=3e38)
    run = train(tmp_path / "run", *bad.overrides)
    assert run.codes == [0, 0], run.logs[1].read_text()[-3000:]
    assert_named(bad, run, kinds=("gradient", "gradient"))
    end = newest(run.folder, stage=STAGE)
    assert end is not None
    assert end[1].skipped_steps == bad.TWICE
    weights = load_file(end[0] / "weights.safetensors")
    assert [name for name, value in weights.items() if not value.isfinite().all()] == []


@pytest.mark.slow
def test_records_whose_loss_is_not_finite_too_often_end_the_run_by_name(tmp_path) -> None:
    """In the second of the two steps nothing of the record is supervised: its loss is sound."""
    bad = OneBadRow(tmp_path, value=torch.inf)
    run = train(tmp_path / "run", *bad.overrides, f"guards.max_skipped={bad.TWICE}")
    assert run.codes == [2, 2]
    assert_named(bad, run, kinds=("loss", "gradient"))
    last_step, rank = bad.places[-1]
    for log in run.logs:
        expected = f"error: {bad.TWICE} steps in the stage were skipped, up to step {last_step}"
        assert expected in log.read_text().splitlines()[-1]
    named = run.skipped(rank)[-1]["records"]
    assert named[0] in run.logs[rank].read_text().splitlines()[-1]
    assert len(run.metrics()) == last_step


UNMOVED = """
import torch
from pathlib import Path
from cocoa_dist import distributed
from cocoa_dist.config import load_recipe
from cocoa_dist.objectives.reconstruction import Reconstruction
from cocoa_dist.runtime import seed_everything
from cocoa_dist.train.rehearsal import _first_batch
from cocoa_dist.train.session import build_engine, quiet_known_warnings

quiet_known_warnings()
config = load_recipe("debug", [])
distributed.start(timeout_seconds=60)
seed_everything(0)
first = _first_batch(config, "joint_reconstruction", run_dir=None)
engine = build_engine(config, "joint_reconstruction", first.parts)
whole = Reconstruction.sums


def broken(kind):
    def sums(self, outputs, packs):
        found = whole(self, outputs, packs)
        if kind == "loss":
            found["text"] = found["text"] + torch.inf  # its gradient is finite
        else:
            found["text"].register_hook(lambda gradient: gradient * torch.nan)
        return found
    return sums


def moved(before):
    after = engine.gathered_weights()
    return [name for name in before if not torch.equal(before[name], after[name])]


engine.train_step(first.batch.packs, step=1)
for kind in ("loss", "gradient"):
    before = engine.gathered_weights()
    Reconstruction.sums = broken(kind)
    stats = engine.train_step(first.batch.packs, step=2)
    Reconstruction.sums = whole
    assert stats.skipped == kind, (kind, stats)
    assert moved(before) == [], kind
stats = engine.train_step(first.batch.packs, step=3)
assert not stats.skipped and stats.finite_here and moved(before)
"""


@pytest.mark.slow
def test_no_weight_moves_in_a_step_that_is_left_out() -> None:
    command = [sys.executable, "-c", UNMOVED]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_a_full_disk_is_seen_before_step_1(tmp_path) -> None:
    code = (
        "import os, types\n"
        "whole = os.statvfs\n"
        "def few(path):\n"
        "    f = whole(path)\n"
        "    return types.SimpleNamespace(f_blocks=f.f_blocks, f_bfree=10, f_bavail=10, "
        "f_frsize=1)\n"
        "os.statvfs = few\n"
    )
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(code)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(site), prepend=os.pathsep)
        run = train(tmp_path / "run", fresh=True)
    assert run.codes == [2, 2]
    last = run.logs[0].read_text().splitlines()[-1]
    assert "has 0.00 GiB free, 2 checkpoints, one with all weights, need 0.0" in last
    assert run.metrics() == []


@pytest.mark.slow
def test_a_rank_without_memory_for_the_packs_ends_all_before_step_1(tmp_path) -> None:
    run = train(tmp_path / "run", faults="room:1:0")
    assert run.codes == [2, 2]
    for log in run.logs:
        last = log.read_text().splitlines()[-1]
        assert "largest pack of the stage" in last
        assert "0.00 GiB are there: no pack fits. Lower data.tokens_per_pack" in last
    assert run.metrics() == []


def stacks(run: Run, rank: int) -> str:
    return (run.folder / "logs" / "by_hand" / f"{STAGE}.rank{rank}.stacks").read_text()


@pytest.mark.slow
def test_a_rank_that_sleeps_ends_itself_and_is_named(tmp_path) -> None:
    run = train(tmp_path / "run", "engine.timeout_seconds=10", faults="sleep:1:3")
    assert run.codes[1] == EXIT_HUNG, run.logs[1].read_text()[-3000:]
    assert run.codes[0] != 0  # of its own watchdog, or of the peer it has lost
    assert "fall_asleep" in stacks(run, 1)
    assert "in step 3: rank 1 is in fall_asleep" in run.logs[1].read_text().splitlines()[-1]
    left = [Departure(rank, code, run.logs[rank]) for rank, code in enumerate(run.codes)]
    culprit = choose_culprit(left)
    assert culprit.rank == 1
    assert culprit.describe().startswith("rank 1 hung and ended itself: HangError: no progress")


@pytest.mark.slow
def test_a_rank_that_waits_in_vain_names_the_collective(tmp_path) -> None:
    run = train(tmp_path / "run", "engine.timeout_seconds=10", faults="stop:1:3")
    assert run.codes == [EXIT_HUNG], run.logs[0].read_text()[-3000:]
    line = run.logs[0].read_text().splitlines()[-1]
    assert "in step 3: rank 0 waits for the other ranks in " in line
    assert "distributed_c10d.py" in stacks(run, 0)
