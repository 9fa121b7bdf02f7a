"""Every model family through segment plans, against transformers' own model under a 4-D mask.

The reference runs one sample at a time, unrouted, with the visibility that the rule declares.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from family_models import (
    HEADS,
    PATCH,
    RULES,
    SHAPES,
    Shape,
    assert_near,
    each_family,
    each_rule,
    enlarge,
    gradients,
    hidden_rows,
    make_backbone,
    make_pack,
    make_samples,
    model_config,
    moved_segments,
    packed_step,
    reference_outputs,
    scalar,
    unrouted_copy,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import masking_utils

from cocoa_dist.config import ConfigError, load_recipe
from cocoa_dist.data.packing import EmbeddingInfo, build_pack
from cocoa_dist.model.compiled import compile_layers
from cocoa_dist.model.embedder import EmbeddingModel
from cocoa_dist.model.heads import HeadsConfig
from cocoa_dist.segments import AttentionRule, Role
from cocoa_dist.train.build import image_geometry, load_vocabulary


@pytest.fixture(scope="module")
def vocabulary():
    return load_vocabulary(model_config("qwen2_vl"))


@each_rule
@each_family
def test_packed_outputs_and_gradients_are_transformers_own(vocabulary, name, rule):
    """float64; found 4e-15. Embeddings and rotary angles are float32 in both, and the same."""
    backbone = make_backbone(vocabulary, name, dtype=torch.float64)
    model = EmbeddingModel(backbone, HEADS)
    enlarge(model.patch_decoder)
    plain = unrouted_copy(backbone)
    samples = make_samples(vocabulary)
    pack = make_pack(vocabulary, backbone, rule)
    assert len(pack.label_rows) > 0
    assert len(pack.patch_rows) > 0
    expected = reference_outputs(plain, model.patch_decoder, samples, pack, rule)
    scalar(*expected).backward()
    slow = {f"backbone.{k}": v for k, v in gradients(plain).items()}
    slow |= {f"patch_decoder.{k}": v for k, v in gradients(model.patch_decoder).items()}
    for _ in range(2):  # published code loses M-RoPE on the second forward
        outputs, fast = packed_step(model, pack)
        for what, found, wanted in zip("lpe", outputs, expected, strict=True):
            assert_near(found, wanted.detach(), share=1e-12, what=what)
        assert fast.keys() == slow.keys()
        for key, wanted in slow.items():
            assert wanted.any(), key
            assert_near(fast[key], wanted, share=1e-12, what=key)


@each_family
@pytest.mark.parametrize("backend", ["split", "dense", "auto"])
def test_float32_is_as_near_as_its_rounding_allows(vocabulary, name, backend):
    """1e-4 of the largest value: two layers of float32 in another order of summation."""
    backbone = make_backbone(vocabulary, name, backend=backend)
    model, rule = EmbeddingModel(backbone, HEADS), RULES["eos_bridged"]
    samples, pack = make_samples(vocabulary), make_pack(vocabulary, backbone, rule)
    with torch.no_grad():
        expected = reference_outputs(
            unrouted_copy(backbone), model.patch_decoder, samples, pack, rule
        )
        output = model(pack)
    found = (output.logits_SV, output.patches_RC, output.embeddings_ED)
    for what, ours, theirs in zip("lpe", found, expected, strict=True):
        assert_near(ours, theirs, share=1e-4, what=what)


@each_rule
@each_family
def test_checkpointed_gradients_are_the_same_to_the_last_bit(vocabulary, name, rule):
    backbone = make_backbone(vocabulary, name)
    pack = make_pack(vocabulary, backbone, rule)
    model = EmbeddingModel(backbone, HEADS).train()
    plain_outputs, plain = packed_step(model, pack)
    backbone.activation_checkpointing_enable(
        activation_checkpointing_kwargs={"use_reentrant": False}
    )
    assert backbone.model.visual.blocks[0].gradient_checkpointing
    for _ in range(2):
        outputs, checkpointed = packed_step(model, pack)
        for ours, theirs in zip(outputs, plain_outputs, strict=True):
            assert torch.equal(ours, theirs)
        for key, wanted in plain.items():
            assert torch.equal(checkpointed[key], wanted), key


@pytest.mark.parametrize("texts", ["text alone", "filler alone"])
@each_family
def test_pack_without_pictures_reaches_every_vision_parameter(vocabulary, name, texts):
    """The filler's tokens weigh zero, on every path: also that of deepstack's mergers."""
    backbone = make_backbone(vocabulary, name)
    samples = make_samples(vocabulary, (Shape(()), Shape((), target=0))) if texts[0] == "t" else []
    if samples:
        pack = make_pack(vocabulary, backbone, RULES["eos_bridged"], samples=samples)
    else:
        pack = build_pack(
            [],
            rule=RULES["causal"],
            geometry=image_geometry(backbone),
            vocabulary=vocabulary,
        )
    assert pack.num_filler_images == 1
    model = EmbeddingModel(backbone, HeadsConfig())
    language = hidden_rows(model, pack)
    language.square().sum().backward()
    for key, parameter in backbone.model.visual.named_parameters():
        assert parameter.grad is not None, key
        assert not parameter.grad.any(), key
    assert backbone.model.language_model.layers[0].mlp.up_proj.weight.grad.any()


class NoSquares(TorchDispatchMode):
    """Fails on any tensor with two neighbouring sides of a forbidden length."""

    def __init__(self, *sides: int) -> None:
        super().__init__()
        self.sides = sides

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, Tensor):
                for pair in zip(value.shape, value.shape[1:], strict=False):
                    assert pair[0] != pair[1] or pair[0] not in self.sides, (func, value.shape)
        return out


def refuse_masks(monkeypatch) -> None:
    """Make everything that transformers builds masks with raise."""

    def refuse(*_, **__):
        raise AssertionError("a mask was built")

    for name in ("sdpa_mask", "eager_mask", "flash_attention_mask", "flex_attention_mask"):
        monkeypatch.setattr(masking_utils, name, refuse)
        for key, function in masking_utils.ALL_MASK_ATTENTION_FUNCTIONS.items():
            if getattr(function, "__name__", "") == name:
                monkeypatch.setitem(masking_utils.ALL_MASK_ATTENTION_FUNCTIONS, key, refuse)


@each_rule
@each_family
def test_no_dense_mask_is_ever_built_in_training(vocabulary, name, rule, monkeypatch):
    """Neither by transformers' mask functions nor by hand: nothing is T x T or P x P."""
    backbone = make_backbone(vocabulary, name)
    model = EmbeddingModel(backbone, HEADS).train()
    backbone.activation_checkpointing_enable(
        activation_checkpointing_kwargs={"use_reentrant": False}
    )
    pack = make_pack(vocabulary, backbone, rule)
    refuse_masks(monkeypatch)
    with NoSquares(pack.num_tokens, len(pack.pixel_values)):
        packed_step(model, pack)


def test_the_watch_for_dense_masks_does_see_one(vocabulary, monkeypatch):
    dense = make_backbone(vocabulary, "qwen2_vl", backend="dense")
    pack = make_pack(vocabulary, dense, RULES["causal"])
    with pytest.raises(AssertionError), NoSquares(pack.num_tokens):
        EmbeddingModel(dense, HEADS)(pack)
    plain = unrouted_copy(dense)
    refuse_masks(monkeypatch)
    with pytest.raises(AssertionError, match="a mask was built"):
        # padding, so that the causal mask cannot be left to the kernel
        plain(input_ids=pack.input_ids[None, -4:], attention_mask=torch.tensor([[0, 1, 1, 1]]))


@pytest.mark.parametrize("pooling", ["last", "mean"])
@each_family
def test_a_step_reads_no_value_of_a_tensor(vocabulary, name, pooling):
    """On the meta device there are none to read, as a GPU would have to be waited for."""
    backbone = make_backbone(vocabulary, name)
    samples = make_samples(vocabulary)
    pack = build_pack(
        samples,
        rule=RULES["eos_bridged_causal"],
        geometry=image_geometry(backbone),
        vocabulary=vocabulary,
        embeddings=[EmbeddingInfo(i, 0, i) for i in range(len(samples))],
        pooling=pooling,
        noise=[np.random.default_rng(i) for i in range(len(samples))],
    )
    model = EmbeddingModel(backbone, HEADS).to("meta").train()
    packed = pack.to("meta")
    assert packed.vision.positions.is_meta
    output = model(packed)
    (output.logits_SV.sum() + output.patches_RC.sum() + output.embeddings_ED.sum()).backward()
    assert all(p.grad is not None for p in model.parameters())


# --- the bridge is the only way ------------------------------------------------------------------


def target_gradient(vocabulary, name: str, rule: AttentionRule, *, cut: bool) -> Tensor:
    """Gradient of the loss on TARGET rows with respect to the pixels of their samples.

    `cut`: BRIDGE rows are detached behind every decoder layer.
    """
    backbone = make_backbone(vocabulary, name)
    samples = make_samples(vocabulary)
    pack = make_pack(vocabulary, backbone, rule, samples=samples)
    roles = np.concatenate(
        [np.full(s.stop - s.start, s.role) for one in moved_segments(samples) for s in one]
    )
    bridge_T1 = torch.from_numpy(roles == Role.BRIDGE)[:, None]
    if cut:
        for layer in backbone.model.language_model.layers:
            layer.register_forward_hook(
                lambda module, inputs, out: torch.where(bridge_T1, out.detach(), out)
            )
    pixels = pack.pixel_values.clone().requires_grad_()
    hidden = hidden_rows(
        EmbeddingModel(backbone, HeadsConfig()), replace(pack, pixel_values=pixels)
    )
    rows = torch.from_numpy(np.flatnonzero(roles == Role.TARGET))
    logits = backbone.lm_head(hidden[rows])
    torch.nn.functional.cross_entropy(logits, pack.input_ids[rows]).backward()
    return pixels.grad


@pytest.mark.parametrize("rule", ["eos_bridged", "eos_bridged_causal", "compression"])
@each_family
def test_nothing_of_the_pixels_reaches_the_target_but_over_the_bridge(vocabulary, name, rule):
    assert not target_gradient(vocabulary, name, RULES[rule], cut=True).any()
    open_gradient = target_gradient(vocabulary, name, RULES[rule], cut=False)
    assert open_gradient.any()
    counts = [
        sum(image.shape[0] * image.shape[1] for image in one.sample.images) // PATCH**2
        for one in make_samples(vocabulary)
    ]
    with_target = [part for part in open_gradient.split(counts) if len(part)]
    assert all(part.any() for part in with_target)


@each_family
def test_the_cut_bridge_does_not_hide_a_leak(vocabulary, name):
    """Under `bidirectional` targets see the pictures themselves."""
    assert target_gradient(vocabulary, name, RULES["bidirectional"], cut=True).any()


# --- compiled layers -----------------------------------------------------------------------------


# Dynamo asks every input for its gradient, and torch warns of those that cannot have one.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "checkpointed", "compiler"),
    [
        ("qwen2_vl", False, "eager"),
        ("qwen2_5_vl", True, "aot_eager"),  # its backward pass is traced too
        ("qwen3_vl", False, "eager"),
        ("qwen3_vl", True, "aot_eager"),
    ],
)
def test_compiled_layers_give_the_same_numbers_and_gradients(
    vocabulary, name, checkpointed, compiler
):
    """For two packs of different lengths; 1e-5: what is fused may round otherwise (float32)."""
    from torch import _dynamo as dynamo

    dynamo.reset()
    dynamo.utils.counters.clear()
    backbone = make_backbone(vocabulary, name)
    if checkpointed:
        backbone.activation_checkpointing_enable(
            activation_checkpointing_kwargs={"use_reentrant": False}
        )
    model = EmbeddingModel(backbone, HEADS).train()
    rule = RULES["eos_bridged_causal"]
    packs = [
        make_pack(vocabulary, backbone, rule, samples=make_samples(vocabulary, SHAPES[skip:]))
        for skip in (0, 2)
    ]
    names = [key for key, _ in model.named_parameters()]
    plain = [packed_step(model, pack) for pack in packs]
    compile_layers(backbone, backend=compiler)
    for pack, (outputs, wanted) in zip(packs, plain, strict=True):
        found_outputs, found = packed_step(model, pack)
        for found_one, one in zip(found_outputs, outputs, strict=True):
            assert_near(found_one, one.detach(), share=1e-5, what=name)
        for key, gradient in wanted.items():
            assert_near(found[key], gradient, share=1e-5, what=key)
    assert [key for key, _ in model.named_parameters()] == names
    graphs = dynamo.utils.counters["stats"]["unique_graphs"]
    assert 4 <= graphs <= 20  # text and vision, in two parts each; not one for each pack


def test_layers_copied_from_compiled_ones_run_themselves(vocabulary):
    """The patch decoder copies a layer; a copy that ran the original would never learn."""
    backbone = make_backbone(vocabulary, "qwen2_vl")
    compile_layers(backbone, backend="eager")
    model = EmbeddingModel(backbone, HEADS)
    copied = model.patch_decoder.layer.forward
    assert copied.args[0] is model.patch_decoder.layer


@each_family
def test_compiled_layers_are_gathered_whole_under_zero3(vocabulary, name):
    from deepspeed.utils import z3_leaf_module

    backbone = make_backbone(vocabulary, name)
    assert not any(z3_leaf_module(module) for module in backbone.modules())
    compile_layers(backbone, backend="eager")
    leaves = [module for module in backbone.modules() if z3_leaf_module(module)]
    assert len(leaves) == 2 + 3


def test_compiled_layers_and_adapters_are_refused_together():
    adapter = "stages.contrastive.adapter={targets: [q_proj]}"
    assert load_recipe("debug", [adapter]).stages["contrastive"].adapter is not None
    with pytest.raises(
        ConfigError, match=r"stage 'contrastive' has an adapter, and model\.compile"
    ):
        load_recipe("debug", [adapter, "model.compile_layers=true"])
