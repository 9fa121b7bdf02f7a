"""What a comparison's table says of rows whose numbers are known."""

import pytest
from comparison_preset import PRESET

from cocoa_dist.comparison import markdown, table
from cocoa_dist.comparison.arms import Preset, resolve


def row_of(preset, arm, *, held_out, validation, ablation=None, value=None) -> table.Row:
    variant = resolve(preset, arm, ablation=ablation, value=value)

    def split(values, seed):
        cuts = {"r1": values[seed], "r10": values[seed]}
        return {"n": 10, "chance": {}, "t2i": cuts, "i2t": cuts}

    runs = {
        seed: {
            "splits": {"unseen": split(held_out, seed), "validation": split(validation, seed)},
            "cpu_seconds": 1.0,
            "tokens": 1,
            "samples": 1,
            "steps": 1,
            "wall_seconds": 1.0,
            "stages": {},
            "curve": {},
        }
        for seed in range(len(held_out))
    }
    return table.Row(variant, {}, None, runs, {})


def test_settings_are_chosen_by_validation_and_not_by_held_out_scores() -> None:
    preset = Preset.model_validate(PRESET)
    rows = [
        row_of(preset, "alone", held_out=[50, 50], validation=[50, 50]),
        row_of(preset, "whole", held_out=[90, 90], validation=[40, 40]),
        row_of(preset, "whole", held_out=[10, 30], validation=[60, 62], ablation="mask", value=0.5),
        row_of(preset, "whole", held_out=[99], validation=[99], ablation="mask", value=0.9),
    ]
    content = table.build(
        rows, preset=preset, settings={}, sizes={}, costs={}, commands=(), choose=True
    )
    alone, cocoa = content["groups"][0]["chosen"]
    assert (alone["method"], alone["row"]) == ("contrastive", "alone")
    assert cocoa["row"] == "whole-mask-0.5"  # 0.9 has one seed of two: not comparable yet
    assert cocoa["candidates"] == {"whole": 40.0, "whole-mask-0.5": 61.0}
    assert cocoa["differences"]["unseen/both/r10"]["mean"] == pytest.approx(-30.0)
    said = markdown.statements(content, content["groups"][0])
    assert said[1].endswith("30.0 points below alone over 2 seed(s), more than the spread of 14.1.")
    assert said[2].endswith("one seed, so its spread is unknown.")


def test_an_ablation_of_the_data_is_compared_with_the_control_on_the_same_data() -> None:
    preset = Preset.model_validate(PRESET)
    few = {"ablation": "pairs", "value": 32}
    rows = [
        row_of(preset, "alone", held_out=[50], validation=[1]),
        row_of(preset, "alone", held_out=[20], validation=[1], **few),
        row_of(preset, "whole", held_out=[25], validation=[1], **few),
    ]
    content = table.build(
        rows, preset=preset, settings={}, sizes={}, costs={}, commands=(), choose=False
    )
    found = content["groups"][0]["rows"]
    assert found[2]["control"] == "alone-pairs-32"
    assert found[2]["differences"]["unseen/t2i/r1"]["mean"] == pytest.approx(5.0)
    assert found[1]["differences"]["unseen/t2i/r1"]["mean"] == pytest.approx(-30.0)
