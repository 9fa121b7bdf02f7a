"""Every option of the methods gives the loss and gradients of one rank on 2 and on 4 ranks."""

import pytest
import torch
from ranks import launch
from test_parity import SMALL

JOINT, BRIDGED = "joint_reconstruction", "eos_bridged_reconstruction"
GENERATED = ["objective={kind: next_token}", "attention.bridge_sees_target=false"]
# name: recipe, stage, overrides of the stage, overrides of the recipe
OPTIONS: dict[str, tuple[str, str, list[str], list[str]]] = {
    "CoMa, compression": ("debug_coma", "compression", [], []),
    "CoMa, vision tower trained": ("debug_coma", "compression", ["freeze_vision=false"], []),
    "CoMa, contrastive": ("debug_coma", "contrastive", [], []),
    "MoCa, documents": ("debug_moca", JOINT, [], []),
    "MoCa, contrastive over all tokens": ("debug_moca", "contrastive", [], []),
    "context hidden": ("debug", BRIDGED, ["objective.context_mask_ratio=0.4"], []),
    "separate views": ("debug", BRIDGED, ["data.separate_views=true"], []),
    "learnt vector for hidden patches": (
        *("debug", JOINT, ["objective.mask_replacement=learned"]),
        [],
    ),
    "learnt vector behind the first layers too": (
        *("debug", JOINT, ["objective.mask_replacement=learned"]),
        ["model.random.family=qwen3_vl"],
    ),
    "exact count": ("debug", JOINT, ["objective.mask_sampling=exact"], []),
    "spans and squares": (
        *("debug", JOINT, ["objective.text_mask_span=3", "objective.image_mask_block=2"]),
        [],
    ),
    "several bridge tokens": ("debug", BRIDGED, [], ["model.num_bridge_tokens=3"]),
    "several bridge tokens, contrastive": (
        *("debug", "contrastive", ["pooling=compression"]),
        ["model.num_bridge_tokens=3"],
    ),
    "bridge blind to the target": ("debug", BRIDGED, ["attention.bridge_sees_target=false"], []),
    "target generated from the bridge": (
        *("debug", BRIDGED, [*GENERATED, "attention.target_causal=true"]),
        [],
    ),
    "labels not shifted": ("debug", JOINT, ["objective.label_shift=false"], []),
    "normalised patches": ("debug", JOINT, ["objective.normalise_patches=true"], []),
}


def job(name: str, *, tokens_per_pack: int) -> dict[str, object]:
    recipe, stage, of_stage, of_recipe = OPTIONS[name]
    return {
        "name": name,
        "recipe": recipe,
        "stage": stage,
        "overrides": [
            *SMALL,
            f"data.tokens_per_pack={tokens_per_pack}",
            f"stages.{stage}.batch_size=12",
            f"stages.{stage}.steps=4",
            *(f"stages.{stage}.{override}" for override in of_stage),
            *of_recipe,
        ],
        "steps": 1,
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("methods")

    def of(name: str, *, world_size: int, tokens_per_pack: int):
        jobs = [job(option, tokens_per_pack=tokens_per_pack) for option in OPTIONS]
        return launch(jobs, world_size=world_size, folder=root / name)

    return {
        1: of("one", world_size=1, tokens_per_pack=4096),
        2: of("two", world_size=2, tokens_per_pack=160),
        4: of("four", world_size=4, tokens_per_pack=4096),
    }


@pytest.mark.slow
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("world_size", [2, 4])
def test_an_option_gives_the_numbers_of_one_rank(runs, option: str, world_size: int) -> None:
    """Float32; sums run in another order over ranks and packs."""
    found, one = runs[world_size][option], runs[1][option]
    assert found["digests"] == one["digests"]
    assert one["packs"] == 1
    assert world_size != 2 or found["packs"] >= 2
    losses = torch.tensor(found["losses"]), torch.tensor(one["losses"])
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
    assert found["gradients"].keys() == one["gradients"].keys()
    trained = {name: g for name, g in one["gradients"].items() if g is not None}
    scale = max(g.abs().max().item() for g in trained.values())
    assert scale > 0
    for name, gradient in trained.items():
        torch.testing.assert_close(
            found["gradients"][name], gradient, rtol=1e-5, atol=1e-5 * min(scale, 1.0), msg=name
        )


@pytest.mark.slow
def test_learnt_parameters_have_gradients_where_they_are_used(runs) -> None:
    for option, parameter in (
        ("CoMa, compression", "compression_tokens.rows"),
        ("CoMa, contrastive", "compression_tokens.rows"),
        ("several bridge tokens", "compression_tokens.rows"),
        ("learnt vector for hidden patches", "hidden_patch.vector"),
    ):
        for world_size in (1, 2, 4):
            assert runs[world_size][option]["gradients"][parameter].abs().max() > 0
