"""The frozen guide of a contrastive stage: what it is, and what it may not be."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_evaluate import write_checkpoint
from tiny_exports import tiny_export

from cocoa_dist.config import ConfigError, load_recipe
from cocoa_dist.manifest import sha256_file
from cocoa_dist.report.facts import comparison_notes
from cocoa_dist.train.__main__ import main
from cocoa_dist.train.build import build_parts, first_steps
from cocoa_dist.train.guide import guide_digest, load_guide
from launcher.slurm.site_inputs import input_paths

STAGE = "contrastive"
GUIDE = f"stages.{STAGE}.objective.guide"


def recipe(*overrides: str, init_from: str = "model"):
    return load_recipe("debug", [f"stages.{STAGE}.init_from={init_from}", *overrides])


def guide_of(config, *, run_dir=None):
    """Return the guide, the parts of the stage, and its first pack."""
    parts = build_parts(config, STAGE, run_dir=run_dir)
    pack = first_steps(config, STAGE, parts)[0].packs[0]
    return load_guide(config, STAGE, parts, run_dir=run_dir), parts, pack


def embedded(model, pack) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(pack).embeddings_ED


def test_a_stage_without_a_guide_has_none() -> None:
    config = recipe()
    parts = build_parts(config, STAGE, run_dir=None)
    assert load_guide(config, STAGE, parts, run_dir=None) is None
    assert guide_digest(config.stages[STAGE], hash_files=lambda _: pytest.fail("hashed")) == ""


@pytest.mark.parametrize(
    "more", [[], ["model.num_bridge_tokens=3", f"stages.{STAGE}.pooling=late_interaction"]]
)
def test_the_guide_stays_what_the_model_was_when_the_stage_began(more: list[str]) -> None:
    guide, parts, pack = guide_of(recipe(f"{GUIDE}=stage_start", *more))
    before = embedded(parts.model, pack)
    assert torch.equal(guide(pack), before)
    with torch.no_grad():
        for parameter in parts.model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    assert not torch.allclose(embedded(parts.model, pack), before, atol=1e-2)
    found = guide(pack)
    assert torch.equal(found, before)
    assert not found.requires_grad


def test_the_guide_of_a_later_stage_is_the_end_of_the_one_before(tmp_path) -> None:
    before = "joint_reconstruction"
    config = recipe(f"{GUIDE}=stage_start", init_from=before)
    write_checkpoint(tmp_path, config, complete=True)
    guide, parts, pack = guide_of(config, run_dir=tmp_path)
    assert torch.equal(guide(pack), embedded(parts.model, pack))
    base = build_parts(recipe(), STAGE, run_dir=None)
    assert not torch.allclose(guide(pack), embedded(base.model, pack), atol=1e-2)
    with pytest.raises(
        ValueError, match=r"end of stage 'joint_reconstruction': give the --run-dir"
    ):
        load_guide(config, STAGE, parts, run_dir=None)


def test_an_exported_folder_guides_by_its_own_weights(tmp_path) -> None:
    folder = tiny_export(tmp_path / "guide", change=_disturb)
    config = recipe(f"{GUIDE}={folder}")
    guide, parts, pack = guide_of(config)
    expected = build_parts(recipe(), STAGE, run_dir=None).model
    _disturb(expected.backbone)
    torch.testing.assert_close(guide(pack), embedded(expected, pack), rtol=0, atol=1e-6)
    assert not torch.allclose(guide(pack), embedded(parts.model, pack), atol=1e-2)
    digest = guide_digest(
        config.stages[STAGE], hash_files=lambda paths: list(map(sha256_file, paths))
    )
    assert digest.startswith("+guide-")


def test_a_guide_is_known_by_its_settings_too(tmp_path) -> None:
    folder = tmp_path / "guide"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "tokenizer.json").write_text("{}")
    stage = recipe(f"{GUIDE}={folder}").stages[STAGE]
    found = []
    for settings in (
        {"rope_theta": 1e4},
        {"rope_theta": 1e4, "transformers_version": "5.0"},
        {"rope_theta": 1e6},
    ):
        (folder / "config.json").write_text(json.dumps({"model_type": "qwen2_vl", **settings}))
        found.append(guide_digest(stage, hash_files=lambda paths: list(map(sha256_file, paths))))
    assert found[0] == found[1] != found[2]
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"lacks config.json"):
        guide_digest(stage, hash_files=lambda _: pytest.fail("hashed"))


@torch.no_grad()
def _disturb(model: torch.nn.Module) -> None:
    draw = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))


def test_a_guide_with_other_tokens_or_pictures_is_refused(tmp_path) -> None:
    folder = tiny_export(tmp_path / "guide")
    learnt = recipe(f"{GUIDE}={folder}", "model.num_bridge_tokens=3")
    with pytest.raises(
        ValueError, match=r"2 tokens have other ids .*'<\|compress_1\|>': none there"
    ):
        guide_of(learnt)
    patches = recipe(f"{GUIDE}={folder}", "model.random.patch_size=4")
    with pytest.raises(ValueError, match="give a guide of the same family and patch size"):
        guide_of(patches)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"model folder .*guide lacks config.json"):
        guide_of(recipe(f"{GUIDE}={folder}"))


def test_a_guide_that_is_not_there_is_found_out_before_anything_starts(tmp_path, capsys) -> None:
    arguments = ["debug", f"{GUIDE}={tmp_path}/nowhere", "--check-inputs"]
    assert main(arguments) == 2
    said = "".join(capsys.readouterr())
    assert f"stages.{STAGE}.objective.guide '{tmp_path}/nowhere' is not a folder" in said


def test_a_margin_without_a_guide_is_refused() -> None:
    with pytest.raises(ConfigError, match="there is no guide: name one"):
        recipe(f"stages.{STAGE}.objective.guide_margin=0.1")


def test_a_folder_of_a_guide_is_an_input_and_no_other_beginning() -> None:
    config = recipe(f"{GUIDE}=/models/guide")
    assert Path("/models/guide") in input_paths(config)
    assert all(
        "stage_start" not in str(path) for path in input_paths(recipe(f"{GUIDE}=stage_start"))
    )
    arms = [arm("weights"), arm("weights+guide-1234"), arm("others")]
    assert [bool(comparison_notes(arms[0], other)) for other in arms] == [False, False, True]


def arm(base_model: str):
    """Facts of a run that compare equal but for what it began with."""
    stage = SimpleNamespace(manifest=SimpleNamespace(base_model=base_model))
    run = SimpleNamespace(data=None)
    return SimpleNamespace(stages=[stage], config=run, train_cpu_seconds=1.0)
