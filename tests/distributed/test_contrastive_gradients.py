"""W ranks with batch B / W give the loss and gradients of one rank with batch B, for every option.

Plain and by GradCache, in one pack and in several. The data has false negatives across ranks.
"""

from pathlib import Path

import pytest
from pair_records import hard_records, write_pairs
from ranks import launch
from test_grad_cache import distance

WORKER = Path(__file__).with_name("contrastive_worker.py")
BATCH = 24
STAGE = "stages.contrastive"
NEGATIVES = f"{STAGE}.data.negatives=2"


def option(**fields: object) -> list[str]:
    return [f"{STAGE}.objective.{name}={value}" for name, value in fields.items()]


LATE = ["model.num_bridge_tokens=3", f"{STAGE}.pooling=late_interaction"]
OPTIONS = {
    "symmetric": [],
    "negatives": [NEGATIVES],
    "matryoshka": option(matryoshka="[8, 16, 32]", matryoshka_weights="[1, 1, 2]"),
    "learnable": option(learnable_temperature="true"),
    "sigmoid": option(loss="sigmoid", symmetric="false", bias=-2.0),
    "sigmoid, learnable": [
        NEGATIVES,
        *option(loss="sigmoid", symmetric="false", bias=-2.0, learnable_temperature="true"),
    ],
    "margin": [NEGATIVES, *option(false_negative_margin=0.01)],
    "distillation": [NEGATIVES, *option(distillation_weight=0.5)],
    "guide": [NEGATIVES, *option(guide="stage_start")],
    "late interaction": LATE,
    "late interaction, all": [
        *LATE,
        NEGATIVES,
        *option(
            matryoshka="[8, 32]",
            learnable_temperature="true",
            false_negative_margin=0.01,
            guide="stage_start",
            guide_margin=-0.005,
            distillation_weight=0.5,
        ),
    ],
    "all": [
        NEGATIVES,
        f"{STAGE}.data.negatives_choice=draw",
        f"{STAGE}.data.instruction=Find the picture",
        "engine.resident_parameters=false",
        *option(
            matryoshka="[8, 32]",
            learnable_temperature="true",
            false_negative_margin=0.01,
            distillation_weight=0.5,
        ),
    ],
}
LEARNABLE = ["learnable", "sigmoid, learnable"]
# ranks, tokens a pack, GradCache
WAYS = {
    "one rank, cached": (1, 220, "always"),
    "two ranks": (2, 4096, "never"),
    "two ranks, cached": (2, 160, "always"),
    "four ranks": (4, 110, "never"),
    "four ranks, cached": (4, 110, "always"),
}
REFERENCE = (1, 8192, "never")
SMALL = [
    "model.random.hidden_size=32",
    "model.random.num_heads=2",
    "model.random.num_key_value_heads=1",
    "model.random.intermediate_size=64",
    "model.random.vision_width=16",
]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Results by number of ranks, tokens a pack, GradCache and option."""
    folder = tmp_path_factory.mktemp("gradients")
    data = write_pairs(folder / "data", hard_records(BATCH))
    results = {}
    for ranks in (1, 2, 4):
        ways = {way for way in (*WAYS.values(), REFERENCE) if way[0] == ranks}
        jobs = [
            {
                "name": f"{tokens}/{cache}/{name}",
                # A second one shows what moved, and what did not.
                "steps": 2 if name in (*LEARNABLE, "guide") else 1,
                "overrides": [
                    *SMALL,
                    f"{STAGE}.data.sources={{a: {{path: {data}}}}}",
                    f"{STAGE}.batch_size={BATCH}",
                    f"{STAGE}.optimizer.warmup_steps=1",
                    f"data.tokens_per_pack={tokens}",
                    f"{STAGE}.objective.grad_cache.mode={cache}",
                    *overrides,
                ],
            }
            for _, tokens, cache in sorted(ways)
            for name, overrides in OPTIONS.items()
        ]
        results[ranks] = launch(jobs, world_size=ranks, folder=folder / str(ranks), worker=WORKER)
    return results


def result(found, way, name):
    ranks, tokens, cache = way
    return found[ranks][f"{tokens}/{cache}/{name}"]


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", OPTIONS)
def test_loss_and_gradients_are_those_of_one_rank(found, name, way) -> None:
    one, other = result(found, REFERENCE, name), result(found, WAYS[way], name)
    assert one["packs"] == 1
    if "cached" in way:
        assert other["packs"] > 1
    assert other["counts"] == one["counts"]
    assert other["sums"] == pytest.approx(one["sums"], rel=1e-5)
    # float32: sums run in another order over ranks and packs
    assert distance(other, one) < 1e-5
    assert other["losses"] == pytest.approx(one["losses"], rel=1e-4)
    assert other["health"][0] == pytest.approx(one["health"][0], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_the_same_picture_on_two_ranks_is_no_negative(found, ranks) -> None:
    way = next(way for way in WAYS.values() if way[0] == ranks)
    there, alone = result(found, way, "negatives"), result(found, REFERENCE, "negatives")
    apart = [
        identity
        for identity in alone["identities"][0]
        if sum(identity in of_rank for of_rank in there["identities"]) > 1
    ]
    assert apart  # the plan has put some on different ranks
    share = alone["health"][0]["false_negative_ratio"]
    assert share > 0
    assert there["health"][0]["false_negative_ratio"] == pytest.approx(share)
    hidden = alone["health"][0]["hidden_negative_ratio"]
    assert 0 < hidden < 1
    assert there["health"][0]["hidden_negative_ratio"] == pytest.approx(hidden)


@pytest.mark.slow
def test_every_option_changes_the_loss(found) -> None:
    losses = {name: result(found, REFERENCE, name)["losses"][0] for name in OPTIONS}
    del losses["learnable"]  # begins as the fixed one
    assert len(set(losses.values())) == len(losses)


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARNABLE)
def test_a_learnable_temperature_moves_alike_on_all_ranks(found, name) -> None:
    one = result(found, REFERENCE, name)
    assert one["health"][0]["temperature"] == pytest.approx(0.05)
    assert one["health"][1]["temperature"] != pytest.approx(0.05, rel=1e-5)
    assert set(one["similarity"]) == {
        "similarity.log_scale",
        *(["similarity.bias"] if name.startswith("sigmoid") else []),
    }
    for way in WAYS.values():
        other = result(found, way, name)
        for key, value in one["similarity"].items():
            assert other["similarity"][key].shape == (1,)
            assert other["similarity"][key].item() == pytest.approx(value.item(), rel=1e-5)
