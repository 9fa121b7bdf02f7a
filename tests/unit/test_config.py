"""Recipes: loading, overriding, and what a wrong key gets."""

import subprocess
import sys
import time

import pytest

from cocoa_dist.config import (
    ConfigError,
    differences,
    dump_yaml,
    fingerprint,
    load_recipe,
    load_resolved,
    recipe_names,
)


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_resolves_and_reads_back_equal(name, tmp_path) -> None:
    config = load_recipe(name)
    path = tmp_path / "resolved.yaml"
    path.write_text(dump_yaml(config))
    assert load_resolved(path) == config
    assert fingerprint(load_resolved(path)) == fingerprint(config)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.contrastiv.steps=3", "stage 'contrastiv' is not in this recipe, did you mean"),
        ("stages.contrastive.stepz=3", "stages.contrastive.stepz: unknown key, did you mean 'step"),
        ("stages.contrastive.steps=many", "stages.contrastive.steps: found 'many'; input should"),
        (
            "stages.contrastive.init_from=eos",
            "init_from 'eos' is not an earlier stage of this recipe",
        ),
        (
            "stages.contrastive.objective.temprature=1",
            "stages.contrastive.objective.temprature: unknown key, did you mean 'temperature'",
        ),
        ("stages.contrastive.optimizer.warmup_steps=9999", "more than the"),
        ("stages.contrastive.data.view=caption", "objective contrastive needs data.view pair"),
        (
            "stages.contrastive.data.task_block=10",
            "stages.contrastive: batch_size 256 is not a multiple of data.task_block 10; it can",
        ),
        ("data.image.max_pixelz=4", "did you mean 'max_pixels'"),
        ("sed=3", "sed: unknown key, did you mean 'seed'"),
        ("model.new_tokens=[<a>, <b>, <a>]", "model: new_tokens has <a> twice; expected"),
        ("model.new_tokens=['']", "model: new_tokens has an empty token; expected"),
        ("seed", "is not of the form a.b.c=value"),
        ("seed.x=3", "seed is a value, not a group"),
    ],
)
def test_wrong_override_names_key_and_remedy(override, message) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe("quickstart", [override])


def test_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'quickstart'"):
        load_recipe("quickstat")


def test_override_beats_recipe_and_changes_the_fingerprint() -> None:
    old, new = load_recipe("debug"), load_recipe("debug", ["seed=7"])
    assert new.seed == 7
    assert fingerprint(old) != fingerprint(new)
    assert differences(old, new, free=False) == ["seed: 0 -> 7"]


def test_free_keys_do_not_change_the_fingerprint() -> None:
    old = load_recipe("debug")
    new = load_recipe("debug", ["metrics.log_every_steps=1", "data.log_sample_ids=true"])
    assert fingerprint(old) == fingerprint(new)
    assert len(differences(old, new, free=True)) == 2
    assert differences(old, new, free=False) == []


def test_extends_takes_keys_away_with_null() -> None:
    assert list(load_recipe("quickstart_contrastive").stages) == ["contrastive"]


def test_recipe_that_extends_itself_is_refused(tmp_path) -> None:
    path = tmp_path / "loop.yaml"
    path.write_text(f"extends: {path}\n")
    with pytest.raises(ConfigError, match="extends itself"):
        load_recipe(str(path))


def test_file_that_is_not_yaml_is_refused(tmp_path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("a: [1")
    with pytest.raises(ConfigError, match="is not YAML"):
        load_recipe(str(path))


def test_dump_config_is_fast_and_needs_no_torch() -> None:
    code = (
        "import sys; from cocoa_dist.train.__main__ import main;"
        "code = main(['cocoa_qwen2_vl_2b', '--stage', 'joint_reconstruction', '--dump-config']);"
        "assert 'torch' not in sys.modules, 'torch was imported'; sys.exit(code)"
    )
    begin = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "joint_reconstruction" in done.stdout
    assert time.monotonic() - begin < 5  # under one second on a quiet machine


def test_override_of_one_stage_leaves_the_others_alone() -> None:
    """The recipes share values by YAML aliases; an override must not."""
    old = load_recipe("debug")
    new = load_recipe(
        "debug",
        [
            "stages.contrastive.optimizer.learning_rate=0.5",
            "stages.contrastive.data.sources.emoji.limit=32",
        ],
    )
    assert differences(old, new, free=False) == [
        "stages.contrastive.data.sources.emoji.limit: 64 -> 32",
        "stages.contrastive.optimizer.learning_rate: 0.001 -> 0.5",
    ]


@pytest.mark.parametrize(
    "override",
    ["stages.next_token.attention.rule=bidirectional", "stages.next_token.attention={}"],
)
def test_next_tokens_may_not_be_seen_before_they_are_predicted(override) -> None:
    with pytest.raises(ConfigError, match="would be seen before they are predicted"):
        load_recipe("quickstart_backbone", [override])


def test_stage_name_cannot_lead_out_of_the_run_folder(tmp_path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("extends: quickstart_contrastive\nstages: {../../x: {init_from: model}}\n")
    with pytest.raises(ConfigError, match="should match pattern"):
        load_recipe(str(path))
