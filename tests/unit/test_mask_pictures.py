"""Pictures of rules: what they show is the plan, also where a cell stands for many tokens."""

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest

from cocoa_dist.attention import compile_plan
from cocoa_dist.segments import RULE_NAMES, Role, attention_rule, dense_visibility

TOOLS = str(Path(__file__).resolve().parents[2] / "tools")
PACK = "C6 B1 T4 | C3 B1 T5"
UNEVEN = "C11 B1 T9 | T5 C16 B8 T5 | B2 | C12 B1 T3 C4 B1 T5"


@pytest.fixture(scope="module")
def pictures():
    sys.path.insert(0, TOOLS)
    import mask_pictures

    yield mask_pictures
    sys.path.remove(TOOLS)


@pytest.fixture(scope="module")
def show_batch(pictures):
    import show_batch

    return show_batch


def test_a_pack_is_read_from_letters_and_lengths(pictures):
    samples = pictures.parse_pack("c2 B1 | T3")
    assert [[(s.start, s.stop, s.role) for s in sample] for sample in samples] == [
        [(0, 2, Role.CONTEXT), (2, 3, Role.BRIDGE)],
        [(3, 6, Role.TARGET)],
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("C6 X1", "'X1' in sample 1 is not a segment"),
        ("C6 | C0", "'C0' in sample 2"),
        ("C6 B-1", "'B-1'"),
        ("C6 | | T2", "sample 2 has no segments"),
        ("", "sample 1 has no segments"),
    ],
)
def test_a_word_that_is_no_segment_is_named(pictures, text, said):
    with pytest.raises(ValueError, match=said.replace("|", r"\|")):
        pictures.parse_pack(text)


@pytest.mark.parametrize("name", RULE_NAMES)
@pytest.mark.parametrize("max_cells", [7, 40, 1000])
def test_cells_hold_the_share_of_visible_pairs(pictures, name, max_cells):
    """Against the mean of the dense table over each cell, for each role seen."""
    samples = pictures.parse_pack(UNEVEN)
    rule = attention_rule(name)
    cells = pictures.cut(compile_plan(samples, rule), samples, max_cells)
    visible = dense_visibility(samples, rule)
    roles = np.array([s.role for sample in samples for s in sample for _ in range(s.start, s.stop)])
    spans = list(itertools.pairwise(cells.edges))
    assert len(spans) == min(max_cells, len(roles))
    expected = [
        [[(visible[a:b, c:d] & (roles[c:d] == r)).mean() for r in Role] for c, d in spans]
        for a, b in spans
    ]
    np.testing.assert_allclose(cells.shares, expected, atol=1e-12)
    assert cells.exact == (max_cells == 1000)


@pytest.mark.parametrize("name", RULE_NAMES)
def test_text_shows_a_letter_exactly_where_a_row_may_see(pictures, name):
    samples = pictures.parse_pack(PACK)
    rule = attention_rule(name)
    head, *rows = pictures.text_lines(compile_plan(samples, rule), samples)
    assert "c context, b bridge, t target" in head
    letters = "ccccccbtttt|cccbttttt"
    assert f" {letters} " in head
    marks = [row.split()[1].replace("|", "") for row in rows if "-" not in row]
    assert len(rows) == len(marks) + 1, "one line parts the two samples"
    plain = letters.replace("|", "")
    for seen, visible in zip(marks, dense_visibility(samples, rule), strict=True):
        assert seen == "".join(c if v else "." for c, v in zip(plain, visible, strict=True))


def test_text_of_a_large_pack_says_how_many_tokens_a_letter_is(pictures):
    samples = pictures.parse_pack("C300 B1 T99 | C250 B1 T250")
    plan = compile_plan(samples, attention_rule("eos_bridged"))
    lines = pictures.text_lines(plan, samples)
    assert "901 tokens, 12 to 13 a letter" in lines[0]
    assert max(map(len, lines)) <= 132
    marks = [line.split()[1] for line in lines[3:] if "-" not in line]
    assert any("+" in row for row in marks), "cells of which less than half is seen"
    assert len(marks) == pictures.MAX_TEXT_CELLS


def test_rules_are_drawn_without_data(show_batch, tmp_path, capsys):
    target = tmp_path / "rule.png"
    arguments = ["--rule", "eos_bridged", "--option", "target_causal=true", "--pack", PACK]
    assert show_batch.main([*arguments, "--png", str(target)]) == 0
    shown = capsys.readouterr().out
    assert "eos_bridged target_causal=true" in shown
    assert "visible     108 of 400 pairs" in shown
    assert "t ......btt..|" in shown
    assert target.read_bytes().startswith(b"\x89PNG")


def test_all_rules_are_drawn_side_by_side(show_batch, tmp_path, capsys):
    from PIL import Image

    target = tmp_path / "all.png"
    assert show_batch.main(["--rule", "all", "--pack", PACK, "--png", str(target)]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n{name}" in f"\n{shown}" for name in RULE_NAMES)
    assert shown.count("bridge_sees_target=") == 4
    with Image.open(target) as image:
        assert image.width > 1.5 * image.height, "two rows of four"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "needed: a recipe with --stage, or --rule with --pack"),
        (["debug"], "needed: a recipe with --stage"),
        (["debug", "--stage", "contrastive", "--samples", "0"], "--samples is 0"),
        (["--rule", "causal"], "--rule needs a --pack"),
        (["debug", "--rule", "causal", "--pack", "C1"], "leave out the recipe"),
        (["debug", "--stage", "contrastive", "--pack", "C1"], "--pack and --option belong to"),
        (["--rule", "all", "--option", "a=true", "--pack", "C1"], "leave out --option"),
        (["--rule", "causal", "--option", "a=2", "--pack", "C1"], "expected NAME=true"),
        (["--rule", "causal", "--option", "a=true", "--pack", "C1"], "has no option a"),
        (["--rule", "diagonal", "--pack", "C1"], "unknown attention rule 'diagonal'"),
        (["--rule", "causal", "--pack", "C1", "--png", "/none/x.png"], "cannot be written"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(show_batch, capsys, arguments, said):
    assert show_batch.main(arguments) == 2
    assert said in capsys.readouterr().err


# Machado, Oliveira and Fernandes (IEEE TVCG 2009), severity 1, for linear RGB.
VISIONS = {
    "normal": np.eye(3),
    "protan": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "deutan": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "tritan": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
}


@pytest.mark.parametrize("vision", VISIONS)
def test_roles_can_be_told_apart_with_any_colour_vision(pictures, vision):
    """At least 20 apart in CIELAB (a just noticeable difference is about 2)."""
    from matplotlib.colors import to_rgb

    colours = [to_rgb(c) for c in (*pictures.COLOURS.values(), pictures.UNSEEN)]
    seen = [cielab(np.array(VISIONS[vision]) @ linear(np.array(c))) for c in colours]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 20


def linear(rgb):
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def cielab(rgb):
    to_xyz = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    )
    xyz = to_xyz @ rgb.clip(0, 1) / np.array([0.9505, 1.0, 1.089])
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])
