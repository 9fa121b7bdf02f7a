"""Compression tokens in the model: embedded, carried on, exported, and all that targets see."""

from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from sentence_transformers import MultiVectorEncoder, SentenceTransformer
from test_export import card_code
from torch import nn

from cocoa_dist.config import ConfigError, load_recipe
from cocoa_dist.data.vocabulary import bridge_tokens
from cocoa_dist.export import check_self_test, export_folder
from cocoa_dist.export.card import CardInfo
from cocoa_dist.export.selftest import encoder_class
from cocoa_dist.mining.vectors import ExportedModel
from cocoa_dist.model.learnt import HiddenPatch, LearntTokens
from cocoa_dist.report.arms import (
    export_tokenizer,
    image_settings,
    read_held_out,
    self_test_vectors,
)
from cocoa_dist.train.__main__ import main
from cocoa_dist.train.build import build_parts, first_steps, load_weights
from cocoa_dist.train.evaluate import Item, load_embedder, similarity_matrix
from cocoa_dist.train.visibility import picture_leak


def stage_parts(recipe: str, stage: str, *overrides: str):
    config = load_recipe(recipe, [f"stages.{stage}.init_from=model", *overrides])
    parts = build_parts(config, stage, run_dir=None)
    return config, parts, first_steps(config, stage, parts)[0].packs


def test_learnt_tokens_stand_in_place_of_the_embedding_and_get_its_gradient() -> None:
    torch.manual_seed(0)
    embedding = nn.Embedding(10, 4)
    learnt = LearntTokens(embedding, first=7, count=2, known=False)
    ids = torch.tensor([1, 7, 8, 7, 2])
    embedded = embedding(ids)
    out = learnt(embedded, ids)
    expected = torch.stack([embedded[0], *learnt.rows[[0, 1, 0]], embedded[4]])
    assert torch.equal(out, expected)
    out.sum().backward()
    assert torch.equal(learnt.rows.grad, torch.tensor([[2.0] * 4, [1.0] * 4]))
    assert not embedding.weight.grad[7:9].any()


def test_learnt_tokens_are_in_the_graph_of_a_pack_without_them() -> None:
    learnt = LearntTokens(nn.Embedding(10, 4), first=7, count=2, known=False)
    ids = torch.tensor([1, 2])
    learnt(torch.zeros(2, 4), ids).sum().backward()
    assert torch.equal(learnt.rows.grad, torch.zeros(2, 4))


def test_learnt_tokens_of_an_exported_model_begin_as_its_rows() -> None:
    embedding = nn.Embedding(10, 4)
    learnt = LearntTokens(embedding, first=7, count=2, known=True)
    assert torch.equal(learnt.rows, embedding.weight[7:9])


def test_a_hidden_visual_token_is_the_vector_whatever_the_tower_says() -> None:
    hidden = HiddenPatch(nn.Embedding(10, 4))
    tokens = torch.randn(3, 4, requires_grad=True)
    out = hidden(tokens, torch.tensor([False, True, False]))
    assert torch.equal(out[1], hidden.vector[0])
    assert torch.equal(out[[0, 2]], tokens[[0, 2]])
    out.sum().backward()
    assert not tokens.grad[1].any()
    hidden.vector.grad = None
    hidden(torch.zeros(3, 4), torch.zeros(3, dtype=torch.bool)).sum().backward()
    assert torch.equal(hidden.vector.grad, torch.zeros(1, 4))


@pytest.mark.parametrize(
    ("recipe", "stage", "overrides"),
    [
        ("debug_coma", "compression", []),
        ("debug_coma", "compression", ["model.attention_backend=dense"]),
        ("debug_coma", "compression", ["model.random.family=qwen2_5_vl"]),
        ("debug", "eos_bridged_reconstruction", []),
        ("debug", "eos_bridged_reconstruction", ["model.num_bridge_tokens=3"]),
    ],
)
def test_no_picture_reaches_a_target_of_the_running_model_past_the_bridge(
    recipe: str, stage: str, overrides: list[str]
) -> None:
    overrides = [*overrides, f"stages.{stage}.data.image_share=1.0"]
    _, parts, packs = stage_parts(recipe, stage, *overrides)
    with torch.no_grad():  # larger weights than the initialisation's, so that a leak would show
        for parameter in parts.model.parameters():
            parameter.mul_(3.0) if parameter.dim() > 1 else None
    leak = picture_leak(parts.model.eval(), packs[0])
    assert leak is not None
    assert leak.past_the_bridge == 0.0
    assert leak.through_the_bridge > 1e-3
    assert leak.num_rows > 10


def test_a_model_that_does_not_keep_its_rule_is_noticed() -> None:
    """The pack says `compression`, the layers run causally."""
    _, parts, packs = stage_parts("debug_coma", "compression")
    causal_rule = "stages.compression.attention.rule=causal"
    *_, causal = stage_parts("debug_coma", "compression", causal_rule)
    model = parts.model.eval()
    run = model.core.language_model.forward
    wrong = causal[0].plan
    model.core.language_model.forward = lambda **given: run(**{**given, "segment_plan": wrong})
    leak = picture_leak(model, packs[0])
    assert leak is not None
    assert leak.past_the_bridge > 1e-4
    assert picture_leak(model, causal[0]) is None  # where all may see it there is nothing to check


def test_gradient_of_answers_reaches_pixels_through_the_bridge_alone() -> None:
    """With the compression tokens' states cut from the graph in every layer it is exactly zero."""
    trained = "stages.compression.freeze_vision=false"
    _, parts, packs = stage_parts("debug_coma", "compression", trained)
    pack, model = packs[0], parts.model
    pixels = pack.pixel_values.clone().requires_grad_()
    pack = replace(pack, pixel_values=pixels)

    def answers_gradient() -> torch.Tensor:
        pixels.grad = None
        model(pack).logits_SV.square().sum().backward()
        return pixels.grad

    assert answers_gradient().abs().max() > 0
    bridge = pack.bridge_rows.flatten()

    def cut(_, inputs):
        keep = torch.ones(inputs[0].shape[1], 1)
        keep[bridge] = 0.0
        return (inputs[0] * keep + (inputs[0] * (1 - keep)).detach(), *inputs[1:])

    for layer in model.core.language_model.layers:
        layer.register_forward_pre_hook(cut)
    assert not answers_gradient().any()


def test_the_command_line_checks_a_stage(capfd) -> None:
    assert main(["debug_coma", "--stage", "compression", "--check-attention"]) == 0


@pytest.mark.parametrize("tokens", [0, 2, 8])
def test_another_number_of_tokens_than_the_earlier_stages_is_refused(tokens, tmp_path) -> None:
    _, four, _ = stage_parts("debug_coma", "compression")
    path = tmp_path / "weights.safetensors"
    save_file({n: p.detach().contiguous() for n, p in four.model.named_parameters()}, path)
    more = [f"model.compression_tokens={tokens}"]
    if not tokens:
        more.append("stages.contrastive.pooling=last")
    _, other, _ = stage_parts("debug_coma", "compression", *more)
    with pytest.raises(ValueError, match="one number of compression tokens: set"):
        load_weights(other.model, path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.num_bridge_tokens=2", "either learnt tokens alone, or EOS with learnt ones"),
        ("model.compression_tokens=0", "pooling compression is over learnt tokens, and the model"),
        ("stages.compression.attention.rule=bidirectional", "do not belong together, expected"),
        ("stages.compression.data.separate_views=true", "is an option of view bridged, not of"),
    ],
)
def test_settings_that_do_not_fit_are_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe("debug_coma", [override])


@pytest.mark.parametrize("recipe", ["debug", "debug_coma"])
def test_late_interaction_needs_more_than_one_token(recipe: str) -> None:
    pooling = "stages.contrastive.pooling=late_interaction"
    alone = {"debug": [], "debug_coma": ["model.compression_tokens=1"]}[recipe]
    with pytest.raises(ConfigError, match="as several vectors, and this model's has one"):
        load_recipe(recipe, [pooling, *alone])
    more = {"debug": "model.num_bridge_tokens=2", "debug_coma": "model.compression_tokens=2"}
    load_recipe(recipe, [pooling, more[recipe]])


def test_a_learnt_mask_without_hidden_visual_tokens_is_refused() -> None:
    stage = "stages.eos_bridged_reconstruction.objective.mask_replacement=learned"
    with pytest.raises(ConfigError, match="image_mask_ratio and context_mask_ratio are 0"):
        load_recipe("debug", [stage])
    with pytest.raises(ConfigError, match="only view bridged has a context beside a target"):
        load_recipe("debug", ["stages.joint_reconstruction.objective.context_mask_ratio=0.5"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "pooling"),
    [
        ([], "compression"),
        (["stages.contrastive.pooling=last"], "last"),
        (["model.compression_tokens=0", "model.num_bridge_tokens=3"], "compression"),
        (["stages.contrastive.pooling=late_interaction"], "late_interaction"),
        (
            [
                "model.compression_tokens=0",
                "model.num_bridge_tokens=3",
                "stages.contrastive.pooling=late_interaction",
            ],
            "late_interaction",
        ),
    ],
)
def test_the_exported_folder_gives_the_vectors_of_training(overrides, pooling, tmp_path) -> None:
    config = load_recipe("debug_coma", overrides)
    embedder = load_embedder(config, run_dir=None, after_stage="model")
    with torch.no_grad():  # away from the rows of the vocabulary, which nothing may read
        embedder.model.compression_tokens.rows.normal_(std=0.3)
    texts = ["a cat", "two words and a few more", "x"]
    before = embedder.embed([Item(text=text) for text in texts])
    embedder.model.write_compression_tokens()
    assert (embedder.embed([Item(text=text) for text in texts]) == before).all()
    export_folder(
        model=embedder.model.backbone,
        tokenizer=export_tokenizer(config.model),
        destination=tmp_path / "model",
        image_settings=image_settings(config, embedder),
        bidirectional=False,
        pooling=pooling,
        prompts={},
        card=CardInfo(name="x", base="b", stages=[], data="d", licence="l", compute="c"),
        self_test=[
            *self_test_vectors(embedder, []),
            *self_test_vectors(embedder, read_held_out(config, embedder)[:1]),
        ],
        bridge=bridge_tokens(config.model),
        max_text_tokens=config.data.max_text_tokens,
    )
    report = check_self_test(tmp_path / "model")
    assert report.passed, report.describe()
    several = pooling == "late_interaction"
    kind = MultiVectorEncoder if several else SentenceTransformer
    encoder = kind(str(tmp_path / "model"), device="cpu")
    inputs = [{"text": text} for text in texts]  # of unequal lengths: padded
    assert stacked(encoder.encode(inputs)).shape == before.shape
    torch.testing.assert_close(
        stacked(encoder.encode(inputs)), torch.tensor(before), rtol=0, atol=1e-4
    )
    if several:  # both sides of a search, and the score that was trained
        queries, answers = encoder.encode_query(inputs), encoder.encode_document(inputs)
        found = encoder.similarity(queries, answers)
        torch.testing.assert_close(stacked(queries), torch.tensor(before), rtol=0, atol=1e-4)
        expected = torch.tensor(similarity_matrix(before, before))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        with pytest.raises(ValueError, match="mining takes one each"):
            ExportedModel(tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text()
    assert ("by WordWeights" in card) == (pooling == "compression")
    of_transformers_alone(tmp_path / "model", encoder)


def test_an_older_sentence_transformers_is_told_what_it_lacks(tmp_path, monkeypatch) -> None:
    file = tmp_path / "config_sentence_transformers.json"
    file.write_text('{"model_type": "MultiVectorEncoder"}')
    assert encoder_class(tmp_path) is MultiVectorEncoder
    monkeypatch.delattr("sentence_transformers.MultiVectorEncoder")
    with pytest.raises(ValueError, match=r"version .* has none: install 6\.2 or newer"):
        encoder_class(tmp_path)
    file.unlink()
    assert encoder_class(tmp_path) is SentenceTransformer


def stacked(vectors) -> torch.Tensor:
    """Vectors of all inputs, whichever kind of model made them."""
    return torch.stack([torch.as_tensor(one) for one in vectors])


def of_transformers_alone(folder, encoder) -> None:
    """Run the card's code for transformers alone; it must give the same vector."""
    code = next(code for code in card_code(folder) if "AutoProcessor" in code)
    picture = Image.new("RGB", (32, 32), "red")
    picture.save(folder / "picture.png")
    code = code.replace("path/to/this/folder", str(folder))
    names: dict = {}
    exec(code.replace('"picture.png"', repr(str(folder / "picture.png"))), names)
    expected = stacked(encoder.encode([{"image": picture, "text": "an octopus"}]))
    torch.testing.assert_close(names["vectors"], expected, rtol=0, atol=1e-4)
