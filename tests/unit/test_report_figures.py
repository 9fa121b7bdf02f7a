"""Charts, pictures and tables of the report, each by itself."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from cocoa_dist.report import figures, pieces
from cocoa_dist.report.__main__ import score_lines
from cocoa_dist.report.filling import Piece


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (2.31, 2.32), (3.0, 3.0), (0.0, 4821.0)])
def test_ticks_cover_the_range_with_few_round_numbers(low, high):
    ticks = figures.nice_ticks(low, high)
    assert ticks[0] <= low
    assert ticks[-1] >= high
    assert 2 <= len(ticks) <= 8
    assert np.allclose(np.diff(ticks), ticks[1] - ticks[0])


def test_smoothing_keeps_a_constant_and_calms_noise():
    assert figures.smoothed([2.0] * 50) == pytest.approx([2.0] * 50)
    noise = np.random.default_rng(0).normal(size=800)
    calm = figures.smoothed(noise)
    assert len(calm) == 800
    assert calm.std() < 0.4 * noise.std()


def test_smoothing_is_a_plain_mean_of_neighbours():
    values = np.random.default_rng(1).normal(size=160).tolist()
    slow = [np.mean(values[max(0, i - 4) : i + 5]) for i in range(160)]
    assert figures.smoothed(values) == pytest.approx(slow)


def test_chart_survives_values_that_are_no_numbers():
    line = figures.Line("a", (1.0, 2.0, 3.0), (1.0, float("nan"), 2.0))
    assert "nan" not in figures.line_chart([line], label="x").lower()
    empty = figures.Line("a", (1.0,), (float("nan"),))
    assert "No finite values" in figures.line_chart([empty], label="x")


def test_small_pictures_go_in_as_they_are_and_large_ones_are_made_small():
    small, large = encoded(32), encoded(900)
    assert decoded(figures.picture_uri(small)).size == (32, 32)
    assert figures.picture_uri(small).endswith(base64.b64encode(small).decode())
    assert max(decoded(figures.picture_uri(large)).size) <= 96


def test_hidden_pixels_are_transparent():
    image = np.full((4, 4, 3), 200, dtype=np.uint8)
    hidden = np.zeros((4, 4), dtype=bool)
    hidden[0] = True
    alpha = np.asarray(decoded(figures.pixels_uri(image, hidden=hidden)))[:, :, 3]
    assert np.array_equal(alpha == 0, hidden)


def test_texts_from_data_are_escaped():
    markup = pieces.filled_text([Piece("<b>"), Piece(" cat", " <i>"), Piece("&", "&")])
    assert "<b>" not in markup
    assert "<i>" not in markup
    assert "&lt;i&gt;<s>cat</s>" in markup


def test_right_guesses_and_wrong_ones_differ():
    markup = pieces.filled_text([Piece(" dog", " dog"), Piece(" cat", " cow")])
    assert '<span class="ok">dog</span>' in markup
    assert '<span class="no">cow<s>cat</s></span>' in markup


def test_the_best_arm_is_marked_in_each_column_and_chance_stands_beside():
    arms = {
        "untrained": {"splits": {"s": score(1.0)}},
        "cocoa": {"splits": {"s": score(30.0)}},
        "contrastive": {"splits": {"s": score(20.0)}},
    }
    rows = pieces.score_table(arms, "s", "t2i", caption="c").split("<tr>")
    best = [row for row in rows if "best" in row]
    assert len(best) == 1
    assert ">cocoa<" in best[0]
    assert best[0].count("best") == 3
    assert all(row.count("<i>0.5</i>") == 1 for row in rows[2:])


def test_equal_arms_are_not_marked():
    arms = {name: {"splits": {"s": score(5.0)}} for name in ("a", "b")}
    assert "best" not in pieces.score_table(arms, "s", "i2t", caption="c")


def score(value):
    cuts = {"r1": value, "r5": value, "r10": value}
    chance = {"r1": 0.5, "r5": 2.5, "r10": 5.0}
    return {"n": 197, "chance": chance, "t2i": cuts, "i2t": cuts}


def test_plain_table_has_every_arm_chance_and_the_ratio():
    arms = {
        "untrained": {"train_cpu_seconds": 0.0, "splits": {"s": score(1.0)}},
        "cocoa": {"train_cpu_seconds": 120.0, "splits": {"s": score(30.0)}},
    }
    said = score_lines({"arms": arms, "notes": ["mind this"], "cpu_ratio": 1.02})
    assert re.search(r"cocoa +30\.0", said)
    assert re.search(r"chance +0\.5 +2\.5 +5\.0", said)
    assert "120.0" in said
    assert "1.020" in said
    assert "note: mind this" in said


def encoded(side):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, size=(side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "WEBP", quality=30)
    return buffer.getvalue()


def decoded(uri):
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
