"""Runs a plan. All backends share one signature and give the same numbers; `auto` picks one."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType, ModuleType

import torch
from torch import Tensor

from cocoa_dist.attention.backends import dense, flash_attn, flash_attn_4, flex, split, varlen
from cocoa_dist.attention.plan import AttentionPlan

_MODULES: Mapping[str, ModuleType] = MappingProxyType(
    {
        "dense": dense,
        "split": split,
        "varlen": varlen,
        "flash_attn": flash_attn,
        "flash_attn_4": flash_attn_4,
        "flex": flex,
    }
)
BACKENDS = tuple(_MODULES)
_FORWARD_ANYWHERE = ("flex",)  # runs without gradients where it cannot train
_WIDTH_STEPS = MappingProxyType({"varlen": 8, "flash_attn_4": 8})  # flash_attn pads by itself


@dataclass(frozen=True)
class BackendChoice:
    """Which backend runs, and why."""

    name: str
    reason: str


def available_backends(
    device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> tuple[str, ...]:
    """Names that can train on `device`, besides `auto`.

    `dtype` defaults to bfloat16 on a GPU and float32 elsewhere.
    """
    where = torch.device(device)
    if dtype is None:
        dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    return tuple(name for name, module in _MODULES.items() if not module.missing(where, dtype))


def choose_backend(
    backend: str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> BackendChoice:
    """Turn `auto` into the fastest backend that is here, and check any other name.

    Raises ValueError for an unknown name, and for a backend that cannot run here, with what is
    missing and how to get it.
    """
    return _choose(backend, torch.device(device), dtype)


@lru_cache(maxsize=256)
def _choose(backend: str, device: torch.device, dtype: torch.dtype) -> BackendChoice:
    if backend == "auto":
        return _fastest(device, dtype)
    if backend not in _MODULES:
        raise ValueError(
            f"unknown attention backend '{backend}' (have: auto, {', '.join(BACKENDS)})"
        )
    fault = _MODULES[backend].missing(device, dtype)
    if fault is not None and backend not in _FORWARD_ANYWHERE:
        raise ValueError(f"attention backend '{backend}' cannot run here: {fault}")
    return BackendChoice(backend, "asked for by name")


def _fastest(device: torch.device, dtype: torch.dtype) -> BackendChoice:
    if device.type != "cuda":
        return BackendChoice("split", f"the fastest that trains on {device.type}")
    if flash_attn.has_flash_3(device) and flash_attn.missing(device, dtype) is None:
        return BackendChoice("flash_attn", "FlashAttention-3 is installed and the card is Hopper")
    fault = varlen.missing(device, dtype)
    if fault is None:
        return BackendChoice("varlen", "FlashAttention-2 in torch itself, nothing to install")
    if flex.missing(device, dtype) is None:
        return BackendChoice("flex", f"varlen cannot run: {fault}")
    return BackendChoice("split", f"varlen cannot run: {fault}; flex cannot either")


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
    devices that do not fit, and for a backend that is not here, before any kernel runs.
    """
    _check(q_THK, k_TGK, v_TGK, plan)
    chosen = _choose(backend, q_THK.device, q_THK.dtype)
    step = _WIDTH_STEPS.get(chosen.name, 1)
    if q_THK.shape[2] % step:
        raise ValueError(
            f"attention backend '{chosen.name}' takes heads whose width is a multiple of {step}, "
            f"found {q_THK.shape[2]}: set model.attention_backend=flex or split"
        )
    out_THK: Tensor = _MODULES[chosen.name].run(q_THK, k_TGK, v_TGK, plan, scale)
    return out_THK


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
    if (
        not heads
        or not width
        or not k_TGK.shape[1]
        or heads % k_TGK.shape[1]
        or width != k_TGK.shape[2]
    ):
        raise ValueError(
            f"{heads} query heads of width {width} do not fit {k_TGK.shape[1]} key heads of "
            f"width {k_TGK.shape[2]}"
        )
    if not (q_THK.dtype == k_TGK.dtype == v_TGK.dtype):
        raise ValueError(f"dtypes differ: {q_THK.dtype}, {k_TGK.dtype}, {v_TGK.dtype}")
    if not q_THK.is_floating_point():
        raise ValueError(f"attention needs a floating-point dtype, found {q_THK.dtype}")
    if not (q_THK.device == k_TGK.device == v_TGK.device == plan.device):
        raise ValueError(
            f"devices differ: q {q_THK.device}, k {k_TGK.device}, v {v_TGK.device}, "
            f"plan {plan.device}"
        )
