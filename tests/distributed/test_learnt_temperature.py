"""A temperature and a bias that are trained: saved, resumed, held below their limit."""

import math
from pathlib import Path

import pytest
import torch
from incarnations import Incarnation, Moment, assert_same_run, end, history, losses
from safetensors.torch import load_file

from cocoa_dist.config import load_recipe
from cocoa_dist.metrics import read_json_lines
from cocoa_dist.train.build import build_parts
from cocoa_dist.train.evaluate import load_embedder

pytestmark = pytest.mark.slow

STAGE = "contrastive"
LIMIT = 20.05
LEARNT = [
    f"stages.{STAGE}.init_from=model",
    f"stages.{STAGE}.objective.learnable_temperature=true",
    f"stages.{STAGE}.objective.max_scale={LIMIT}",
    f"stages.{STAGE}.objective.loss=sigmoid",
    f"stages.{STAGE}.objective.symmetric=false",
    f"stages.{STAGE}.objective.bias=-30.0",
    "checkpoint.keep_last=20",
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("learnt") / "run"
    Incarnation(run_dir, *LEARNT, stage=STAGE).finish()
    return run_dir


def temperatures(run_dir: Path) -> list[float]:
    return [float(r["temperature"]) for r in read_json_lines(run_dir / "metrics.jsonl")]


def learnt(run_dir: Path) -> dict[str, torch.Tensor]:
    weights = load_file(end(run_dir, stage=STAGE)[0] / "weights.safetensors")
    return {name: value for name, value in weights.items() if name.startswith("similarity.")}


def test_it_is_recorded_and_stays_below_its_limit(whole) -> None:
    found = temperatures(whole)
    assert found[0] == pytest.approx(0.05)
    assert len(set(found)) > 3
    assert min(found) >= 1.0 / LIMIT - 1e-6
    assert any(value == pytest.approx(1.0 / LIMIT, rel=1e-6) for value in found)  # was reached
    values = learnt(whole)
    assert {name: value.shape for name, value in values.items()} == {
        "similarity.log_scale": (1,),
        "similarity.bias": (1,),
    }
    assert values["similarity.bias"].item() != -30.0
    # the optimizer never carries it further than one update behind the limit
    assert values["similarity.log_scale"].item() <= math.log(LIMIT) + 1.1e-3


def test_a_run_that_was_interrupted_is_the_same_to_the_last_bit(whole, tmp_path) -> None:
    run_dir = tmp_path / "run"
    Incarnation(run_dir, *LEARNT, stage=STAGE, moment=Moment("leaves", "all", 3)).finish()
    assert len(history(run_dir)) < len(history(whole))
    Incarnation(run_dir, *LEARNT, stage=STAGE).finish()
    assert_same_run(run_dir, whole, stages=(STAGE,))
    assert temperatures(run_dir) == temperatures(whole)


def test_it_goes_on_with_another_number_of_ranks_and_another_engine(whole, tmp_path) -> None:
    for number, more in enumerate(([], ["engine.kind=fsdp2"])):
        run_dir = tmp_path / str(number) / "run"
        Incarnation(
            run_dir, *LEARNT, *more, stage=STAGE, moment=Moment("leaves", "all", 3)
        ).finish()
        Incarnation(run_dir, *LEARNT, *more, stage=STAGE, world_size=1).finish()
        # float32; sums run in another order over other numbers of ranks
        torch.testing.assert_close(
            torch.tensor(losses(run_dir)), torch.tensor(losses(whole)), rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(
            torch.tensor(temperatures(run_dir)),
            torch.tensor(temperatures(whole)),
            rtol=1e-5,
            atol=1e-7,
        )


def test_what_comes_after_reads_the_model_without_it(whole) -> None:
    config = load_recipe("debug", LEARNT)
    embedder = load_embedder(config, run_dir=whole, after_stage=STAGE)
    assert embedder.model.heads.similarity is None
    tree = config.model_dump(mode="json")
    last = {**tree["stages"][STAGE], "init_from": STAGE}
    for learnable, expected in (
        (True, learnt(whole)["similarity.log_scale"]),  # goes on from what was learnt
        (False, None),
    ):
        objective = {**last["objective"], "learnable_temperature": learnable, "bias": -3.0}
        tree["stages"]["again"] = {**last, "objective": objective}
        parts = build_parts(type(config).model_validate(tree), "again", run_dir=whole)
        if expected is None:
            assert not hasattr(parts.model, "similarity")
        else:
            assert torch.equal(parts.model.similarity.log_scale, expected)
