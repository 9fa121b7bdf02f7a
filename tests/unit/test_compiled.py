"""Layers that cannot be compiled, or are compiled without end, go on as they are."""

import copy

import pytest
import torch
from family_models import (
    HEADS,
    RULES,
    SHAPES,
    assert_near,
    make_backbone,
    make_pack,
    make_samples,
    model_config,
    packed_step,
)
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from cocoa_dist.model import compiled
from cocoa_dist.model.compiled import compilation_of, compile_layers
from cocoa_dist.model.embedder import EmbeddingModel
from cocoa_dist.train.build import load_vocabulary

# Dynamo asks every input for its gradient, and torch warns of those that cannot have one.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@pytest.fixture(scope="module")
def vocabulary():
    return load_vocabulary(model_config("qwen2_vl"))


@pytest.fixture
def model_and_packs(vocabulary):
    """A model and packs of three lengths."""
    from torch import _dynamo as dynamo

    dynamo.reset()
    backbone = make_backbone(vocabulary, "qwen2_vl")
    model = EmbeddingModel(backbone, HEADS).train()
    rule = RULES["eos_bridged_causal"]
    packs = [
        make_pack(vocabulary, backbone, rule, samples=make_samples(vocabulary, SHAPES[skip:]))
        for skip in (0, 2, 1)
    ]
    return model, packs


def assert_steps_as(model, packs, plain) -> None:
    """1e-5: what is compiled may sum in another order (float32)."""
    for pack, (outputs, gradients) in zip(packs, plain, strict=True):
        found_outputs, found = packed_step(model, pack)
        for ours, wanted in zip(found_outputs, outputs, strict=True):
            assert_near(ours, wanted.detach(), share=1e-5, what="output")
        for key, wanted in gradients.items():
            assert_near(found[key], wanted, share=1e-5, what=key)


def fails(graph, inputs):
    raise RuntimeError("no C++ compiler\nsecond line")


def fails_later(graph, inputs):
    raise RuntimeError("no backward kernel")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("compiler", "message"),
    [
        (fails, "no C++ compiler"),
        (
            aot_autograd(
                fw_compiler=lambda graph, _: make_boxed_func(graph.forward),
                bw_compiler=fails_later,
            ),
            "no backward kernel",
        ),
    ],
    ids=["forward", "backward"],
)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_layers_that_cannot_be_compiled_run_as_they_are(
    model_and_packs, compiler, message, checkpointed, caplog
):
    model, packs = model_and_packs
    if checkpointed:
        model.backbone.activation_checkpointing_enable(
            activation_checkpointing_kwargs={"use_reentrant": False}
        )
    plain = [packed_step(model, pack) for pack in packs]
    compilation = compile_layers(model.backbone, backend=compiler)
    assert compilation_of(model) is compilation
    assert_steps_as(model, packs, plain)
    assert compilation.graphs <= 2  # a graph without gradients may come before; not tried again
    assert message in compilation.stopped
    assert caplog.text.count("layers run without torch.compile from here on") == 1
    assert "second line" not in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("checkpointed", [False, True])
def test_layers_that_are_compiled_without_end_are_left_alone(
    model_and_packs, checkpointed, caplog, monkeypatch
):
    model, packs = model_and_packs
    if checkpointed:
        model.backbone.activation_checkpointing_enable(
            activation_checkpointing_kwargs={"use_reentrant": False}
        )
    plain = [packed_step(model, pack) for pack in packs]
    given = []

    def counting(graph, inputs):
        given.append(graph)
        return graph.forward

    monkeypatch.setattr(compiled, "MOST_GRAPHS", 3)
    compilation = compile_layers(model.backbone, backend=counting)
    assert_steps_as(model, packs, plain)
    assert len(given) == 3
    assert compilation.graphs > 3
    before = compilation.graphs
    assert_steps_as(model, packs, plain)
    assert compilation.graphs == before  # nothing is traced any more
    assert caplog.text.count("4 graphs were compiled, expected at most 3") == 1


def test_a_copied_layer_is_counted_with_the_others(vocabulary):
    backbone = make_backbone(vocabulary, "qwen2_vl")
    assert compilation_of(backbone) is None
    compilation = compile_layers(backbone, backend="eager")
    assert compilation_of(copy.deepcopy(backbone.model.language_model.layers[0])) is compilation


def test_an_error_that_is_not_the_compilers_passes_unchanged(model_and_packs):
    model, packs = model_and_packs

    def broken(graph, inputs):
        def run(*_):
            raise ValueError("shapes differ")

        return run

    compilation = compile_layers(model.backbone, backend=broken)
    with pytest.raises(ValueError, match="shapes differ"), torch.no_grad():
        model(packs[0])
    assert not compilation.stopped
