"""What tools/bench_attention.py compares: packs, and the ways to compute attention over them.

An arm is a forward pass over inputs of its own. Ours go through `segment_attention`; the limits
compute the same problems on rows that already lie in order; the baselines are what one would write
without a plan. Nothing is timed here.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from cocoa_dist.attention import AttentionPlan, available_backends, compile_plan, segment_attention
from cocoa_dist.segments import AttentionRule, Role, Segment, attention_rule, dense_visibility

CALL_BACKENDS = ("varlen", "flash_attn", "flash_attn_4")  # those that run a plan's calls
MAX_DENSE_TOKENS = 8192  # T x T scores of 28 heads at 32768 do not fit into a card
COMPRESSION_TOKENS = 32  # CoMa's K
CONTEXT_SHARE = 0.75  # of a sample without its bridge: a picture and a short text before the target

Samples = Sequence[Sequence[Segment]]

RULES: Mapping[str, AttentionRule] = MappingProxyType(
    {
        "bidirectional": attention_rule("bidirectional"),
        "causal": attention_rule("causal"),
        "eos_bridged": attention_rule("eos_bridged"),
        "eos_bridged target_causal": attention_rule("eos_bridged", target_causal=True),
        "eos_bridged blind bridge": attention_rule("eos_bridged", bridge_sees_target=False),
        "compression": attention_rule("compression"),
    }
)


@dataclass(frozen=True)
class Heads:
    """Query heads, key heads and their width."""

    query: int
    key: int
    width: int

    def __str__(self) -> str:
        return f"{self.query}/{self.key} heads of {self.width}"


@dataclass(frozen=True)
class Case:
    """One pack under one rule: q (T, H, K), k and v (T, G, K), and the gradient of the output."""

    rule_name: str
    heads: Heads
    samples: Samples
    plan: AttentionPlan  # on the device
    q_THK: Tensor
    k_TGK: Tensor
    v_TGK: Tensor
    gradient_THK: Tensor

    @property
    def rule(self) -> AttentionRule:
        """The rule itself."""
        return RULES[self.rule_name]

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Leaves whose gradients are computed."""
        return self.q_THK, self.k_TGK, self.v_TGK

    @property
    def without_gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        """The same inputs, for what cannot train here and refuses leaves."""
        return self.q_THK.detach(), self.k_TGK.detach(), self.v_TGK.detach()

    @property
    def flops(self) -> float:
        """Of one forward pass: 4 x visible pairs x query heads x width."""
        return 4.0 * self.plan.visible_area * self.heads.query * self.heads.width


@dataclass(frozen=True)
class Arm:
    """One way to compute a case."""

    name: str
    kind: str  # ours, limit or baseline
    forward: Callable[[], tuple[Tensor, ...]]
    inputs: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...]  # one for each tensor that `forward` returns
    trains: bool = True
    prepare: Callable[[], object] | None = None  # what is done once a batch, for all layers


def make_samples(
    num_tokens: int, num_samples: int, *, bridge: int, seed: int
) -> list[list[Segment]]:
    """Cut `num_tokens` into samples of uneven length (0.5 to 1.5 of the mean), context first.

    Raises ValueError if a sample would have no room for its three segments.
    """
    mean, needed = num_tokens // num_samples, 2 * bridge + 4
    if mean < needed:
        raise ValueError(
            f"{num_tokens} tokens in {num_samples} samples are {mean} a sample, needed are "
            f"{needed}: give more --tokens or fewer --samples"
        )
    generator = torch.Generator().manual_seed(seed)
    shares = 0.5 + torch.rand(num_samples, generator=generator, dtype=torch.float64)
    ends = (shares.cumsum(0) / shares.sum() * num_tokens).round().long().tolist()
    samples = []
    for start, stop in zip([0, *ends[:-1]], ends, strict=True):
        context = start + max(1, round(CONTEXT_SHARE * (stop - start - bridge)))
        target = context + bridge
        samples.append(
            [
                Segment(start, context, Role.CONTEXT),
                Segment(context, target, Role.BRIDGE),
                Segment(target, stop, Role.TARGET),
            ]
        )
    return samples


def make_case(
    rule_name: str,
    heads: Heads,
    *,
    num_tokens: int,
    num_samples: int,
    device: torch.device,
    dtype: torch.dtype,
    seed: int = 0,
) -> Case:
    """Draw a pack and its inputs."""
    bridge = COMPRESSION_TOKENS if rule_name == "compression" else 1
    samples = make_samples(num_tokens, num_samples, bridge=bridge, seed=seed)
    generator = torch.Generator(device).manual_seed(seed)

    def draw(num_heads: int) -> Tensor:
        size = (num_tokens, num_heads, heads.width)
        return torch.randn(size, generator=generator, device=device).to(dtype)

    return Case(
        rule_name=rule_name,
        heads=heads,
        samples=samples,
        plan=compile_plan(samples, RULES[rule_name]).to(device),
        q_THK=draw(heads.query).requires_grad_(),
        k_TGK=draw(heads.key).requires_grad_(),
        v_TGK=draw(heads.key).requires_grad_(),
        gradient_THK=draw(heads.query),
    )


def our_arms(case: Case, *, with_flex: bool) -> list[Arm]:
    """One arm for each backend that runs on the device of the case."""
    device = case.q_THK.device
    names = [n for n in available_backends(device, case.q_THK.dtype) if with_flex or n != "flex"]
    if case.plan.num_tokens > MAX_DENSE_TOKENS:
        names = [name for name in names if name != "dense"]
    arms = [_through_plan(case, name) for name in names]
    if with_flex and "flex" not in names:
        arms.append(_through_plan(case, "flex", trains=False))
    return arms


def _through_plan(case: Case, backend: str, *, trains: bool = True) -> Arm:
    q, k, v = case.inputs if trains else case.without_gradients

    def forward() -> tuple[Tensor, ...]:
        return (segment_attention(q, k, v, plan=case.plan, backend=backend),)

    def prepare() -> object:
        return compile_plan(case.samples, case.rule)

    return Arm(
        backend,
        "ours",
        forward,
        case.inputs,
        (case.gradient_THK,),
        trains=trains,
        prepare=prepare,
    )


def limit_arms(case: Case) -> list[Arm]:
    """Compute the plan's problems on rows that lie in order: no gather, nothing put back."""
    if case.q_THK.device.type == "cpu":
        return [_plain_sdpa(case)]
    here = available_backends(case.q_THK.device, case.q_THK.dtype)
    return [plain_calls(case, name) for name in CALL_BACKENDS if name in here]


def plain_calls(case: Case, backend: str) -> Arm:
    """Run the plan's calls through the backend's own kernel, each on inputs of its own."""
    module = importlib.import_module(f"cocoa_dist.attention.backends.{backend}")
    parts = []
    for call in case.plan.calls:
        plan = replace(
            case.plan, num_tokens=call.num_q, calls=(call,), query_rows=(), keys=None, host=None
        )
        parts.append((plan, _fresh(case, call.num_q, call.num_k)))

    def forward() -> tuple[Tensor, ...]:
        return tuple(module.run(*leaves, plan, None) for plan, leaves in parts)

    inputs = tuple(leaf for _, leaves in parts for leaf in leaves)
    gradients = tuple(torch.randn_like(leaves[0]).detach() for _, leaves in parts)
    return Arm(f"plain {backend}", "limit", forward, inputs, gradients)


def _plain_sdpa(case: Case) -> Arm:
    """Run one batched SDPA for each shape of problem, in SDPA's own layout: the CPU's limit."""
    heads = case.heads
    parts: list[tuple[tuple[Tensor, Tensor, Tensor], bool, Tensor | None]] = []
    for shape in case.plan.buckets.shapes:
        sizes = ((heads.query, shape.n_q), (heads.key, shape.n_k), (heads.key, shape.n_k))
        q, k, v = (
            torch.randn(shape.count, num, rows, heads.width, dtype=case.q_THK.dtype)
            for num, rows in sizes
        )
        square = shape.n_q == shape.n_k
        mask = None
        if shape.causal and not square:
            mask = torch.ones(shape.n_q, shape.n_k, dtype=torch.bool)
            mask = mask.tril(shape.n_k - shape.n_q)
        leaves = (q.requires_grad_(), k.requires_grad_(), v.requires_grad_())
        parts.append((leaves, shape.causal and square, mask))
    grouped = heads.query != heads.key

    def forward() -> tuple[Tensor, ...]:
        return tuple(
            F.scaled_dot_product_attention(
                *leaves, attn_mask=mask, is_causal=causal, enable_gqa=grouped
            )
            for leaves, causal, mask in parts
        )

    inputs = tuple(leaf for leaves, _, _ in parts for leaf in leaves)
    gradients = tuple(torch.randn_like(leaves[0]).detach() for leaves, _, _ in parts)
    return Arm("plain SDPA", "limit", forward, inputs, gradients)


def _fresh(case: Case, num_q: int, num_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return inputs (num_q, H, K) and twice (num_k, G, K) like those of the case."""
    heads = case.heads

    def draw(rows: int, num_heads: int) -> Tensor:
        drawn = torch.randn(rows, num_heads, heads.width, device=case.q_THK.device)
        return drawn.to(case.q_THK.dtype).requires_grad_()

    return draw(num_q, heads.query), draw(num_k, heads.key), draw(num_k, heads.key)


def baseline_arms(case: Case) -> list[Arm]:
    """Return what one would write without a plan: a dense mask, and a loop over samples."""
    arms = [_sample_loop(case)]
    if case.plan.num_tokens <= MAX_DENSE_TOKENS:
        arms.append(_dense_sdpa(case))
    return arms


def _dense_sdpa(case: Case) -> Arm:
    mask = case.plan.visibility()

    def forward() -> tuple[Tensor, ...]:
        return (_sdpa(case, slice(None), mask=mask),)

    return Arm(
        "SDPA, dense mask",
        "baseline",
        forward,
        case.inputs,
        (case.gradient_THK,),
        prepare=case.plan.visibility,
    )


def _sample_loop(case: Case) -> Arm:
    """Slice, SDPA and join, sample by sample; a mask only where SDPA has no flag for the rule."""
    spans = [slice(sample[0].start, sample[-1].stop) for sample in case.samples]
    causal = case.rule.name == "causal"
    masked = not causal and case.rule.name != "bidirectional"

    def make_masks() -> list[Tensor | None]:
        if not masked:
            return [None] * len(spans)
        return [_own_mask(sample, case) for sample in case.samples]

    masks = make_masks()

    def forward() -> tuple[Tensor, ...]:
        pairs = zip(spans, masks, strict=True)
        return (torch.cat([_sdpa(case, span, mask=mask, causal=causal) for span, mask in pairs]),)

    return Arm(
        "loop over samples",
        "baseline",
        forward,
        case.inputs,
        (case.gradient_THK,),
        prepare=make_masks,
    )


def _own_mask(sample: Sequence[Segment], case: Case) -> Tensor:
    base = sample[0].start
    moved = [replace(s, start=s.start - base, stop=s.stop - base) for s in sample]
    return torch.from_numpy(dense_visibility([moved], case.rule)).to(case.q_THK.device)


def _sdpa(case: Case, span: slice, *, mask: Tensor | None, causal: bool = False) -> Tensor:
    """SDPA over some rows of the case, (rows, H, K)."""
    q, k, v = (rows[span].transpose(0, 1)[None] for rows in case.inputs)
    grouped = case.heads.query != case.heads.key
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped
    )
    return out[0].transpose(0, 1)


def flex_arm(case: Case) -> Arm:
    """FlexAttention, compiled, as its manual has it: a mask_mod on ids, and create_block_mask."""
    from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

    device, tokens = case.q_THK.device, case.plan.num_tokens
    compiled = torch.compile(flex_attention, dynamic=False)
    mask_mod = _mask_mod_of_ids(case)

    def prepare() -> BlockMask:
        return create_block_mask(mask_mod, None, None, tokens, tokens, device=str(device))

    block_mask = prepare()
    grouped = case.heads.query != case.heads.key
    on_gpu = device.type == "cuda"
    inputs = case.inputs if on_gpu else case.without_gradients

    def forward() -> tuple[Tensor, ...]:
        q, k, v = (rows.transpose(0, 1)[None] for rows in inputs)
        out = compiled(q, k, v, block_mask=block_mask, enable_gqa=grouped)
        return (out[0].transpose(0, 1),)

    return Arm(
        "flex, create_block_mask",
        "baseline",
        forward,
        case.inputs,
        (case.gradient_THK,),
        trains=on_gpu,
        prepare=prepare,
    )


def _mask_mod_of_ids(case: Case) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    device = case.q_THK.device
    lengths = [[s.stop - s.start for s in sample] for sample in case.samples]
    flat = torch.tensor([length for sample in lengths for length in sample])
    numbers = torch.arange(len(lengths)).repeat_interleave(torch.tensor([len(s) for s in lengths]))
    sample_T = numbers.repeat_interleave(flat).to(device)
    roles = torch.tensor([int(s.role) for sample in case.samples for s in sample])
    role_T = roles.repeat_interleave(flat).to(device)
    views = [case.rule.views[role] for role in Role]
    full = torch.tensor([[key in view.full for key in Role] for view in views], device=device)
    causal = torch.tensor([[key in view.causal for key in Role] for view in views], device=device)

    def mask_mod(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        query_role, key_role = role_T[row], role_T[key]
        seen = full[query_role, key_role] | (causal[query_role, key_role] & (key <= row))
        return seen & (sample_T[row] == sample_T[key])

    return mask_mod


def worst_difference(case: Case, arm: Arm) -> float:
    """Largest difference of an arm's output from the first backend's, relative to its maximum.

    Limits have rows in another order and are not compared: 0.
    """
    if arm.kind == "limit":
        return 0.0
    with torch.no_grad():
        expected = segment_attention(*case.inputs, plan=case.plan).float()
        found = arm.forward()[0].float()
    return float((found - expected).abs().max() / expected.abs().max())
