"""torch.nn.attention.varlen: FlashAttention-2 inside torch's own CUDA wheel, nothing to install."""

import inspect
from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from cocoa_dist.attention.gather import gather_rows, part_rows, place_rows
from cocoa_dist.attention.plan import AttentionPlan, PlanCall

HALF_DTYPES = (torch.float16, torch.bfloat16)
_OLDEST_CAPABILITY = (8, 0)

# (q, k, v, call, scale) -> out, for the rows of one call
Kernel = Callable[[Tensor, Tensor, Tensor, PlanCall, float | None], Tensor]


def missing(device: torch.device, dtype: torch.dtype) -> str | None:
    """Say why the kernel cannot run on `device` in `dtype`, or None."""
    fault = missing_half_gpu(device, dtype)
    if fault is not None:
        return fault
    if find_spec("torch.nn.attention.varlen") is None:
        return f"torch {torch.__version__} has no torch.nn.attention.varlen: install torch >= 2.10"
    return None


def missing_half_gpu(device: torch.device, dtype: torch.dtype) -> str | None:
    """Say why no flash-attention kernel can run on `device` in `dtype`, or None."""
    if device.type != "cuda":
        return f"it needs a CUDA device, found {device.type}"
    if not torch.cuda.is_available():
        return f"it needs a CUDA device, torch {torch.__version__} finds none"
    if dtype not in HALF_DTYPES:
        return f"it computes in float16 or bfloat16, found {dtype}: set model.dtype=bfloat16"
    capability = torch.cuda.get_device_capability(device)
    if capability < _OLDEST_CAPABILITY:
        return f"it needs compute capability 8.0 or newer, found {capability[0]}.{capability[1]}"
    return None


def run(
    q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, plan: AttentionPlan, scale: float | None
) -> Tensor:
    """Attention by one varlen call for each causality class, (T, H, K)."""
    return run_calls(q_THK, k_TGK, v_TGK, plan, scale, kernel=_kernel)


def run_calls(
    q_THK: Tensor,
    k_TGK: Tensor,
    v_TGK: Tensor,
    plan: AttentionPlan,
    scale: float | None,
    *,
    kernel: Kernel,
) -> Tensor:
    """Gather, run `kernel` once for each call of the plan, put the results back in order."""
    rows_k = [call.num_k for call in plan.calls]
    parts = zip(
        part_rows(q_THK, plan.query_rows),
        torch.split(gather_rows(k_TGK, plan.keys), rows_k),
        torch.split(gather_rows(v_TGK, plan.keys), rows_k),
        plan.calls,
        strict=True,
    )
    outs = [kernel(q, k, v, call, scale) for q, k, v, call in parts]
    return place_rows(outs, plan.query_rows)


def flash_kernel(function: Any) -> Kernel:
    """Return a flash-attention package's `flash_attn_varlen_func` as a kernel for `run_calls`.

    Called by keyword: the order of its parameters has changed between releases.
    """

    def kernel(q: Tensor, k: Tensor, v: Tensor, call: PlanCall, scale: float | None) -> Tensor:
        out = function(
            q=q,
            k=k,
            v=v,
            cu_seqlens_q=call.cu_seqlens_q,
            cu_seqlens_k=call.cu_seqlens_k,
            max_seqlen_q=call.max_seqlen_q,
            max_seqlen_k=call.max_seqlen_k,
            softmax_scale=scale,
            causal=call.causal,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        first: Tensor = out[0] if isinstance(out, tuple) else out
        return first

    return kernel


def _kernel(q: Tensor, k: Tensor, v: Tensor, call: PlanCall, scale: float | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    if q.shape[1] != k.shape[1] and "enable_gqa" not in _options():
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    if "scale" not in _options():  # at first it was always 1 / sqrt(K)
        q = q if scale is None else q * (scale * q.shape[2] ** 0.5)
    out = varlen_attn(
        q,
        k,
        v,
        call.cu_seqlens_q,
        call.cu_seqlens_k,
        call.max_seqlen_q,
        call.max_seqlen_k,
        **_how(causal=call.causal, grouped=q.shape[1] != k.shape[1], scale=scale),
    )
    assert isinstance(out, Tensor)  # with `return_aux` it would be a pair
    return out


def _how(*, causal: bool, grouped: bool, scale: float | None) -> dict[str, Any]:
    """Causality, grouped heads and scale in the words of this torch; its signature has changed."""
    options = _options()
    how: dict[str, Any] = {}
    if "is_causal" in options:
        how["is_causal"] = causal
    elif causal:
        how["window_size"] = (-1, 0)
    if "scale" in options:
        how["scale"] = scale
    if grouped and "enable_gqa" in options:
        how["enable_gqa"] = True
    return how


@lru_cache(maxsize=1)
def _options() -> frozenset[str]:
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)
