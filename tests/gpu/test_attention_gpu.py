"""The attention backends' own kernels, on the card that is here.

Every check is a function of (device, dtype, backend) and runs for the CPU's backends as well, so
that a machine without a GPU runs the checks themselves. A backend that is not installed is
skipped with the words in which `choose_backend` refuses it.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from cocoa_dist.attention import AttentionPlan, choose_backend, compile_plan, segment_attention
from cocoa_dist.attention.backends import varlen
from cocoa_dist.attention.kernels import BACKENDS
from cocoa_dist.data.geometry import ImageGeometry
from cocoa_dist.data.vision_layout import vision_layout
from cocoa_dist.segments import AttentionRule, Role, Segment, attention_rule, dense_visibility

C, B, T = Role.CONTEXT, Role.BRIDGE, Role.TARGET
Pack = list[list[Segment]]

RULES = {
    "bidirectional": attention_rule("bidirectional"),
    "causal": attention_rule("causal"),
    "compression": attention_rule("compression"),
    "eos_bridged": attention_rule("eos_bridged"),
    "eos_bridged_blind": attention_rule("eos_bridged", bridge_sees_target=False),
    "eos_bridged_target_causal": attention_rule("eos_bridged", target_causal=True),
}
HEADS = {  # query heads, key heads, width
    "text of 2B/3B, 16/2 of 128": (16, 2, 128),
    "text of 7B, 28/4 of 128": (28, 4, 128),
    "vision, 16 of 72": (16, 16, 72),
    "vision, 16 of 80": (16, 16, 80),
}
REPEATS = {"cpu": 2, "cuda": 8}
# Torch says it of its own switch, and inductor of float32 products that we do not make.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),
]


class Where(NamedTuple):
    device: str
    dtype: torch.dtype
    backend: str


def settings(*dtypes: torch.dtype, backends: Sequence[str] = BACKENDS) -> list[Any]:
    """The CPU's backends in float32, and each on the card in each of `dtypes`."""
    on_cpu = [Where("cpu", torch.float32, name) for name in ("dense", "split") if name in backends]
    on_card = [
        pytest.param(Where("cuda", dtype, name), marks=pytest.mark.gpu)
        for name in backends
        for dtype in dtypes
    ]
    return [*on_cpu, *on_card]


def name_of(value: Any) -> str | None:
    if isinstance(value, Where):
        return f"{value.device}-{str(value.dtype).removeprefix('torch.')}-{value.backend}"
    return None


everywhere = pytest.mark.parametrize("where", settings(torch.bfloat16), ids=name_of)
in_both_halves = pytest.mark.parametrize(
    "where", settings(torch.bfloat16, torch.float16), ids=name_of
)
each_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


@pytest.fixture(autouse=True)
def skip_what_is_not_installed(request: pytest.FixtureRequest) -> None:
    params = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    where = params.get("where")
    if where is None:
        return
    try:
        choose_backend(where.backend, device=where.device, dtype=where.dtype)
    except ValueError as fault:
        pytest.skip(str(fault))
    if where.device == "cuda" and where.backend in ("flex", "flash_attn_4"):
        if where.dtype != torch.bfloat16:
            pytest.skip("compiles many seconds for each dtype: bfloat16 only")
        if where.backend == "flex":
            skip_most_of_flex(params)


def skip_most_of_flex(params: dict[str, Any]) -> None:
    """Leave two rules and one kind of heads: flex compiles for each number of intervals."""
    if params.get("rule", RULES["compression"]) not in (RULES["compression"], RULES["eos_bridged"]):
        pytest.skip("compiles many seconds for each rule: compression and eos_bridged only")
    if params.get("heads", (16, 2, 128)) != (16, 2, 128):
        pytest.skip("compiles many seconds for each width: 16/2 of 128 only")
    torch._dynamo.reset()  # else it stops compiling at the eighth shape


def pack_of(*samples: Sequence[tuple[Role, int]]) -> Pack:
    packed, start = [], 0
    for shape in samples:
        sample = []
        for role, length in shape:
            sample.append(Segment(start, start + length, role))
            start += length
        packed.append(sample)
    return packed


# Lengths around the kernels' tiles (64, 128), one token, several bridges and targets in a sample
PACK = pack_of(
    ((C, 129), (B, 1), (T, 40)),
    ((C, 3), (B, 32), (T, 17), (C, 5), (T, 9)),
    ((T, 64), (B, 2), (C, 64), (B, 1)),
    ((C, 1),),
    ((B, 1), (T, 70)),
)
SMALL_PACK = pack_of(((C, 9), (B, 4), (T, 5), (C, 2), (T, 3)), ((T, 7), (B, 1), (C, 8)), ((B, 1),))


class Numbers(NamedTuple):
    out: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    slope: Tensor  # gradient of the loss with respect to the output


def random_inputs(num_tokens: int, heads: tuple[int, int, int], where: Where) -> Inputs:
    """Standard normal inputs; on the CPU one key head and an eighth of the width."""
    query_heads, key_heads, width = heads
    if where.device == "cpu":
        query_heads, key_heads, width = query_heads // key_heads, 1, width // 8
    generator = torch.Generator().manual_seed(0)
    drawn = (
        torch.randn(num_tokens, count, width, generator=generator)
        for count in (query_heads, key_heads, key_heads, query_heads)
    )
    return Inputs(*(tensor.to(where.device, where.dtype) for tensor in drawn))


def run(inputs: Inputs, plan: AttentionPlan, backend: str) -> Numbers:
    q, k, v = (tensor.detach().requires_grad_() for tensor in inputs[:3])
    out = segment_attention(q, k, v, plan=plan, backend=backend)
    return Numbers(out.detach(), *torch.autograd.grad(out, (q, k, v), inputs.slope))


def exact(inputs: Inputs, samples: Pack, rule: AttentionRule) -> Numbers:
    """Attention written out in float64 under the rule's table; no plan, no SDPA."""
    q, k, v = (tensor.detach().double().requires_grad_() for tensor in inputs[:3])
    ratio = q.shape[1] // k.shape[1]
    keys, values = (tensor.repeat_interleave(ratio, dim=1) for tensor in (k, v))
    scores_HTT = torch.einsum("qhk,thk->hqt", q, keys) / q.shape[2] ** 0.5
    visible_TT = torch.from_numpy(dense_visibility(samples, rule)).to(q.device)
    shares_HTT = scores_HTT.masked_fill(~visible_TT, -torch.inf).softmax(-1)
    out = torch.einsum("hqt,thk->qhk", shares_HTT, values)
    gradients = torch.autograd.grad(out, (q, k, v), inputs.slope.double())
    return Numbers(out.detach(), *gradients)


def distances(found: Numbers, expected: Numbers) -> dict[str, float]:
    """Euclidean distances as shares of the expected lengths."""
    return {
        name: float((left.double() - right).norm() / right.norm())
        for name, left, right in zip(Numbers._fields, found, expected, strict=True)
    }


def leave_nan_in_free_memory(device: str) -> None:
    """Fill memory that the next allocations get: rows that no kernel writes come back as NaN."""
    if device == "cuda":
        filled = [torch.full((2**22,), torch.nan, device=device) for _ in range(16)]
        filled += [torch.full((2**12,), torch.nan, device=device) for _ in range(256)]
        del filled


@each_rule
@in_both_halves
def test_attention_kernel_sees_exactly_what_the_rule_says(where: Where, rule: Any) -> None:
    # Equal scores and one-hot values: the output of a row lists the keys that it has seen. This
    # pins bottom-right causality where a problem has more keys than queries.
    plan = compile_plan(SMALL_PACK, rule).to(where.device)
    tokens, width = plan.num_tokens, 64
    assert tokens <= width
    zeros = torch.zeros(tokens, 2, width, device=where.device, dtype=where.dtype)
    one_hot = torch.eye(tokens, width, device=where.device, dtype=where.dtype)
    with torch.no_grad():
        out = segment_attention(
            zeros, zeros, one_hot[:, None].expand(-1, 2, -1).contiguous(), plan=plan,
            backend=where.backend,
        )  # fmt: skip
    seen_TT = torch.from_numpy(dense_visibility(SMALL_PACK, rule)).to(where.device)
    for head in range(2):
        assert torch.equal(out[:, head, :tokens] > 0, seen_TT)
        shares = out[:, head].float().sum(-1)
        torch.testing.assert_close(shares, torch.ones_like(shares), rtol=0, atol=0.02)


@each_rule
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@in_both_halves
def test_attention_kernel_errs_at_most_twice_as_much_as_dense(
    where: Where, heads: tuple[int, int, int], rule: Any
) -> None:
    plan = compile_plan(PACK, rule).to(where.device)
    inputs = random_inputs(plan.num_tokens, heads, where)
    expected = exact(inputs, PACK, rule)
    leave_nan_in_free_memory(where.device)
    found = run(inputs, plan, where.backend)
    for name, tensor in found._asdict().items():
        assert tensor.dtype == where.dtype
        assert tensor.isfinite().all(), f"{name} has {int((~tensor.isfinite()).sum())} bad values"
    errors = distances(found, expected)
    if where.dtype == torch.float32:
        assert max(errors.values()) <= 1e-5, errors
        return
    # On a card SDPA may compute `dense` in float32 inside: then what one more rounding costs
    floor = 0.75 * torch.finfo(where.dtype).eps
    allowed = distances(run(inputs, plan, "dense"), expected)
    pairs = {name: (errors[name], allowed[name]) for name in errors}
    assert all(error <= max(2 * dense, floor) for error, dense in pairs.values()), pairs


@contextmanager
def deterministic_algorithms() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@each_rule
@everywhere
def test_attention_kernel_repeats_bit_by_bit_when_asked_to(where: Where, rule: Any) -> None:
    plan = compile_plan(PACK, rule).to(where.device)
    inputs = random_inputs(plan.num_tokens, (16, 2, 128), where)
    with deterministic_algorithms():
        first, *others = (run(inputs, plan, where.backend) for _ in range(REPEATS[where.device]))
    for other in others:
        for name, left, right in zip(Numbers._fields, first, other, strict=True):
            assert torch.equal(left, right), f"{name} differs between two runs"


@each_rule
@everywhere
def test_attention_kernel_repeats_bit_by_bit_but_for_query_gradients(
    where: Where, rule: Any
) -> None:
    # Not asked for determinism, flash kernels add query gradients over key tiles by atomics, in
    # any order; all else, our gathers included, repeats.
    plan = compile_plan(PACK, rule).to(where.device)
    inputs = random_inputs(plan.num_tokens, (16, 2, 128), where)
    first, *others = (run(inputs, plan, where.backend) for _ in range(REPEATS[where.device]))
    for other in others:
        for name in ("out", "dk", "dv"):
            assert torch.equal(getattr(first, name), getattr(other, name)), f"{name} differs"


@contextmanager
def no_synchronisation(device: str) -> Iterator[None]:
    """Let torch raise where the host would wait for the card."""
    if device != "cuda":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@each_rule
@everywhere
def test_attention_never_makes_the_host_wait(where: Where, rule: Any) -> None:
    warm, fresh = (compile_plan(PACK, rule) for _ in range(2))
    inputs = random_inputs(warm.num_tokens, (16, 2, 128), where)
    run(inputs, warm.to(where.device), where.backend)  # kernels are loaded or compiled here
    if where.device == "cuda":
        fresh = fresh.pin_memory()
    with no_synchronisation(where.device):
        run(inputs, fresh.to(where.device), where.backend)


@pytest.mark.gpu
def test_the_switch_that_forbids_waiting_works() -> None:
    with no_synchronisation("cuda"), pytest.raises(RuntimeError, match="synchron"):
        torch.ones(1, device="cuda").item()


@each_rule
@pytest.mark.parametrize(
    "where", settings(torch.bfloat16, torch.float16, backends=("varlen",)), ids=name_of
)
def test_attention_calls_varlen_once_for_each_call_of_the_plan(
    where: Where, rule: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.nn.attention import varlen as torch_varlen

    original, calls = torch_varlen.varlen_attn, []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args[5:7])
        return original(*args, **kwargs)

    counted.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    monkeypatch.setattr(torch_varlen, "varlen_attn", counted)
    varlen._options.cache_clear()
    plan = compile_plan(PACK, rule).to(where.device)
    run(random_inputs(plan.num_tokens, (16, 2, 128), where), plan, "varlen")
    assert calls == [(call.max_seqlen_q, call.max_seqlen_k) for call in plan.calls]
    assert len(calls) <= 2


@pytest.mark.parametrize(
    "where",
    settings(torch.bfloat16, backends=("varlen", "flash_attn", "flash_attn_4")),
    ids=name_of,
)
def test_attention_of_a_long_pack_takes_no_memory_of_its_square(where: Where) -> None:
    rule = RULES["compression"]
    plan = compile_plan(pack_of(*[((C, 200), (B, 8), (T, 48))] * 128), rule).to(where.device)
    inputs = random_inputs(plan.num_tokens, (4, 2, 64), where)
    run(inputs, plan, where.backend)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(inputs, plan, where.backend)
    used = torch.cuda.max_memory_allocated() - before
    assert used < plan.num_tokens**2 / 2, f"{used} bytes for {plan.num_tokens} tokens"


@everywhere
def test_attention_moves_a_plan_once_and_uses_it_again(where: Where) -> None:
    plan = compile_plan(PACK, RULES["compression"])
    moved = plan.to(where.device)
    assert moved.device.type == where.device
    assert moved.to(moved.device) is moved
    inputs = random_inputs(plan.num_tokens, (4, 2, 64), where)
    with torch.inference_mode():
        segment_attention(*inputs[:3], plan=moved, backend=where.backend)
    numbers = run(inputs, moved, where.backend)
    assert all(tensor.isfinite().all() for tensor in numbers)


@pytest.mark.parametrize("heads", [HEADS["vision, 16 of 72"], HEADS["vision, 16 of 80"]], ids=str)
@everywhere
def test_attention_kernel_takes_views_of_one_projection(
    where: Where, heads: tuple[int, int, int]
) -> None:
    # As in a vision tower: one call takes all rows in order, so nothing is gathered before it
    plan = compile_plan(PACK, RULES["bidirectional"]).to(where.device)
    inputs = random_inputs(plan.num_tokens, heads, where)
    expected = run(inputs, plan, where.backend)
    joined = torch.stack(inputs[:3], dim=1).requires_grad_()
    out = segment_attention(*joined.unbind(1), plan=plan, backend=where.backend)
    (gradient,) = torch.autograd.grad(out, joined, inputs.slope)
    errors = distances(Numbers(out.detach(), *gradient.unbind(1)), expected)
    assert max(errors.values()) <= torch.finfo(where.dtype).eps, errors


@pytest.mark.gpu
def test_layout_of_pictures_moves_without_waiting_and_comes_back_whole() -> None:
    grids = ((1, 26, 4), (2, 6, 4), (1, 64, 64))
    layout = vision_layout(grids, ImageGeometry(patch_size=14, window=4, position_side=48))
    pinned = layout.pin_memory()
    with no_synchronisation("cuda"):
        moved = pinned.to("cuda")
    assert torch.equal(moved.positions.cpu(), layout.positions)
    torch.cuda._sleep(10**8)  # type: ignore[no-untyped-call]
    back = moved.to("cpu")  # the copy waits for the card, or reads what is not written yet
    for name in ("positions", "window_index", "taps", "tap_weights"):
        assert torch.equal(getattr(back, name), getattr(layout, name))
    assert torch.equal(back.plan.hi, layout.plan.hi)


@pytest.mark.gpu
def test_attention_auto_on_a_card_takes_a_kernel_made_for_it() -> None:
    choice = choose_backend("auto", device="cuda", dtype=torch.bfloat16)
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip(f"the card is too old for flash attention: {choice.reason}")
    assert choice.name in ("varlen", "flash_attn"), choice.reason


@pytest.mark.gpu
def test_attention_refuses_a_plan_that_stayed_on_the_host() -> None:
    q = torch.zeros(4, 2, 64, device="cuda", dtype=torch.bfloat16)
    plan = compile_plan(pack_of(((C, 4),)), RULES["causal"])
    with pytest.raises(ValueError, match=r"devices differ: q cuda:0, .*plan cpu"):
        segment_attention(q, q, q, plan=plan)
