"""The pack that memory is tried with: full in tokens and patches, fuller than any of the plan."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cocoa_dist.config import RunConfig, load_recipe
from cocoa_dist.data.fullest import (
    Fullest,
    _largest_first,
    _that_fit,
    fuller_packs,
    fullest_pack,
    most_packs,
)
from cocoa_dist.data.geometry import ImageGeometry
from cocoa_dist.data.loader import StageLoader
from cocoa_dist.data.records import Record, image_part, text_part
from cocoa_dist.data.shards import write_shards
from cocoa_dist.train.build import load_vocabulary

GEOMETRY = ImageGeometry(patch_size=8)
STAGES = ("joint_reconstruction", "eos_bridged_reconstruction", "contrastive")


def loader(config: RunConfig, stage: str, folder: Path, *, rank: int = 0, world_size: int = 1):
    return StageLoader(
        config,
        stage,
        vocabulary=load_vocabulary(config.model),
        geometry=GEOMETRY,
        rank=rank,
        world_size=world_size,
        start_step=1,
        folder=folder,
    )


@pytest.mark.parametrize("stage", STAGES)
def test_it_is_full_and_no_pack_of_the_plan_is_fuller(stage, tmp_path) -> None:
    config = load_recipe("debug", ["data.tokens_per_pack=320", f"stages.{stage}.batch_size=96"])
    ranks = [loader(config, stage, tmp_path, rank=rank, world_size=2) for rank in range(2)]
    found = [fullest_pack(one, world_size=2) for one in ranks]
    assert found[0].records == found[1].records
    assert found[0].keys == tuple(
        ranks[0]._dataset._sources["emoji"].key(r) for r in found[0].records
    )
    assert found[0].pack.num_samples >= len(found[0].records) == len(set(found[0].records))
    packs = [pack for one in ranks for _ in range(6) for pack in one.next_step().packs]
    assert 0.97 * 320 <= found[0].pack.num_tokens <= 320
    assert found[0].pack.num_tokens >= max(pack.num_tokens for pack in packs)
    plan = ranks[0].plan
    assert most_packs(plan, world_size=2) > 1
    later = dataclasses.replace(plan, start_step=5)  # a blend that was changed in between
    assert most_packs(later, world_size=2) > 1


def test_records_of_pictures_and_records_of_text_fill_both_budgets(tmp_path) -> None:
    """Sorted by size the pictures come first; a pack of them alone has room for a lot of text."""
    pictures = [picture(number) for number in range(20)]
    texts = [text(number) for number in range(400)]
    write_shards([*pictures, *texts], tmp_path / "data", info={})
    stage = "eos_bridged_reconstruction"
    config = load_recipe(
        "debug",
        [
            "data.tokens_per_pack=512",
            "data.patches_per_pack=600",
            "data.image.max_pixels=9216",
            f"stages.{stage}.batch_size=200",
            f"stages.{stage}.data.sources={{mixed: {{path: {tmp_path / 'data'}}}}}",
        ],
    )
    found = fullest_pack(loader(config, stage, tmp_path), world_size=1)
    assert 0.95 * 512 <= found.pack.num_tokens <= 512
    assert 0.9 * 600 <= len(found.pack.pixel_values) <= 600


def picture(number: int) -> Record:
    import io

    file = io.BytesIO()
    draw = np.random.default_rng(number)
    Image.fromarray(draw.integers(0, 256, (96, 96, 3), dtype=np.uint8)).save(file, "PNG")
    return Record(
        key=f"picture{number}",
        task="t",
        query=(image_part(0),),
        positives=(),
        target=(text_part("seen"),),
        images=(file.getvalue(),),
        meta={},
    )


def text(number: int) -> Record:
    return Record(
        key=f"text{number}",
        task="t",
        query=(text_part(f"thing {number}"),),
        positives=(),
        target=(text_part("small"),),
        images=(),
        meta={"keywords": ["small", "round"]},
    )


def largest(one: StageLoader, found: Fullest, *, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the most tokens and patches of what is tried, and of the packs of some steps."""
    tried = [found.pack, *(more.pack for more in fuller_packs(one, found.pack, world_size=1))]
    real = [pack for _ in range(steps) for pack in one.next_step().packs]
    most = [
        np.max([(pack.num_tokens, len(pack.pixel_values)) for pack in packs], axis=0)
        for packs in (tried, real)
    ]
    return most[0], most[1]


def test_what_is_drawn_in_every_pass_is_tried_at_its_largest(tmp_path) -> None:
    """With one draw it had 204 tokens and 64 patches, packs of the plan up to 267 and 112."""
    stage = "eos_bridged_reconstruction"
    more = [f"stages.{stage}.data.image_share=0.5", f"stages.{stage}.batch_size=8"]
    one = loader(load_recipe("debug", more), stage, tmp_path)
    tried, real = largest(one, fullest_pack(one, world_size=1), steps=60)
    assert (real <= tried).all()


@pytest.mark.parametrize("block", [4, None], ids=["mixed", "one a step"])
def test_sources_of_texts_and_of_pictures_are_both_tried(block, tmp_path) -> None:
    words = text_part(" ".join(["octopus"] * 20))
    texts = [Record(f"t{n}", "t", (words,), positives=((words,),)) for n in range(60)]
    shown = [picture(n) for n in range(60)]
    shown = [dataclasses.replace(one, positives=((words,),), target=()) for one in shown]
    sources = {}
    for name, records in (("texts", texts), ("pictures", shown)):
        write_shards(records, tmp_path / name, info={})
        sources[name] = {"path": str(tmp_path / name)}
    data = {"view": "pair", "task_block": block, "sources": sources}
    config = load_recipe(
        "debug",
        [
            f"stages.contrastive.data={json.dumps(data)}",
            "stages.contrastive.batch_size=32",
            "data.tokens_per_pack=900",
            "data.patches_per_pack=48",
        ],
    )
    one = loader(config, "contrastive", tmp_path)
    found = fullest_pack(one, world_size=1)
    tried, real = largest(one, found, steps=20)
    assert (real <= tried).all()
    assert tried[0] >= 0.9 * 900
    assert (found.source == "pictures + texts") == (block is not None)


def test_it_has_no_more_records_than_a_rank_gets(tmp_path) -> None:
    config = load_recipe("debug")
    found = fullest_pack(loader(config, STAGES[0], tmp_path), world_size=4)
    assert len(found.records) == 6  # of a batch of 24


def test_records_can_be_left_out_until_none_is_left(tmp_path) -> None:
    config = load_recipe("debug")
    one = loader(config, STAGES[0], tmp_path)
    first = fullest_pack(one, world_size=1)
    second = fullest_pack(one, first.records, world_size=1)
    assert not {*first.records} & {*second.records}
    assert fullest_pack(one, range(64), world_size=1) is None
    assert one.next_step().step == 1  # no step was taken


def test_what_fits_is_taken_in_order_across_chunks(monkeypatch) -> None:
    monkeypatch.setattr("cocoa_dist.data.fullest._CHUNK", 2)
    sizes = np.array([[60, 1], [50, 1], [30, 1], [9, 9], [10, 1], [1, 1]])
    room = np.array([100, 5])
    assert list(_that_fit(sizes, room=room, count=9)) == [0, 2, 4]
    assert list(_that_fit(sizes, room=room, count=2)) == [0, 2]
    assert room.tolist() == [100, 5]


def test_of_a_large_source_the_largest_and_a_sample_are_tried(monkeypatch, tmp_path) -> None:
    """Sorting ten million records would keep a stage waiting; the pack is as full with some."""
    overrides = ["data.tokens_per_pack=320", f"stages.{STAGES[0]}.data.sources.emoji.limit=2000"]
    config = load_recipe("debug", overrides)
    one = loader(config, STAGES[0], tmp_path)
    whole = fullest_pack(one, world_size=1)
    monkeypatch.setattr("cocoa_dist.data.fullest._LOOKED_AT", 200)
    tried = _largest_first(one.plan.sources[0], one.plan)
    assert 150 <= len(tried.records) == len(set(tried.records.tolist())) <= 300
    some = fullest_pack(one, world_size=1)
    assert some.records[0] == whole.records[0]
    assert some.pack.num_tokens >= 0.97 * whole.pack.num_tokens
