"""Save on some ranks, go on with more or fewer: the same records, the same losses."""

import shutil
from pathlib import Path

import pytest
import torch
from incarnations import STAGE, Incarnation, Moment, end, history, left_overs, losses, records
from safetensors import safe_open

from cocoa_dist.manifest import step_folders

pytestmark = pytest.mark.slow

STEPS = [f"stages.{STAGE}.steps=12", "checkpoint.keep_last=20"]
ADAPTER = [
    f"stages.{STAGE}.adapter={{kind: dora, rank: 4, dropout: 0.1, targets: [q_proj, v_proj, qkv]}}",
    *("model.random=null", "model.path=asset:quickstart_backbone"),
    "model.mask_token=<|hidden|>",  # a new one, behind the model's last row: it gets one, trained
]
TRAINED_BESIDE = {"patch_decoder", "new_tokens"}


@pytest.fixture(scope="module")
def on_two(tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("on_two") / "run"
    Incarnation(run_dir, *STEPS).finish()
    return run_dir


@pytest.fixture(scope="module")
def left_early(tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("left_early") / "run"
    Incarnation(run_dir, *STEPS, moment=Moment("leaves", "all", 2)).finish()
    return run_dir


def assert_same_training(run_dir: Path, reference: Path) -> None:
    assert records(run_dir) == records(reference)
    assert [line[:3] for line in history(run_dir)] == [line[:3] for line in history(reference)]
    # float32; sums run in another order over other numbers of ranks
    torch.testing.assert_close(
        torch.tensor(losses(run_dir)), torch.tensor(losses(reference)), rtol=1e-5, atol=1e-5
    )


def test_two_three_one_four_and_back_are_one_run(on_two, tmp_path) -> None:
    run_dir, sizes = tmp_path / "run", (2, 3, 1, 4, 2)
    for size in sizes[:-1]:
        # asked in the second step, so that it leaves behind the third
        Incarnation(run_dir, *STEPS, world_size=size, moment=Moment("leaves", "all", 2)).finish()
    said = Incarnation(run_dir, *STEPS, world_size=sizes[-1]).finish()
    assert "2 processes go on with what 4 wrote: the shards are cut anew" in said
    assert_same_training(run_dir, on_two)
    assert left_overs(run_dir) == []
    written_by = {end(run_dir)[1].world_size}
    for folder in step_folders(run_dir, stage=STAGE):
        written_by.add(len(list((folder / "shards").iterdir())))
    assert written_by == {1, 2, 3, 4}


def test_going_on_with_as_many_ranks_is_the_same_run_to_the_last_bit(on_two, tmp_path) -> None:
    run_dir = tmp_path / "run"
    Incarnation(run_dir, *STEPS, moment=Moment("leaves", "1", 5)).finish()
    Incarnation(run_dir, *STEPS).finish()
    assert history(run_dir) == history(on_two)


def test_adapter_stage_saves_its_adapters_alone_and_goes_on_bit_for_bit(tmp_path) -> None:
    """With dropout: the generators of both ranks come back, the frozen base is read anew."""
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    Incarnation(whole, *ADAPTER).finish()
    Incarnation(halved, *ADAPTER, moment=Moment("leaves", "all", 3)).finish()
    folder, _ = end(halved)
    with safe_open(folder / "shards" / "rank_00000.safetensors", framework="pt") as file:
        names = {name.partition("/")[2] for name in file.keys()}  # no mapping
    assert {name.partition(".")[0] for name in names if ".lora_" not in name} == TRAINED_BESIDE
    Incarnation(halved, *ADAPTER).finish()
    assert history(halved) == history(whole)
    weights = [end(run_dir)[0] / "weights.safetensors" for run_dir in (whole, halved)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_another_base_model_is_refused_by_name(left_early, tmp_path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(left_early, run_dir)
    folder, manifest = end(run_dir)
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace(manifest.base_model, "random-0123"))
    again = Incarnation(run_dir, *STEPS)
    assert set(again.wait()) == {2}
    said = again.log.read_text()
    assert f"checkpoint {folder} was trained on another base model" in said
    assert "it says random-0123, found random-" in said


def test_changed_settings_are_named_and_safe_ones_go_on(on_two, left_early, tmp_path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(left_early, run_dir)
    unsafe = f"stages.{STAGE}.optimizer.weight_decay=0.5"
    again = Incarnation(run_dir, *STEPS, unsafe, "metrics.log_every_steps=3")
    assert set(again.wait()) == {2}
    said = again.log.read_text()
    assert "was trained with other settings" in said
    assert f"stages.{STAGE}.optimizer.weight_decay: 0.01 -> 0.5" in said
    assert "log_every_steps" not in said
    safe = ["metrics.log_every_steps=3", "checkpoint.every_steps=5"]
    said = Incarnation(run_dir, *STEPS, *safe).finish()
    assert "metrics.log_every_steps: 2 -> 3" in said
    assert history(run_dir) == history(on_two)
