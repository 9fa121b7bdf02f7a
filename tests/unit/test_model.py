"""The packed model against transformers' own, one sample at a time under an explicit mask."""

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cocoa_dist.config import (
    ContrastiveConfig,
    ModelConfig,
    NextTokenConfig,
    RandomModelConfig,
    ReconstructionConfig,
    load_recipe,
    resolve_path,
)
from cocoa_dist.data.corruption import corrupt
from cocoa_dist.data.packing import EmbeddingInfo, build_pack
from cocoa_dist.data.samples import draw_for, view_samples, view_settings
from cocoa_dist.data.shards import ShardReader
from cocoa_dist.model.backbone import load_backbone, route_attention
from cocoa_dist.model.embedder import EmbeddingModel
from cocoa_dist.model.heads import HeadsConfig
from cocoa_dist.objectives.reconstruction import Reconstruction
from cocoa_dist.segments import attention_rule, dense_visibility
from cocoa_dist.train.build import image_geometry, load_vocabulary, special_token_ids

MODEL = ModelConfig(
    random=RandomModelConfig(hidden_size=64, intermediate_size=96, vision_width=32, vision_heads=2),
    tokenizer="asset:tokenizer",
)
CASES = {
    "bidirectional": ("caption", ReconstructionConfig(text_mask_ratio=0.3, image_mask_ratio=0.5)),
    "causal": ("language", NextTokenConfig()),
    "eos_bridged": ("bridged", ReconstructionConfig(text_mask_ratio=0.7)),
    "compression": ("pair", ContrastiveConfig()),  # any view: the rule is what is compared
}


@pytest.fixture(scope="module")
def vocabulary():
    return load_vocabulary(MODEL)


def make_backbone(vocabulary, *, seed: int = 0, backend: str = "split"):
    torch.manual_seed(seed)
    backbone = load_backbone(
        MODEL.model_copy(update={"attention_backend": backend}),
        token_ids=special_token_ids(MODEL),
        vocabulary_size=vocabulary.size,
    )
    with torch.no_grad():  # larger weights than the initialisation's, so that errors show
        for parameter in backbone.parameters():
            parameter.normal_(std=0.08) if parameter.dim() > 1 else None
    return backbone


def make_pack(vocabulary, geometry, *, rule: str, count: int = 5):
    view, objective = CASES[rule]
    data = load_recipe("debug").data
    stage = load_recipe("debug").stages["eos_bridged_reconstruction"].data
    settings = view_settings(data, geometry=geometry, stage=stage)
    settings = settings.__class__(**{**vars(settings), "image_share": 0.5})
    reader = ShardReader(resolve_path("asset:emoji/train"))
    samples = []
    for record_id in range(count):
        draw = draw_for(3, rule, 0, record_id)
        result = view_samples(
            view, reader.record(record_id), draw=draw, vocabulary=vocabulary, settings=settings
        )
        samples += [
            corrupt(s, objective, draw=draw, vocabulary=vocabulary, geometry=geometry)
            for s in result.samples
        ]
    pack = build_pack(
        samples,
        rule=attention_rule(rule),
        geometry=geometry,
        vocabulary=vocabulary,
        embeddings=[EmbeddingInfo(i, 0, i) for i in range(len(samples))],
        noise=[draw_for(3, "noise", 0, i) for i in range(len(samples))],
    )
    return samples, pack


def reference_hidden(backbone, samples, pack, rule):
    """Each sample alone through transformers' forward with a 4-D mask; rows joined."""
    rows, token, patch = [], 0, 0
    for corrupted in samples:
        sample = corrupted.sample
        length = len(sample.input_ids)
        visible = torch.from_numpy(dense_visibility([sample.segments], rule))
        ids = torch.from_numpy(corrupted.input_ids)[None]
        original = torch.from_numpy(sample.input_ids)[None]
        kinds = (original == backbone.config.image_token_id).int()
        grids = [[1, i.shape[0] // 8, i.shape[1] // 8] for i in sample.images]
        patches = sum(t * h * w for t, h, w in grids)
        vision = (
            {
                "pixel_values": pack.pixel_values[patch : patch + patches],
                "image_grid_thw": torch.tensor(grids),
            }
            if grids
            else {}
        )
        positions, _ = backbone.model.get_rope_index(
            ids, kinds, image_grid_thw=vision.get("image_grid_thw")
        )
        out = backbone.model(
            input_ids=ids,
            attention_mask=visible[None, None],
            position_ids=positions,
            mm_token_type_ids=kinds,
            use_cache=False,
            **vision,
        )
        rows.append(out.last_hidden_state[0])
        token, patch = token + length, patch + patches
    return torch.cat(rows)


def hooked_hidden(model, pack):
    """Hidden states of the packed forward, taken at the language model's exit."""
    caught = []
    handle = model.core.language_model.register_forward_hook(
        lambda module, inputs, output: caught.append(output.last_hidden_state[0])
    )
    model.keep_all_rows = True
    output = model(pack)
    model.keep_all_rows = False
    handle.remove()
    return caught[0], output


@pytest.mark.parametrize("backend", ["split", "dense"])
@pytest.mark.parametrize("rule", CASES)
def test_packed_forward_equals_transformers_one_sample_at_a_time(vocabulary, rule, backend):
    ours = make_backbone(vocabulary, backend=backend)
    theirs = make_backbone(vocabulary)
    unrouted = theirs.__class__(theirs.config)  # plain modules: vision attention not exchanged
    unrouted.load_state_dict(theirs.state_dict())
    unrouted.set_attn_implementation("sdpa")
    model = EmbeddingModel(ours, HeadsConfig(text_logits=True, embeddings=True))
    samples, pack = make_pack(vocabulary, image_geometry(ours), rule=rule)
    assert pack.num_filler_images == 0
    expected = reference_hidden(unrouted, samples, pack, attention_rule(rule))
    for _ in range(2):  # published code loses M-RoPE on the second forward
        found, output = hooked_hidden(model, pack)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)  # float32, 2 layers
        pooled = torch.nn.functional.normalize(expected[pack.pool_rows], dim=-1)
        torch.testing.assert_close(output.embeddings_ED, pooled, rtol=1e-4, atol=2e-5)


def test_pack_without_pictures_runs_the_vision_tower_on_a_filler(vocabulary):
    model = EmbeddingModel(make_backbone(vocabulary), HeadsConfig(embeddings=True))
    geometry = image_geometry(model.backbone)
    samples, _ = make_pack(vocabulary, geometry, rule="eos_bridged", count=12)
    texts = [s for s in samples if not s.sample.images]
    pack = build_pack(
        texts,
        rule=attention_rule("eos_bridged"),
        geometry=geometry,
        vocabulary=vocabulary,
        embeddings=[EmbeddingInfo(i, 0, i) for i in range(len(texts))],
    )
    assert pack.num_filler_images == 1
    model(pack).embeddings_ED.sum().backward()
    grads = [p.grad for p in model.core.visual.parameters()]
    assert all(g is not None and not g.any() for g in grads)


def test_context_rows_do_not_depend_on_the_target_nor_the_reverse(vocabulary):
    """With the bridge's own input cut, nothing crosses; with it, everything crosses there."""
    backbone = make_backbone(vocabulary)
    model = EmbeddingModel(backbone, HeadsConfig())
    model.keep_all_rows = True
    samples, pack = make_pack(vocabulary, image_geometry(backbone), rule="eos_bridged", count=1)
    segments = {s.role.name: s for s in samples[0].sample.segments}

    def hidden_after(first_layer_only: bool, **changed):
        altered = pack.__class__(**{**vars(pack), **changed})
        caught = []
        layer = model.core.language_model.layers[0 if first_layer_only else -1]
        handle = layer.register_forward_hook(lambda m, i, out: caught.append(out[0].detach()))
        model(altered)
        handle.remove()
        return caught[0]

    target, context = segments["TARGET"], segments["CONTEXT"]
    changed_target = pack.input_ids.clone()
    changed_target[target.start] = (changed_target[target.start] + 7) % vocabulary.size
    before, after = hidden_after(True), hidden_after(True, input_ids=changed_target)
    rows = slice(context.start, context.stop)
    assert torch.equal(before[rows], after[rows])  # one layer: not over the bridge yet
    deep_before, deep_after = hidden_after(False), hidden_after(False, input_ids=changed_target)
    assert not torch.equal(deep_before[rows], deep_after[rows])  # two layers: over the bridge
    changed_pixels = pack.pixel_values + 1.0
    target_rows = slice(target.start, target.stop)
    seen = hidden_after(True, pixel_values=changed_pixels)
    assert samples[0].sample.images
    assert torch.equal(before[target_rows], seen[target_rows])
    assert not torch.equal(before[rows], seen[rows])


def test_no_dense_mask_is_built_on_the_training_path(vocabulary, monkeypatch):
    from transformers import masking_utils

    def refuse(*_, **__):
        raise AssertionError("a dense mask was built")

    for name in ("sdpa_mask", "eager_mask"):
        monkeypatch.setattr(masking_utils, name, refuse)
    for rule in CASES:
        backbone = make_backbone(vocabulary)
        model = EmbeddingModel(backbone, HeadsConfig(text_logits=True))
        _, pack = make_pack(vocabulary, image_geometry(backbone), rule=rule)
        model(pack)


def test_patch_decoder_starts_from_the_middle_layer_and_learns_pixels(vocabulary):
    backbone = make_backbone(vocabulary)
    objective = Reconstruction(image_weight=0.5, patch_values=3 * 16 * 16)
    model = EmbeddingModel(backbone, objective.heads)
    _, pack = make_pack(vocabulary, image_geometry(backbone), rule="bidirectional")
    middle = dict(backbone.model.language_model.layers[1].named_parameters())
    for name, parameter in model.patch_decoder.layer.named_parameters():
        assert torch.equal(parameter, middle[name])
    sums = objective.sums([model(pack)], [pack])
    assert objective.counts([pack]) == {
        "text": float(len(pack.labels)),
        "image": float(pack.patch_targets.numel()),
    }
    (sums["text"] + sums["image"]).backward()
    assert all(p.grad is not None for p in model.patch_decoder.parameters())


def test_sliding_windows_are_refused_by_name(vocabulary):
    backbone = make_backbone(vocabulary)
    backbone.config.text_config.use_sliding_window = True
    with pytest.raises(ValueError, match="use_sliding_window"):
        route_attention(backbone, backend="split")


def test_model_folder_that_lacks_parts_says_which(tmp_path):
    def load(path):
        return load_backbone(ModelConfig(path=str(path)), token_ids={}, vocabulary_size=1)

    with pytest.raises(ValueError, match="is not a folder; download the model"):
        load(tmp_path / "none")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match=r"lacks tokenizer.json, \*.safetensors"):
        load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="type 'llama', which is not supported"):
        load(tmp_path)


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "folder"])
def test_bfloat16_is_for_parameters_and_leaves_rotary_frequencies_exact(
    vocabulary, family, weights
) -> None:
    """Rounded, they are off by up to 0.4 %: whole turns for tokens some thousand places on."""
    if family == "folder":
        source = {"path": "asset:quickstart_backbone"}
    else:
        source = {"random": {**load_recipe("debug").model.random.model_dump(), "family": family}}

    def load(dtype):
        config = ModelConfig(**source, tokenizer="asset:tokenizer", dtype=dtype)
        return load_backbone(
            config,
            token_ids=special_token_ids(config),
            vocabulary_size=vocabulary.size,
            weights=weights,
        )

    exact, rounded = load("float32"), load("bfloat16")
    assert {p.dtype for p in rounded.parameters()} == {torch.bfloat16}
    buffers = dict(rounded.named_buffers())
    assert any("inv_freq" in name for name in buffers)
    for name, buffer in exact.named_buffers():
        torch.testing.assert_close(buffers[name], buffer, rtol=0, atol=0)


def test_a_model_folder_without_all_weights_is_refused(vocabulary, tmp_path) -> None:
    """Transformers would draw them at random and train on."""
    folder = tmp_path / "model"
    shutil.copytree(resolve_path("asset:quickstart_backbone"), folder)
    (file,) = folder.glob("*.safetensors")
    weights = load_file(file)
    name = next(name for name in weights if name.endswith("layers.0.mlp.down_proj.weight"))
    whole = weights.pop(name)
    save_file(weights, file, metadata={"format": "pt"})

    def load():
        config = ModelConfig(path=str(folder))
        return load_backbone(config, token_ids={}, vocabulary_size=vocabulary.size)

    with pytest.raises(ValueError, match=r"lack 1 parameters .*layers\.0\.mlp\.down_proj\.weight"):
        load()
    save_file({**weights, name: whole[:, 1:].contiguous()}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="cannot be read"):
        load()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"model_type": "qwen2', r"config\.json cannot be read: Unterminated string.*fetch"),
        ("[1]", r"config\.json cannot be read"),
        ("{}", r"config\.json has no model_type"),
    ],
)
def test_model_config_that_is_cut_off_is_named(content, message, tmp_path):
    for name in ("tokenizer.json", "model.safetensors"):
        (tmp_path / name).touch()
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_backbone(ModelConfig(path=str(tmp_path)), token_ids={}, vocabulary_size=1)


def test_mean_pooling_averages_all_rows_of_a_sample():
    from cocoa_dist.model.heads import pool

    hidden = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0]])
    found = pool(hidden, index=torch.tensor([0, 0, 1]), count=2)
    half = np.sqrt(0.5)
    torch.testing.assert_close(found, torch.tensor([[half, half], [1.0, 0.0]]).float())
