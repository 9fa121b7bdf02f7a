"""Rules: who may see whom."""

import numpy as np
import pytest

from cocoa_dist.segments import (
    RULE_NAMES,
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
# Two segments of each role, the second in another order
MIXED = [
    Segment(0, 1, C),
    Segment(1, 2, B),
    Segment(2, 4, T),
    Segment(4, 5, B),
    Segment(5, 6, C),
    Segment(6, 7, T),
]
MIXED_BEHIND_SAMPLE = [Segment(s.start + 5, s.stop + 5, s.role) for s in MIXED]


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
        (
            attention_rule("eos_bridged", bridge_sees_target=False, target_causal=True),
            "xxx.. xxx.. xxx.. ..xx. ..xxx",
        ),
        (attention_rule("compression"), "x.... xx... xxx.. ..xx. ..xxx"),
    ],
    ids=lambda value: value.name if isinstance(value, AttentionRule) else "",
)
def test_rule_is_the_picture_of_the_paper(rule: AttentionRule, picture: str) -> None:
    assert np.array_equal(dense_visibility([SAMPLE], rule), table(picture))


@pytest.mark.parametrize(
    ("rule", "picture"),
    [
        (
            attention_rule("bidirectional"),
            "xxxxxxx xxxxxxx xxxxxxx xxxxxxx xxxxxxx xxxxxxx xxxxxxx",
        ),
        (attention_rule("causal"), "x...... xx..... xxx.... xxxx... xxxxx.. xxxxxx. xxxxxxx"),
        (attention_rule("eos_bridged"), "xx..xx. xxxxxxx .xxxx.x .xxxx.x xxxxxxx xx..xx. .xxxx.x"),
        (
            attention_rule("eos_bridged", bridge_sees_target=False),
            "xx..xx. xx..xx. .xxxx.x .xxxx.x xx..xx. xx..xx. .xxxx.x",
        ),
        (
            attention_rule("eos_bridged", target_causal=True),
            "xx..xx. xxxxxxx .xx.x.. .xxxx.. xxxxxxx xx..xx. .xxxx.x",
        ),
        (
            attention_rule("eos_bridged", bridge_sees_target=False, target_causal=True),
            "xx..xx. xx..xx. .xx.x.. .xxxx.. xx..xx. xx..xx. .xxxx.x",
        ),
        (attention_rule("compression"), "x...... xx..... .xx.x.. .xxxx.. xx..x.. xx..xx. .xxxx.x"),
    ],
    ids=lambda value: value.name if isinstance(value, AttentionRule) else "",
)
def test_rule_holds_for_several_bridges_and_targets_in_a_sample(
    rule: AttentionRule, picture: str
) -> None:
    assert np.array_equal(dense_visibility([MIXED], rule), table(picture))


@pytest.mark.parametrize("name", RULE_NAMES)
def test_every_named_rule_lets_each_row_see_itself(name: str) -> None:
    assert dense_visibility([SAMPLE, MIXED_BEHIND_SAMPLE], attention_rule(name)).diagonal().all()


def test_target_cannot_see_the_context_under_the_rules_with_a_bridge() -> None:
    for rule in (attention_rule("eos_bridged"), attention_rule("compression")):
        visible = dense_visibility([MIXED], rule)
        assert not visible[np.ix_([2, 3, 6], [0, 5])].any()


def test_rule_of_ones_own_is_one_value_and_its_picture() -> None:
    own = AttentionRule(
        "reader",
        {
            C: View(full=frozenset({C}), causal=frozenset({T})),
            B: View(causal=frozenset({C, B})),
            T: View(full=frozenset({T})),
        },
    )
    picture = "x....x. xx..... ..xx..x ..xx..x xx..x.. x.xx.x. ..xx..x"
    assert np.array_equal(dense_visibility([MIXED], own), table(picture))


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
        ([[Segment(0, 3, C)], [Segment(2, 4, C)]], r"\[0, 3\) and \[2, 4\) overlap"),
        ([[Segment(0, 3, C)], [Segment(5, 6, C)]], r"\[0, 3\) and \[5, 6\) leave a gap"),
        ([[Segment(0, 0, C)]], "empty segment"),
        ([[Segment(0, 2, C), Segment(2, 1, T)]], r"empty segment \[2, 1\) TARGET"),
        ([[], [Segment(0, 1, C)]], "sample 0 has no segments"),
        ([], "at least one sample"),
        ([[Segment(0, 4, 7)]], r"\[0, 4\) has role 7, expected one of CONTEXT, BRIDGE, TARGET"),
    ],
)
def test_segments_must_tile_the_pack(samples: list[list[Segment]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_segments(samples)


def test_unknown_rule_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="have: bidirectional, causal, eos_bridged, compression"):
        attention_rule("bidirectionl")


@pytest.mark.parametrize("name", ["bidirectional", "causal", "compression"])
def test_option_of_another_rule_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"rule '{name}' has no option target_causal \(has: none"):
        attention_rule(name, target_causal=True)


def test_unknown_option_names_the_known_ones() -> None:
    message = r"no option target_casual \(has: bridge_sees_target, target_causal\)"
    with pytest.raises(ValueError, match=message):
        attention_rule("eos_bridged", target_casual=True)


def test_rule_without_a_view_for_each_role_is_refused() -> None:
    with pytest.raises(ValueError, match="rule 'own' has no view for: BRIDGE, TARGET"):
        AttentionRule("own", {C: View(full=frozenset({C}))})


def test_rule_of_ones_own_must_let_every_row_see_itself() -> None:
    with pytest.raises(ValueError, match="TARGET do not see themselves"):
        AttentionRule(
            "own", {C: View(full=frozenset({C})), B: View(full=frozenset({B})), T: View()}
        )


def test_view_of_plain_sets_and_lists_is_the_view_of_frozen_ones() -> None:
    plain = View(full={Role.CONTEXT}, causal=[Role.TARGET])  # type: ignore[arg-type]
    frozen = View(full=frozenset({Role.CONTEXT}), causal=frozenset({Role.TARGET}))
    assert plain == frozen
    assert hash(plain) == hash(frozen)


def test_view_cannot_be_both_whole_and_causal() -> None:
    with pytest.raises(ValueError, match="not both: CONTEXT"):
        View(full=frozenset({C}), causal=frozenset({C}))
