"""What a model family declares, what its vision tower is given, and what is refused."""

import os
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from family_models import (
    FAMILY_NAMES,
    HEADS,
    PATCH,
    RULES,
    each_family,
    make_backbone,
    make_pack,
    model_config,
    unrouted_copy,
)
from transformers import vision_utils

from cocoa_dist.batch import VisionLayout
from cocoa_dist.config import ModelConfig
from cocoa_dist.data.geometry import ImageGeometry
from cocoa_dist.data.packing import patchify
from cocoa_dist.data.vision_layout import vision_layout
from cocoa_dist.inputs import SUPPORTED_MODEL_TYPES
from cocoa_dist.model.backbone import (
    _ATTENTION_NAMES,
    load_backbone,
    route_attention,
    vision_inputs,
)
from cocoa_dist.model.embedder import EmbeddingModel
from cocoa_dist.model.families import FAMILIES, family_of
from cocoa_dist.model.heads import HeadsConfig
from cocoa_dist.train.build import image_geometry, load_vocabulary


@pytest.fixture(scope="module")
def vocabulary():
    return load_vocabulary(model_config("qwen2_vl"))


# --- what the vision tower is given --------------------------------------------------------------

GRIDS = ((1, 2, 2), (1, 6, 10), (1, 8, 8), (1, 2, 14), (1, 6, 10), (1, 26, 4), (2, 6, 4))


@pytest.mark.parametrize("window", [1, 2, 3, 4])
@pytest.mark.parametrize("side", [2, 7, 48])
def test_layout_is_what_transformers_would_work_out(window, side):
    """Bit for bit, for sizes that windows do not divide and for more frames than one."""
    geometry = ImageGeometry(patch_size=PATCH, window=window, position_side=side)
    found = vision_layout(GRIDS, geometry)
    grids = torch.tensor(GRIDS)
    assert torch.equal(found.positions, vision_utils.get_vision_position_ids(grids, 2))
    frames = found.plan.calls[0].cu_seqlens_q
    assert torch.equal(frames, vision_utils.get_vision_cu_seqlens(grids))
    index, lengths = vision_utils.get_vision_window_index(
        grids, spatial_merge_size=2, window_size=window * 2 * PATCH, patch_size=PATCH
    )
    assert torch.equal(found.window_index, index)
    assert torch.equal(found.window_plan.calls[0].cu_seqlens_q, lengths)
    taps, weights = vision_utils.get_vision_interpolation_indices_and_weights(
        grids, num_grid_per_side=side, align_corners=True, spatial_merge_size=2
    )
    assert torch.equal(found.taps, taps)
    assert torch.equal(found.tap_weights, weights)


@each_family
def test_tower_needs_nothing_but_the_layout(vocabulary, name, monkeypatch):
    """With the layout it gives what it gives without, and works nothing out by itself."""
    backbone = make_backbone(vocabulary, name)
    pack = make_pack(vocabulary, backbone, RULES["causal"])
    visual = backbone.model.visual
    with torch.no_grad():
        alone = unrouted_copy(backbone).model.visual(
            pack.pixel_values, grid_thw=pack.image_grid_thw
        )

        def refuse(*_, **__):
            raise AssertionError("the tower looked at its grids")

        for method in ("tolist", "repeat_interleave", "nonzero", "item"):
            monkeypatch.setattr(torch.Tensor, method, refuse)
        monkeypatch.setattr(torch, "repeat_interleave", refuse)
        given = visual(
            pack.pixel_values, grid_thw=pack.image_grid_thw, **vision_inputs(pack.vision)
        )
    torch.testing.assert_close(given.pooler_output, alone.pooler_output, rtol=1e-4, atol=1e-5)


def test_layout_goes_to_a_gpu_without_waiting_and_comes_back_with_waiting(monkeypatch):
    moves = []

    def noted(tensor, device, *, non_blocking=False):
        moves.append((str(device), non_blocking))
        return tensor.new_empty(tensor.shape, device="meta")

    whole = vision_layout(GRIDS, ImageGeometry(patch_size=PATCH, window=2, position_side=4))
    monkeypatch.setattr(torch.Tensor, "to", noted)
    there = whole.to("cuda")
    assert set(moves) == {("cuda", True)}
    assert len(moves) >= 4 + 2 * 4  # its own tensors, and those of two plans
    moves.clear()
    there.to("cpu")
    assert set(moves) == {("cpu", False)}, "read before it is written"


def test_equal_pictures_share_one_layout():
    geometry = ImageGeometry(patch_size=PATCH, window=2)
    assert vision_layout(GRIDS, geometry) is vision_layout(tuple(GRIDS), geometry)


def test_layout_refuses_pictures_that_do_not_divide_into_tokens():
    with pytest.raises(ValueError, match=r"3 x 4 patches .* does not divide into visual tokens of"):
        vision_layout(((1, 2, 2), (1, 3, 4)), ImageGeometry(patch_size=PATCH))


def test_layout_refuses_parts_for_other_patches():
    whole = vision_layout(GRIDS, ImageGeometry(patch_size=PATCH, window=2, position_side=4))
    patches = whole.plan.num_tokens
    with pytest.raises(ValueError, match=f"for {patches} patches, but positions for {patches - 1}"):
        replace(whole, positions=whole.positions[1:])
    with pytest.raises(ValueError, match="a window_plan needs a window_index"):
        replace(whole, window_index=None)
    with pytest.raises(ValueError, match="taps need tap_weights"):
        VisionLayout(positions=whole.positions, plan=whole.plan, taps=whole.taps)


def test_windowed_tower_refuses_a_batch_laid_out_without_windows(vocabulary):
    backbone = make_backbone(vocabulary, "qwen2_5_vl")
    pack = make_pack(vocabulary, backbone, RULES["causal"])
    bare = replace(pack, vision=replace(pack.vision, window_plan=None, window_index=None))
    with pytest.raises(ValueError, match="has windows, the batch was laid out without"):
        EmbeddingModel(backbone, HEADS)(bare)


def test_only_windowed_blocks_run_the_window_plan(vocabulary):
    blocks = make_backbone(vocabulary, "qwen2_5_vl").model.visual.blocks
    assert [block.attn.windowed for block in blocks] == [True, True, False]
    blocks = make_backbone(vocabulary, "qwen3_vl").model.visual.blocks
    assert not any(block.attn.windowed for block in blocks)


def test_window_smaller_than_a_visual_token_is_refused(vocabulary):
    backbone = make_backbone(vocabulary, "qwen2_5_vl")
    backbone.config.vision_config.window_size = 7
    with pytest.raises(ValueError, match="window_size is 7 pixels, less than the 8"):
        image_geometry(backbone)


# --- families ------------------------------------------------------------------------------------


def test_every_supported_type_has_a_family():
    assert FAMILY_NAMES == SUPPORTED_MODEL_TYPES
    assert [family.model_type for family in FAMILIES.values()] == list(FAMILY_NAMES)


def test_a_model_of_no_family_is_named(vocabulary):
    config = make_backbone(vocabulary, "qwen2_vl").config
    config.model_type = "qwen9_vl"
    with pytest.raises(ValueError, match=r"type 'qwen9_vl' is not supported .have: qwen2_vl"):
        family_of(config)


@each_family
def test_pictures_are_normalised_with_the_statistics_of_the_family(vocabulary, name):
    """Against Qwen2-VL's processor, which all three use; float32 rounding."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    family = FAMILIES[name]
    wanted = [0.5, 0.5, 0.5] if name == "qwen3_vl" else [0.48145466, 0.4578275, 0.40821073]
    assert list(family.mean) == wanted
    geometry = image_geometry(make_backbone(vocabulary, name))
    images = np.random.default_rng(0).integers(0, 256, (2, 24, 32, 3), dtype=np.uint8)
    processor = Qwen2VLImageProcessorPil(
        patch_size=PATCH,
        min_pixels=24 * 32,
        max_pixels=24 * 32,
        image_mean=list(family.mean),
        image_std=list(family.std),
    )
    expected = processor(images=list(images), return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(patchify(images, geometry=geometry), expected, atol=1e-6, rtol=0)


@each_family
def test_a_saved_model_is_loaded_by_its_type(vocabulary, name, tmp_path):
    backbone = make_backbone(vocabulary, name)
    backbone.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    loaded = load_backbone(
        ModelConfig(path=str(tmp_path)), token_ids={}, vocabulary_size=vocabulary.size
    )
    pack = make_pack(vocabulary, backbone, RULES["eos_bridged"])
    assert dict(loaded.named_parameters()).keys() == dict(backbone.named_parameters()).keys()
    with torch.no_grad():
        ours, theirs = (EmbeddingModel(m, HeadsConfig(embeddings=True)) for m in (backbone, loaded))
        assert torch.equal(ours(pack).embeddings_ED, theirs(pack).embeddings_ED)


@each_family
def test_attention_is_registered_under_names_transformers_leaves_alone(vocabulary, name):
    for registered in _ATTENTION_NAMES.values():
        assert not any(word in registered for word in ("flash", "flex_attention", "/"))
    assert _ATTENTION_NAMES["flash_attn"] == "cocoa_fa"
    backbone = make_backbone(vocabulary, name, backend="dense")
    assert backbone.config.text_config._attn_implementation == "cocoa_dense"
    with pytest.raises(ValueError, match="unknown attention backend 'sparse'"):
        route_attention(backbone, backend="sparse")


def test_a_backend_that_is_not_here_says_what_to_install(vocabulary):
    backbone = make_backbone(vocabulary, "qwen2_vl")
    with pytest.raises(ValueError, match=r"'flash_attn_4' cannot run here: .*pip install"):
        route_attention(backbone, backend="flash_attn_4", device="cpu")


def test_the_backend_and_its_reason_are_logged_once(vocabulary, caplog):
    from cocoa_dist.model import backbone as module

    module._announce.cache_clear()
    with caplog.at_level("INFO", logger="cocoa_dist.model"):
        for _ in range(2):
            make_backbone(vocabulary, "qwen2_vl", backend="auto")
    lines = [r.message for r in caplog.records if "attention backend" in r.message]
    assert lines == ["attention backend split: the fastest that trains on cpu"]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("use_sliding_window", True, "text_config.use_sliding_window is true"),
        ("layer_types", ["full_attention", "sliding_attention"], "has sliding_attention"),
        ("attention_dropout", 0.1, "text_config.attention_dropout is 0.1"),
    ],
)
@each_family
def test_attention_that_plans_do_not_express_is_refused_by_key(
    vocabulary, name, key, value, message
):
    backbone = make_backbone(vocabulary, name)
    setattr(backbone.config.text_config, key, value)
    with pytest.raises(ValueError, match=message):
        route_attention(backbone, backend="split")


def test_a_sliding_window_that_is_not_used_is_fine(vocabulary):
    """As in the released Qwen2.5-VL: a size is given, and use_sliding_window is false."""
    backbone = make_backbone(vocabulary, "qwen2_5_vl")
    backbone.config.text_config.sliding_window = 32768
    route_attention(backbone, backend="split")


def test_a_mask_given_to_routed_attention_is_refused(vocabulary):
    backbone = make_backbone(vocabulary, "qwen3_vl")
    pack = make_pack(vocabulary, backbone, RULES["causal"])
    with pytest.raises(ValueError, match=r"takes no attention mask.* mask \(1, 1, 4, 4\)"):
        backbone.model.language_model(
            input_ids=pack.input_ids[None, -4:],
            attention_mask=torch.ones(1, 1, 4, 4, dtype=torch.bool),
            segment_plan=pack.plan,
        )


# --- training ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["joint_reconstruction", "contrastive"])
@each_family
def test_debug_recipe_trains_a_step_of_every_family(name, stage, tmp_path):
    """The whole trainer, in a process of its own: the loss of one batch falls."""
    command = [sys.executable, "-m", "cocoa_dist.train", "debug", "--stage", stage]
    changes = [f"model.random.family={name}", f"stages.{stage}.init_from=model"]
    done = subprocess.run(
        [*command, "--overfit-one-batch", "--steps", "8", *changes],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
        cwd=tmp_path,
    )
    losses = [float(found) for found in re.findall(r"step \d+: \w+ (\d+\.\d+)", done.stdout)]
    assert len(losses) == 8, done.stdout[-2000:] + done.stderr[-2000:]
    assert losses[-1] < losses[0]
