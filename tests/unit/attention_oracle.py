"""Attention as the methods' sentences say it, one row at a time: what all kernels are held to.

The loop knows tokens, their samples, roles and positions; nothing of views, plans or dense tables,
so that it cannot repeat their mistakes. Gradients are written out by hand for the same reason.
Beside it what the attention tests share: random packs and inputs, and running a backend on them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import hypothesis.strategies as st
import numpy as np
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

from cocoa_dist.attention import AttentionPlan, segment_attention
from cocoa_dist.segments import AttentionRule, Role, Segment, View, attention_rule

Pack = list[list[Segment]]
Shape = tuple[tuple[Role, int], ...]  # role and length of each segment of a sample

C, B, T = Role.CONTEXT, Role.BRIDGE, Role.TARGET


class Token(NamedTuple):
    """One row of a pack."""

    position: int
    role: str  # the name, so that no property of the enum can leak in


@dataclass(frozen=True)
class RuleCase:
    """A rule as the package declares it, beside the sentence that it has to mean."""

    name: str
    rule: AttentionRule
    may_see: Callable[[Token, Token], bool]  # (query, key) of the same sample


def _bidirectional(query: Token, key: Token) -> bool:
    """Every token sees its whole sample."""
    return True


def _causal(query: Token, key: Token) -> bool:
    """A token sees its sample up to itself."""
    return key.position <= query.position


def _eos_bridged(
    query: Token, key: Token, *, bridge_sees_target: bool, target_causal: bool
) -> bool:
    """Context sees context and bridge; the bridge sees everything; the target bridge and target.

    All of it whatever the order of the tokens; with `target_causal` the target sees itself only up
    to its own position, without `bridge_sees_target` the bridge sees no target.
    """
    if query.role == "CONTEXT":
        return key.role != "TARGET"
    if query.role == "BRIDGE":
        return key.role != "TARGET" or bridge_sees_target
    if key.role == "TARGET":
        return key.position <= query.position or not target_causal
    return key.role == "BRIDGE"


def _compression(query: Token, key: Token) -> bool:
    """Context and bridge are causal among themselves.

    The dialogue sees every compression token and itself causally, never the image.
    """
    if query.role == "TARGET":
        return key.role == "BRIDGE" or (key.role == "TARGET" and key.position <= query.position)
    return key.role != "TARGET" and key.position <= query.position


def _own_lookback(query: Token, key: Token) -> bool:
    """Context: earlier context. Bridge: all context, earlier bridge and target. Target: earlier."""
    if query.role == "CONTEXT":
        return key.role == "CONTEXT" and key.position <= query.position
    if query.role == "BRIDGE" and key.role == "CONTEXT":
        return True
    return key.position <= query.position


def _own_islands(query: Token, key: Token) -> bool:
    """A role sees itself alone, the target causally."""
    if query.role == "TARGET" and key.position > query.position:
        return False
    return query.role == key.role


def _own_reader(query: Token, key: Token) -> bool:
    """Context and bridge read target written so far, and themselves wholly; target as they do."""
    if query.role == "BRIDGE":
        return key.role == "BRIDGE" or key.position <= query.position
    if query.role == "CONTEXT":
        return key.role == "CONTEXT" or (key.role == "TARGET" and key.position <= query.position)
    return key.role == "TARGET" or (key.role == "CONTEXT" and key.position <= query.position)


def _bridged(*, bridge_sees_target: bool, target_causal: bool) -> RuleCase:
    options = {"bridge_sees_target": bridge_sees_target, "target_causal": target_causal}
    blind = "" if bridge_sees_target else "_blind"
    return RuleCase(
        f"eos_bridged{blind}{'_target_causal' if target_causal else ''}",
        attention_rule("eos_bridged", **options),
        lambda query, key: _eos_bridged(query, key, **options),
    )


def _own(
    name: str, may_see: Callable[[Token, Token], bool], context: View, bridge: View, target: View
) -> RuleCase:
    return RuleCase(name, AttentionRule(name, {C: context, B: bridge, T: target}), may_see)


def _view(full: Sequence[Role] = (), causal: Sequence[Role] = ()) -> View:
    return View(full=frozenset(full), causal=frozenset(causal))


RULE_CASES = (
    RuleCase("bidirectional", attention_rule("bidirectional"), _bidirectional),
    RuleCase("causal", attention_rule("causal"), _causal),
    RuleCase("compression", attention_rule("compression"), _compression),
    *(
        _bridged(bridge_sees_target=sees, target_causal=causal)
        for sees in (True, False)
        for causal in (False, True)
    ),
    # causal keys that are not, or not only, of the queries' own role
    _own("own_lookback", _own_lookback, _view((), (C,)), _view((C,), (B, T)), _view((), (C, B, T))),
    _own("own_islands", _own_islands, _view((C,)), _view((B,)), _view((), (T,))),
    _own("own_reader", _own_reader, _view((C,), (T,)), _view((B,), (C, T)), _view((T,), (C,))),
)
RULE_CASE_IDS = [case.name for case in RULE_CASES]
METHOD_CASES = tuple(case for case in RULE_CASES if not case.name.startswith("own"))


def keys_of_rows(samples: Pack, case: RuleCase) -> list[list[int]]:
    """Return, for each row of the pack, the rows it may see in rising order."""
    seen = []
    for sample in samples:
        tokens = [
            Token(position, segment.role.name)
            for segment in sample
            for position in range(segment.start, segment.stop)
        ]
        for query in tokens:
            seen.append([key.position for key in tokens if case.may_see(query, key)])
    return seen


def visibility_table(samples: Pack, case: RuleCase) -> np.ndarray:
    """Return the table (T, T), True where the row may see the column."""
    seen = keys_of_rows(samples, case)
    visible_TT = np.zeros((len(seen), len(seen)), dtype=bool)
    for row, keys in enumerate(seen):
        visible_TT[row, keys] = True
    return visible_TT


class Numbers(NamedTuple):
    """What attention gives: the output and the gradients of sum(output * weight)."""

    out: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


Run = Callable[[Tensor, Tensor, Tensor, AttentionPlan, float | None], Tensor]  # a backend's `run`


class Inputs(NamedTuple):
    """q and weight (T, H, K), k and v (T, G, K), float64; scale as segment_attention takes it."""

    q: Tensor
    k: Tensor
    v: Tensor
    weight: Tensor
    scale: float | None


def slow_attention(inputs: Inputs, keys_of: Sequence[Sequence[int]]) -> Numbers:
    """Attention and its gradients in float64, a loop over rows; `keys_of[t]`: what row t sees."""
    q, k, v, weight = (tensor.double().numpy() for tensor in inputs[:4])
    heads, groups, width = q.shape[1], k.shape[1], q.shape[2]
    scale = width**-0.5 if inputs.scale is None else inputs.scale
    out, dq, dk, dv = (np.zeros_like(array) for array in (q, q, k, v))
    for row, keys in enumerate(keys_of):
        # query head h reads key head h // (H / G): as (G, H / G, K) against (G, n, K)
        query, slope = (x[row].reshape(groups, heads // groups, width) for x in (q, weight))
        key, value = (x[list(keys)].transpose(1, 0, 2) for x in (k, v))
        scores = scale * query @ key.transpose(0, 2, 1)
        share = np.exp(scores - scores.max(axis=-1, keepdims=True))
        share /= share.sum(axis=-1, keepdims=True)
        out[row] = (share @ value).reshape(heads, width)
        d_share = slope @ value.transpose(0, 2, 1)
        d_scores = share * (d_share - (share * d_share).sum(axis=-1, keepdims=True))
        dq[row] = scale * (d_scores @ key).reshape(heads, width)
        dk[list(keys)] += scale * (d_scores.transpose(0, 2, 1) @ query).transpose(1, 0, 2)
        dv[list(keys)] += (share.transpose(0, 2, 1) @ slope).transpose(1, 0, 2)
    return Numbers(*(torch.from_numpy(array) for array in (out, dq, dk, dv)))


def random_inputs(
    num_tokens: int,
    *,
    groups: int = 2,
    ratio: int = 2,
    width: int = 16,
    scale: float | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Inputs:
    """Draw standard normal inputs that `dtype` holds exactly, as float64."""
    generator = torch.Generator().manual_seed(seed)
    heads = (groups * ratio, groups, groups, groups * ratio)
    drawn = (
        torch.randn(num_tokens, count, width, generator=generator, dtype=torch.float64)
        for count in heads
    )
    return Inputs(*(tensor.to(dtype).double() for tensor in drawn), scale)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference, as a share of the largest expected value; inf for NaN."""
    found, expected = found.detach().double(), expected.detach().double()
    difference = (found - expected).abs().max().item()
    size = expected.abs().max().item()
    return difference / max(size, 1e-300) if difference == difference else float("inf")


def pack_of(shapes: Sequence[Shape]) -> Pack:
    """Put samples of these shapes end to end."""
    samples, start = [], 0
    for shape in shapes:
        sample = []
        for role, length in shape:
            sample.append(Segment(start, start + length, role))
            start += length
        samples.append(sample)
    return samples


def seeded_pack(seed: int, *, num_samples: int = 12, max_length: int = 12) -> Pack:
    """Draw a pack without hypothesis: 0-3 segments of each role a sample, in any order."""
    rng = np.random.default_rng(seed)
    shapes = []
    for _ in range(num_samples):
        roles = [role for role in Role for _ in range(int(rng.integers(0, 4)))] or [C]
        rng.shuffle(roles)
        shapes.append(tuple((Role(r), int(rng.integers(1, max_length + 1))) for r in roles))
    return pack_of(shapes)


@st.composite
def _shapes(draw: st.DrawFn, max_length: int) -> Shape:
    counts = draw(st.tuples(*[st.integers(0, 5)] * len(Role)).filter(any))
    roles = draw(st.permutations([r for r, n in zip(Role, counts, strict=True) for _ in range(n)]))
    return tuple((role, draw(st.integers(1, max_length))) for role in roles)


@st.composite
def packs(draw: st.DrawFn, max_samples: int = 40) -> Pack:
    """Packs of 1-40 samples, each with 0-5 segments of each role in any order.

    Made of one to six shapes: samples of equal shape are what kernels put together.
    """
    max_length = draw(st.sampled_from([1, 3, 12]))
    kinds = draw(st.lists(_shapes(max_length), min_size=1, max_size=6))
    size = draw(st.integers(1, max_samples))  # drawn for itself: lists alone stay short
    return pack_of(draw(st.lists(st.sampled_from(kinds), min_size=size, max_size=size)))


rule_cases = st.sampled_from(RULE_CASES)


def steady(max_examples: int) -> settings:
    """Return settings that draw the same examples everywhere, however loaded the machine."""
    return settings(
        max_examples=max_examples,
        derandomize=True,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
    )


@st.composite
def problems(draw: st.DrawFn, max_samples: int = 40) -> tuple[Pack, RuleCase, Inputs]:
    """Packs with a rule and inputs: grouped heads 1, 2 and 8, widths 8, 16 and 80."""
    samples, case = draw(packs(max_samples)), draw(rule_cases)
    inputs = random_inputs(
        samples[-1][-1].stop,
        groups=draw(st.sampled_from([1, 2])),
        ratio=draw(st.sampled_from([1, 2, 8])),
        width=draw(st.sampled_from([8, 16, 80])),
        scale=draw(st.sampled_from([None, 0.3])),
        seed=draw(st.integers(0, 1000)),
        dtype=torch.bfloat16,  # numbers that every dtype holds exactly
    )
    return samples, case, inputs


def numbers_of(run: Run, inputs: Inputs, plan: AttentionPlan, dtype: torch.dtype) -> Numbers:
    """Run forward and backward in `dtype`."""
    q, k, v = (tensor.detach().to(dtype).requires_grad_() for tensor in inputs[:3])
    out = run(q, k, v, plan, inputs.scale)
    assert out.dtype == dtype
    assert out.shape == q.shape
    return Numbers(out, *torch.autograd.grad(out, (q, k, v), inputs.weight.to(dtype)))


def by_name(backend: str) -> Run:
    return lambda q, k, v, plan, scale: segment_attention(
        q, k, v, plan=plan, backend=backend, scale=scale
    )


def assert_all_close(found: Numbers, expected: Numbers, *, tolerance: float) -> None:
    for name, left, right in zip(Numbers._fields, found, expected, strict=True):
        error = relative_error(left, right)
        assert error <= tolerance, f"{name}: relative error {error:.1e}"


def distance(found: Tensor, expected: Tensor) -> float:
    """Return the Euclidean distance."""
    return float((found.detach().double() - expected).norm())
