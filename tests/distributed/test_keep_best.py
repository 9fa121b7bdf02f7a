"""The best checkpoint of a stage: which it is, that it stays, and what a kill leaves of it."""

import math
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file
from stage_run import StageRun, start

from cocoa_dist.config import load_recipe
from cocoa_dist.manifest import newest, stage_best
from cocoa_dist.train.evaluate import load_embedder, stage_weights

STAGE = "joint_reconstruction"
MEASURE = "held_out_recall/unseen_concept"
SETTINGS = [
    *(f"stages.{STAGE}.steps=8", "checkpoint.every_steps=3", "checkpoint.keep_last=1"),
    *("evaluation.every_steps=1", f"evaluation.keep_best={MEASURE}"),
    "evaluation.sets.unseen_concept.limit=8",
]
# Step 1 is the best for a while; steps 4 and 7 tie with the best one.
SCORES = "0.1 0.4 nan 0.4 0.2 0.3 0.4 0.1"
pytestmark = pytest.mark.slow


def kept(run: StageRun) -> list[int]:
    folder = run.folder / "checkpoints" / STAGE
    return sorted(int(path.name.removeprefix("step_")) for path in folder.glob("step_*"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> StageRun:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    return start(folder, STAGE, *SETTINGS, SCORES=SCORES).wait()


def test_the_best_checkpoint_stays_beside_the_last_one(undisturbed) -> None:
    assert kept(undisturbed) == [2, 8]
    _, manifest = stage_best(undisturbed.folder, stage=STAGE)
    assert (manifest.step, manifest.complete) == (2, False)
    for found in (manifest, newest(undisturbed.folder, stage=STAGE)[1]):
        assert (found.best.measure, found.best.step, found.best.value) == (MEASURE, 2, 0.4)
    written = [record[MEASURE] for record in undisturbed.records()]
    assert written == [None if math.isnan(x) else x for x in map(float, SCORES.split())]


def test_the_best_checkpoint_can_be_loaded_and_is_not_the_end(undisturbed) -> None:
    best = load_file(stage_weights(undisturbed.folder, STAGE, best=True))
    end = undisturbed.weights()
    assert best.keys() == end.keys()
    assert not all(torch.equal(best[name], end[name]) for name in best)
    embedder = load_embedder(
        load_recipe("debug"), run_dir=undisturbed.folder, after_stage=STAGE, best=True
    )
    loaded = dict(embedder.model.named_parameters())
    assert loaded
    assert all(torch.equal(loaded[name], best[name]) for name in loaded if name in best)
    assert sum(name in best for name in loaded) > 10


def test_a_damaged_best_checkpoint_is_not_loaded(undisturbed, tmp_path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(undisturbed.folder, copy)
    weights = copy / "checkpoints" / STAGE / "step_00000002" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(
        ValueError, match=r"best checkpoint of stage .* weights.safetensors has sha"
    ):
        stage_weights(copy, STAGE, best=True)


def test_a_killed_run_keeps_its_best_and_goes_on_to_the_same(undisturbed, tmp_path) -> None:
    # The save at step 6 has waited for the one at step 3, and is not committed when step 7 hangs.
    killed = start(tmp_path / "run", STAGE, *SETTINGS, SCORES=SCORES, FAULTS="sleep:1:7")
    deadline = time.monotonic() + 300
    while [record["step"] for record in killed.records()] != [1, 2, 3, 4, 5, 6]:
        assert time.monotonic() < deadline, killed.log(0)[-2000:]
        time.sleep(0.05)
    killed.kill()
    assert kept(killed) == [2, 3]  # the best one, and the last one that is due
    again = start(tmp_path / "run", STAGE, *SETTINGS, SCORES=SCORES).wait()
    assert kept(again) == [2, 8]
    assert again.numbers() == undisturbed.numbers()
    for best in (True, False):
        left = load_file(stage_weights(again.folder, STAGE, best=best))
        right = load_file(stage_weights(undisturbed.folder, STAGE, best=best))
        assert all(torch.equal(left[name], right[name]) for name in right)
