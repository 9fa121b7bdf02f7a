"""FlexAttention under a BlockMask that is built from the plan's intervals, never from T x T.

Trains on a GPU; on the CPU torch has no backward pass for it, so there it is for checking alone.
"""

from collections.abc import Callable
from functools import lru_cache, reduce
from importlib.util import find_spec
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from cocoa_dist.attention.plan import AttentionPlan

_BLOCK = 128
_COMPILED_KINDS = 64  # numbers of intervals, kinds of heads, with and without gradients
_MASKS: "WeakKeyDictionary[AttentionPlan, BlockMask]" = WeakKeyDictionary()


def missing(device: torch.device, dtype: torch.dtype) -> str | None:
    """Say why the kernel cannot train on `device` in `dtype`, or None."""
    if device.type != "cuda":
        return f"it trains on a CUDA device alone, found {device.type}"
    if find_spec("triton") is None:
        return "triton cannot be imported: pip install triton"
    return None


def run(
    q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, plan: AttentionPlan, scale: float | None
) -> Tensor:
    """Attention under the block mask, (T, H, K). On the CPU without gradients only."""
    on_gpu = q_THK.device.type == "cuda"
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (q_THK, k_TGK, v_TGK))
    if needs_grad and not on_gpu:
        raise ValueError(
            "backend 'flex' has no backward pass on the CPU; use attention_backend=split there"
        )
    if not on_gpu:  # there torch refuses leaves that require gradients even under no_grad
        q_THK, k_TGK, v_TGK = q_THK.detach(), k_TGK.detach(), v_TGK.detach()
    attend = _compiled() if on_gpu else flex_attention
    out_HTK = attend(
        q_THK.transpose(0, 1)[None],
        k_TGK.transpose(0, 1)[None],
        v_TGK.transpose(0, 1)[None],
        block_mask=block_mask(plan),
        scale=scale,
        enable_gqa=q_THK.shape[1] != k_TGK.shape[1],
    )
    assert isinstance(out_HTK, Tensor)
    return out_HTK[0].transpose(0, 1)


@lru_cache(maxsize=1)
def _compiled() -> Any:
    from torch import _dynamo as dynamo  # a second to import

    # Past its limit torch runs it uncompiled, with all T x T scores, and only warns.
    dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, _COMPILED_KINDS)
    return torch.compile(flex_attention)


def block_mask(plan: AttentionPlan) -> BlockMask:
    """Return the plan's BlockMask, made once for each plan: O(M T + blocks^2)."""
    if plan not in _MASKS:
        with torch.inference_mode(False):  # a plan first used in evaluation may be trained with
            _MASKS[plan] = _block_mask(plan)
    return _MASKS[plan]


def _block_mask(plan: AttentionPlan) -> BlockMask:
    blocks = -(-plan.num_tokens // _BLOCK)
    begins = torch.arange(blocks, device=plan.device) * _BLOCK
    ends = (begins + _BLOCK).clamp(max=plan.num_tokens)
    touched = torch.zeros(blocks, blocks, dtype=torch.bool, device=plan.device)
    full = torch.zeros_like(touched)
    for lo, hi in zip(plan.lo, plan.hi, strict=True):
        # rows behind the pack's end repeat its last row, so that they change nothing
        lo_BR, hi_BR = (_in_blocks(bound, blocks) for bound in (lo, hi))
        empty = hi_BR <= lo_BR
        lowest = torch.where(empty, plan.num_tokens, lo_BR).amin(1)
        highest = torch.where(empty, 0, hi_BR).amax(1)
        touched |= (lowest[:, None] < ends) & (highest[:, None] > begins)
        full |= (lo_BR.amax(1)[:, None] <= begins) & (hi_BR.amin(1)[:, None] >= ends)
    # as create_block_mask does: a block that reaches behind the pack's end is never a full one
    whole = begins + _BLOCK <= plan.num_tokens
    full &= whole[:, None] & whole
    partial = touched & ~full
    return BlockMask.from_kv_blocks(
        *_listed(partial),
        *_listed(full),
        BLOCK_SIZE=_BLOCK,
        mask_mod=_mask_mod(plan),
        seq_lengths=(plan.num_tokens, plan.num_tokens),
    )


def _in_blocks(bound_T: Tensor, blocks: int) -> Tensor:
    missing_rows = blocks * _BLOCK - len(bound_T)
    return torch.cat([bound_T, bound_T[-1:].expand(missing_rows)]).view(blocks, _BLOCK)


def _listed(blocks_QB: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many key blocks each row of blocks has, and which, in ascending order."""
    counts = blocks_QB.sum(1, dtype=torch.int32)
    order = torch.argsort(blocks_QB.to(torch.int8), dim=1, descending=True, stable=True)
    return counts[None, None], order.to(torch.int32)[None, None].contiguous()


def _mask_mod(plan: AttentionPlan) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    bounds = list(zip(plan.lo, plan.hi, strict=True))

    def visible(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        inside = [(key >= lo[row]) & (key < hi[row]) for lo, hi in bounds]
        either: Tensor = reduce(torch.logical_or, inside)
        return either

    return visible
