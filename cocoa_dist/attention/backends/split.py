"""Problems of one shape in one batched SDPA call each: exact, no padding, the CPU's default."""

import torch
import torch.nn.functional as F
from torch import Tensor

from cocoa_dist.attention.gather import gather_rows
from cocoa_dist.attention.plan import AttentionPlan, Bucket


def missing(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return None: it runs everywhere."""
    return None


def run(
    q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, plan: AttentionPlan, scale: float | None
) -> Tensor:
    """Attention bucket by bucket, (T, H, K)."""
    buckets = plan.buckets
    rows_q = [shape.count * shape.n_q for shape in buckets.shapes]
    rows_k = [shape.count * shape.n_k for shape in buckets.shapes]
    parts = zip(
        buckets.shapes,
        torch.split(gather_rows(q_THK, buckets.queries), rows_q),
        torch.split(gather_rows(k_TGK, buckets.keys), rows_k),
        torch.split(gather_rows(v_TGK, buckets.keys), rows_k),
        strict=True,
    )
    out = torch.cat([_one_shape(shape, q, k, v, scale) for shape, q, k, v in parts])
    return gather_rows(out, buckets.restore)


def _one_shape(
    shape: Bucket, q_RHK: Tensor, k_RGK: Tensor, v_RGK: Tensor, scale: float | None
) -> Tensor:
    square = shape.n_q == shape.n_k
    mask = None if square or not shape.causal else _bottom_right(shape, q_RHK.device)
    out_BHQK = F.scaled_dot_product_attention(
        _batched(q_RHK, shape.count),
        _batched(k_RGK, shape.count),
        _batched(v_RGK, shape.count),
        attn_mask=mask,
        is_causal=shape.causal and square,
        scale=scale,
        enable_gqa=q_RHK.shape[1] != k_RGK.shape[1],
    )
    return out_BHQK.transpose(1, 2).flatten(0, 1)


def _batched(rows: Tensor, count: int) -> Tensor:
    """(count * n, heads, K) -> (count, heads, n, K)."""
    return rows.view(count, -1, *rows.shape[1:]).transpose(1, 2)


def _bottom_right(shape: Bucket, device: torch.device) -> Tensor:
    """Causal table (n_q, n_k) whose last query sees all keys; SDPA's own is top-left."""
    visible = torch.ones(shape.n_q, shape.n_k, dtype=torch.bool, device=device)
    return visible.tril(shape.n_k - shape.n_q)
