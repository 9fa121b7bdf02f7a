"""The loader through energon: one order for all world sizes, workers and restarts; bad data masked.

Data sets are tiny and made here.
"""

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_loaders import (
    BAD_RECORD,
    BATCH_SIZE,
    CAPTION_VIEWS,
    NUM_RECORDS,
    OBJECTIVES,
    TOKENIZER,
    config,
    open_loader,
    read,
    record,
    write,
)

from cocoa_dist.batch import StepBatch
from cocoa_dist.config import RunConfig, differences
from cocoa_dist.data.packing import length_bound
from cocoa_dist.data.record_source import RecordSource
from cocoa_dist.data.samples import Vocabulary

MASKS: list[dict[str, Any]] = [
    {"mask_sampling": "exact"},
    {"text_mask_span": 3, "image_mask_block": 2},
    {"text_mask_span": 3, "image_mask_block": 2, "mask_sampling": "exact"},
    {"mask_replacement": "learned"},
    {"context_mask_ratio": 0.4},
]


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary.load(TOKENIZER, config({"a": "x"}).model)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("good") / "a", [record(n) for n in range(NUM_RECORDS)])


@pytest.fixture(scope="module")
def dataset_with_bad_record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    records = [record(n, broken=n == BAD_RECORD) for n in range(NUM_RECORDS)]
    return write(tmp_path_factory.mktemp("bad") / "a", records)


def summary(ranks: list[StepBatch]) -> dict[str, Any]:
    """What must not depend on ranks, workers or packs."""
    packs = [pack for batch in ranks for pack in batch.packs if pack.num_samples]
    return {
        "step": ranks[0].step,
        "digest": {batch.digest for batch in ranks},
        "record_ids": {batch.record_ids for batch in ranks},
        "keys": sorted(key for batch in ranks for key in batch.record_keys),
        "tokens": sum(batch.num_tokens for batch in ranks),
        "samples": sum(batch.num_samples for batch in ranks),
        "ids": sorted(i for pack in packs for i in pack.input_ids.tolist()),
        "labels": sorted(i for pack in packs for i in pack.labels.tolist()),
        "pixels": sorted(
            row for pack in packs for row in pack.pixel_values.double().sum(dim=1).tolist()
        ),
        "pairs": sorted(
            row
            for pack in packs
            for row in zip(pack.pair_ids.tolist(), pack.identities.tolist(), strict=True)
        ),
    }


@pytest.mark.parametrize("view", CAPTION_VIEWS)
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_content_does_not_depend_on_the_world_size(
    view: str, world_size: int, dataset: Path, vocabulary: Vocabulary, tmp_path: Path
) -> None:
    run = config({"a": dataset}, view=view)
    one = read(run, vocabulary, tmp_path, steps=4)
    many = read(run, vocabulary, tmp_path, steps=4, world_size=world_size)
    fillers = {"pixels"}  # a rank without pictures has a filler of zeros
    for left, right in zip(one, many, strict=True):
        expected, found = summary(left), summary(right)
        for key in expected.keys() - fillers:
            assert found[key] == expected[key], key
        assert [x for x in found["pixels"] if x] == [x for x in expected["pixels"] if x]


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more than a machine has cores
def test_content_does_not_depend_on_worker_processes(
    workers: int, world_size: int, dataset: Path, vocabulary: Vocabulary, tmp_path: Path
) -> None:
    here = read(config({"a": dataset}), vocabulary, tmp_path, steps=5, world_size=world_size)
    there = read(
        config({"a": dataset}, workers=workers),
        vocabulary,
        tmp_path,
        steps=5,
        world_size=world_size,
    )
    assert [summary(ranks) for ranks in there] == [summary(ranks) for ranks in here]
    assert all(batch.cpu_seconds > 0 for ranks in there for batch in ranks)
    assert all(batch.cpu_seconds == 0 for ranks in here for batch in ranks)


@pytest.mark.parametrize("options", MASKS, ids=lambda options: " ".join(map(str, options)))
def test_what_is_hidden_depends_on_no_world_size_and_no_resume(
    options: dict[str, Any], dataset: Path, vocabulary: Vocabulary, tmp_path: Path
) -> None:
    view = "bridged" if "context_mask_ratio" in options else "caption"
    run = config({"a": dataset}, view=view, objective={**OBJECTIVES[view], **options})
    one = read(run, vocabulary, tmp_path, steps=4)
    resumed = read(run, vocabulary, tmp_path, steps=2, world_size=3, start_step=3)
    for left, right in zip(one[2:], resumed, strict=True):
        expected, found = summary(left), summary(right)
        for key in expected.keys() - {"pixels"}:
            assert found[key] == expected[key], key
        assert [x for x in found["pixels"] if x] == [x for x in expected["pixels"] if x]


@pytest.mark.parametrize(("start_step", "workers"), [(2, 0), (5, 0), (4, 2)])
def test_a_restart_goes_on_where_the_first_run_was(
    start_step: int, workers: int, dataset: Path, vocabulary: Vocabulary, tmp_path: Path
) -> None:
    whole = read(config({"a": dataset}), vocabulary, tmp_path, steps=6)
    rest = read(
        config({"a": dataset}, workers=workers),
        vocabulary,
        tmp_path,
        steps=7 - start_step,
        start_step=start_step,
    )
    assert [summary(ranks) for ranks in rest] == [summary(r) for r in whole[start_step - 1 :]]


def test_every_record_comes_exactly_once_in_a_pass(
    dataset: Path, vocabulary: Vocabulary, tmp_path: Path
) -> None:
    steps = read(config({"a": dataset}), vocabulary, tmp_path, steps=5, world_size=2)
    keys: list[str] = []
    for ranks in steps:
        of_record = {}
        for batch in ranks:
            of_record |= {int(key.removeprefix("a")): key for key in batch.record_keys}
        keys += [of_record[number] for number in ranks[0].record_ids]
    everything = sorted(f"a{number}" for number in range(NUM_RECORDS))
    assert sorted(keys[:NUM_RECORDS]) == everything
    assert sorted(keys[NUM_RECORDS : 2 * NUM_RECORDS]) == everything


@pytest.mark.parametrize("world_size", [2, 3, 4, 6])
def test_all_ranks_have_equal_numbers_of_packs(
    world_size: int, dataset: Path, vocabulary: Vocabulary, tmp_path: Path
) -> None:
    run = config({"a": dataset}, data={"tokens_per_pack": 90})
    steps = read(run, vocabulary, tmp_path, steps=6, world_size=world_size)
    for ranks in steps:
        assert len({len(batch.packs) for batch in ranks}) == 1
        assert sum(batch.num_samples for batch in ranks) == BATCH_SIZE
        for batch in ranks:
            assert all(len(pack.pixel_values) > 0 for pack in batch.packs)
            assert all(pack.num_tokens <= 90 for pack in batch.packs)
            assert batch.fill_ratio == batch.num_tokens / (90 * len(batch.packs))


@pytest.mark.parametrize("view", CAPTION_VIEWS)
def test_a_corrupt_picture_is_masked_and_named_and_shifts_nothing(
    view: str,
    dataset: Path,
    dataset_with_bad_record: Path,
    vocabulary: Vocabulary,
    tmp_path: Path,
) -> None:
    changes: dict[str, Any] = {"view": view}
    good = read(config({"a": dataset}, **changes), vocabulary, tmp_path, steps=3)
    bad = read(config({"a": dataset_with_bad_record}, **changes), vocabulary, tmp_path, steps=3)
    named = 0
    for (clean,), (masked,) in zip(good, bad, strict=True):
        assert (masked.digest, masked.record_ids) == (clean.digest, clean.record_ids)
        assert sorted(masked.record_keys) == sorted(clean.record_keys)
        lost = clean.num_samples - masked.num_samples
        assert lost == len(masked.bad_records) * (2 if view == "pair" else 1)
        for line in masked.bad_records:
            assert str(line).startswith(f"a {BAD_RECORD} a{BAD_RECORD}: ")
            assert line.kind == "not a picture"
        named += len(masked.bad_records)
        weights = torch.cat([pack.pair_weights for pack in masked.packs])
        assert int((weights == 0).sum()) == (lost if view == "pair" else 0)
    assert named >= 1


def test_a_record_that_cannot_be_read_is_masked_and_named(
    vocabulary: Vocabulary, tmp_path: Path
) -> None:
    path = write(tmp_path / "a", [record(n) for n in range(NUM_RECORDS)])
    shard = path / "shard-00000.arrow"
    data = bytearray(shard.read_bytes())
    at = data.find(b"thing 7")
    data[at : at + 7] = b"thinG 7"  # the same size: only the checksum tells
    shard.write_bytes(data)
    run = config({"a": path}, view="pair")
    (batches,) = zip(*read(run, vocabulary, tmp_path, steps=3), strict=True)
    bad = [line for batch in batches for line in batch.bad_records]
    assert bad
    assert all(str(line).startswith("a 7 a7: ") and "crc32" in str(line) for line in bad)


def test_a_pair_stays_in_one_pack_with_its_position(
    dataset: Path, vocabulary: Vocabulary, tmp_path: Path
) -> None:
    run = config({"a": dataset}, view="pair")
    for ranks in read(run, vocabulary, tmp_path, steps=2, world_size=2):
        seen: list[int] = []
        for batch in ranks:
            for pack in batch.packs:
                assert pack.pair_ids[0::2].tolist() == pack.pair_ids[1::2].tolist()
                assert pack.sides.tolist() == [0, 1] * (pack.num_embeddings // 2)
                seen += pack.pair_ids[0::2].tolist()
                rows = pack.pool_rows
                assert (pack.input_ids[rows] == vocabulary.eos).all()
        assert sorted(seen) == list(range(BATCH_SIZE))


def test_a_blend_takes_each_step_from_one_source(
    dataset: Path, vocabulary: Vocabulary, tmp_path: Path
) -> None:
    other = write(tmp_path / "b", [record(n, "b") for n in range(20)])
    sources = {
        "a": {"path": str(dataset), "weight": 3.0, "limit": 13},
        "b": {"path": str(other), "weight": 1.0},
    }
    steps = read(config(sources), vocabulary, tmp_path, steps=40)
    names = [ranks[0].dataset for ranks in steps]
    assert 4 <= names.count("b") <= 18  # a quarter of 40, drawn from an exact block of 1000
    for (batch,) in steps:
        assert {key[0] for key in batch.record_keys} == {batch.dataset}
        assert max(batch.record_ids) < (13 if batch.dataset == "a" else 20)


def in_blocks(
    dataset: Path, tmp_path: Path, *, bad: int | None = None, **changes: Any
) -> RunConfig:
    """A blend of two data sets in blocks of four records, over steps of twelve."""
    other = tmp_path / "other"
    if not other.exists():
        write(other, [record(n, "b", broken=n == bad) for n in range(20)])
    run = config({"a": dataset, "b": other}, **changes)
    data = run.stages["s"].data.model_copy(update={"task_block": 4})
    stage = run.stages["s"].model_copy(update={"data": data})
    return run.model_copy(update={"stages": {"s": stage}})


@pytest.mark.parametrize("view", CAPTION_VIEWS)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_step_in_blocks_takes_each_block_from_one_source(
    view: str, world_size: int, dataset: Path, vocabulary: Vocabulary, tmp_path: Path
) -> None:
    run = in_blocks(dataset, tmp_path, view=view)
    steps = read(run, vocabulary, tmp_path, steps=4, world_size=world_size)
    one = read(run, vocabulary, tmp_path, steps=4)
    mixed = 0
    for ranks, (alone,) in zip(steps, one, strict=True):
        named = {
            f"{name}{number}"
            for name, number in zip(ranks[0].datasets, ranks[0].record_ids, strict=True)
        }
        assert {key for batch in ranks for key in batch.record_keys} == named
        assert all(count % 4 == 0 for _, count in ranks[0].blocks)
        assert sum(count for _, count in ranks[0].blocks) == BATCH_SIZE
        expected, found = summary([alone]), summary(ranks)
        assert {k: found[k] for k in ("digest", "keys", "ids", "labels", "pairs")} == {
            k: expected[k] for k in ("digest", "keys", "ids", "labels", "pairs")
        }
        mixed += " + " in ranks[0].dataset
    assert mixed


def test_in_blocks_a_bad_record_is_named_with_its_own_data_set(
    dataset: Path, vocabulary: Vocabulary, tmp_path: Path
) -> None:
    run = in_blocks(dataset, tmp_path, bad=BAD_RECORD)
    steps = read(run, vocabulary, tmp_path, steps=6)
    bad = [fault for (batch,) in steps for fault in batch.bad_records]
    assert bad
    assert {(fault.dataset, fault.number) for fault in bad} == {("b", BAD_RECORD)}


def test_blocks_are_an_order_that_may_change_if_asked_for(dataset: Path, tmp_path: Path) -> None:
    whole = config({"a": dataset, "b": tmp_path / "other"})
    (line,) = differences(whole, in_blocks(dataset, tmp_path), free=False)
    assert line == "stages.s.data.task_block: None -> 4"
    goes_on = in_blocks(dataset, tmp_path, data={"on_change": "continue"})
    assert differences(whole, goes_on, free=False) == []


def test_state_and_fingerprint_are_the_plans(
    dataset: Path, vocabulary: Vocabulary, tmp_path: Path
) -> None:
    with open_loader(config({"a": dataset}), vocabulary, tmp_path) as loader:
        state = loader.state(7)
        assert state["next_step"] == 7
        assert loader.plan.resumed(state).plan_hash == loader.fingerprint
        assert state["plan_hash"] == loader.fingerprint
    with open_loader(config({"a": dataset}, batch_size=6), vocabulary, tmp_path) as loader:
        assert loader.fingerprint != state["plan_hash"]


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_leaves_the_generator_of_training_alone(
    workers: int, dataset: Path, vocabulary: Vocabulary, tmp_path: Path
) -> None:
    """A resumed run starts to load at a later step; its dropout must not notice."""
    run = config({"a": dataset}, workers=workers)
    with open_loader(run, vocabulary, tmp_path) as loader:
        before = torch.get_rng_state()
        for _ in range(2):
            loader.next_step()
            assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("damage", ["missing", "truncated", "no manifest"])
def test_a_damaged_data_set_is_named_before_the_first_step(
    damage: str, vocabulary: Vocabulary, tmp_path: Path
) -> None:
    path = write(tmp_path / "a", [record(n) for n in range(NUM_RECORDS)])
    shard = path / "shard-00001.arrow"
    if damage == "missing":
        shard.unlink()
    elif damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:-9])
    else:
        (path / "manifest.json").unlink()
    expected = "is not a data set" if damage == "no manifest" else "shard-00001.arrow"
    with (
        pytest.raises(ValueError, match=expected),
        open_loader(config({"a": path}), vocabulary, tmp_path),
    ):
        pass


def test_a_batch_that_ranks_cannot_share_is_refused(
    dataset: Path, vocabulary: Vocabulary, tmp_path: Path
) -> None:
    with (
        pytest.raises(ValueError, match="batch_size 12 cannot be shared equally by 5"),
        open_loader(config({"a": dataset}), vocabulary, tmp_path, world_size=5),
    ):
        pass


def test_long_texts_are_counted(dataset: Path, vocabulary: Vocabulary, tmp_path: Path) -> None:
    run = config({"a": dataset}, data={"max_text_tokens": 3})
    ((batch,),) = read(run, vocabulary, tmp_path, steps=1)
    assert batch.num_truncated > 0


@pytest.mark.parametrize("workers", [0, 1])
def test_pictures_above_the_limit_are_counted(
    workers: int, dataset: Path, vocabulary: Vocabulary, tmp_path: Path
) -> None:
    """Those of `record` have 32 x 32 pixels; a second pass takes them from the cache."""
    image = {"min_pixels": 256, "max_pixels": 512}
    small = config({"a": dataset}, data={"image": image}, workers=workers)
    for (batch,) in read(small, vocabulary, tmp_path, steps=4):
        assert batch.num_shrunk == BATCH_SIZE
    for (batch,) in read(config({"a": dataset}), vocabulary, tmp_path, steps=2):
        assert batch.num_shrunk == 0


def test_workers_outlive_the_signals_that_stop_a_rank(
    dataset: Path, vocabulary: Vocabulary, tmp_path: Path
) -> None:
    with open_loader(config({"a": dataset}, workers=2), vocabulary, tmp_path) as loader:
        loader.next_step()
        loader.next_step()  # both workers have begun
        processes = loader._loader._iterator._workers
        for process in processes:
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
                os.kill(process.pid, number)
        assert [loader.next_step().step for _ in range(6)] == [3, 4, 5, 6, 7, 8]
    assert not any(process.is_alive() for process in processes)


def test_a_loader_leaves_the_checkout_alone(
    dataset: Path, vocabulary: Vocabulary, tmp_path: Path
) -> None:
    folder = tmp_path / "blend"
    with open_loader(config({"a": dataset}), vocabulary, folder):
        assert [path.name for path in folder.iterdir()] == ["s.yaml"]


def test_a_tokenizer_that_did_not_count_the_texts_loosens_the_bounds(
    dataset: Path, vocabulary: Vocabulary, tmp_path: Path
) -> None:
    other = replace(vocabulary, sha256="another")
    with open_loader(config({"a": dataset}), other, tmp_path) as loader:
        assert set(loader.plan.sources[0].tokens.tolist()) == {6 + 48 + 2}


@pytest.mark.parametrize("view", ["caption", "bridged", "pair"])
def test_lengths_of_a_large_data_set_come_from_its_index(
    view: str,
    dataset: Path,
    vocabulary: Vocabulary,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr("cocoa_dist.data.encoder.EXACT_BOUND_RECORDS", 0)
    monkeypatch.setattr(RecordSource, "record", lambda self, number: pytest.fail("was read"))
    run = config({"a": dataset}, view=view, data={"tokens_per_pack": 400})
    with open_loader(run, vocabulary, tmp_path) as loader:
        source, encoder = loader.plan.sources[0], loader._dataset._encoder
        reader = loader._dataset._sources["a"].reader
        expected = [
            length_bound(
                view,
                num_text_tokens=int(reader.num_text_tokens[number])
                if encoder._counted(loader._dataset._sources["a"])
                else -1,
                image_sizes=reader.image_sizes(number),
                record=None,
                vocabulary=vocabulary,
                settings=encoder.settings,
            )
            for number in range(len(reader))
        ]
        found = zip(source.tokens.tolist(), source.patches.tolist(), strict=True)
        assert list(found) == expected
        assert source.largest is not None
        assert max(expected)[0] == source.tokens[source.largest[0]]
