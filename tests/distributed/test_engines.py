"""DeepSpeed's ZeRO-3, FSDP2 and plain torch are the same training, and read each other's state."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from ranks import launch

WORKER = Path(__file__).with_name("engines_worker.py")
STEPS = 50
STAGES = ("joint_reconstruction", "contrastive")
GUIDE = ("stages.contrastive.objective.guide=stage_start",)
SWITCHES = ("fsdp2 then fsdp2", "fsdp2 then deepspeed", "deepspeed then fsdp2")


def job(
    stage: str, engine: str, *, steps: int, tokens_per_pack: int = 4096, more: Sequence[str] = ()
) -> dict[str, object]:
    return {
        "name": " ".join([stage, engine, *more]),
        "recipe": "debug",
        "stage": stage,
        "overrides": [
            f"data.tokens_per_pack={tokens_per_pack}",
            f"stages.{stage}.batch_size=12",
            f"stages.{stage}.steps={steps}",
            *more,
        ],
        "steps": steps,
        "engine": engine,
    }


@pytest.fixture(scope="module")
def long_runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("engines")
    kinds = ("deepspeed", "fsdp2")
    sharded = [job(s, k, steps=STEPS, tokens_per_pack=160) for s in STAGES for k in kinds]
    alone = [job(stage, "plain", steps=STEPS) for stage in STAGES]
    return {
        **launch(sharded, world_size=2, folder=root / "sharded", worker=WORKER),
        **launch(alone, world_size=1, folder=root / "alone", worker=WORKER),
    }


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["deepspeed", "fsdp2"])
@pytest.mark.parametrize("stage", STAGES)
def test_an_engine_on_two_ranks_trains_like_plain_torch_for_50_steps(
    long_runs, stage, engine
) -> None:
    found, plain = long_runs[f"{stage} {engine}"], long_runs[f"{stage} plain"]
    assert found["packs"] > 1  # contrastive: in chunks
    assert plain["losses"][-1] < plain["losses"][0]
    torch.testing.assert_close(
        torch.tensor(found["losses"]), torch.tensor(plain["losses"]), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(
        torch.tensor(found["norms"]), torch.tensor(plain["norms"]), rtol=1e-3, atol=1e-5
    )


@pytest.mark.slow
def test_state_goes_on_under_the_same_engine_or_the_other(tmp_path) -> None:
    stage = "contrastive"
    jobs = [job(stage, engine, steps=8) for engine in ("fsdp2", *SWITCHES)]
    kinds = ("deepspeed", "fsdp2", "fsdp2 then deepspeed", "deepspeed then fsdp2")
    guided = [job(stage, kind, steps=8, more=GUIDE) for kind in kinds]
    runs = launch([*jobs, *guided], world_size=2, folder=tmp_path, worker=WORKER)
    losses = [torch.tensor(runs[one["name"]]["losses"]) for one in guided]
    for other in losses[1:]:  # one that goes on has the guide of the stage's start, not of its own
        torch.testing.assert_close(other, losses[0], rtol=1e-5, atol=1e-5)
    assert abs(losses[0] - torch.tensor(runs[f"{stage} fsdp2"]["losses"])).min() > 1e-3
    whole = runs[f"{stage} fsdp2"]
    for engine in SWITCHES:
        found = runs[f"{stage} {engine}"]
        torch.testing.assert_close(
            torch.tensor(found["losses"]), torch.tensor(whole["losses"]), rtol=1e-5, atol=1e-5
        )
        for name, weight in whole["weights"].items():  # float32, 8 steps of AdamW
            torch.testing.assert_close(
                found["weights"][name], weight, rtol=1e-3, atol=1e-5, msg=f"{engine} {name}"
            )
    exact = runs[f"{stage} fsdp2 then fsdp2"]
    assert exact["losses"] == whole["losses"]
    assert all(torch.equal(exact["weights"][n], w) for n, w in whole["weights"].items())
