"""The last text layer: what nobody reads is not computed, and everything else is as it was."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from family_models import (
    FAMILY_NAMES,
    HEADS,
    RULES,
    assert_near,
    gradients,
    make_backbone,
    make_pack,
    make_samples,
    model_config,
)

from cocoa_dist.data.packing import build_pack
from cocoa_dist.model.backbone import compile_layers
from cocoa_dist.model.embedder import EmbeddingModel
from cocoa_dist.model.heads import HeadsConfig
from cocoa_dist.train.build import image_geometry, load_vocabulary

READS = {
    "labels": HeadsConfig(text_logits=True),
    "embeddings": HeadsConfig(embeddings=True),
    "both": HeadsConfig(text_logits=True, embeddings=True),
}


@pytest.fixture(scope="module")
def vocabulary():
    return load_vocabulary(model_config("qwen2_vl"))


@contextmanager
def rows_of_last_mlp(model) -> Iterator[list[int]]:
    """How many rows the last layer's feed-forward part is given."""
    rows: list[int] = []
    mlp = model.core.language_model.layers[-1].mlp
    handle = mlp.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].shape[1]))
    yield rows
    handle.remove()


def step(model, pack):
    output = model(pack)
    found = [t for t in (output.logits_SV, output.embeddings_ED) if t is not None]
    sum((t.float().square() * torch.arange(1.0, 1 + t.shape[1])).sum() for t in found).backward()
    return [t.detach() for t in found], gradients(model)


@pytest.mark.parametrize("heads", READS)
@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_outputs_and_gradients_are_those_of_the_whole_layer(vocabulary, name, heads):
    backbone = make_backbone(vocabulary, name, num_layers=3)  # deepstack: behind the first two
    model = EmbeddingModel(backbone, READS[heads])
    pack = make_pack(vocabulary, backbone, RULES["eos_bridged"])
    model.keep_all_rows = True
    with rows_of_last_mlp(model) as whole:
        expected, wanted = step(model, pack)
    model.keep_all_rows = False
    with rows_of_last_mlp(model) as read:
        found, got = step(model, pack)
    assert whole == [pack.num_tokens]
    labels = len(pack.label_rows) if READS[heads].text_logits else 0
    assert read == [labels + (len(pack.pool_rows) if READS[heads].embeddings else 0)]
    for ours, theirs in zip(found, expected, strict=True):
        assert_near(ours, theirs, share=1e-5, what=name)
    assert got.keys() == wanted.keys()
    for key, gradient in wanted.items():
        assert_near(got[key], gradient, share=1e-5, what=key)


def test_a_patch_decoder_sees_all_rows(vocabulary):
    backbone = make_backbone(vocabulary, "qwen2_vl")
    model = EmbeddingModel(backbone, HEADS)
    pack = make_pack(vocabulary, backbone, RULES["causal"])
    with rows_of_last_mlp(model) as rows:
        model(pack)
    assert rows == [pack.num_tokens]


def test_features_behind_the_last_layer_keep_all_of_its_rows(vocabulary):
    """Qwen3-VL adds features of the vision tower behind its first layers, by their rows."""
    backbone = make_backbone(vocabulary, "qwen3_vl", num_layers=2)
    model = EmbeddingModel(backbone, READS["embeddings"])
    pack = make_pack(vocabulary, backbone, RULES["causal"])
    with rows_of_last_mlp(model) as rows:
        embeddings = model(pack).embeddings_ED
    assert rows == [pack.num_tokens]
    assert len(embeddings) == pack.num_embeddings


@pytest.mark.parametrize("bridge", [1, 3])
def test_a_pack_that_nobody_reads_has_a_gradient_of_zero_everywhere(bridge):
    """Ranks with an empty pack run all collectives of the others; it has no bridge to measure."""
    vocabulary = load_vocabulary(model_config("qwen2_vl", num_bridge_tokens=bridge))
    backbone = make_backbone(vocabulary, "qwen2_vl")
    model = EmbeddingModel(backbone, READS["embeddings"])
    pack = build_pack(
        [], rule=RULES["causal"], geometry=image_geometry(backbone), vocabulary=vocabulary
    )
    model(pack).embeddings_ED.sum().backward()
    for key, parameter in backbone.model.named_parameters():
        assert parameter.grad is not None, key
        assert not parameter.grad.any(), key


# Dynamo asks every input for its gradient, and torch warns of those that cannot have one.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.slow
def test_compiled_layers_leave_out_the_same_rows(vocabulary):
    backbone = make_backbone(vocabulary, "qwen2_vl")
    model = EmbeddingModel(backbone, READS["embeddings"])
    pack = make_pack(vocabulary, backbone, RULES["causal"], samples=make_samples(vocabulary))
    expected, wanted = step(model, pack)
    compile_layers(backbone, backend="eager")
    found, got = step(model, pack)
    for ours, theirs in zip(found, expected, strict=True):
        assert_near(ours, theirs, share=1e-5, what="embeddings")
    for key, gradient in wanted.items():
        assert_near(got[key], gradient, share=1e-5, what=key)
