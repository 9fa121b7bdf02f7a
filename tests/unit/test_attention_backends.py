"""Every attention backend that runs here against the loop over rows."""

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from attention_oracle import (
    METHOD_CASES,
    RULE_CASE_IDS,
    RULE_CASES,
    B,
    C,
    Inputs,
    Numbers,
    Pack,
    RuleCase,
    T,
    assert_all_close,
    by_name,
    distance,
    keys_of_rows,
    numbers_of,
    pack_of,
    problems,
    random_inputs,
    relative_error,
    seeded_pack,
    slow_attention,
    steady,
    visibility_table,
)
from hypothesis import given
from torch import Tensor

from cocoa_dist.attention import (
    available_backends,
    compile_plan,
    segment_attention,
)
from cocoa_dist.attention.backends import flex
from cocoa_dist.segments import attention_rule

on_each_backend = pytest.mark.parametrize("backend", available_backends("cpu"))
on_each_rule = pytest.mark.parametrize("case", RULE_CASES, ids=RULE_CASE_IDS)
# torch says so at each call outside torch.compile; on the CPU it is what we want
unfused_flex = pytest.mark.filterwarnings(
    "ignore:flex_attention called without torch.compile:UserWarning"
)


@on_each_backend
@given(problem=problems())
@steady(60)
def test_attention_backend_in_float64_is_the_loop_over_rows(
    backend: str, problem: tuple[Pack, RuleCase, Inputs]
) -> None:
    samples, case, inputs = problem
    expected = slow_attention(inputs, keys_of_rows(samples, case))
    found = numbers_of(by_name(backend), inputs, compile_plan(samples, case.rule), torch.float64)
    assert_all_close(found, expected, tolerance=1e-12)  # the order of sums differs, nothing else


@on_each_backend
@given(problem=problems())
@steady(60)
def test_attention_backend_in_float32_is_the_loop_over_rows(
    backend: str, problem: tuple[Pack, RuleCase, Inputs]
) -> None:
    samples, case, inputs = problem
    expected = slow_attention(inputs, keys_of_rows(samples, case))
    found = numbers_of(by_name(backend), inputs, compile_plan(samples, case.rule), torch.float32)
    assert_all_close(found, expected, tolerance=1e-5)


@given(problem=problems())
@steady(60)
def test_attention_split_in_bfloat16_errs_at_most_twice_as_much_as_dense(
    problem: tuple[Pack, RuleCase, Inputs],
) -> None:
    samples, case, inputs = problem
    plan = compile_plan(samples, case.rule)
    expected = slow_attention(inputs, keys_of_rows(samples, case))
    dense, split = (
        numbers_of(by_name(name), inputs, plan, torch.bfloat16) for name in ("dense", "split")
    )
    for name, found, reference, right in zip(Numbers._fields, split, dense, expected, strict=True):
        # Euclidean: a single row may round three times worse in the one by luck of the other
        error, allowed = distance(found, right), 2 * distance(reference, right)
        assert error <= allowed, f"{name}: {error:.1e}, dense {allowed / 2:.1e}"


@unfused_flex
@given(
    problem=problems(max_samples=6),
    precision=st.sampled_from([(torch.float64, 1e-12), (torch.float32, 1e-5)]),
)
@steady(6)  # half a second each: torch traces the mask anew
def test_attention_flex_forward_on_the_cpu_is_the_loop_over_rows(
    problem: tuple[Pack, RuleCase, Inputs], precision: tuple[torch.dtype, float]
) -> None:
    samples, case, inputs = problem
    dtype, tolerance = precision
    expected = slow_attention(inputs, keys_of_rows(samples, case)).out
    plan = compile_plan(samples, case.rule)
    q, k, v = (tensor.to(dtype) for tensor in inputs[:3])
    found = segment_attention(q, k, v, plan=plan, backend="flex", scale=inputs.scale)
    assert relative_error(found, expected) <= tolerance


@on_each_rule
@pytest.mark.parametrize("max_length", [12, 150])
def test_attention_flex_blocks_hold_every_visible_pair(case: RuleCase, max_length: int) -> None:
    samples = seeded_pack(7, num_samples=8, max_length=max_length)
    visible_TT = visibility_table(samples, case)
    mask = flex.block_mask(compile_plan(samples, case.rule))
    partial, full = (
        listed_blocks(counts, indices)
        for counts, indices in (
            (mask.kv_num_blocks, mask.kv_indices),
            (mask.full_kv_num_blocks, mask.full_kv_indices),
        )
    )
    assert not partial & full
    side = 128
    if len(visible_TT) % side:  # the kernel's loop over full blocks looks at no end of the pack
        last = len(visible_TT) // side
        assert not any(last in block for block in full)
    for row in range(0, len(visible_TT), side):
        for column in range(0, len(visible_TT), side):
            block = visible_TT[row : row + side, column : column + side]
            at = (row // side, column // side)
            assert at not in full or block.all(), f"block {at} has pairs that are not visible"
            assert at in partial | full or not block.any(), f"block {at} is left out"


def listed_blocks(counts: Tensor | None, indices: Tensor | None) -> set[tuple[int, int]]:
    assert counts is not None
    assert indices is not None
    return {
        (row, column)
        for row, count in enumerate(counts[0, 0].tolist())
        for column in indices[0, 0, row, :count].tolist()
    }


@unfused_flex
def test_attention_flex_blocks_first_made_in_inference_can_be_saved_for_a_backward_pass() -> None:
    plan = compile_plan(pack_of([((C, 200), (T, 30))]), attention_rule("causal"))
    q, k, v, _, _ = random_inputs(plan.num_tokens)
    with torch.inference_mode():
        segment_attention(q, k, v, plan=plan, backend="flex")
    mask = flex.block_mask(plan)
    for tensor in (mask.kv_num_blocks, mask.kv_indices, mask.full_kv_indices, mask.q_indices):
        assert tensor is not None
        assert not tensor.is_inference()


@unfused_flex
def test_attention_flex_is_not_compiled_anew_for_each_length(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled, torch_compile = [], torch.compile

    def counting(graph: torch.fx.GraphModule, example: list[Tensor]) -> Callable[..., Any]:
        compiled.append(graph)
        return graph.forward

    monkeypatch.setattr(
        torch, "compile", lambda function, **how: torch_compile(function, backend=counting, **how)
    )
    flex._compiled.cache_clear()
    torch._dynamo.reset()
    attend = flex._compiled()
    assert torch._dynamo.config.recompile_limit >= 64  # else the ninth kind takes T x T scores
    for length in range(5):
        plan = compile_plan(
            pack_of([((C, 50 + 3 * length), (B, 1), (T, 40 + length))] * (3 + length)),
            attention_rule("eos_bridged"),
        )
        q, k, v, _, _ = random_inputs(plan.num_tokens, ratio=1)
        q, k, v = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
        attend(q, k, v, block_mask=flex.block_mask(plan))
    flex._compiled.cache_clear()
    torch._dynamo.reset()
    assert 1 <= len(compiled) <= 3  # one length, then any length


@on_each_backend
def test_attention_repeats_bit_by_bit(backend: str) -> None:
    for case in RULE_CASES:
        plan = compile_plan(seeded_pack(6), case.rule)
        inputs = random_inputs(plan.num_tokens)
        once, again = (numbers_of(by_name(backend), inputs, plan, torch.float32) for _ in range(2))
        assert all(torch.equal(left, right) for left, right in zip(once, again, strict=True))


@on_each_backend
def test_attention_of_large_scores_is_finite(backend: str) -> None:
    for case in METHOD_CASES:
        plan = compile_plan(seeded_pack(6), case.rule)
        inputs = random_inputs(plan.num_tokens)._replace(scale=1e4)
        numbers = numbers_of(by_name(backend), inputs, plan, torch.float32)
        assert all(tensor.isfinite().all() for tensor in numbers)


@on_each_backend
def test_attention_takes_views_that_are_not_contiguous(backend: str) -> None:
    samples, case = seeded_pack(6), METHOD_CASES[2]
    plan = compile_plan(samples, case.rule)
    inputs = random_inputs(plan.num_tokens, ratio=1)
    q, k, v = (tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in inputs[:3])
    expected = slow_attention(inputs, keys_of_rows(samples, case)).out
    assert not q.is_contiguous()
    found = segment_attention(q, k, v, plan=plan, backend=backend)
    assert relative_error(found, expected) <= 1e-12


@on_each_backend
def test_attention_of_one_token_is_its_value(backend: str) -> None:
    plan = compile_plan(pack_of([((B, 1),)]), attention_rule("compression"))
    q, k, v, _, _ = random_inputs(1, ratio=1)
    assert torch.equal(segment_attention(q, k, v, plan=plan, backend=backend), v)
