"""Rules: who may see whom."""

import numpy as np
import pytest

from cocoa_dist.segments import (
    AttentionRule,
    Role,
    Segment,
    View,
    attention_rule,
    check_segments,
    dense_visibility,
)

C, B, T = Role.CONTEXT, Role.BRIDGE, Role.TARGET
SAMPLE = [Segment(0, 2, C), Segment(2, 3, B), Segment(3, 5, T)]


def table(text: str) -> np.ndarray:
    return np.array([[char == "x" for char in row] for row in text.split()])


@pytest.mark.parametrize(
    ("rule", "picture"),
    [
        (attention_rule("bidirectional"), "xxxxx xxxxx xxxxx xxxxx xxxxx"),
        (attention_rule("causal"), "x.... xx... xxx.. xxxx. xxxxx"),
        (attention_rule("eos_bridged"), "xxx.. xxx.. xxxxx ..xxx ..xxx"),
        (
            attention_rule("eos_bridged", bridge_sees_target=False),
            "xxx.. xxx.. xxx.. ..xxx ..xxx",
        ),
        (attention_rule("eos_bridged", target_causal=True), "xxx.. xxx.. xxxxx ..xx. ..xxx"),
        (attention_rule("compression"), "x.... xx... xxx.. ..xx. ..xxx"),
    ],
    ids=lambda value: value.name if isinstance(value, AttentionRule) else "",
)
def test_rule_is_the_picture_of_the_paper(rule: AttentionRule, picture: str) -> None:
    assert np.array_equal(dense_visibility([SAMPLE], rule), table(picture))


def test_samples_of_a_pack_never_see_each_other() -> None:
    pack = [[Segment(0, 2, C)], [Segment(2, 4, C)]]
    visible = dense_visibility(pack, attention_rule("bidirectional"))
    assert np.array_equal(visible, table("xx.. xx.. ..xx ..xx"))


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([[Segment(1, 2, C)]], "starts at 1, expected 0"),
        ([[Segment(0, 2, C), Segment(3, 4, B)]], "leave a gap"),
        ([[Segment(0, 2, C), Segment(1, 4, B)]], "overlap"),
        ([[Segment(0, 0, C)]], "empty segment"),
        ([[], [Segment(0, 1, C)]], "sample 0 has no segments"),
        ([], "at least one sample"),
    ],
)
def test_segments_must_tile_the_pack(samples: list[list[Segment]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_segments(samples)


def test_unknown_rule_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="have: bidirectional, causal, eos_bridged, compression"):
        attention_rule("bidirectionl")


def test_unknown_option_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="no option target_causal"):
        attention_rule("causal", target_causal=True)


def test_rule_of_ones_own_must_let_every_row_see_itself() -> None:
    with pytest.raises(ValueError, match="TARGET do not see themselves"):
        AttentionRule(
            "own", {C: View(full=frozenset({C})), B: View(full=frozenset({B})), T: View()}
        )


def test_view_cannot_be_both_whole_and_causal() -> None:
    with pytest.raises(ValueError, match="not both: CONTEXT"):
        View(full=frozenset({C}), causal=frozenset({C}))
