"""Plans: exactly what the rule says, in the form kernels need, at the cost that is promised."""

import pickle
from collections.abc import Iterable, Iterator
from itertools import islice
from time import process_time

import numpy as np
import pytest
import torch
from attention_oracle import (
    METHOD_CASES,
    RULE_CASE_IDS,
    RULE_CASES,
    B,
    C,
    Pack,
    RuleCase,
    Shape,
    T,
    pack_of,
    packs,
    random_inputs,
    rule_cases,
    seeded_pack,
    steady,
    visibility_table,
)
from hypothesis import given

from cocoa_dist.attention import AttentionPlan, compile_plan, segment_attention
from cocoa_dist.attention.plan import PlanCall
from cocoa_dist.segments import Segment, attention_rule, dense_visibility

METHOD_IDS = [case.name for case in METHOD_CASES]
MAX_PLAN_SECONDS = 5e-3  # of one core, for 16,384 tokens in 256 samples
MAX_PLAN_BYTES = 64  # a token


def query_rows_of(plan: AttentionPlan) -> list[int]:
    """Return the rows of the pack in the order of the calls' queries."""
    return torch.cat(plan.query_rows).tolist() if plan.query_rows else list(range(plan.num_tokens))


def key_rows_of(plan: AttentionPlan) -> list[int]:
    """Return the rows of the pack in the order of the calls' keys."""
    return list(range(plan.num_tokens)) if plan.keys is None else plan.keys.index.tolist()


def problems_of(plan: AttentionPlan) -> Iterator[tuple[list[int], list[int], bool]]:
    """Yield rows of the queries, rows of the keys and causality, read as a varlen kernel does."""
    queries, keys = query_rows_of(plan), key_rows_of(plan)
    for call in plan.calls:
        bounds_q, bounds_k = call.cu_seqlens_q.tolist(), call.cu_seqlens_k.tolist()
        for s in range(len(bounds_q) - 1):
            yield (
                queries[bounds_q[s] : bounds_q[s + 1]],
                keys[bounds_k[s] : bounds_k[s + 1]],
                call.causal,
            )
        queries, keys = queries[bounds_q[-1] :], keys[bounds_k[-1] :]
    assert not queries
    assert not keys


@given(samples=packs(), case=rule_cases)
@steady(150)
def test_dense_visibility_is_what_the_sentences_of_the_rule_say(
    samples: Pack, case: RuleCase
) -> None:
    assert np.array_equal(dense_visibility(samples, case.rule), visibility_table(samples, case))


@given(samples=packs(), case=rule_cases)
@steady(150)
def test_plan_shows_exactly_what_the_sentences_of_the_rule_say(
    samples: Pack, case: RuleCase
) -> None:
    plan = compile_plan(samples, case.rule)
    expected_TT = visibility_table(samples, case)
    assert plan.visible_area == int(expected_TT.sum())
    assert np.array_equal(plan.visibility().numpy(), expected_TT)


@given(samples=packs(), case=rule_cases)
@steady(100)
def test_problems_of_the_calls_hold_every_visible_pair_once(samples: Pack, case: RuleCase) -> None:
    plan = compile_plan(samples, case.rule)
    seen_TT = np.zeros((plan.num_tokens, plan.num_tokens), dtype=int)
    for queries, keys, causal in problems_of(plan):
        for back, row in enumerate(reversed(queries)):  # bottom-right: the last query sees all
            seen_TT[row, keys[: len(keys) - back] if causal else keys] += 1
    assert np.array_equal(seen_TT, visibility_table(samples, case).astype(int))


@given(samples=packs(), case=rule_cases)
@steady(100)
def test_calls_tile_the_rows_and_have_lengths_that_kernels_take(
    samples: Pack, case: RuleCase
) -> None:
    plan = compile_plan(samples, case.rule)
    causalities = [call.causal for call in plan.calls]
    assert causalities in ([False], [True], [False, True])
    problems = list(problems_of(plan))
    rows = [row for queries, _, _ in problems for row in queries]
    assert sorted(rows) == list(range(plan.num_tokens))
    for queries, keys, causal in problems:
        assert queries
        assert keys
        assert not causal or len(keys) >= len(queries)
    for call in plan.calls:
        for lengths, bounds, longest in (
            (call.lengths_q, call.cu_seqlens_q, call.max_seqlen_q),
            (call.lengths_k, call.cu_seqlens_k, call.max_seqlen_k),
        ):
            assert bounds.dtype == torch.int32
            assert bounds.tolist() == [sum(lengths[:s]) for s in range(len(lengths) + 1)]
            assert type(longest) is int
            assert longest == max(lengths)


@pytest.mark.parametrize("name", ["bidirectional", "causal"])
def test_plan_of_a_rule_for_whole_samples_gathers_nothing(name: str) -> None:
    plan = compile_plan(seeded_pack(0), attention_rule(name))
    assert plan.query_rows == ()
    assert plan.keys is None
    assert len(plan.calls) == 1
    assert plan.calls[0].lengths_q == plan.calls[0].lengths_k


def ordinary_shape(length: int) -> Shape:
    """A sample as the stages pack it: a picture with its query, one EOS, the target text."""
    target = length // 4
    return ((C, length - 1 - target), (B, 1), (T, target))


@pytest.mark.parametrize("case", METHOD_CASES, ids=METHOD_IDS)
@pytest.mark.parametrize("length", [32, 64, 512])
def test_plan_of_ordinary_samples_takes_few_bytes_a_token(case: RuleCase, length: int) -> None:
    plan = compile_plan(pack_of([ordinary_shape(length)] * 16), case.rule)
    assert plan.nbytes <= MAX_PLAN_BYTES * plan.num_tokens


@pytest.mark.parametrize("case", RULE_CASES, ids=RULE_CASE_IDS)
def test_plan_grows_as_the_pack_does(case: RuleCase) -> None:
    samples = seeded_pack(1, num_samples=8)
    shapes = [tuple((s.role, s.stop - s.start) for s in sample) for sample in samples]
    once, ten = (compile_plan(pack_of(shapes * times), case.rule) for times in (1, 10))
    assert ten.nbytes <= 10 * once.nbytes


def test_plan_counts_the_bytes_of_every_tensor_that_it_pickles() -> None:
    plan = compile_plan(pack_of([ordinary_shape(64)] * 64), attention_rule("compression"))
    overhead = 0.1 * plan.nbytes + 8192  # names of fields, and lengths as Python integers
    assert plan.nbytes <= len(pickle.dumps(plan)) <= plan.nbytes + overhead


def unseen_packs() -> Iterator[Pack]:
    """Yield packs of 16,384 tokens in 256 samples, no two samples of any of them of one shape."""
    pairs = (
        [((C, context), (B, 1), (T, size - context - 1)) for size in (length, 128 - length)]
        for length in range(3, 64)
        for context in range(1, length - 1)
    )
    for chosen in zip(*[pairs] * 128, strict=False):
        yield pack_of([shape for pair in chosen for shape in pair])


def quickest(samples_of_runs: Iterable[Pack], case: RuleCase) -> float:
    """Return the fewest seconds that this process spent on the CPU: others do not count."""
    seconds = []
    for samples in samples_of_runs:
        assert (len(samples), samples[-1][-1].stop) == (256, 16384)
        started = process_time()
        compile_plan(samples, case.rule)
        seconds.append(process_time() - started)
    return min(seconds)


@pytest.mark.parametrize("case", METHOD_CASES, ids=METHOD_IDS)
def test_plan_of_16384_tokens_in_known_shapes_takes_under_five_milliseconds(case: RuleCase) -> None:
    assert quickest([next(unseen_packs())] * 8, case) < MAX_PLAN_SECONDS


@pytest.mark.parametrize("case", METHOD_CASES, ids=METHOD_IDS)
def test_plan_of_16384_tokens_in_new_shapes_takes_under_five_milliseconds(case: RuleCase) -> None:
    # not the first pack: the test above has used it
    assert quickest(islice(unseen_packs(), 1, 8), case) < MAX_PLAN_SECONDS


@pytest.mark.parametrize("case", RULE_CASES, ids=RULE_CASE_IDS)
def test_pickled_plan_gives_the_same_numbers(case: RuleCase) -> None:
    plan = compile_plan(seeded_pack(2), case.rule)
    q, k, v, _, _ = random_inputs(plan.num_tokens)
    expected = segment_attention(q, k, v, plan=plan)  # fills what the plan keeps for later calls
    again = pickle.loads(pickle.dumps(plan))
    assert again.visible_area == plan.visible_area
    assert torch.equal(again.visibility(), plan.visibility())
    assert torch.equal(segment_attention(q, k, v, plan=again), expected)


def test_plan_that_is_where_it_should_be_stays_the_same_object() -> None:
    plan = compile_plan(seeded_pack(2), attention_rule("eos_bridged"))
    assert plan.to("cpu") is plan
    assert plan.to(torch.device("cpu")) is plan


def test_plan_moves_with_all_its_tensors() -> None:
    plan = compile_plan(seeded_pack(2), attention_rule("compression"))
    moved = plan.to("meta")
    gathers = (moved.keys, moved.buckets.queries, moved.buckets.keys, moved.buckets.restore)
    tensors = [tensor for gather in gathers if gather is not None for tensor in gather.tensors]
    tensors += [t for call in moved.calls for t in (call.cu_seqlens_q, call.cu_seqlens_k)]
    tensors += [*moved.query_rows, moved.lo, moved.hi]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert moved.nbytes == plan.nbytes
    assert [call.lengths_k for call in moved.calls] == [call.lengths_k for call in plan.calls]


def test_plan_comes_back_to_the_host_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    moved = compile_plan(seeded_pack(2), attention_rule("compression")).to("meta")
    moves = []

    def noted(tensor: torch.Tensor, device: str, *, non_blocking: bool = False) -> torch.Tensor:
        moves.append(non_blocking)
        return tensor

    monkeypatch.setattr(torch.Tensor, "to", noted)
    moved.to("cpu")
    assert moves
    assert not any(moves)
    moved.to("cuda")
    assert moves[-1]


@pytest.mark.parametrize("backend", ["dense", "split"])
def test_plan_first_used_in_inference_can_be_trained_with(backend: str) -> None:
    for case in RULE_CASES:
        plan = compile_plan(seeded_pack(3), case.rule)
        q, k, v, weight, _ = random_inputs(plan.num_tokens)
        with torch.inference_mode():
            expected = segment_attention(q, k, v, plan=plan, backend=backend)
        inputs = [tensor.requires_grad_() for tensor in (q, k, v)]
        found = segment_attention(*inputs, plan=plan, backend=backend)
        gradients = torch.autograd.grad((found * weight).sum(), inputs)
        assert torch.equal(found, expected)
        assert all(gradient.abs().sum() > 0 for gradient in gradients)


def test_plan_made_in_inference_can_be_trained_with() -> None:
    with torch.inference_mode():
        plan = compile_plan(seeded_pack(3), attention_rule("compression"))
    q, k, v, weight, _ = random_inputs(plan.num_tokens)
    inputs = [tensor.requires_grad_() for tensor in (q, k, v)]
    (segment_attention(*inputs, plan=plan) * weight).sum().backward()
    assert all(tensor.grad is not None for tensor in inputs)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([[Segment(0, 5, C), Segment(3, 8, T)]], r"\[0, 5\) and \[3, 8\) overlap"),
        ([[Segment(0, 5, C)], [Segment(4, 8, C)]], r"\[0, 5\) and \[4, 8\) overlap"),
        ([[Segment(0, 5, C), Segment(6, 8, T)]], r"\[0, 5\) and \[6, 8\) leave a gap"),
        ([[Segment(0, 5, C)], [Segment(7, 9, C)]], r"\[0, 5\) and \[7, 9\) leave a gap"),
        ([[Segment(4, 8, T), Segment(0, 4, C)]], "starts at 4, expected 0"),
        ([[Segment(2, 5, C)]], "starts at 2, expected 0"),
        ([[Segment(0, 5, C), Segment(5, 5, B)]], r"empty segment \[5, 5\) BRIDGE"),
        ([[Segment(0, -3, C)]], r"empty segment \[0, -3\) CONTEXT"),
        ([[Segment(0, 5, C)], []], "sample 1 has no segments"),
        ([], "at least one sample"),
    ],
)
def test_plan_refuses_segments_that_do_not_tile_the_pack(samples: Pack, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compile_plan(samples, attention_rule("eos_bridged"))


@pytest.mark.parametrize(
    ("lengths_q", "lengths_k", "message"),
    [
        ((3, 5), (3, 4), "causal problem 1 has 5 queries and only 4 keys"),
        ((3, 0), (3, 4), "problem 1 is empty: 0 queries, 4 keys"),
        ((3, 4), (0, 4), "problem 0 is empty: 3 queries, 0 keys"),
        ((3, 4), (3,), "2 query lengths, 1 key lengths"),
        ((), (), "0 query lengths, 0 key lengths"),
        ((1, 1), (2**31 - 2, 2), "2147483648 rows do not fit into int32"),
    ],
)
def test_call_refuses_lengths_that_kernels_answer_wrongly(
    lengths_q: tuple[int, ...], lengths_k: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        PlanCall.of(lengths_q, lengths_k, causal=True)


def test_call_that_is_not_causal_may_have_more_queries_than_keys() -> None:
    assert PlanCall.of((5,), (2,), causal=False).num_q == 5


def test_plan_refuses_a_pack_beyond_int32() -> None:
    with pytest.raises(ValueError, match="2147483648 tokens does not fit into int32"):
        compile_plan([[Segment(0, 2**31, C)]], attention_rule("causal"))


def test_plan_refuses_gathered_keys_beyond_int32(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = pack_of([((C, 20), (B, 1), (T, 20))])
    compile_plan(samples, attention_rule("eos_bridged"))
    for module in ("plan", "compile"):
        monkeypatch.setattr(f"cocoa_dist.attention.{module}.INT32_MAX", 41)
    # the bridge reads all 41 rows, context and target 21 each: more keys than the pack has tokens
    with pytest.raises(ValueError, match=r"\d\d rows do not fit into int32"):
        compile_plan(samples, attention_rule("eos_bridged"))
