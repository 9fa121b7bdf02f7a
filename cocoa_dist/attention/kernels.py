"""Runs a plan. All backends share one signature and give the same numbers.

`dense` is the reference: SDPA under the plan's full table, quadratic in T. `split` gathers the
problems of one shape into one batched SDPA call each: exact, no padding, the CPU default.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from cocoa_dist.attention.plan import AttentionPlan, PlanCall

BACKENDS = ("dense", "split")


def available_backends() -> tuple[str, ...]:
    """Names that `segment_attention` takes here, besides `auto`."""
    return BACKENDS


def resolve_backend(backend: str) -> str:
    """Turn `auto` into the fastest backend that is here. Raises ValueError for unknown names."""
    if backend == "auto":
        return "split"
    if backend not in BACKENDS:
        raise ValueError(
            f"unknown attention backend '{backend}' (have: auto, {', '.join(BACKENDS)})"
        )
    return backend


def segment_attention(
    q_THK: Tensor,
    k_TGK: Tensor,
    v_TGK: Tensor,
    *,
    plan: AttentionPlan,
    backend: str = "auto",
    scale: float | None = None,
) -> Tensor:
    """Attention in which every row sees exactly what the plan allows; returns (T, H, K).

    `scale` multiplies the scores; default 1 / sqrt(K). Raises ValueError for shapes, dtypes or
    devices that do not fit, before any kernel runs.
    """
    _check(q_THK, k_TGK, v_TGK, plan)
    if resolve_backend(backend) == "dense":
        return _dense(q_THK, k_TGK, v_TGK, plan, scale)
    return _split(q_THK, k_TGK, v_TGK, plan, scale)


def _check(q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, plan: AttentionPlan) -> None:
    if q_THK.dim() != 3 or k_TGK.shape != v_TGK.shape or k_TGK.dim() != 3:
        raise ValueError(
            f"expected q (T, H, K) and k, v (T, G, K), found {tuple(q_THK.shape)}, "
            f"{tuple(k_TGK.shape)}, {tuple(v_TGK.shape)}"
        )
    tokens, heads, width = q_THK.shape
    if tokens != plan.num_tokens or k_TGK.shape[0] != tokens:
        raise ValueError(
            f"the plan is for {plan.num_tokens} tokens, q has {tokens}, k has {k_TGK.shape[0]}"
        )
    if heads % k_TGK.shape[1] or width != k_TGK.shape[2]:
        raise ValueError(
            f"{heads} query heads of width {width} do not fit {k_TGK.shape[1]} key heads of "
            f"width {k_TGK.shape[2]}"
        )
    if not (q_THK.dtype == k_TGK.dtype == v_TGK.dtype):
        raise ValueError(f"dtypes differ: {q_THK.dtype}, {k_TGK.dtype}, {v_TGK.dtype}")
    if not (q_THK.device == k_TGK.device == plan.lo.device):
        raise ValueError(
            f"devices differ: q {q_THK.device}, k {k_TGK.device}, plan {plan.lo.device}"
        )


def _dense(
    q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, plan: AttentionPlan, scale: float | None
) -> Tensor:
    out_HTK = F.scaled_dot_product_attention(
        q_THK.transpose(0, 1)[None],
        k_TGK.transpose(0, 1)[None],
        v_TGK.transpose(0, 1)[None],
        attn_mask=plan.visibility(),
        scale=scale,
        enable_gqa=q_THK.shape[1] != k_TGK.shape[1],
    )[0]
    return out_HTK.transpose(0, 1)


def _split(
    q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, plan: AttentionPlan, scale: float | None
) -> Tensor:
    """One batched SDPA for each shape of problem; rows are put back by one gather at the end."""
    parts = [part for call in plan.calls for part in _split_call(q_THK, k_TGK, v_TGK, call, scale)]
    return torch.cat(parts).index_select(0, plan.restore_order)


def _split_call(
    q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, call: PlanCall, scale: float | None
) -> list[Tensor]:
    buckets = call.buckets
    rows_q = [shape.count * shape.n_q for shape in buckets.shapes]
    rows_k = [shape.count * shape.n_k for shape in buckets.shapes]
    gathered = zip(
        buckets.shapes,
        torch.split(q_THK.index_select(0, buckets.q_order), rows_q),
        torch.split(k_TGK.index_select(0, buckets.k_order), rows_k),
        torch.split(v_TGK.index_select(0, buckets.k_order), rows_k),
        strict=True,
    )
    out = []
    for shape, q, k, v in gathered:
        square = shape.n_q == shape.n_k
        out_BHQK = F.scaled_dot_product_attention(
            q.view(shape.count, shape.n_q, *q.shape[1:]).transpose(1, 2),
            k.view(shape.count, shape.n_k, *k.shape[1:]).transpose(1, 2),
            v.view(shape.count, shape.n_k, *v.shape[1:]).transpose(1, 2),
            attn_mask=None if square or not call.causal else _bottom_right(shape.n_q, shape.n_k, q),
            is_causal=call.causal and square,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        out.append(out_BHQK.transpose(1, 2).flatten(0, 1))
    return out


def _bottom_right(n_q: int, n_k: int, like: Tensor) -> Tensor:
    """Causal table (n_q, n_k) whose last query sees all keys; SDPA's own is top-left."""
    if n_k < n_q:
        raise ValueError(f"a causal problem has {n_q} queries and only {n_k} keys")
    visible = torch.ones(n_q, n_k, dtype=torch.bool, device=like.device)
    return visible.tril(n_k - n_q)
