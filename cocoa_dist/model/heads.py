"""What sits on the backbone: the patch decoder, pooling, and which heads a stage asks for."""

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cocoa_dist.attention.plan import AttentionPlan


@dataclass(frozen=True)
class HeadsConfig:
    """Which outputs a stage needs; what is not needed is not computed."""

    text_logits: bool = False
    patch_values: int = 0  # values a masked visual token is rebuilt to, C'; 0: no decoder
    embeddings: bool = False
    learnt_mask: bool = False  # hidden visual tokens become a learnt vector, behind the tower
    similarity: "SimilarityStart | None" = None  # how similarities are scaled, if that is trained


@dataclass(frozen=True)
class SimilarityStart:
    """Where a trained scale of similarities begins, and how far it may grow."""

    scale: float  # 1 / temperature
    max_scale: float
    bias: float | None = None  # None: the loss has none


class PatchDecoder(nn.Module):
    """Rebuilds masked visual tokens: one layer of the backbone's kind, then pixels.

    The layer starts as a copy of the backbone's middle one (MoCa, arXiv 2506.23115, whose decoder
    CoCoA follows).
    """

    def __init__(self, language_model: nn.Module, *, patch_values: int) -> None:
        super().__init__()
        layers: Any = language_model.layers
        width: int = language_model.config.hidden_size  # type: ignore[union-attr,assignment]
        self.layer = copy.deepcopy(layers[len(layers) // 2])
        dtype = next(self.layer.parameters()).dtype
        norm: Any = language_model.norm
        self.norm = copy.deepcopy(norm)
        self.to_pixels = nn.Linear(width, patch_values, dtype=dtype)

    def forward(
        self,
        hidden_TD: Tensor,
        *,
        rows: Tensor,
        plan: AttentionPlan,
        position_embeddings: tuple[Tensor, Tensor],
    ) -> Tensor:
        """Hidden states (T, D) -> pixels (R, C') of the listed rows, normalised units."""
        decoded = self.layer(
            hidden_TD[None], position_embeddings=position_embeddings, segment_plan=plan
        )
        predicted: Tensor = self.to_pixels(self.norm(decoded[0].index_select(0, rows)))
        return predicted


class SimilarityScale(nn.Module):
    """The log of the scale of similarities, and for a sigmoid loss their bias: one element each.

    The log is held below its limit before every update, by the optimizer, and in use, here; a
    gradient passes as if it were not, so it can come back (CLIP, arXiv 2103.00020, section 2.5).
    """

    def __init__(self, start: SimilarityStart, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.max_log_scale = math.log(start.max_scale)
        self.log_scale = nn.Parameter(torch.full((1,), math.log(start.scale), dtype=dtype))
        self.bias: nn.Parameter | None = None
        if start.bias is not None:
            self.bias = nn.Parameter(torch.full((1,), start.bias, dtype=dtype))

    def forward(self) -> Tensor:
        """Return scale and bias, (2,) float32."""
        log_scale = self.log_scale.float()
        beyond = (log_scale - self.max_log_scale).clamp(min=0.0).detach()
        bias = torch.zeros_like(log_scale) if self.bias is None else self.bias.float()
        return torch.cat([(log_scale - beyond).exp(), bias])


def pool(rows_LD: Tensor, *, index: Tensor, count: int, vectors: int = 1) -> Tensor:
    """Average rows (L, D) into `count` embeddings (E, D), float32, L2-normalised.

    `index` says which embedding each row belongs to; one row each is last-token pooling. With
    several `vectors` an embedding, its rows stay apart: (E, K, D), each of unit length.
    """
    picked = rows_LD.float()
    if vectors > 1:
        picked = picked.view(count, vectors, rows_LD.shape[1])
    elif len(rows_LD) != count:
        # Not bincount: it makes the host wait for a GPU.
        size = picked.new_zeros(count).index_add(0, index, picked.new_ones(len(index)))
        total = picked.new_zeros(count, picked.shape[1]).index_add(0, index, picked)
        picked = total / size.clamp(min=1)[:, None]
    return F.normalize(picked, dim=-1)
