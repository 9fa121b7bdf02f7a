"""Plans and kernels against an independent slow loop over rows."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from cocoa_dist.attention import available_backends, compile_plan, segment_attention
from cocoa_dist.segments import AttentionRule, Role, Segment, View, attention_rule, dense_visibility

C, B, T = Role.CONTEXT, Role.BRIDGE, Role.TARGET
RULES = [
    attention_rule("bidirectional"),
    attention_rule("causal"),
    attention_rule("compression"),
    *(
        attention_rule("eos_bridged", bridge_sees_target=sees, target_causal=causal)
        for sees in (True, False)
        for causal in (True, False)
    ),
    AttentionRule(  # a rule of one's own, with causal keys that are not the queries' own role
        "own",
        {
            C: View(causal=frozenset({C})),
            B: View(full=frozenset({C}), causal=frozenset({B, T})),
            T: View(causal=frozenset(Role)),
        },
    ),
]


@st.composite
def packs(draw: st.DrawFn) -> list[list[Segment]]:
    samples, start = [], 0
    for _ in range(draw(st.integers(1, 6))):
        sample = []
        for _ in range(draw(st.integers(1, 6))):
            length = draw(st.integers(1, 7))
            sample.append(Segment(start, start + length, draw(st.sampled_from(list(Role)))))
            start += length
        samples.append(sample)
    return samples


def sees(samples: list[list[Segment]], rule: AttentionRule, row: int) -> list[int]:
    """The rule, read word for word for one row."""
    sample = next(s for s in samples if s[0].start <= row < s[-1].stop)
    view = rule.views[next(s.role for s in sample if s.start <= row < s.stop)]
    return [
        key
        for segment in sample
        for key in range(segment.start, segment.stop)
        if segment.role in view.full or (segment.role in view.causal and key <= row)
    ]


def slow_attention(q, k, v, samples, rule):
    rows = []
    for row in range(len(q)):
        keys = sees(samples, rule, row)
        heads = []
        for head in range(q.shape[1]):
            group = head * k.shape[1] // q.shape[1]
            scores = q[row, head] @ k[keys, group].T / q.shape[2] ** 0.5
            heads.append(scores.softmax(-1) @ v[keys, group])
        rows.append(torch.stack(heads))
    return torch.stack(rows)


@given(samples=packs(), rule=st.sampled_from(RULES))
@settings(max_examples=120, deadline=None)
def test_attention_plan_allows_exactly_what_the_rule_says(samples, rule) -> None:
    plan = compile_plan(samples, rule)
    expected_TT = torch.from_numpy(dense_visibility(samples, rule))
    assert torch.equal(plan.visibility(), expected_TT)
    assert plan.visible_area == int(expected_TT.sum())
    for row in range(plan.num_tokens):
        assert expected_TT[row].nonzero()[:, 0].tolist() == sorted(sees(samples, rule, row))


@given(samples=packs(), rule=st.sampled_from(RULES))
@settings(max_examples=60, deadline=None)
def test_every_row_is_a_query_of_exactly_one_attention_call(samples, rule) -> None:
    plan = compile_plan(samples, rule)
    rows = [
        torch.arange(plan.num_tokens) if call.q_index is None else call.q_index
        for call in plan.calls
    ]
    assert len(plan.calls) <= 2
    assert torch.cat(rows).sort().values.tolist() == list(range(plan.num_tokens))
    for call in plan.calls:
        assert not call.causal or all(
            k >= q for q, k in zip(call.lengths_q, call.lengths_k, strict=True)
        )


@pytest.mark.parametrize("backend", available_backends())
@given(samples=packs(), rule=st.sampled_from(RULES), seed=st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_attention_backend_agrees_with_a_loop_over_rows(backend, samples, rule, seed) -> None:
    plan = compile_plan(samples, rule)
    generator = torch.Generator().manual_seed(seed)
    q, k, v, weight = (
        torch.randn(plan.num_tokens, heads, 4, generator=generator, dtype=torch.float64)
        for heads in (4, 2, 2, 4)
    )
    inputs = [tensor.requires_grad_() for tensor in (q, k, v)]
    expected = slow_attention(*inputs, samples, rule)
    expected_grads = torch.autograd.grad((expected * weight).sum(), inputs)
    found = segment_attention(*inputs, plan=plan, backend=backend)
    found_grads = torch.autograd.grad((found * weight).sum(), inputs)
    # float64; the two differ by the order of sums alone
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for left, right in zip(found_grads, expected_grads, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((5, 4, 8), (5, 2, 8)), "the plan is for 4 tokens"),
        (((4, 3, 8), (4, 2, 8)), "3 query heads of width 8 do not fit 2 key heads"),
        (((4, 4, 8), (4, 2, 6)), "do not fit"),
        (((4, 4), (4, 2)), "expected q"),
    ],
)
def test_attention_refuses_shapes_that_do_not_fit(shapes, message) -> None:
    plan = compile_plan([[Segment(0, 4, C)]], attention_rule("causal"))
    q, k = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=message):
        segment_attention(q, k, k, plan=plan)


def test_attention_refuses_mixed_dtypes_and_unknown_backends() -> None:
    plan = compile_plan([[Segment(0, 4, C)]], attention_rule("causal"))
    q = torch.zeros(4, 2, 8)
    with pytest.raises(ValueError, match="dtypes differ"):
        segment_attention(q, q.double(), q.double(), plan=plan)
    with pytest.raises(ValueError, match="unknown attention backend 'fast'"):
        segment_attention(q, q, q, plan=plan, backend="fast")


def test_plan_first_used_in_inference_can_be_trained_with() -> None:
    plan = compile_plan([[Segment(0, 3, C)], [Segment(3, 5, C)]], attention_rule("causal"))
    q = torch.randn(5, 2, 8)
    with torch.inference_mode():
        segment_attention(q, q, q, plan=plan)
    trained = q.clone().requires_grad_()
    segment_attention(trained, trained, trained, plan=plan).sum().backward()
    assert trained.grad is not None
