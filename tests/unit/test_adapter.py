"""Adapters, merged by our arithmetic as by peft's; and the rows of new tokens beside them."""

import numpy as np
import pytest
import torch

from cocoa_dist.batch import PackedBatch
from cocoa_dist.config import AdapterConfig, ModelConfig, RandomModelConfig
from cocoa_dist.data.corruption import uncorrupted
from cocoa_dist.data.packing import build_pack
from cocoa_dist.data.samples import Sample
from cocoa_dist.model.adapter import add_adapter, merge_adapter
from cocoa_dist.model.backbone import load_backbone
from cocoa_dist.model.embedder import EmbeddingModel
from cocoa_dist.model.heads import HeadsConfig
from cocoa_dist.segments import Role, Segment, attention_rule
from cocoa_dist.train.build import image_geometry, load_vocabulary, special_token_ids

TEXT = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
VISION = {  # what a vision block multiplies with, by family
    "qwen2_vl": ("qkv", "proj", "fc1", "fc2"),
    "qwen2_5_vl": ("qkv", "proj", "gate_proj", "up_proj", "down_proj"),
    "qwen3_vl": ("qkv", "proj", "linear_fc1", "linear_fc2"),
}


def backbone(family: str = "qwen2_vl"):
    config = ModelConfig(
        random=RandomModelConfig(family=family, hidden_size=32, num_heads=2, num_key_value_heads=1,
                                 intermediate_size=48, vision_width=16, vision_heads=2),
        tokenizer="asset:tokenizer",
    )  # fmt: skip
    torch.manual_seed(0)
    return load_backbone(
        config,
        token_ids=special_token_ids(config),
        vocabulary_size=load_vocabulary(config).size,
    )


@pytest.fixture(params=[(f, k) for f in VISION for k in ("lora", "dora")], ids="-".join)
def adapted(request) -> tuple[str, AdapterConfig, EmbeddingModel]:
    """A model of each family whose adapters, on every linear layer, have learnt something."""
    family, kind = request.param
    names = ("attn.proj" if name == "proj" else name for name in (*TEXT, *VISION[family]))
    config = AdapterConfig(kind=kind, rank=4, alpha=8, targets=tuple(dict.fromkeys(names)))
    model = EmbeddingModel(backbone(family), HeadsConfig())
    model.backbone = add_adapter(model.backbone, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return family, config, model


def test_only_adapters_are_trained_and_every_block_has_them(adapted) -> None:
    family, _, model = adapted
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert all(".lora_" in name for name in trained)
    for layers, names in (
        (model.core.language_model.layers, TEXT),
        (model.core.visual.blocks, VISION[family]),
    ):
        for layer in layers:
            parts = {n.rpartition(".")[2]: m for n, m in layer.named_modules()}
            assert all(hasattr(parts[name], "lora_A") for name in names)


def test_merged_weights_equal_pefts_own(adapted) -> None:
    family, config, model = adapted
    plain_names = dict(EmbeddingModel(backbone(family), HeadsConfig()).named_parameters()).keys()
    ours = merge_adapter({n: p.detach() for n, p in model.named_parameters()}, config)
    theirs = model.backbone.merge_and_unload()
    assert ours.keys() == plain_names
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(ours[f"backbone.{name}"], parameter, rtol=1e-5, atol=1e-6)


def test_merged_model_computes_what_the_adapted_one_does(adapted) -> None:
    """1e-3 of the largest value: float32, and W + s B A is rounded once where two sums were."""
    family, config, model = adapted
    pack = pack_for(model.backbone.get_base_model(), [700, 701])
    merged = EmbeddingModel(backbone(family), HeadsConfig())
    untouched = hidden_rows(merged, pack)
    merged.load_state_dict(
        merge_adapter({n: p.detach() for n, p in model.named_parameters()}, config), strict=False
    )
    expected = hidden_rows(model, pack)
    assert (untouched - expected).abs().max() > 0.1 * expected.abs().max()
    error = (hidden_rows(merged, pack) - expected).abs().max()
    assert error < 1e-3 * expected.abs().max()


def pack_for(model, words: list[int]) -> PackedBatch:
    """One sample: a picture of nine tokens, then `words` and EOS."""
    geometry = image_geometry(model)
    vocabulary = load_vocabulary(
        ModelConfig(random=RandomModelConfig(), tokenizer="asset:tokenizer")
    )
    side = 3 * geometry.factor
    draw = np.random.default_rng(0)
    tokens = [vocabulary.vision_start, *[vocabulary.image_pad] * 9, vocabulary.vision_end]
    ids = np.array([*tokens, *words, vocabulary.eos])
    sample = Sample(
        input_ids=ids,
        segments=(Segment(0, len(ids), Role.CONTEXT),),
        images=(draw.integers(0, 256, (side, side, 3), dtype=np.uint8),),
        text_positions=np.zeros(len(ids), dtype=np.bool_),
    )
    return build_pack(
        [uncorrupted(sample, geometry=geometry)],
        rule=attention_rule("bidirectional"),
        geometry=geometry,
        vocabulary=vocabulary,
    )


def hidden_rows(
    model: EmbeddingModel, pack: PackedBatch, *, gradient: bool = False
) -> torch.Tensor:
    """Hidden states (T, D) at the language model's exit."""
    caught = []
    handle = model.core.language_model.register_forward_hook(
        lambda module, inputs, output: caught.append(output.last_hidden_state[0])
    )
    model.keep_all_rows = True
    with torch.set_grad_enabled(gradient):
        model(pack)
    model.keep_all_rows = False
    handle.remove()
    return caught[0]


def test_target_that_is_not_there_is_named() -> None:
    config = AdapterConfig(targets=("q_proj", "w_pack"))
    with pytest.raises(ValueError, match="no module named w_pack"):
        add_adapter(backbone(), config)


def test_target_that_is_not_linear_is_refused() -> None:
    """`proj` is a vision block's output and the patch embedding, a convolution."""
    with pytest.raises(
        ValueError, match=r"'proj' names model\.visual\.patch_embed\.proj too, a Conv"
    ):
        add_adapter(backbone(), AdapterConfig(targets=("q_proj", "proj")))


FIRST_NEW, COUNT = 2040, 3  # the last rows but five, as if the tokenizer ended before them
LORA = AdapterConfig(rank=2, targets=("q_proj",))


def with_new_tokens() -> EmbeddingModel:
    model = EmbeddingModel(backbone(), HeadsConfig())
    model.backbone = add_adapter(model.backbone, LORA)
    model.add_new_tokens(first=FIRST_NEW, count=COUNT)
    return model


def test_new_tokens_begin_as_the_rows_they_have() -> None:
    pack = pack_for(backbone(), [700, FIRST_NEW, FIRST_NEW + 2])
    plain = EmbeddingModel(backbone(), HeadsConfig())
    assert torch.equal(hidden_rows(with_new_tokens(), pack), hidden_rows(plain, pack))


def test_of_the_embedding_new_tokens_alone_get_a_gradient() -> None:
    model = with_new_tokens()
    pack = pack_for(model.backbone.get_base_model(), [700, FIRST_NEW, FIRST_NEW + 2])
    hidden_rows(model, pack, gradient=True)[:-2].square().sum().backward()
    found = dict(model.named_parameters())
    assert found["new_tokens.from_2040"].shape == (COUNT, 32)
    moves = found["new_tokens.from_2040"].grad.abs().amax(dim=1) > 0
    assert moves.tolist() == [True, False, True]  # the second is not in the pack
    trained = {name for name, p in found.items() if p.requires_grad}
    assert {name for name in trained if ".lora_" not in name} == {"new_tokens.from_2040"}


def test_a_pack_without_new_tokens_has_them_in_its_graph() -> None:
    """Or ranks would reduce different gradients under ZeRO-3."""
    model = with_new_tokens()
    pack = pack_for(model.backbone.get_base_model(), [700])
    hidden_rows(model, pack, gradient=True).sum().backward()
    assert torch.equal(model.new_tokens.from_2040.grad, torch.zeros(COUNT, 32))


def test_new_tokens_are_merged_into_their_rows_alone() -> None:
    model, plain = with_new_tokens(), EmbeddingModel(backbone(), HeadsConfig())
    learnt = torch.randn(COUNT, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        model.new_tokens.from_2040.copy_(learnt)
    before = {n: p.detach().clone() for n, p in plain.named_parameters()}
    merged = merge_adapter({n: p.detach() for n, p in model.named_parameters()}, LORA)
    assert merged.keys() == before.keys()
    (embedding,) = (name for name in merged if name.endswith("embed_tokens.weight"))
    moved = merged[embedding] - before[embedding]
    rows = moved.abs().amax(dim=1).nonzero()[:, 0].tolist()
    assert rows == [FIRST_NEW, FIRST_NEW + 1, FIRST_NEW + 2]
    torch.testing.assert_close(moved[rows], learnt, rtol=1e-5, atol=1e-6)
    own = dict(model.named_parameters())
    (frozen,) = (name for name in own if name.endswith("embed_tokens.weight"))
    assert torch.equal(own[frozen], before[embedding])  # a merge for a save leaves training alone
    plain.load_state_dict(merged, strict=False)
    pack = pack_for(backbone(), [700, FIRST_NEW + 1])
    torch.testing.assert_close(hidden_rows(plain, pack), hidden_rows(model, pack))


def test_new_tokens_that_the_model_has_no_rows_for_are_refused() -> None:
    model = EmbeddingModel(backbone(), HeadsConfig())
    with pytest.raises(ValueError, match=r"ids 2040 to 2059, the model embeds only 2048 tokens"):
        model.add_new_tokens(first=2040, count=20)
