"""Reconstruction: cross-entropy of hidden or next tokens, squared error of hidden patches.

Serves the joint stage (CoCoA arXiv 2603.01471, MoCa arXiv 2506.23115), the EOS-bridged stage and
next-token training alike: which rows are supervised is the data's business.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cocoa_dist.batch import PackedBatch
from cocoa_dist.model.embedder import ModelOutput
from cocoa_dist.model.heads import HeadsConfig
from cocoa_dist.objectives.base import BRIDGE_MEASURES, Measures, measure_bridge


class Reconstruction:
    """Text term in nats per supervised token; image term in squared normalised pixel units."""

    step_wide = False

    def __init__(
        self, *, image_weight: float = 0.0, patch_values: int = 0, learnt_mask: bool = False
    ) -> None:
        """`patch_values` C' > 0 turns the image term on, weighted by `image_weight`.

        `learnt_mask`: the model replaces hidden visual tokens, their pixels are shown to the tower.
        """
        self.measures = Measures("right", "asked", "texts", "hidden", "visual", *BRIDGE_MEASURES)
        self.heads = HeadsConfig(
            text_logits=True, patch_values=patch_values, learnt_mask=learnt_mask
        )
        self.weights: Mapping[str, float] = {"text": 1.0}
        if patch_values:
            self.weights = {"text": 1.0, "image": image_weight}

    def counts(self, packs: Sequence[PackedBatch]) -> dict[str, float]:
        """Supervised tokens; pixels of hidden patches (values of one frame)."""
        counts = {"text": float(sum(len(pack.labels) for pack in packs))}
        if "image" in self.weights:
            counts["image"] = float(sum(pack.patch_targets.numel() for pack in packs))
        return counts

    def sums(
        self, outputs: Sequence[ModelOutput], packs: Sequence[PackedBatch]
    ) -> dict[str, Tensor]:
        """Sum of cross-entropy, and of squared error, over the packs."""
        sums = {"text": _total([_text_sum(o, p) for o, p in zip(outputs, packs, strict=True)])}
        if "image" in self.weights:
            errors = [_image_sum(o, p) for o, p in zip(outputs, packs, strict=True)]
            sums["image"] = _total(errors)
        for output, pack in zip(outputs, packs, strict=True):
            self._measure(output, pack)
        return sums

    @torch.no_grad()
    def _measure(self, output: ModelOutput, pack: PackedBatch) -> None:
        """Count tokens that were asked for, those guessed right, and hidden visual tokens."""
        assert output.logits_SV is not None
        self.measures.add(
            right=(output.logits_SV.argmax(dim=-1) == pack.labels).sum(),
            asked=len(pack.labels),
            texts=len(pack.input_ids) - len(pack.image_rows),
            hidden=len(pack.patch_rows),
            visual=len(pack.image_rows),
        )
        measure_bridge(self.measures, output, pack)

    def health(self, measured: Mapping[str, float]) -> dict[str, float]:
        """Give the shares of tokens asked for, guessed right, and of visual tokens hidden.

        Where a bridge is several tokens, also how alike these are.
        """
        shares = {
            "token_accuracy": ("right", "asked"),
            "asked_token_ratio": ("asked", "texts"),
            "hidden_patch_ratio": ("hidden", "visual"),
            "token_similarity": BRIDGE_MEASURES,
        }
        return {
            name: measured[part] / measured[whole]
            for name, (part, whole) in shares.items()
            if measured[whole]
        }


def _text_sum(output: ModelOutput, pack: PackedBatch) -> Tensor:
    assert output.logits_SV is not None
    return F.cross_entropy(output.logits_SV.float(), pack.labels, reduction="sum")


def _image_sum(output: ModelOutput, pack: PackedBatch) -> Tensor:
    assert output.patches_RC is not None
    return (output.patches_RC.float() - pack.patch_targets).square().sum()


def _total(parts: list[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
