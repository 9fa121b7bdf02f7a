"""The same numbers on any number of ranks, in any packing, with ZeRO-3 or without."""

import pytest
import torch
from ranks import launch

SMALL = [
    "model.random.hidden_size=32",
    "model.random.num_heads=2",
    "model.random.num_key_value_heads=1",
    "model.random.intermediate_size=64",
    "model.random.vision_width=16",
]
STAGES = {
    "joint_reconstruction": "debug",
    "eos_bridged_reconstruction": "debug",
    "contrastive": "debug",
    "next_token": "quickstart_backbone",
}


def job(stage: str, *, tokens_per_pack: int, steps: int, engine: str = "zero3", batch: int = 12):
    # a whole batch is about 280 tokens (texts and pictures of 12 records)
    overrides = [
        *SMALL,
        f"data.tokens_per_pack={tokens_per_pack}",
        f"stages.{stage}.batch_size={batch}",
        f"stages.{stage}.steps=20",
        f"stages.{stage}.optimizer.warmup_steps=2",
    ]
    return {
        "name": stage,
        "recipe": STAGES[stage],
        "stage": stage,
        "overrides": overrides,
        "steps": steps,
        "engine": engine,
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One rank with several packs or one, two with several (not all full), four with one each."""
    root = tmp_path_factory.mktemp("parity")

    def of(name: str, *, world_size: int, tokens_per_pack: int):
        jobs = [job(stage, tokens_per_pack=tokens_per_pack, steps=3) for stage in STAGES]
        folder = root / name
        return launch(jobs, world_size=world_size, folder=folder, compare_collectives=True)

    return {
        "many_packs": of("many_packs", world_size=1, tokens_per_pack=160),
        "one_pack": of("one_pack", world_size=1, tokens_per_pack=4096),
        "two_ranks": of("two_ranks", world_size=2, tokens_per_pack=80),
        "four_ranks": of("four_ranks", world_size=4, tokens_per_pack=4096),
    }


def assert_same(left, right):
    assert left["digests"] == right["digests"]
    # float32; sums run in another order over ranks and packs
    torch.testing.assert_close(
        torch.tensor(left["losses"]), torch.tensor(right["losses"]), rtol=1e-5, atol=1e-6
    )
    assert left["gradients"].keys() == right["gradients"].keys()
    scale = max(g.abs().max().item() for g in right["gradients"].values())
    for name, gradient in right["gradients"].items():
        torch.testing.assert_close(
            left["gradients"][name], gradient, rtol=1e-4, atol=1e-6 * max(scale, 1.0), msg=name
        )


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_one_rank_with_many_packs_equals_four_ranks_with_one(runs, stage) -> None:
    many, four = runs["many_packs"][stage], runs["four_ranks"][stage]
    assert many["packs"] >= 2
    assert four["packs"] == 1
    assert_same(many, four)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_packing_does_not_change_loss_or_gradient(runs, stage) -> None:
    many, one = runs["many_packs"][stage], runs["one_pack"][stage]
    assert one["packs"] == 1
    assert_same(many, one)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_several_packs_on_two_ranks_equal_one_pack_on_one(runs, stage) -> None:
    two, one = runs["two_ranks"][stage], runs["one_pack"][stage]
    assert two["packs"] >= 2
    assert_same(two, one)


@pytest.mark.slow
def test_zero3_on_two_ranks_equals_plain_torch_over_20_steps(tmp_path) -> None:
    jobs = [job(stage, tokens_per_pack=4096, steps=20) for stage in STAGES]
    plain = [{**j, "engine": "plain"} for j in jobs]
    ours = launch(jobs, world_size=2, folder=tmp_path / "zero3")
    theirs = launch(plain, world_size=1, folder=tmp_path / "plain")
    for stage in STAGES:
        left, right = ours[stage], theirs[stage]
        assert left["digests"] == right["digests"]
        torch.testing.assert_close(
            torch.tensor(left["losses"]), torch.tensor(right["losses"]), rtol=1e-5, atol=1e-5
        )
        torch.testing.assert_close(
            torch.tensor(left["norms"]), torch.tensor(right["norms"]), rtol=1e-3, atol=1e-5
        )
        assert left["losses"][-1] < left["losses"][0]
        for name, weight in right["weights"].items():  # float32, 20 steps of AdamW
            torch.testing.assert_close(
                left["weights"][name], weight, rtol=1e-3, atol=2e-4, msg=f"{stage} {name}"
            )
