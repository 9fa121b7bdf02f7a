"""The reference: SDPA under the plan's full table. Quadratic in T, on any device and dtype."""

import torch
import torch.nn.functional as F
from torch import Tensor

from cocoa_dist.attention.plan import AttentionPlan


def missing(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return None: it runs everywhere."""
    return None


def run(
    q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, plan: AttentionPlan, scale: float | None
) -> Tensor:
    """Attention under the dense table, (T, H, K)."""
    out_HTK = F.scaled_dot_product_attention(
        q_THK.transpose(0, 1)[None],
        k_TGK.transpose(0, 1)[None],
        v_TGK.transpose(0, 1)[None],
        attn_mask=plan.visibility(),
        scale=scale,
        enable_gqa=q_THK.shape[1] != k_TGK.shape[1],
    )[0]
    return out_HTK.transpose(0, 1)
