"""What a step costs the machine: FLOPs of the model, memory of the GPU.

On a CPU nothing is said of a GPU; resident memory and CPU time are the exporter's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from cocoa_dist.batch import PackedBatch

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
    """FLOPs of a step by what it is made of, forward and backward: 2 a weight and pass.

    Real tokens, patches and labels only, nothing that is computed twice. Attention scores are left
    out, so that the utilisation made of it is a lower bound, the lower the longer samples are.
    """

    token: float
    patch: float
    visual_token: float
    label: float
    hidden: float  # visual token that is rebuilt
    patches_a_token: int

    @staticmethod
    def of_model(model: nn.Module, *, text_logits: bool, patches_a_token: int) -> "StepFlops":
        """Count the weights of a model that is whole (before an engine has cut it)."""
        found = dict.fromkeys(("token", "patch", "visual_token", "label", "hidden"), 0.0)
        trained = {_kind(n): False for n, _ in model.named_parameters()}
        for name, parameter in model.named_parameters():
            trained[_kind(name)] |= parameter.requires_grad
        for name, parameter in model.named_parameters():
            kind = _kind(name)
            if parameter.dim() < 2 or (kind == "label" and not text_logits):
                continue
            # A frozen part below nothing trained has no backward pass, others at least its half.
            backward = 2 if parameter.requires_grad else int(kind == "token" or trained[kind])
            found[kind] += 2.0 * parameter.numel() * (1 + backward)
        return StepFlops(**found, patches_a_token=patches_a_token)

    def of_packs(self, packs: Sequence[PackedBatch]) -> float:
        """Return the FLOPs of this rank's packs."""
        total = 0.0
        for pack in packs:
            total += self.token * pack.num_tokens + self.label * len(pack.labels)
            total += (self.visual_token + self.patch * self.patches_a_token) * len(pack.image_rows)
            total += self.hidden * len(pack.patch_rows)
        return total


def _kind(name: str) -> str:
    """Return what a parameter is applied to once."""
    if ".visual." in name:
        return "visual_token" if ".merger" in name else "patch"
    if name.startswith("patch_decoder.to_pixels."):
        return "hidden"
    return "label" if "embed_tokens." in name or "lm_head." in name else "token"
