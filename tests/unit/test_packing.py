"""The packed batch: against transformers for pixels and positions, and consistent in itself."""

from collections.abc import Sequence
from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest
import torch

from cocoa_dist.batch import PackedBatch
from cocoa_dist.config import (
    ASSET_DIR,
    DataConfig,
    ModelConfig,
    RandomModelConfig,
    ReconstructionConfig,
    StageDataConfig,
)
from cocoa_dist.data.corruption import CorruptedSample, corrupt, uncorrupted
from cocoa_dist.data.packing import (
    EmbeddingInfo,
    build_pack,
    gaussian,
    identity_number,
    length_bound,
    patchify,
    rope_positions,
)
from cocoa_dist.data.samples import (
    VIEWS,
    ImageGeometry,
    Sample,
    Vocabulary,
    draw_for,
    filler_sample,
    view_settings,
)
from cocoa_dist.data.shards import ShardReader
from cocoa_dist.segments import Role, Segment, attention_rule

GEOMETRY = ImageGeometry(patch_size=8)
RULE = attention_rule("bidirectional")
VOCABULARY = Vocabulary(
    eos=1,
    image_pad=2,
    vision_start=3,
    vision_end=4,
    mask=5,
    bos=6,
    size=99,
    encoder=lambda text: [ord(letter) for letter in text],
)
HIDE_SOME = ReconstructionConfig(text_mask_ratio=0.4, image_mask_ratio=0.5)


def sample(sizes: Sequence[tuple[int, int]], num_text: int, seed: int = 0) -> Sample:
    random = np.random.default_rng(seed)
    ids: list[int] = []
    for height, width in sizes:
        ids += [3, *[2] * GEOMETRY.num_tokens(height, width), 4]
    text = random.integers(20, 90, num_text).tolist()
    return Sample(
        input_ids=np.array(ids + text),
        segments=(Segment(0, len(ids) + num_text, Role.CONTEXT),),
        images=tuple(random.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes),
        text_positions=np.array([False] * len(ids) + [True] * num_text),
    )


def mixed_samples() -> list[Sample]:
    return [
        sample([(32, 32)], 5, seed=1),
        sample([], 7, seed=2),
        sample([(16, 48), (32, 32)], 3, seed=3),
        sample([(16, 16)], 4, seed=4),
    ]


def hide(samples: Sequence[Sample]) -> tuple[list[CorruptedSample], list[np.random.Generator]]:
    draws = [draw_for(0, "s", 0, number) for number in range(len(samples))]
    options = {"vocabulary": VOCABULARY, "geometry": GEOMETRY}
    hidden = [
        corrupt(one, HIDE_SOME, draw=draw, **options)  # type: ignore[arg-type]
        for one, draw in zip(samples, draws, strict=True)
    ]
    return hidden, draws


def pack(samples: Sequence[Sample], **options: object) -> PackedBatch:
    hidden, draws = hide(samples)
    return build_pack(
        hidden,
        rule=RULE,
        geometry=GEOMETRY,
        vocabulary=VOCABULARY,
        noise=draws,
        **options,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(("height", "width"), [(32, 32), (16, 64), (96, 32)])
@pytest.mark.parametrize("patch_size", [8, 4])
def test_patches_are_those_of_the_qwen2_vl_processor(
    height: int, width: int, patch_size: int
) -> None:
    """float32 rounding only: 1e-6 of values up to 2.7."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    random = np.random.default_rng(0)
    images = random.integers(0, 256, (3, height, width, 3), dtype=np.uint8)
    processor = Qwen2VLImageProcessorPil(
        patch_size=patch_size, min_pixels=height * width, max_pixels=height * width
    )
    expected = processor(images=list(images), return_tensors="np")
    geometry = ImageGeometry(patch_size=patch_size)
    found = patchify(images, geometry=geometry)
    np.testing.assert_allclose(found, expected["pixel_values"], atol=1e-6, rtol=0)
    assert expected["image_grid_thw"].tolist() == [list(geometry.grid(image)) for image in images]


def test_positions_are_those_of_qwen2_vl() -> None:
    from transformers import Qwen2VLConfig
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel

    shape = {"vocab_size": 99, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    config = Qwen2VLConfig(
        text_config={**shape, **heads, "rope_parameters": rope},
        vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2},
        image_token_id=VOCABULARY.image_pad,
        vision_start_token_id=VOCABULARY.vision_start,
        vision_end_token_id=VOCABULARY.vision_end,
    )
    model = Qwen2VLModel(config)
    random = np.random.default_rng(0)
    for number in range(30):
        count = int(random.integers(0, 4))
        sizes = [(int(h) * 16, int(w) * 16) for h, w in random.integers(1, 6, (count, 2))]
        ids, grids = [], []
        for height, width in sizes:
            ids += random.integers(20, 90, random.integers(0, 4)).tolist()
            ids += [3, *[2] * GEOMETRY.num_tokens(height, width), 4]
            grids.append((1, height // 8, width // 8))
        ids += random.integers(20, 90, 1 + number % 5).tolist()
        tensor = torch.tensor([ids])
        expected, _ = model.get_rope_index(
            tensor,
            (tensor == VOCABULARY.image_pad).int(),
            torch.tensor(grids) if grids else None,
        )
        found = rope_positions(np.array(ids), grids, VOCABULARY)
        assert np.array_equal(found, expected[:, 0].numpy())


def test_positions_refuse_pictures_that_do_not_fit_their_tokens() -> None:
    with pytest.raises(ValueError, match="4 visual tokens, but pictures"):
        rope_positions(np.array([3, 2, 2, 2, 2, 4]), [(1, 2, 2)], VOCABULARY)


def test_positions_begin_again_in_every_sample() -> None:
    batch, start = pack(mixed_samples()), 0
    for one in mixed_samples():
        stop = start + len(one.input_ids)
        grids = [GEOMETRY.grid(image) for image in one.images]
        alone = rope_positions(one.input_ids, grids, VOCABULARY)
        assert np.array_equal(batch.position_ids[:, start:stop].numpy(), alone)
        start = stop


def test_a_pack_holds_its_samples_end_to_end() -> None:
    hidden, _ = hide(mixed_samples())
    batch = pack(mixed_samples())
    assert batch.input_ids.tolist() == [i for one in hidden for i in one.input_ids.tolist()]
    assert batch.num_samples == 4
    assert batch.num_filler_images == 0
    assert batch.image_grid_thw.tolist() == [[1, 4, 4], [1, 2, 6], [1, 4, 4], [1, 2, 2]]
    assert batch.num_image_tokens == len(batch.image_rows) == 4 + 3 + 4 + 1


def test_attention_keeps_samples_and_pictures_apart() -> None:
    batch = pack(mixed_samples())
    sizes = [len(one.input_ids) for one in mixed_samples()]
    expected = torch.block_diag(*[torch.ones(size, size) for size in sizes]).bool()
    assert torch.equal(batch.plan.visibility(), expected)
    pictures = torch.block_diag(*[torch.ones(size, size) for size in (16, 12, 16, 4)]).bool()
    assert torch.equal(batch.vision.plan.visibility(), pictures)


def test_labels_are_the_clean_tokens_behind_their_rows_in_one_sample() -> None:
    samples = mixed_samples()
    batch = pack(samples)
    clean = np.concatenate([one.input_ids for one in samples])
    owner = np.repeat(np.arange(4), [len(one.input_ids) for one in samples])
    rows = batch.label_rows.numpy()
    assert len(rows) > 0
    assert np.array_equal(owner[rows], owner[rows + 1])
    assert np.array_equal(clean[rows + 1], batch.labels.numpy())
    assert (batch.input_ids.numpy()[rows + 1] == VOCABULARY.mask).all()


def test_noise_is_gaussian_and_a_function_of_the_generator() -> None:
    def draw(key: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=key))

    values = gaussian(draw(1), 400_001)
    assert values.dtype == np.float32
    assert values.shape == (400_001,)
    assert np.array_equal(values[:1001], gaussian(draw(1), 1001))
    assert not np.array_equal(values[:1001], gaussian(draw(2), 1001))
    # Of 400,000 draws: standard errors are 0.0016, 0.0022 and 0.008.
    assert abs(values.mean()) < 0.008
    assert values.var() == pytest.approx(1.0, abs=0.011)
    assert (values**4).mean() == pytest.approx(3.0, abs=0.04)
    ordered = np.sort(values)[:: len(values) // 99][1:-1]  # percentiles against the normal's own
    expected = [NormalDist().inv_cdf(share / 99) for share in range(1, 99)]
    np.testing.assert_allclose(ordered[:98], expected, atol=0.03)
    levels = np.unique(gaussian(draw(3), 4_000_000))
    assert len(levels) == 2**16
    np.testing.assert_array_equal(levels, -levels[::-1])


def test_noise_goes_on_where_the_generator_is() -> None:
    draw = np.random.Generator(np.random.Philox(key=5))
    first, second = gaussian(draw, 8), gaussian(draw, 8)
    both = gaussian(np.random.Generator(np.random.Philox(key=5)), 16)
    np.testing.assert_array_equal(np.concatenate([first, second]), both)


def test_hidden_visual_tokens_are_noise_and_their_targets_the_clean_pixels() -> None:
    samples = mixed_samples()
    batch, hidden = pack(samples), hide(samples)[0]
    clean = np.concatenate(
        [patchify(image[None], geometry=GEOMETRY) for one in samples for image in one.images]
    )
    masks = np.concatenate([mask for one in hidden for mask in one.image_masks])
    assert 0 < masks.sum() < len(masks)
    assert np.array_equal(batch.patch_rows.numpy(), batch.image_rows.numpy()[masks])
    changed = (batch.pixel_values.numpy() != clean).reshape(len(masks), -1)
    assert not changed[~masks].any()
    assert changed[masks].all()
    area = 64
    first = clean.reshape(len(masks), 4, 3, 2, area)[:, :, :, 0].reshape(len(masks), -1)
    assert np.array_equal(batch.patch_targets.numpy(), first[masks])
    noise = batch.pixel_values.numpy().reshape(len(masks), -1)[masks]
    assert abs(noise.mean()) < 0.05
    assert noise.std() == pytest.approx(1.0, abs=0.05)


def test_normalised_targets_have_mean_0_and_variance_1_in_every_patch() -> None:
    """The floor under the variance, 1e-6, is far below that of random pixels."""
    targets = pack(mixed_samples(), normalise_patches=True).patch_targets.reshape(-1, 3 * 64)
    assert torch.allclose(targets.mean(dim=1), torch.zeros(len(targets)), atol=1e-5)
    assert torch.allclose(targets.var(dim=1), torch.ones(len(targets)), atol=1e-3)


def test_what_a_sample_becomes_does_not_depend_on_its_pack() -> None:
    samples = mixed_samples()
    hidden, draws = hide(samples)
    together = pack(samples)
    alone = build_pack(
        hidden[2:3], rule=RULE, geometry=GEOMETRY, vocabulary=VOCABULARY, noise=draws[2:3]
    )
    assert torch.equal(together.pixel_values[16:44], alone.pixel_values)


def test_hidden_pictures_need_a_generator_for_each_sample() -> None:
    hidden, draws = hide(mixed_samples())
    with pytest.raises(ValueError, match="a generator for each of 4 samples, found 1"):
        build_pack(hidden, rule=RULE, geometry=GEOMETRY, vocabulary=VOCABULARY, noise=draws[:1])


def test_a_pack_without_pictures_carries_one_filler() -> None:
    batch = pack([sample([], 7)])
    assert batch.num_filler_images == 1
    assert batch.image_grid_thw.tolist() == [[1, 2, 2]]
    assert batch.pixel_values.shape == (4, 3 * 2 * 64)
    assert not batch.pixel_values.any()
    assert len(batch.image_rows) == len(batch.patch_rows) == 0
    assert batch.patch_targets.shape == (0, 4 * 3 * 64)
    assert batch.num_image_tokens == 1


def test_an_empty_pack_is_one_filler_that_asks_for_nothing() -> None:
    batch = pack([])
    assert batch.input_ids.tolist() == [VOCABULARY.eos]
    assert (batch.num_samples, batch.num_embeddings, len(batch.labels)) == (0, 0, 0)
    assert batch.num_filler_images == 1


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_embeddings_are_pooled_from_their_own_sample(pooling: str) -> None:
    samples = mixed_samples()
    infos = [EmbeddingInfo(7, 0, 100), EmbeddingInfo(7, 1, 100), EmbeddingInfo(3, 0, -5)]
    infos.append(EmbeddingInfo(3, 1, -5, weight=0.0))
    batch = pack(samples, embeddings=infos, pooling=pooling)
    stops = np.cumsum([len(one.input_ids) for one in samples])
    if pooling == "last":
        assert batch.pool_rows.tolist() == (stops - 1).tolist()
        assert batch.pool_index.tolist() == [0, 1, 2, 3]
    else:
        assert batch.pool_rows.tolist() == list(range(stops[-1]))
        assert batch.pool_index.tolist() == np.repeat(range(4), np.diff(stops, prepend=0)).tolist()
    assert batch.pair_ids.tolist() == [7, 7, 3, 3]
    assert batch.sides.tolist() == [0, 1, 0, 1]
    assert batch.identities.tolist() == [100, 100, -5, -5]
    assert batch.pair_weights.tolist() == [1.0, 1.0, 1.0, 0.0]


def test_the_tokens_of_a_bridge_are_the_vectors_of_late_interaction() -> None:
    vocabulary = replace(VOCABULARY, bridge=(VOCABULARY.eos, 95, 96))
    short, long = sample([], 3), sample([(32, 32)], 2)
    bridged = [
        replace(
            one,
            input_ids=np.append(one.input_ids, vocabulary.bridge_ids),
            segments=(*one.segments, Segment(n, n + 3, Role.BRIDGE)),
            text_positions=np.append(one.text_positions, [False] * 3),
        )
        for one, n in ((short, len(short.input_ids)), (long, len(long.input_ids)))
    ]
    samples = [bridged[0], filler_sample(vocabulary), bridged[1]]
    infos = [EmbeddingInfo(0, 0, 1), EmbeddingInfo(0, 1, 1, weight=0.0), EmbeddingInfo(1, 0, 2)]
    batch = build_pack(
        [uncorrupted(one, geometry=GEOMETRY) for one in samples],
        rule=RULE,
        geometry=GEOMETRY,
        vocabulary=vocabulary,
        embeddings=infos,
        pooling="late_interaction",
    )
    first, end = len(bridged[0].input_ids), batch.num_tokens
    filler = [first] * 3  # its one token stands for all three
    expected = [*range(first - 3, first), *filler, *range(end - 3, end)]
    assert batch.num_vectors == 3
    assert batch.pool_rows.tolist() == expected
    assert batch.pool_index.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    with pytest.raises(ValueError, match="3 embeddings of 2 vectors, but 9 pool_rows"):
        replace(batch, num_vectors=2)


@pytest.mark.parametrize("name", ["labels", "patch_targets", "pool_index"])
def test_rows_without_their_values_are_refused(name: str) -> None:
    batch = pack(mixed_samples())
    longer = torch.zeros(len(getattr(batch, name)) + 1, dtype=torch.int64)
    with pytest.raises(ValueError, match=f"_rows, but {len(longer)} {name}"):
        replace(batch, **{name: longer})


def test_fillers_do_not_count_as_samples() -> None:
    batch = build_pack(
        [uncorrupted(one, geometry=GEOMETRY) for one in (sample([], 3), filler_sample(VOCABULARY))],
        rule=RULE,
        geometry=GEOMETRY,
        vocabulary=VOCABULARY,
    )
    assert batch.num_samples == 1
    assert batch.num_tokens == 4


def test_identities_are_int64_and_differ() -> None:
    numbers = {identity_number(f"identity {number}") for number in range(1000)}
    assert len(numbers) == 1000
    assert torch.tensor(sorted(numbers)).dtype == torch.int64


@pytest.mark.parametrize("with_record", [True, False], ids=["tight", "index alone"])
@pytest.mark.parametrize("view", sorted(VIEWS.keys() - {"dialogue"}))  # emoji have no turns
def test_bounds_hold_for_the_emoji_data(view: str, with_record: bool) -> None:
    tokenizer = ASSET_DIR / "tokenizer"
    model = ModelConfig(random=RandomModelConfig(), tokenizer="x")
    vocabulary = Vocabulary.load(tokenizer, model)
    reader = ShardReader(ASSET_DIR / "emoji" / "validation")
    stage = StageDataConfig.model_validate(
        {
            "sources": {"a": {"path": "x"}},
            "view": view,
            "image_share": 0.5,
            "instruction": "Find the picture of this",
        }
    )
    settings = view_settings(DataConfig(max_text_tokens=20), geometry=GEOMETRY, stage=stage)
    for number in range(0, len(reader), 3):
        record = reader.record(number)
        tokens, patches = length_bound(
            view,
            num_text_tokens=int(reader.num_text_tokens[number]),
            image_sizes=reader.image_sizes(number),
            record=record if with_record else None,
            vocabulary=vocabulary,
            settings=settings,
        )
        for seed in range(3):
            draw = draw_for(seed, "s", 0, number)
            made = VIEWS[view](record, draw=draw, vocabulary=vocabulary, settings=settings)
            assert sum(len(one.input_ids) for one in made) <= tokens
            assert sum(16 * len(one.images) for one in made) <= patches


def test_bounds_of_unknown_texts_and_broken_pictures() -> None:
    settings = view_settings(DataConfig(max_text_tokens=20), geometry=GEOMETRY)
    found = length_bound(
        "caption",
        num_text_tokens=-1,
        image_sizes=[(0, 0), (64, 64)],
        record=None,
        vocabulary=VOCABULARY,
        settings=settings,
    )
    assert found == (6 + 20 + 2, 16)
