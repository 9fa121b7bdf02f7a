"""What is handed to the GPU kernels, checked where there is no GPU.

The kernels are replaced by slow ones that insist on flash-attn's contract; the real ones are in
tests/gpu. Beside them the gathers that bring rows to the kernels and back.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from attention_oracle import (
    RULE_CASE_IDS,
    RULE_CASES,
    B,
    C,
    Inputs,
    Pack,
    RuleCase,
    Run,
    T,
    assert_all_close,
    keys_of_rows,
    numbers_of,
    pack_of,
    problems,
    random_inputs,
    relative_error,
    seeded_pack,
    slow_attention,
    steady,
)
from hypothesis import given
from torch import Tensor

from cocoa_dist.attention import (
    compile_plan,
)
from cocoa_dist.attention.backends import flash_attn, flash_attn_4, varlen
from cocoa_dist.attention.gather import RowGather, gather_rows, part_rows, place_rows

on_each_rule = pytest.mark.parametrize("case", RULE_CASES, ids=RULE_CASE_IDS)


def contract_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bounds_q: Tensor,
    bounds_k: Tensor,
    max_q: int,
    max_k: int,
    causal: bool,
    scale: float | None,
) -> Tensor:
    """flash-attn's varlen contract, insisted on, and its answer by a loop over problems."""
    for rows, bounds, longest in ((q, bounds_q, max_q), (k, bounds_k, max_k)):
        assert rows.stride(-1) == 1
        assert bounds.dtype == torch.int32
        assert bounds.is_contiguous()
        assert type(longest) is int
        lengths = bounds.diff()
        assert int(lengths.min()) > 0, "kernels hang or fail on empty problems"
        assert longest == int(lengths.max())
        assert (int(bounds[0]), int(bounds[-1])) == (0, len(rows)), "rows left out come back as NaN"
    assert len(v) == len(k)
    assert q.shape[1] % k.shape[1] == 0
    out = []
    for s in range(len(bounds_q) - 1):
        query, key, value = (
            rows[bounds[s] : bounds[s + 1]].transpose(0, 1)
            for rows, bounds in ((q, bounds_q), (k, bounds_k), (v, bounds_k))
        )
        key, value = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=0) for x in (key, value))
        scores = query @ key.transpose(1, 2) * (q.shape[2] ** -0.5 if scale is None else scale)
        if causal:
            n_q, n_k = scores.shape[1:]
            hidden = torch.arange(n_k) > torch.arange(n_q)[:, None] + n_k - n_q  # bottom-right
            scores = scores.masked_fill(hidden, -torch.inf)
        out.append((scores.softmax(-1) @ value).transpose(0, 1))
    return torch.cat(out)


def varlen_of_today(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1),
    enable_gqa=False,
):  # fmt: skip
    """torch.nn.attention.varlen.varlen_attn as of torch 2.13."""
    assert window_size in ((-1, -1), (-1, 0))
    assert enable_gqa or query.shape[1] == key.shape[1]
    return contract_kernel(
        query, key, value, bounds_q=cu_seq_q, bounds_k=cu_seq_k, max_q=max_q, max_k=max_k,
        causal=window_size == (-1, 0), scale=scale,
    )  # fmt: skip


def varlen_of_before(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, *, scale=None
):
    """varlen_attn as it was first: a flag for causality, no grouped heads."""
    assert query.shape[1] == key.shape[1]
    return contract_kernel(
        query, key, value, bounds_q=cu_seq_q, bounds_k=cu_seq_k, max_q=max_q, max_k=max_k,
        causal=is_causal, scale=scale,
    )  # fmt: skip


def varlen_at_first(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None
):
    """varlen_attn without a scale of one's own."""
    return varlen_of_before(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=is_causal
    )  # fmt: skip


def flash_2(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
    softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False, block_table=None,
):  # fmt: skip
    """flash_attn_varlen_func of flash-attn 2.8."""
    assert dropout_p == 0
    assert window_size == (-1, -1)
    return contract_kernel(
        q, k, v, bounds_q=cu_seqlens_q, bounds_k=cu_seqlens_k, max_q=max_seqlen_q,
        max_k=max_seqlen_k, causal=causal, scale=softmax_scale,
    )  # fmt: skip


def flash_3(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None,
    seqused_k=None, softmax_scale=None, causal=False, window_size=(-1, -1), deterministic=False,
):  # fmt: skip
    """flash_attn_varlen_func of FlashAttention-3, in its builds that return a pair."""
    assert seqused_q is None
    assert seqused_k is None
    out = flash_2(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        softmax_scale=softmax_scale, causal=causal,
    )  # fmt: skip
    return out, None


def flash_4(*, q, k, v, causal=False, softmax_scale=None, deterministic=False, **lengths):
    """flash_attn_varlen_func of flash-attn-4: keywords only, always a pair."""
    return flash_2(q, k, v, **lengths, causal=causal, softmax_scale=softmax_scale), None


class Counted:
    """A kernel that counts its calls."""

    def __init__(self, kernel: Callable[..., Any]) -> None:
        self.kernel, self.calls = kernel, 0
        self.__wrapped__ = kernel  # what inspect.signature reads

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.kernel(*args, **kwargs)


KERNELS = {
    "varlen": (varlen, varlen_of_today),
    "varlen of before": (varlen, varlen_of_before),
    "varlen at first": (varlen, varlen_at_first),
    "flash_attn 2": (flash_attn, flash_2),
    "flash_attn 3": (flash_attn, flash_3),
    "flash_attn_4": (flash_attn_4, flash_4),
}


@pytest.fixture(params=KERNELS)
def kernel_run(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Run, Counted]]:
    """A GPU backend's `run` whose kernel is replaced by one that insists on the contract."""
    module, kernel = KERNELS[request.param]
    counted = Counted(kernel)
    if module is varlen:
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", counted)
        varlen._options.cache_clear()
    elif module is flash_attn_4:
        monkeypatch.setattr(flash_attn_4, "_function", lambda: counted)
    else:
        is_3 = request.param.endswith("3")
        monkeypatch.setattr(flash_attn, "_flash_2", lambda: None if is_3 else counted)
        monkeypatch.setattr(flash_attn, "_flash_3", lambda: counted if is_3 else None)
        monkeypatch.setattr(flash_attn, "has_flash_3", lambda device: is_3)
    yield module.run, counted
    varlen._options.cache_clear()


def test_attention_hands_gpu_kernels_what_gives_the_numbers_of_the_loop_over_rows(
    kernel_run: tuple[Run, Counted],
) -> None:
    run, _ = kernel_run

    @given(problem=problems(max_samples=12))
    @steady(20)
    def check(problem: tuple[Pack, RuleCase, Inputs]) -> None:
        samples, case, inputs = problem
        expected = slow_attention(inputs, keys_of_rows(samples, case))
        found = numbers_of(run, inputs, compile_plan(samples, case.rule), torch.float64)
        assert_all_close(found, expected, tolerance=1e-12)

    check()


def test_attention_calls_the_gpu_kernel_once_for_each_causality(
    kernel_run: tuple[Run, Counted],
) -> None:
    run, kernel = kernel_run
    for case in RULE_CASES:
        samples = pack_of([((C, 9), (B, 2), (T, 5)), ((C, 4), (B, 1), (T, 7))] * 3)
        plan = compile_plan(samples, case.rule)
        q, k, v, _, _ = random_inputs(plan.num_tokens)
        kernel.calls = 0
        run(q, k, v, plan, None)
        assert kernel.calls == len(plan.calls) <= 2


@on_each_rule
def test_gather_of_rows_has_the_gradient_of_index_select(case: RuleCase) -> None:
    plan = compile_plan(seeded_pack(8), case.rule)
    gather = plan.keys or plan.buckets.keys
    assert gather is not None
    rows = random_inputs(plan.num_tokens).k.requires_grad_()
    taken = gather_rows(rows, gather)
    expected = rows.index_select(0, gather.index)
    slope = torch.randn(taken.shape, generator=torch.Generator().manual_seed(0)).double()
    found_grad, expected_grad = (torch.autograd.grad(x, rows, slope)[0] for x in (taken, expected))
    assert torch.equal(taken, expected)
    assert relative_error(found_grad, expected_grad) <= 1e-15


@on_each_rule
def test_gather_adds_gradients_without_two_writes_to_one_row(case: RuleCase) -> None:
    plan = compile_plan(seeded_pack(8), case.rule)
    for gather in (plan.keys, plan.buckets.queries, plan.buckets.keys):
        for rows, _ in gather.further_uses if gather else ():
            assert len(rows.unique()) == len(rows)


@on_each_rule
def test_gather_that_parts_queries_and_places_them_again_changes_nothing(case: RuleCase) -> None:
    plan = compile_plan(seeded_pack(8), case.rule)
    rows = random_inputs(plan.num_tokens).q.requires_grad_()
    parts = part_rows(rows, plan.query_rows)
    placed = place_rows(parts, plan.query_rows)
    slope = random_inputs(plan.num_tokens, seed=1).q
    assert [len(part) for part in parts] == [call.num_q for call in plan.calls]
    assert torch.equal(placed, rows)
    assert torch.equal(torch.autograd.grad(placed, rows, slope)[0], slope)


def test_gather_of_a_permutation_is_undone_by_its_inverse() -> None:
    rows = torch.arange(5, dtype=torch.float64).requires_grad_()
    gather = RowGather.of(np.array([3, 0, 4, 1, 2], dtype=np.int32), 5)
    assert gather is not None
    back = gather_rows(gather_rows(rows, gather), gather.inverse())
    slope = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], dtype=torch.float64)
    assert torch.equal(back, rows)
    assert torch.equal(torch.autograd.grad(back, rows, slope)[0], slope)


def test_gather_that_changes_nothing_is_none() -> None:
    rows = torch.randn(3, 2)
    assert RowGather.of(np.arange(3, dtype=np.int32), 3) is None
    assert gather_rows(rows, None) is rows


@pytest.mark.parametrize("index", [[0, 2, 2], [0, 1], [0, 1, 2, 3]])
def test_gather_refuses_to_lose_a_row(index: list[int]) -> None:
    with pytest.raises(ValueError, match="a gather of 3 rows must take each at least once"):
        RowGather.of(np.array(index, dtype=np.int32), 3)


def test_gather_that_repeats_rows_has_no_inverse() -> None:
    gather = RowGather.of(np.array([1, 0, 1], dtype=np.int32), 2)
    assert gather is not None
    with pytest.raises(ValueError, match="no inverse"):
        gather.inverse()
