"""Tiny random models of every family, packs for them, and transformers' own as the reference."""

import copy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cocoa_dist.batch import PackedBatch
from cocoa_dist.config import ModelConfig, RandomModelConfig
from cocoa_dist.data.corruption import CorruptedSample
from cocoa_dist.data.packing import EmbeddingInfo, build_pack
from cocoa_dist.data.samples import Sample
from cocoa_dist.model.backbone import (
    load_backbone,
)
from cocoa_dist.model.embedder import EmbeddingModel
from cocoa_dist.model.families import FAMILIES
from cocoa_dist.model.heads import HeadsConfig
from cocoa_dist.segments import AttentionRule, Role, Segment, attention_rule, dense_visibility
from cocoa_dist.train.build import image_geometry, special_token_ids

PATCH = 4
FAMILY_NAMES = tuple(FAMILIES)
RULES = {
    "bidirectional": attention_rule("bidirectional"),
    "causal": attention_rule("causal"),
    "eos_bridged": attention_rule("eos_bridged"),
    "eos_bridged_causal": attention_rule("eos_bridged", target_causal=True),
    "eos_bridged_blind": attention_rule("eos_bridged", bridge_sees_target=False),
    "compression": attention_rule("compression"),
}
HEADS = HeadsConfig(text_logits=True, patch_values=3 * (2 * PATCH) ** 2, embeddings=True)
each_family = pytest.mark.parametrize("name", FAMILY_NAMES)
each_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


@dataclass(frozen=True)
class Shape:
    """What one sample of a test pack holds."""

    pictures: tuple[tuple[int, int], ...]  # rows and columns in visual tokens
    context: int = 3
    bridge: int = 1
    target: int = 4


# No pictures, several in one sample, sizes that do not divide into windows of 2 x 2 tokens.
SHAPES = (
    Shape(((2, 2), (3, 5))),
    Shape((), target=6),
    Shape(((1, 1),), bridge=2),
    Shape(((4, 3), (1, 4), (2, 2)), context=1, target=1),
    Shape((), context=2, target=0),
)


def model_config(name: str, *, num_layers: int = 2, **changes: Any) -> ModelConfig:
    shape = RandomModelConfig(
        family=name,  # type: ignore[arg-type]
        hidden_size=48,
        num_layers=num_layers,
        num_heads=3,
        num_key_value_heads=1,
        intermediate_size=40,
        vision_width=16,
        vision_layers=3,
        vision_heads=2,
        patch_size=PATCH,
    )
    return ModelConfig(random=shape, tokenizer="asset:tokenizer", **changes)


def make_backbone(
    vocabulary, name: str, *, dtype=torch.float32, backend: str = "split", num_layers: int = 2
):
    config = model_config(name, num_layers=num_layers, attention_backend=backend)
    torch.manual_seed(0)
    backbone = load_backbone(
        config, token_ids=special_token_ids(config), vocabulary_size=vocabulary.size
    )
    enlarge(backbone)
    return backbone.to(dtype)


def enlarge(module: torch.nn.Module) -> None:
    """Give larger weights than the initialisation's, so that errors show."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15, generator=generator)


def make_samples(vocabulary, shapes=SHAPES, *, seed: int = 0) -> list[CorruptedSample]:
    draw = np.random.default_rng(seed)
    special = {*vars(vocabulary).values()} - {vocabulary.encoder, vocabulary.sha256}
    words = [i for i in range(vocabulary.size) if i not in special]
    samples = []
    for shape in shapes:
        front: list[int] = []
        images, masks = [], []
        for rows, columns in shape.pictures:
            tokens = rows * columns
            front += [vocabulary.vision_start, *[vocabulary.image_pad] * tokens]
            front += [vocabulary.vision_end]
            side = 2 * PATCH
            images.append(draw.integers(0, 256, (rows * side, columns * side, 3), dtype=np.uint8))
            masks.append(draw.random(tokens) < 0.4)
        front += draw.choice(words, shape.context).tolist()
        bridge = [vocabulary.eos] * shape.bridge
        target = draw.choice(words, shape.target).tolist()
        segments, start = [], 0
        for role, part in zip(Role, (front, bridge, target), strict=True):
            if part:
                segments.append(Segment(start, start + len(part), role))
                start += len(part)
        ids = np.array(front + bridge + target)
        sample = Sample(
            input_ids=ids,
            segments=tuple(segments),
            images=tuple(images),
            text_positions=np.isin(ids, words),
        )
        label_rows = np.flatnonzero(np.isin(ids[1:], words))
        samples.append(
            CorruptedSample(
                sample=sample,
                input_ids=ids,
                label_rows=label_rows,
                labels=ids[label_rows + 1],
                image_masks=tuple(masks),
            )
        )
    return samples


def make_pack(vocabulary, backbone, rule: AttentionRule, *, samples=None) -> PackedBatch:
    samples = make_samples(vocabulary) if samples is None else samples
    pack = build_pack(
        samples,
        rule=rule,
        geometry=image_geometry(backbone),
        vocabulary=vocabulary,
        embeddings=[EmbeddingInfo(i, 0, i) for i in range(len(samples))],
        noise=[np.random.default_rng(i) for i in range(len(samples))],
    )
    return replace(pack, pixel_values=pack.pixel_values.to(backbone.dtype))


def unrouted_copy(backbone):
    """Transformers' model as it is, with the same weights."""
    plain = backbone.__class__(copy.deepcopy(backbone.config)).to(backbone.dtype)
    plain.load_state_dict(backbone.state_dict())
    plain.set_attn_implementation("sdpa")
    return plain


def reference_hidden(plain, samples, pack: PackedBatch, rule: AttentionRule) -> Tensor:
    """Hidden states of each sample alone under an explicit 4-D mask; rows joined."""
    rows, start = [], 0
    for one in samples:
        ids = torch.from_numpy(one.input_ids)[None]
        kinds = (ids == plain.config.image_token_id).int()
        grids = [(1, i.shape[0] // PATCH, i.shape[1] // PATCH) for i in one.sample.images]
        patches = sum(high * wide for _, high, wide in grids)
        vision = {}
        if grids:
            vision["pixel_values"] = pack.pixel_values[start : start + patches]
            vision["image_grid_thw"] = torch.tensor(grids)
        start += patches
        positions, _ = plain.model.get_rope_index(ids, kinds, vision.get("image_grid_thw"))
        visible = torch.from_numpy(dense_visibility([one.sample.segments], rule))
        out = plain.model(
            input_ids=ids,
            attention_mask=visible[None, None],
            position_ids=positions,
            mm_token_type_ids=kinds,
            use_cache=False,
            **vision,
        )
        rows.append(out.last_hidden_state[0])
    return torch.cat(rows)


def moved_segments(samples) -> list[list[Segment]]:
    """Segments of each sample in the coordinates of the pack."""
    moved, start = [], 0
    for one in samples:
        parts = one.sample.segments
        moved.append([Segment(s.start + start, s.stop + start, s.role) for s in parts])
        start += len(one.input_ids)
    return moved


def reference_outputs(plain, decoder, samples, pack, rule) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, patches and embeddings as the heads define them, from the reference's rows."""
    hidden = reference_hidden(plain, samples, pack, rule)
    language = plain.model.language_model
    positions = language.rotary_emb(hidden[None], pack.position_ids[:, None])
    visible = torch.from_numpy(dense_visibility(moved_segments(samples), rule))
    old = decoder.layer.self_attn.config._attn_implementation
    decoder.layer.self_attn.config._attn_implementation = "sdpa"
    decoded = decoder.layer(
        hidden[None], attention_mask=visible[None, None], position_embeddings=positions
    )[0]
    decoder.layer.self_attn.config._attn_implementation = old
    patches = decoder.to_pixels(decoder.norm(decoded))[pack.patch_rows]
    pooled = torch.nn.functional.normalize(hidden[pack.pool_rows].float(), dim=-1)
    return plain.lm_head(hidden[pack.label_rows]), patches, pooled


def scalar(logits: Tensor, patches: Tensor, pooled: Tensor) -> Tensor:
    """A number that every output moves, each in its own direction."""
    total = torch.zeros((), dtype=logits.dtype)
    for seed, part in enumerate((logits, patches, pooled)):
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(part.shape, generator=generator, dtype=part.dtype)
        total = total + (part * weight).sum()
    return total


def gradients(module: torch.nn.Module) -> dict[str, Tensor]:
    missing = [name for name, p in module.named_parameters() if p.grad is None]
    assert not missing
    found = {name: p.grad.clone() for name, p in module.named_parameters()}
    module.zero_grad()
    return found


def packed_step(model: EmbeddingModel, pack: PackedBatch) -> tuple[tuple[Tensor, ...], dict]:
    output = model(pack)
    outputs = (output.logits_SV, output.patches_RC, output.embeddings_ED)
    scalar(*outputs).backward()
    return outputs, gradients(model)


def assert_near(found: Tensor, expected: Tensor, *, share: float, what: str) -> None:
    """Compare with the largest expected value: single entries may be sums that cancel."""
    error = (found - expected).abs().max()
    assert error <= share * expected.abs().max().clamp(min=1e-6), (what, float(error))


def hidden_rows(model: EmbeddingModel, pack: PackedBatch) -> Tensor:
    """Hidden states (T, D) at the language model's exit."""
    caught = []
    handle = model.core.language_model.register_forward_hook(
        lambda module, inputs, output: caught.append(output.last_hidden_state[0])
    )
    model.keep_all_rows = True
    model(pack)
    model.keep_all_rows = False
    handle.remove()
    return caught[0]
