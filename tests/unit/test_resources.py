"""FLOPs of a step against torch's own counter, and what is said of a GPU."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cocoa_dist.config import load_recipe
from cocoa_dist.train.build import build_parts, first_steps
from cocoa_dist.train.resources import StepFlops, gpu_memory, peak_flops, peak_of
from launcher.plan.hardware import CARDS

ATTENTION = ("scaled_dot_product", "bmm")
ADAPTER = "{kind: lora, rank: 2, alpha: 4, targets: [q_proj, v_proj]}"


def counted(stage: str, *overrides: str) -> tuple[float, float]:
    """Return what StepFlops says of a step, and what torch counts without attention scores."""
    config = load_recipe("debug", [f"stages.{stage}.init_from=model", *overrides])
    parts = build_parts(config, stage, run_dir=None)
    packs = first_steps(config, stage, parts)[0].packs
    flops = StepFlops.of_model(
        parts.model,
        text_logits=parts.objective.heads.text_logits,
        patches_a_token=parts.geometry.merge**2,
    )
    with FlopCounterMode(display=False) as counter:
        sums = parts.objective.sums([parts.model(pack) for pack in packs], packs)
        sum(sums.values()).backward()
    by_kind = counter.get_flop_counts()["Global"]
    matrices = sum(v for kind, v in by_kind.items() if not any(a in str(kind) for a in ATTENTION))
    return flops.of_packs(packs), matrices


@pytest.mark.parametrize(
    ("stage", "overrides", "within"),
    [
        ("joint_reconstruction", (), 0.1),
        ("eos_bridged_reconstruction", (), 0.1),
        ("contrastive", (), 0.1),
        ("contrastive", ("stages.contrastive.freeze_vision=true",), 0.1),
        ("contrastive", (f"stages.contrastive.adapter={ADAPTER}",), 0.1),
    ],
    ids=["pictures", "words", "pairs", "frozen_vision", "adapter"],
)
def test_flops_are_those_that_torch_counts(stage, overrides, within) -> None:
    found, expected = counted(stage, *overrides)
    assert found == pytest.approx(expected, rel=within)


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
