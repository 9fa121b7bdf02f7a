"""The flash-attn package: FlashAttention-3 where its module is and the card is Hopper, else 2."""

from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from cocoa_dist.attention.backends.varlen import flash_kernel, missing_half_gpu, run_calls
from cocoa_dist.attention.plan import AttentionPlan

_HOPPER = 9


def missing(device: torch.device, dtype: torch.dtype) -> str | None:
    """Say why the kernel cannot run on `device` in `dtype`, or None."""
    if _flash_2() is None and _flash_3() is None:
        return (
            "neither flash_attn nor flash_attn_interface (FlashAttention-3) can be imported: "
            "pip install flash-attn --no-build-isolation"
        )
    fault = missing_half_gpu(device, dtype)
    if fault is not None:
        return fault
    if _flash_2() is None and not has_flash_3(device):
        return "only FlashAttention-3 is installed, which needs a Hopper card: install flash-attn"
    return None


def has_flash_3(device: torch.device) -> bool:
    """Whether FlashAttention-3 is installed and fits the card."""
    if device.type != "cuda" or _flash_3() is None:
        return False
    return torch.cuda.get_device_capability(device)[0] == _HOPPER


def run(
    q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, plan: AttentionPlan, scale: float | None
) -> Tensor:
    """Attention by one call for each causality class, (T, H, K)."""
    function = _flash_3() if has_flash_3(q_THK.device) else _flash_2()
    assert function is not None, "`missing` was asked before"
    return run_calls(q_THK, k_TGK, v_TGK, plan, scale, kernel=flash_kernel(function))


@lru_cache(maxsize=1)
def _flash_2() -> Any:
    return _function("flash_attn")


@lru_cache(maxsize=1)
def _flash_3() -> Any:
    return _function("flash_attn_interface")


def _function(module: str) -> Any:
    """Return flash_attn_varlen_func of a module; None where there is none.

    flash-attn-4 installs a package flash_attn that holds flash_attn.cute alone.
    """
    try:
        return getattr(import_module(module), "flash_attn_varlen_func", None)
    except ImportError:  # not there, or built for another torch
        return None
