"""flash-attn-4 (CuTe DSL): kernels compiled at first use for each card, dtype and head width."""

from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from cocoa_dist.attention.backends.varlen import flash_kernel, missing_half_gpu, run_calls
from cocoa_dist.attention.plan import AttentionPlan

_OLDEST_BACKWARD = 9  # compute capability; on Ampere it has no backward pass


def missing(device: torch.device, dtype: torch.dtype) -> str | None:
    """Say why the kernel cannot run on `device` in `dtype`, or None."""
    if _function() is None:
        return "flash_attn.cute cannot be imported: pip install flash-attn-4"
    fault = missing_half_gpu(device, dtype)
    if fault is not None:
        return fault
    major = torch.cuda.get_device_capability(device)[0]
    if major < _OLDEST_BACKWARD:
        return f"its backward pass needs compute capability 9.0 or newer, found {major}.x"
    return None


def run(
    q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, plan: AttentionPlan, scale: float | None
) -> Tensor:
    """Attention by one call for each causality class, (T, H, K)."""
    function = _function()
    assert function is not None, "`missing` was asked before"
    return run_calls(q_THK, k_TGK, v_TGK, plan, scale, kernel=flash_kernel(function))


@lru_cache(maxsize=1)
def _function() -> Any:
    try:
        return import_module("flash_attn.cute").flash_attn_varlen_func
    except (ImportError, AttributeError):
        return None
