"""FLOPs of a step against torch's own counter, and what is said of a GPU."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cocoa_dist.batch import PackedBatch
from cocoa_dist.config import load_recipe
from cocoa_dist.train.build import StageParts, build_parts, first_steps
from cocoa_dist.train.resources import StepFlops, gpu_memory, peak_flops, peak_of
from launcher.plan.hardware import CARDS

ADAPTER = "{kind: lora, rank: 2, alpha: 4, targets: [q_proj, v_proj]}"
STAGES = ("joint_reconstruction", "eos_bridged_reconstruction", "contrastive")
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


def stage_parts(stage: str, *overrides: str) -> tuple[StageParts, tuple[PackedBatch, ...]]:
    """Return a stage of debug and its first packs, pictures of several windows in them."""
    pictures = ["data.image.min_pixels=4096", "data.image.max_pixels=4096"]
    alike = [f"stages.{stage}.init_from=model", "data.patches_per_pack=2048", *pictures]
    config = load_recipe("debug", [*alike, *overrides])
    parts = build_parts(config, stage, run_dir=None)
    packs = first_steps(config, stage, parts)[0].packs
    assert all(len(pack.image_rows) and not pack.num_filler_images for pack in packs)
    return parts, packs


def flops_of(parts: StageParts) -> StepFlops:
    return StepFlops.of_model(
        parts.model,
        text_logits=parts.objective.heads.text_logits,
        patches_a_token=parts.geometry.merge**2,
    )


def counted_by_torch(parts: StageParts, packs) -> float:
    """Return torch's count of the model, attention as plain products, without rotary angles.

    The rest of torch's list has no formula for what attention is on a CPU.
    """
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        outputs = [parts.model(pack) for pack in packs]
        values = [v for one in outputs for k, v in one.items() if k != "bridges_BKD"]
        sum(value.float().square().sum() for value in values).backward()
    by_module = counter.get_flop_counts()
    whole = sum(by_module["Global"].values())
    angles = [sum(v.values()) for k, v in by_module.items() if k.endswith("rotary_emb")]
    return whole - sum(angles)


def drawn_whole(flops: StepFlops, packs) -> float:
    """Return FLOPs with causal problems counted as their whole rectangle, as torch counts them."""
    rectangles = [
        sum(q * k for c in p.plan.calls for q, k in zip(c.lengths_q, c.lengths_k, strict=True))
        for p in packs
    ]
    hidden = [r - p.plan.visible_area for r, p in zip(rectangles, packs, strict=True)]
    return flops.of_packs(packs) + flops.pair * sum(hidden)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stage", STAGES)
def test_flops_are_exactly_those_that_torch_counts(stage, family) -> None:
    parts, packs = stage_parts(stage, f"model.random.family={family}")
    assert flops_of(parts).of_packs(packs) == counted_by_torch(parts, packs)


@pytest.mark.parametrize(
    ("overrides", "within"),
    [
        (("stages.contrastive.freeze_vision=true",), 0.0),
        (("stages.contrastive.attention.rule=causal",), 0.0),
        (("model.num_bridge_tokens=3",), 1e-3),  # rows are looked up by a product, which is none
        # what is below the first adapter passes no gradient on: one projection of two layers
        ((f"stages.contrastive.adapter={ADAPTER}",), 0.05),
    ],
    ids=["frozen_vision", "causal", "learnt_tokens", "adapter"],
)
def test_flops_of_other_stages_are_those_that_torch_counts(overrides, within) -> None:
    parts, packs = stage_parts("contrastive", *overrides)
    found = drawn_whole(flops_of(parts), packs)
    assert found == pytest.approx(counted_by_torch(parts, packs), rel=within, abs=0.5)


def test_an_output_head_of_its_own_is_counted_once() -> None:
    """Released 7B models are not tied: what they look words up in is no product."""
    parts, _ = stage_parts("joint_reconstruction")
    tied, backbone = flops_of(parts), parts.model.backbone
    backbone.lm_head.weight = torch.nn.Parameter(backbone.lm_head.weight.detach().clone())
    assert len([n for n, _ in parts.model.named_parameters() if "lm_head" in n]) == 1
    assert flops_of(parts) == tied


def test_a_filler_costs_nothing() -> None:
    parts, packs = stage_parts("joint_reconstruction")
    flops, none = flops_of(parts), torch.empty(0, dtype=torch.int64)
    alone = replace(packs[0], image_rows=none)
    seen = flops.patch_pair * packs[0].vision.plan.visible_area
    each = flops.visual_token + flops.patch * flops.patches_a_token
    found = flops.of_packs([packs[0]]) - flops.of_packs([alone])
    assert found == seen + each * len(packs[0].image_rows)


def test_a_cpu_has_no_memory_and_no_peak_to_speak_of() -> None:
    cpu = torch.device("cpu")
    assert gpu_memory(cpu) is None
    assert peak_flops(cpu) is None


def test_cards_are_known_by_the_names_of_their_drivers() -> None:
    for name, card in {
        "NVIDIA A100-SXM4-80GB": "a100-80",
        "NVIDIA L40S": "l40s",
        "NVIDIA H100 80GB HBM3": "h100",
        "NVIDIA H200": "h200",
        "NVIDIA B200": "b200",
    }.items():
        assert peak_of(name) == CARDS[card].peak_flops
    assert peak_of("NVIDIA GeForce RTX 3090") is None
