"""Who may see whom: the roles a token span can have and the rules that connect them.

The only place where an attention pattern is declared. Kernels, the dense reference and the
pictures all read it. Needs numpy, never torch, so that a login node can use it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise

import numpy as np
import numpy.typing as npt


class Role(IntEnum):
    """What a token span is for."""

    CONTEXT = 0  # image and query text
    BRIDGE = 1  # EOS, or compression tokens: what the embedding is read from
    TARGET = 2  # what must be rebuilt or answered


@dataclass(frozen=True, slots=True)
class Segment:
    """Half-open span `[start, stop)` of a pack with one role."""

    start: int
    stop: int
    role: Role


@dataclass(frozen=True, slots=True)
class View:
    """What the rows of one role see inside their sample.

    `full`: roles seen wholly. `causal`: roles seen only at positions up to the row's own.
    """

    full: frozenset[Role] = frozenset()
    causal: frozenset[Role] = frozenset()

    def __post_init__(self) -> None:
        # plans keep views as keys: a set or a list of roles is as good as a frozenset
        object.__setattr__(self, "full", frozenset(self.full))
        object.__setattr__(self, "causal", frozenset(self.causal))
        both = self.full & self.causal
        if both:
            names = ", ".join(sorted(role.name for role in both))
            raise ValueError(f"a role is seen either wholly or causally, not both: {names}")


@dataclass(frozen=True)
class AttentionRule:
    """One view per role. A rule of one's own is a plain value of this type."""

    name: str
    views: Mapping[Role, View]

    def __post_init__(self) -> None:
        missing = [role.name for role in Role if role not in self.views]
        if missing:
            raise ValueError(f"rule '{self.name}' has no view for: {', '.join(missing)}")
        blind = [r.name for r in Role if r not in self.views[r].full | self.views[r].causal]
        if blind:
            raise ValueError(
                f"rule '{self.name}': rows of {', '.join(blind)} do not see themselves"
            )


_ALL = frozenset(Role)
_CONTEXT, _BRIDGE, _TARGET = Role.CONTEXT, Role.BRIDGE, Role.TARGET


def _bidirectional() -> dict[Role, View]:
    return {role: View(full=_ALL) for role in Role}


def _causal() -> dict[Role, View]:
    return {role: View(causal=_ALL) for role in Role}


def _eos_bridged(
    *, bridge_sees_target: bool = True, target_causal: bool = False
) -> dict[Role, View]:
    """CoCoA (arXiv 2603.01471), stage 2: the only way from TARGET to CONTEXT is over BRIDGE."""
    front = frozenset({_CONTEXT, _BRIDGE})
    target = (
        View(full=frozenset({_BRIDGE}), causal=frozenset({_TARGET}))
        if target_causal
        else View(full=frozenset({_BRIDGE, _TARGET}))
    )
    bridge = View(full=_ALL if bridge_sees_target else front)
    return {_CONTEXT: View(full=front), _BRIDGE: bridge, _TARGET: target}


def _compression() -> dict[Role, View]:
    """CoMa (arXiv 2511.08480), stage 1: answers see the compression tokens, never the image."""
    front = View(causal=frozenset({_CONTEXT, _BRIDGE}))
    target = View(full=frozenset({_BRIDGE}), causal=frozenset({_TARGET}))
    return {_CONTEXT: front, _BRIDGE: front, _TARGET: target}


_RULES = {
    "bidirectional": _bidirectional,
    "causal": _causal,
    "eos_bridged": _eos_bridged,
    "compression": _compression,
}
_OPTIONS: dict[str, tuple[str, ...]] = {"eos_bridged": ("bridge_sees_target", "target_causal")}
RULE_NAMES = tuple(_RULES)


def attention_rule(name: str, **options: bool) -> AttentionRule:
    """Make a rule by name: bidirectional, causal, eos_bridged or compression.

    Options of `eos_bridged`: `bridge_sees_target` (default True), `target_causal` (default False).
    Raises ValueError for an unknown rule or option.
    """
    if name not in _RULES:
        raise ValueError(f"unknown attention rule '{name}' (have: {', '.join(_RULES)})")
    allowed = _OPTIONS.get(name, ())
    unknown = sorted(set(options) - set(allowed))
    if unknown:
        have = ", ".join(allowed) or "none"
        raise ValueError(f"rule '{name}' has no option {', '.join(unknown)} (has: {have})")
    return AttentionRule(name, _RULES[name](**options))


def check_segments(samples: Sequence[Sequence[Segment]]) -> int:
    """Check that samples tile a pack `[0, T)` without gap or overlap; return T.

    Raises ValueError with the numbers of the first fault.
    """
    flat = [segment for sample in samples for segment in sample]
    for index, sample in enumerate(samples):
        if not sample:
            raise ValueError(f"sample {index} has no segments")
    if not flat:
        raise ValueError("a pack needs at least one sample")
    if flat[0].start != 0:
        raise ValueError(f"the first segment starts at {flat[0].start}, expected 0")
    for segment in flat:
        if segment.role not in _ALL:
            raise ValueError(
                f"segment [{segment.start}, {segment.stop}) has role {segment.role!r}, expected "
                f"one of {', '.join(role.name for role in Role)}"
            )
        if segment.stop <= segment.start:
            raise ValueError(
                f"empty segment [{segment.start}, {segment.stop}) {segment.role.name}: leave it out"
            )
    for left, right in pairwise(flat):
        if left.stop != right.start:
            fault = "overlap" if right.start < left.stop else "leave a gap"
            raise ValueError(
                f"segments [{left.start}, {left.stop}) and [{right.start}, {right.stop}) {fault}; "
                "segments must tile the pack in order"
            )
    return flat[-1].stop


def dense_visibility(
    samples: Sequence[Sequence[Segment]], rule: AttentionRule
) -> npt.NDArray[np.bool_]:
    """Return the rule as a dense table (T, T): True where the row may see the column.

    For tests and pictures only: quadratic in T. `samples` holds each sample's segments in pack
    coordinates.
    """
    num_tokens = check_segments(samples)
    visible_TT = np.zeros((num_tokens, num_tokens), dtype=np.bool_)
    for sample in samples:
        for query in sample:
            view = rule.views[query.role]
            for key in sample:
                block = visible_TT[query.start : query.stop, key.start : key.stop]
                if key.role in view.full:
                    block[:] = True
                elif key.role in view.causal:
                    rows = np.arange(query.start, query.stop)[:, None]
                    block[:] = np.arange(key.start, key.stop)[None, :] <= rows
    return visible_TT
