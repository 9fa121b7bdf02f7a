"""GradCache under ZeRO-3 gives the gradient of all packs at once, dropout included."""

from pathlib import Path

import pytest
import torch
from ranks import launch

WORKER = Path(__file__).with_name("grad_cache_worker.py")
ADAPTER = (
    "stages.contrastive.adapter={kind: lora, rank: 4, alpha: 8, dropout: 0.3, "
    "targets: [q_proj, v_proj, qkv]}"
)
CACHE = "stages.contrastive.objective.grad_cache"


def job(name: str, *overrides: str, replay: bool = True) -> dict[str, object]:
    shared = ["data.tokens_per_pack=80", "stages.contrastive.batch_size=12"]
    return {"name": name, "overrides": [*shared, *overrides], "replay": replay}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """One step of 2 ranks with several packs each, in every mode."""
    always, never = f"{CACHE}.mode=always", f"{CACHE}.mode=never"
    coalesce, boundary = "engine.reduction=coalesce", "engine.reduction=boundary"
    resident, gathered = "engine.resident_parameters=true", "engine.resident_parameters=false"
    jobs = [
        job("full/plain", never, gathered),
        job("full/auto", boundary, gathered),
        job("full/boundary", always, boundary, gathered),
        job("full/coalesce", always, coalesce, gathered),
        job("full/boundary resident", always, boundary, resident),
        job("full/coalesce resident", always, coalesce, resident),
        job("adapter/plain", never, gathered, ADAPTER),
        job("adapter/boundary", always, boundary, gathered, ADAPTER),
        job("adapter/coalesce", always, coalesce, gathered, ADAPTER),
        job("adapter/two packs a chunk", f"{CACHE}.packs=2", boundary, gathered, ADAPTER),
        job("adapter/resident", always, coalesce, resident, ADAPTER),
        job("adapter/recomputed", always, gathered, ADAPTER, "model.checkpoint_activations=true"),
        job("adapter/not replayed", always, gathered, ADAPTER, replay=False),
    ]
    return launch(jobs, world_size=2, folder=tmp_path_factory.mktemp("cache"), worker=WORKER)


def distance(left, right) -> float:
    """Norm of the difference of all gradients over the norm of the right ones."""
    assert left["gradients"].keys() == right["gradients"].keys()
    squares = [
        ((left["gradients"][n] - g).double().square().sum(), g.double().square().sum())
        for n, g in right["gradients"].items()
    ]
    return (sum(d for d, _ in squares) / sum(n for _, n in squares)).sqrt().item()


MODES = [
    "full/boundary",
    "full/coalesce",
    "full/boundary resident",
    "full/coalesce resident",
    "adapter/boundary",
    "adapter/coalesce",
    "adapter/two packs a chunk",
    "adapter/resident",
    "adapter/recomputed",
]


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_gradients_equal_those_of_all_packs_at_once(found, mode) -> None:
    plain, cached = found[f"{mode.split('/')[0]}/plain"], found[mode]
    assert plain["packs"] >= 3
    assert cached["sum"] == pytest.approx(plain["sum"], rel=1e-6)
    assert distance(cached, plain) < 1e-6  # float32; only the order of sums differs
    assert torch.equal(cached["drawn_next"], plain["drawn_next"])  # the generators went as far
    assert cached["second_loss"] == pytest.approx(plain["second_loss"], rel=1e-5)


@pytest.mark.slow
def test_without_replayed_dropout_the_gradient_would_be_another(found) -> None:
    assert distance(found["adapter/not replayed"], found["adapter/plain"]) > 1e-2


@pytest.mark.slow
def test_a_rank_with_several_packs_takes_the_cache_by_itself(found) -> None:
    assert found["full/auto"]["calls"] == found["full/boundary"]["calls"]
    assert found["full/auto"]["second_loss"] == found["full/boundary"]["second_loss"]


@pytest.mark.slow
def test_coalescing_scatters_once_and_residency_gathers_once(found) -> None:
    plain, coalesced = found["full/plain"], found["full/coalesce"]
    assert coalesced["bytes"]["reduce_scatter_tensor"] == plain["bytes"]["reduce_scatter_tensor"]
    boundary = found["full/boundary"]
    chunks = boundary["packs"]
    assert (
        boundary["bytes"]["reduce_scatter_tensor"]
        > (chunks - 0.5) * (plain["bytes"]["reduce_scatter_tensor"])
    )
    resident = found["full/coalesce resident"]
    assert (
        resident["bytes"]["all_gather_into_tensor"] * 2 * chunks
        < (coalesced["bytes"]["all_gather_into_tensor"])
    )
