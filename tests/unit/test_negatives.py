"""Hard negatives from record to pack: which are used, what they are known by, how long they are."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pair_records import hard_records, pair_record, picture, write_pairs
from pydantic import ValidationError

from cocoa_dist.config import ASSET_DIR, RunConfig, StageDataConfig, parse_config
from cocoa_dist.data.geometry import ImageGeometry
from cocoa_dist.data.loader import StageLoader
from cocoa_dist.data.packing import identity_number, length_bound
from cocoa_dist.data.record_source import fault_kind
from cocoa_dist.data.records import Record, image_part, side_hash, text_part
from cocoa_dist.data.samples import Vocabulary, draw_for, view_samples, view_settings
from cocoa_dist.data.writing.shard_file import count_text_tokens

GEOMETRY = ImageGeometry(patch_size=8)
COUNT = 24


def run_config(path: Path, *, objective: dict[str, Any] | None = None, **data: Any) -> RunConfig:
    stage = {
        "objective": {"kind": "contrastive", **(objective or {})},
        "data": {"view": "pair", "sources": {"a": {"path": str(path)}}, **data},
        "batch_size": 12,
        "steps": 10,
        "optimizer": {"learning_rate": 1e-3},
    }
    tree = {
        "name": "test",
        "method": "test",
        "model": {"random": {}, "tokenizer": "asset:tokenizer"},
        "data": {"tokens_per_pack": 200},
        "stages": {"s": stage},
    }
    return parse_config(tree, source="test")


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary.load(ASSET_DIR / "tokenizer", run_config(Path("x")).model)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "a", hard_records(COUNT))


def settings_for(run: RunConfig, **changes: Any):
    stage = run.stages["s"].data.model_copy(update=changes)
    return view_settings(run.data, geometry=GEOMETRY, stage=stage)


def samples(record: Record, vocabulary: Vocabulary, *, seed: int = 0, **data: Any):
    settings = settings_for(run_config(Path("x")), **data)
    draw = draw_for(seed, "s", 0, 0)
    return view_samples("pair", record, draw=draw, vocabulary=vocabulary, settings=settings)


def steps_of(run: RunConfig, vocabulary: Vocabulary, folder: Path, *, world_size: int = 1):
    found = []
    for rank in range(world_size):
        loader = StageLoader(
            run,
            "s",
            vocabulary=vocabulary,
            geometry=GEOMETRY,
            rank=rank,
            world_size=world_size,
            start_step=1,
            folder=folder,
        )
        found.append(loader.next_step())
        loader.close()
    return found


def test_the_first_negatives_follow_the_target_and_absent_ones_are_fillers(vocabulary) -> None:
    record = pair_record(0, negatives=["one thing", 7])
    made = samples(record, vocabulary, negatives=3)
    assert made.reason is None
    query, target, text, image, absent = made.samples
    assert [sample.is_filler for sample in made.samples] == [False] * 4 + [True]
    assert query.label is None
    assert text.input_ids.tolist() == [*vocabulary.encode("one thing"), vocabulary.eos]
    assert len(image.images) == 1
    assert target.label.content == side_hash(record, record.positives[0])
    assert image.label.content == side_hash(record, record.negatives[1]) == image.label.identity
    assert absent.label is None
    assert math.isnan(text.label.score)


def test_without_the_option_a_record_is_what_it_was(vocabulary) -> None:
    made = samples(pair_record(0, negatives=["one thing", 7]), vocabulary)
    plain = samples(pair_record(0), vocabulary)
    assert [s.input_ids.tolist() for s in made.samples] == [
        s.input_ids.tolist() for s in plain.samples
    ]
    assert [s.label for s in made.samples] == [None, None]


def test_a_draw_takes_each_negative_equally_often_and_none_twice(vocabulary) -> None:
    record = pair_record(0, negatives=[f"thing {n}" for n in range(5)])
    hashes = [side_hash(record, side) for side in record.negatives]
    taken = dict.fromkeys(hashes, 0)
    for seed in range(300):
        made = samples(record, vocabulary, seed=seed, negatives=2, negatives_choice="draw")
        chosen = [sample.label.content for sample in made.samples[2:]]
        assert len(set(chosen)) == 2
        assert sorted(chosen, key=hashes.index) == chosen
        for one in chosen:
            taken[one] += 1
    assert min(taken.values()) > 85  # 120 expected, standard deviation 8.5
    again = samples(record, vocabulary, seed=5, negatives=2, negatives_choice="draw")
    same = samples(record, vocabulary, seed=5, negatives=2, negatives_choice="draw")
    assert [s.label for s in again.samples] == [s.label for s in same.samples]


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (pair_record(3, negatives=[8, 3]), r"negatives\[1\] is a positive of the same record"),
        (
            pair_record(3, negatives=[8], identities=["cat"], identity="cat"),
            r"negatives\[0\] is a positive of the same record",
        ),
        (pair_record(3, negatives=[8], identities=["a", "b"]), "expected 1 texts"),
    ],
)
def test_a_record_that_contradicts_itself_is_named_and_masked(record, words, vocabulary) -> None:
    made = samples(record, vocabulary, negatives=2)
    assert made.reason is not None
    with pytest.raises(ValueError, match=words):
        raise ValueError(made.reason)
    assert fault_kind(made.reason) in ("negative is a positive", "meta does not fit")
    assert [sample.is_filler for sample in made.samples] == [True] * 4


def test_a_target_drawn_from_several_is_known_by_itself(vocabulary) -> None:
    """Else another record whose target it is would be pushed away from what it looks for."""
    one = pair_record(5)  # its picture is the second positive of the other
    both = replace(
        pair_record(3),
        positives=((image_part(0),), (image_part(1),)),
        images=(picture(3), picture(5)),
        identity="",
    )
    named = replace(both, identity="a thing")
    for negatives in (0, 2):
        drawn = set()
        for seed in range(20):
            made = samples(both, vocabulary, seed=seed, negatives=negatives).samples
            number = 0 if (made[1].images[0] == made_of(both, vocabulary, 0)).all() else 1
            drawn.add(number)
            label = made[1].label
            known = both.identity if label is None else label.identity
            assert known == (both.identity, one.identity)[number]
            label = samples(named, vocabulary, seed=seed, negatives=negatives).samples[1].label
            assert label is None or label.identity == "a thing"
        assert drawn == {0, 1}


def made_of(record, vocabulary, number):
    """The pixels of one positive."""
    alone = replace(record, positives=(record.positives[number],))
    return samples(alone, vocabulary).samples[1].images[0]


def test_scores_that_do_not_fit_are_named_where_they_are_read(vocabulary, tmp_path) -> None:
    record = pair_record(3, negatives=[8])
    broken = [pair_record(n, negatives=[n + 50], scores=True) for n in range(11)]
    meta = {"scores": {"positives": [0.5], "negatives": [0.1, 0.2]}}
    broken.append(replace(record, key="broken", identity="", meta=meta))
    path = write_pairs(tmp_path / "a", broken)
    run = run_config(path, negatives=1, objective={"distillation_weight": 1.0})
    (step,) = steps_of(run, vocabulary, tmp_path)
    (bad,) = step.bad_records
    assert bad.key == "broken"
    assert "meta.scores.negatives is [0.1, 0.2], expected 1 numbers" in bad.reason
    (quiet,) = steps_of(run_config(path, negatives=1), vocabulary, tmp_path)
    assert quiet.bad_records == ()  # nobody reads them


def test_a_pack_says_what_every_embedding_is(dataset, vocabulary, tmp_path) -> None:
    run = run_config(dataset, negatives=2, objective={"distillation_weight": 1.0})
    (step,) = steps_of(run, vocabulary, tmp_path)
    records = {record.key: record for record in hard_records(COUNT)}
    keys, record = iter(step.record_keys), None
    for pack in step.packs:
        rows = zip(
            pack.sides.tolist(),
            pack.identities.tolist(),
            pack.contents.tolist(),
            pack.pair_weights.tolist(),
            pack.scores.tolist(),
            strict=True,
        )
        for side, identity, content, weight, score in rows:
            record = records[next(keys)] if side == 0 else record
            if side < 2:
                assert identity == identity_number(record.identity)
                assert weight == 1.0
            if side == 1:
                assert content == identity_number(side_hash(record, record.positives[0]))
            if side >= 2:
                there = side - 2 < len(record.negatives)
                assert weight == float(there)
                if there:
                    of_side = side_hash(record, record.negatives[side - 2])
                    assert content == identity == identity_number(of_side)
            if "scores" not in record.meta or side == 0 or not weight:
                assert math.isnan(score)
            else:
                given = record.meta["scores"]
                expected = given["positives"] if side == 1 else given["negatives"][side - 2 :]
                assert score == pytest.approx(expected[0])


@pytest.mark.parametrize("choice", ["first", "draw"])
@pytest.mark.parametrize("with_record", [True, False], ids=["tight", "index alone"])
@pytest.mark.parametrize("negatives", [1, 2, 5])
def test_bounds_hold_with_negatives(negatives, with_record, choice, vocabulary) -> None:
    settings = settings_for(
        run_config(Path("x")), negatives=negatives, negatives_choice=choice, instruction="Find it"
    )
    for record in hard_records(COUNT):
        counted = count_text_tokens(record, count_tokens=lambda t: len(vocabulary.encode(t)))
        bound = length_bound(
            "pair",
            num_text_tokens=counted,
            image_sizes=[(32, 32)] * len(record.images),
            record=record if with_record else None,
            vocabulary=vocabulary,
            settings=settings,
        )
        for seed in range(4):
            draw = draw_for(seed, "s", 0, 0)
            made = view_samples("pair", record, draw=draw, vocabulary=vocabulary, settings=settings)
            assert made.reason is None
            tokens = sum(len(sample.input_ids) for sample in made.samples)
            assert tokens <= bound[0]
            assert sum(16 * len(sample.images) for sample in made.samples) <= bound[1]
            if with_record and choice == "first":
                assert tokens >= bound[0] - 5  # the longest text may be a negative's


def test_ranks_share_the_negatives_of_a_step(dataset, vocabulary, tmp_path) -> None:
    run = run_config(dataset, negatives=2)

    def rows(steps):
        return sorted(
            row
            for step in steps
            for pack in step.packs
            for row in zip(
                pack.pair_ids.tolist(),
                pack.sides.tolist(),
                pack.contents.tolist(),
                pack.pair_weights.tolist(),
                strict=True,
            )
        )

    one = steps_of(run, vocabulary, tmp_path / "1")
    four = steps_of(run, vocabulary, tmp_path / "4", world_size=4)
    assert rows(one) == rows(four)
    assert len(rows(one)) == 12 * 4


def test_instructions_may_differ_from_source_to_source(dataset, vocabulary, tmp_path) -> None:
    sources = {"a": {"path": str(dataset)}, "b": {"path": str(dataset)}}
    instruction = {"a": "Find the picture of", "b": ""}
    run = run_config(dataset)
    tree = run.model_dump(mode="json")
    tree["stages"]["s"]["data"]["sources"] = sources
    tree["stages"]["s"]["data"]["instruction"] = instruction
    run = parse_config(tree, source="test")
    loader = StageLoader(
        run,
        "s",
        vocabulary=vocabulary,
        geometry=GEOMETRY,
        rank=0,
        world_size=1,
        start_step=1,
        folder=tmp_path,
    )
    start = torch.tensor(vocabulary.encode("Find the picture of"))
    seen = set()
    for _ in range(8):
        step = loader.next_step()
        pack = step.packs[0]
        begins = bool(torch.equal(pack.input_ids[: len(start)], start))
        assert begins == (step.dataset == "a")
        seen.add(step.dataset)
    loader.close()
    assert seen == {"a", "b"}


def test_sides_of_texts_alone_and_of_several_pictures(vocabulary) -> None:
    images = tuple(pair_record(n).images[0] for n in range(3))
    texts = Record(
        key="t",
        task="t",
        query=(text_part("a question"),),
        positives=((text_part("an answer"), text_part("in two parts")),),
        negatives=((text_part("no answer"),),),
    )
    several = Record(
        key="p",
        task="t",
        query=(image_part(0), text_part("more of"), image_part(1)),
        positives=((image_part(2), text_part("this one")),),
        images=images,
    )
    question, answer, other = samples(texts, vocabulary, negatives=1).samples
    assert not question.images + answer.images + other.images
    assert answer.input_ids.tolist()[:-1] == vocabulary.encode("an answer in two parts")
    made = samples(several, vocabulary, instruction="Find").samples
    assert [len(sample.images) for sample in made] == [2, 1]
    words = len(vocabulary.encode("Find more of"))
    assert len(made[0].input_ids) == 2 * (4 + 2) + words + 1


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"instruction": {"b": "x"}}, r"names \['b'\] that is not in sources, and lacks \['a'\]"),
        ({"negatives": 2, "view": "caption"}, "negatives belong to data.view pair"),
    ],
)
def test_data_options_that_do_not_fit_are_refused(data, words) -> None:
    tree = {"view": "pair", "sources": {"a": {"path": "x"}}, **data}
    with pytest.raises(ValidationError, match=words):
        StageDataConfig.model_validate(tree)


def test_a_teacher_needs_negatives_to_score() -> None:
    with pytest.raises(ValueError, match="distillation_weight needs negatives"):
        run_config(Path("x"), objective={"distillation_weight": 1.0})
