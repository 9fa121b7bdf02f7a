"""What a step costs the machine: FLOPs of the model, memory of the GPU.

On a CPU nothing is said of a GPU; resident memory and CPU time are the exporter's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cocoa_dist.batch import PackedBatch
from cocoa_dist.model.embedder import EmbeddingModel

# Dense bfloat16 FLOPs a second, from the makers' data sheets; the first name that fits counts.
PEAK_FLOPS: Mapping[str, float] = {
    "A100": 312e12,
    "L40S": 362e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
}
_MEMORY = {
    "allocated": "allocated_bytes.all.current",
    "reserved": "reserved_bytes.all.current",
    "peak": "allocated_bytes.all.peak",
}


@dataclass(frozen=True)
class GpuMemory:
    """Memory of this rank's GPU as torch keeps it, in bytes."""

    by_kind: Mapping[str, int]  # allocated, reserved, peak (of allocated)
    retries: int  # allocations that first had to empty torch's cache


def gpu_memory(device: torch.device) -> GpuMemory | None:
    """Return what torch holds of the GPU; None on a CPU. Waits for nothing."""
    if device.type != "cuda":
        return None
    stats = torch.cuda.memory_stats(device)
    by_kind = {kind: int(stats.get(key, 0)) for kind, key in _MEMORY.items()}
    return GpuMemory(by_kind, int(stats.get("num_alloc_retries", 0)))


def peak_flops(device: torch.device) -> float | None:
    """Return what the device could do a second; None for a CPU and for cards that are not known."""
    if device.type != "cuda":
        return None
    return peak_of(torch.cuda.get_device_name(device))


def peak_of(card: str) -> float | None:
    """Return the peak of a card by the name that its driver gives it."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in card), None)


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of a step by what it is made of, forward and backward; a product and its sum are two.

    Real tokens, patches, labels and visible pairs only: no filler, nothing that is computed twice.
    What torch counts where all weights are trained; a frozen model's first layer is taken to pass
    a gradient on, which it need not. Left out: norms, rotations and the similarities of a loss.
    """

    token: float
    patch: float
    visual_token: float
    label: float
    hidden: float  # visual token that is rebuilt
    read: float  # row that a head reads: what the last layer does for no other
    pair: float  # (row, key) that attention sees, in all text layers
    patch_pair: float  # ... in the vision blocks that see whole pictures
    window_pair: float  # ... in those that see windows
    patches_a_token: int

    @staticmethod
    def of_model(model: EmbeddingModel, *, text_logits: bool, patches_a_token: int) -> "StepFlops":
        """Count a model that is whole (before an engine has cut it)."""
        found = dict.fromkeys(("token", "patch", "visual_token", "label", "hidden", "read"), 0.0)
        trained = dict.fromkeys(("visual", "text"), False)
        for name, parameter in model.named_parameters():
            trained["visual" if ".visual." in name else "text"] |= parameter.requires_grad
        last = f"language_model.layers.{len(model.core.language_model.layers) - 1}.mlp."
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear | nn.Conv3d):
                kind = "read" if last in name and model.skips_rows else _kind(name)
                if kind != "label" or text_logits:
                    below = trained["visual"] if ".visual." in name else any(trained.values())
                    passed_on = below and ".patch_embed." not in name  # pixels have no gradient
                    passes = 1 + module.weight.requires_grad + passed_on
                    found[kind] += 2.0 * module.weight.numel() * passes
        scores = _Scores.of_model(model)
        vision_passes = 3.0 if trained["visual"] else 1.0
        text_passes = 3.0 if any(trained.values()) else 1.0
        return StepFlops(
            **found,
            pair=text_passes * scores.pair,
            patch_pair=vision_passes * scores.patch_pair,
            window_pair=vision_passes * scores.window_pair,
            patches_a_token=patches_a_token,
        )

    def of_packs(self, packs: Sequence[PackedBatch]) -> float:
        """Return the FLOPs of this rank's packs."""
        total = 0.0
        for pack in packs:
            total += self.token * pack.num_tokens + self.label * len(pack.labels)
            total += (self.visual_token + self.patch * self.patches_a_token) * len(pack.image_rows)
            rows_read = len(pack.label_rows) + len(pack.pool_rows)
            if pack.bridge_rows.shape[1] > 1:
                rows_read += pack.bridge_rows.numel()
            total += self.read * rows_read
            total += self.hidden * len(pack.patch_rows) + self.pair * pack.plan.visible_area
            if len(pack.image_rows):  # else its picture is a filler
                total += self.patch_pair * pack.vision.plan.visible_area
                windows = pack.vision.window_plan
                total += self.window_pair * (windows.visible_area if windows else 0)
        return total


@dataclass(frozen=True)
class _Scores:
    """Forward FLOPs of one visible pair: its score, and its part of the mean of values."""

    pair: float
    patch_pair: float
    window_pair: float

    @staticmethod
    def of_model(model: EmbeddingModel) -> "_Scores":
        text: Any = model.core.language_model.config
        head_width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        layers = len(model.core.language_model.layers) + bool(model.heads.patch_values)
        blocks = [block.attn for block in model.core.visual.blocks]
        windowed = sum(attention.windowed for attention in blocks)
        one = 4.0 * blocks[0].qkv.out_features / 3
        return _Scores(
            pair=4.0 * text.num_attention_heads * head_width * layers,
            patch_pair=one * (len(blocks) - windowed),
            window_pair=one * windowed,
        )


def _kind(name: str) -> str:
    """Return what a linear layer is applied to once."""
    if ".visual." in name:
        return "visual_token" if "merger" in name else "patch"
    if name.startswith("patch_decoder.to_pixels"):
        return "hidden"
    return "label" if name.endswith("lm_head") else "token"
