"""What every model family has to pass; a family added to model/families.py is in it by itself.

Numbers against transformers' own model under explicit masks, packed against alone, are in
test_attention_families.py, what the vision tower is given in test_families.py: both run over all
families as well. docs/backbones.md says how one is added.
"""

import inspect
from dataclasses import replace

import numpy as np
import pytest
import torch
from family_models import (
    HEADS,
    RULES,
    SHAPES,
    Shape,
    assert_near,
    each_family,
    hidden_rows,
    make_backbone,
    make_pack,
    make_samples,
    model_config,
    packed_step,
)

from cocoa_dist.config import load_recipe
from cocoa_dist.data.packing import build_pack
from cocoa_dist.export import CardInfo, check_self_test, export_folder
from cocoa_dist.export.folder import SUPPORTED_MODELS
from cocoa_dist.model import families
from cocoa_dist.model.embedder import EmbeddingModel
from cocoa_dist.report.arms import (
    export_tokenizer,
    image_settings,
    read_held_out,
    self_test_vectors,
)
from cocoa_dist.train.build import image_geometry, load_vocabulary
from cocoa_dist.train.evaluate import load_embedder

MOST_LINES = 150  # of what one family needs: its declaration and its random shape


@pytest.fixture(scope="module")
def vocabulary():
    return load_vocabulary(model_config("qwen2_vl"))


def call_counts(model, pack) -> dict[str, int]:
    """How often the parts run in one forward pass."""
    parts = {
        "visual": model.core.visual,
        "language": model.core.language_model,
        "first layer": model.core.language_model.layers[0],
        "first block": model.core.visual.blocks[0],
    }
    counts = dict.fromkeys(parts, 0)

    def counted(name):
        def count(*_):
            counts[name] += 1

        return count

    handles = [part.register_forward_hook(counted(name)) for name, part in parts.items()]
    model(pack)
    for handle in handles:
        handle.remove()
    return counts


@pytest.mark.parametrize("content", ["several pictures", "no picture", "nothing"])
@each_family
def test_every_part_runs_exactly_once_whatever_is_in_the_pack(vocabulary, name, content):
    """Anything else hangs under ZeRO-3, where ranks gather parameters in the same order."""
    backbone = make_backbone(vocabulary, name)
    shapes = {"several pictures": SHAPES, "no picture": (Shape(()),)}.get(content)
    if shapes is None:
        geometry = image_geometry(backbone)
        pack = build_pack([], rule=RULES["causal"], geometry=geometry, vocabulary=vocabulary)
        model = EmbeddingModel(backbone, replace(HEADS, embeddings=False, patch_values=0))
    else:
        samples = make_samples(vocabulary, shapes)
        pack = make_pack(vocabulary, backbone, RULES["causal"], samples=samples)
        model = EmbeddingModel(backbone, HEADS)
    assert set(call_counts(model, pack).values()) == {1}


@each_family
def test_a_forward_pass_leaves_nothing_behind_for_the_next(vocabulary, name):
    """Published models keep what they worked out of positions and lose it on the second forward."""
    backbone = make_backbone(vocabulary, name)
    model, rule = EmbeddingModel(backbone, HEADS), RULES["eos_bridged"]
    pack = make_pack(vocabulary, backbone, rule)
    other = make_pack(
        vocabulary, backbone, rule, samples=make_samples(vocabulary, SHAPES[::-1], seed=3)
    )
    with torch.no_grad():
        first = hidden_rows(model, pack)
        hidden_rows(model, other)
        again = hidden_rows(model, pack)
    assert torch.equal(first, again)


@pytest.mark.parametrize("rule", ["bidirectional", "causal", "eos_bridged", "compression"])
@each_family
def test_a_sample_is_the_same_in_a_pack_as_alone(vocabulary, name, rule):
    """float64; 1e-11 of the largest value: sums in another order."""
    backbone = make_backbone(vocabulary, name, dtype=torch.float64)
    model = EmbeddingModel(backbone, HEADS)
    samples = [  # nothing hidden: its noise is drawn by the place in the pack
        replace(one, image_masks=tuple(np.zeros_like(mask) for mask in one.image_masks))
        for one in make_samples(vocabulary)
    ]
    with torch.no_grad():
        together = hidden_rows(model, make_pack(vocabulary, backbone, RULES[rule], samples=samples))
        alone = [
            hidden_rows(model, make_pack(vocabulary, backbone, RULES[rule], samples=[sample]))
            for sample in samples
        ]
    lengths = [len(sample.input_ids) for sample in samples]
    # behind the samples there may be a filler's rows
    for part, own, length in zip(together.split(lengths), alone, lengths, strict=False):
        assert_near(part, own[:length], share=1e-11, what=name)


@pytest.mark.parametrize("rule", ["bidirectional", "causal"])
@each_family
def test_the_last_token_reaches_earlier_ones_only_if_the_rule_says_so(vocabulary, name, rule):
    backbone = make_backbone(vocabulary, name)
    model = EmbeddingModel(backbone, HEADS)
    samples = make_samples(vocabulary, SHAPES[:1])
    pack = make_pack(vocabulary, backbone, RULES[rule], samples=samples)
    changed_ids = pack.input_ids.clone()
    last = len(samples[0].input_ids) - 1
    changed_ids[last] = changed_ids[last - 1]
    assert changed_ids[last] != pack.input_ids[last]
    with torch.no_grad():
        before = hidden_rows(model, pack)[:last]
        after = hidden_rows(model, replace(pack, input_ids=changed_ids))[:last]
    moved = (before - after).abs().amax(dim=1) > 1e-6
    assert moved.all() if rule == "bidirectional" else not moved.any()


@each_family
def test_pictures_move_every_part_that_is_trained(vocabulary, name):
    backbone = make_backbone(vocabulary, name)
    model = EmbeddingModel(backbone, HEADS)
    _, found = packed_step(model, make_pack(vocabulary, backbone, RULES["bidirectional"]))
    assert found.keys() == {key for key, _ in model.named_parameters()}
    assert [key for key, gradient in found.items() if not gradient.any()] == []
    assert all(torch.isfinite(gradient).all() for gradient in found.values())


@each_family
def test_an_adapter_of_a_family_is_small(name):
    """What is particular to one is its declaration and a function for its random shape."""
    shape = families.FAMILIES[name].random_shape
    assert len(inspect.getsource(shape).splitlines()) < MOST_LINES


@pytest.mark.slow
@each_family
def test_an_exported_folder_gives_the_vectors_of_training_or_is_refused(name, tmp_path):
    config = load_recipe(
        "debug", [f"model.random.family={name}", "evaluation.sets.unseen_concept.limit=4"]
    )
    embedder = load_embedder(config, run_dir=None, after_stage="model")
    arguments = {
        "model": embedder.model.backbone,
        "tokenizer": export_tokenizer(config.model),
        "destination": tmp_path / "out",
        "image_settings": image_settings(config, embedder),
        "bidirectional": True,
        "pooling": embedder.stage.pooling,
        "prompts": {},
        "card": CardInfo(
            name="tiny",
            base="random",
            stages=[],
            data="none",
            licence="other",
            compute="none",
            scores=[],
        ),
        "self_test": self_test_vectors(embedder, read_held_out(config, embedder)),
        "max_text_tokens": config.data.max_text_tokens,
        "verify": False,
    }
    if name not in SUPPORTED_MODELS:
        with pytest.raises(ValueError, match=f"model is a '{name}', expected one of"):
            export_folder(**arguments)
        return
    export_folder(**arguments)
    found = check_self_test(tmp_path / "out")
    assert found.passed, found.describe()
