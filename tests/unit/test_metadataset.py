"""A blend as energon has it: read as energon reads it, refused by name, used by a stage."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from megatron.energon import (
    Cooker,
    CrudeSample,
    DefaultTaskEncoder,
    WorkerConfig,
    basic_sample_keys,
    edataclass,
    get_loader,
    get_train_dataset,
    stateless,
)
from megatron.energon.flavors import Sample
from megatron.energon.metadataset import load_dataset
from test_loader import TOKENIZER, config, open_loader, record, write

from cocoa_dist.config import ConfigError, RunConfig, differences, fingerprint, load_recipe
from cocoa_dist.config.metadataset import read_metadataset
from cocoa_dist.data.samples import Vocabulary

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "blend.yaml"
STAGE = "stages.contrastive.data"


def blend_yaml(path: Path, train: Any, **more: Any) -> Path:
    content = {
        "__module__": "megatron.energon",
        "__class__": "MetadatasetV2",
        "splits": {"train": train},
    }
    path.write_text(yaml.safe_dump({**content, **more}))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three data sets, a to c, of 30, 20 and 13 records."""
    base = tmp_path_factory.mktemp("data")
    for name, count in (("a", 30), ("b", 20), ("c", 13)):
        write(base / name, [record(n, name) for n in range(count)])
    return base


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary.load(TOKENIZER, config({"a": "x"}).model)


def using(blend: Path, **changes: Any) -> RunConfig:
    """A recipe of one stage, loaded as a user's is, with the blend in place of its sources."""
    given = config({"a": "x"}, **changes).model_dump(mode="json")
    given["stages"]["s"]["data"].pop("sources")
    given["stages"]["s"]["data"]["metadataset"] = str(blend)
    recipe = blend.with_suffix(".recipe.yaml")
    recipe.write_text(yaml.safe_dump(given))
    return load_recipe(str(recipe))


def nested(folder: Path) -> Path:
    """A blend of a and another blend, with subsets inside and outside."""
    inner = [
        {"path": "b", "weight": 2, "subflavors": {"source": "bees", "task": "t"}},
        {"path": "./c", "weight": 1, "subset": {"range": [0, 9]}},
    ]
    blend_yaml(folder / "inner.yaml", {"blend": inner, "subset": {"range": ["0%", "80%"]}})
    outer = [
        {"path": str(folder / "a"), "weight": 0.5, "split_part": "train"},
        {"path": "inner.yaml", "weight": 1.5, "subset": {"range": ["0%", "50%"]}},
    ]
    return blend_yaml(folder / "outer.yaml", {"blend": outer})


def epochized(folder: Path) -> Path:
    inner = [{"path": "b", "repetitions": 2}, {"path": "c", "subset": {"range": [0, "end"]}}]
    blend_yaml(folder / "inner_epochs.yaml", {"blend_epochized": inner})
    outer = [{"path": "a"}, {"path": "inner_epochs.yaml", "repetitions": 1.5}]
    return blend_yaml(folder / "epochs.yaml", {"blend_epochized": outer})


def single(folder: Path) -> Path:
    return blend_yaml(folder / "single.yaml", {"path": "a", "subset": {"range": ["0%", "33%"]}})


@pytest.mark.parametrize("make", [nested, epochized, single])
def test_a_blend_is_read_as_energon_reads_it(make: Any, folder: Path) -> None:
    path = make(folder)
    parts = using(path).stages["s"].data.blend
    loaded = load_dataset(str(path)).get_datasets(
        training=True,
        split_part="train",
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=0),
    )
    assert len(loaded.datasets) == len(parts)
    for part, one in zip(parts.values(), loaded.datasets, strict=True):
        assert str(one.dataset.path.local_path()) == part.path
        count = one.dataset.num_records
        assert part.num_records(len(one.dataset)) == count
        if one.weight is not None:
            assert part.weight == pytest.approx(one.weight)
        if one.repetitions is not None:
            assert part.weight_of(count) == pytest.approx(one.repetitions * count)


def test_names_weights_and_subsets_become_sources(
    folder: Path, vocabulary: Vocabulary, tmp_path: Path
) -> None:
    with open_loader(using(nested(folder)), vocabulary, tmp_path) as loader:
        found = {s.name: (s.num_records, round(s.weight, 6)) for s in loader.plan.sources}
        assert found == {"a": (30, 0.25), "bees": (8, 0.5), "c": (3, 0.25)}
        counted = dict.fromkeys(found, 0)
        for step in range(1, 1001):
            counted[loader.plan.step(step, 1).dataset] += 1
        assert counted == {"a": 250, "bees": 500, "c": 250}
        assert loader.next_step().num_samples == 12


def test_repetitions_are_shares_of_records(
    folder: Path, vocabulary: Vocabulary, tmp_path: Path
) -> None:
    with open_loader(using(epochized(folder)), vocabulary, tmp_path) as loader:
        weights = {source.name: source.weight for source in loader.plan.sources}
        assert weights == {"a": 30.0, "b": 2 * 1.5 * 20, "c": 1.5 * 13}


def test_a_blend_gives_the_plan_that_its_sources_give(
    folder: Path, vocabulary: Vocabulary, tmp_path: Path
) -> None:
    sources = {
        "a": {"path": str(folder / "a"), "weight": 0.25},
        "bees": {"path": str(folder / "b"), "weight": 0.5, "limit": 8},
        "c": {"path": str(folder / "c"), "weight": 0.25, "limit": 3},
    }
    with (
        open_loader(using(nested(folder)), vocabulary, tmp_path / "1") as blend,
        open_loader(config(sources), vocabulary, tmp_path / "2") as plain,
    ):
        assert blend.fingerprint == plain.fingerprint
        assert blend.next_step().digest == plain.next_step().digest


def test_the_content_counts_and_not_the_path(folder: Path, tmp_path: Path) -> None:
    parts = [{"path": str(folder / "a"), "weight": 1}, {"path": str(folder / "b"), "weight": 1}]
    first, second = (
        using(blend_yaml(tmp_path / name, {"blend": parts})) for name in ("1.yaml", "2.yaml")
    )
    assert fingerprint(first) == fingerprint(second)
    assert differences(first, second, free=False) == []
    changed = using(
        blend_yaml(tmp_path / "1.yaml", {"blend": [{**parts[0], "weight": 3}, parts[1]]})
    )
    assert fingerprint(changed) != fingerprint(first)
    assert differences(first, changed, free=False) == [
        "stages.s.data.metadataset.parts.a.weight: 0.5 -> 0.75",
        "stages.s.data.metadataset.parts.b.weight: 0.5 -> 0.25",
    ]
    goes_on = using(tmp_path / "1.yaml", data={"on_change": "continue"})
    assert differences(first, goes_on, free=False) == []


def test_a_changed_blend_goes_on_where_each_data_set_stands(
    folder: Path, vocabulary: Vocabulary, tmp_path: Path
) -> None:
    parts = [{"path": str(folder / "a")}, {"path": str(folder / "b")}]
    path = blend_yaml(tmp_path / "blend.yaml", {"blend": parts})
    with open_loader(using(path), vocabulary, tmp_path) as loader:
        state, again = loader.state(6), loader.fingerprint
    with open_loader(using(path), vocabulary, tmp_path) as loader:
        assert loader.fingerprint == again
        assert loader.plan.resumed(json.loads(json.dumps(state))).start_step == 1
    blend_yaml(path, {"blend": [*parts, {"path": str(folder / "c")}]})
    with open_loader(using(path), vocabulary, tmp_path) as loader:
        with pytest.raises(ValueError, match=r"data\.on_change=continue"):
            loader.plan.resumed(state)
        after = loader.plan.resumed(state, may_change=True)
        assert (after.start_step, after.cursors_at(6)) == (6, {**state["cursors"], "c": 0})


def test_a_file_that_was_changed_after_the_start_does_not_change_the_run(
    folder: Path, vocabulary: Vocabulary, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = blend_yaml(tmp_path / "blend.yaml", {"blend": [{"path": str(folder / "a")}]})
    run = using(path)
    with open_loader(run, vocabulary, tmp_path) as loader:
        before = loader.fingerprint
    assert not caplog.messages
    for change in (lambda: blend_yaml(path, {"path": str(folder / "b")}), path.unlink):
        change()
        caplog.clear()
        with open_loader(run, vocabulary, tmp_path) as loader:
            assert loader.fingerprint == before
        assert any("does not say what it said" in line for line in caplog.messages)


REFUSED: dict[str, tuple[Any, str]] = {
    "join": (
        {"blend": [{"join": [{"path": "a"}, {"path": "b"}], "joiner": "x"}]},
        r"train\.blend\[0\]\.join: a plan cannot have rows of several data sets as one record",
    ),
    "aux": ({"path": "a", "aux": {"x": "b"}}, r"train\.aux: a plan cannot have files beside"),
    "split config": ({"path": "a", "split_config": "x.yaml"}, r"split_config: .* parts of a"),
    "another part": ({"path": "a", "split_part": "val"}, r"split_part: found 'val'"),
    "epochs together": (
        {"path": "a", "shuffle_over_epochs_multiplier": -1},
        r"shuffle_over_epochs_multiplier: found -1",
    ),
    "jsonl": ({"path": "x.jsonl"}, r"found 'x.jsonl'; stages read Arrow shards"),
    "from the middle": (
        {"path": "a", "subset": {"range": ["25%", "75%"]}},
        r"subset\.range: found \['25%', '75%'\]; a part must begin at the first record",
    ),
    "no range": ({"path": "a", "subset": {"range": [0, "x"]}}, r"expected \[0%, N%\]"),
    "records of a blend": (
        {"blend": [{"path": "a"}], "subset": {"range": [0, 5]}},
        "give percentages",
    ),
    "two with one name": (
        {"blend": [{"path": "a"}, {"path": "other/a"}]},
        r"are both called 'a'.*subflavors: \{source: NAME\}",
    ),
    "a weight of nothing": (
        {"blend": [{"path": "a", "weight": 0}]},
        r"blend\[0\]\.weight: found 0",
    ),
    "a misspelt key": ({"blend": [{"path": "a", "wieght": 1}]}, "did you mean 'path'|unknown key"),
    "mixed blends": (
        {"blend": [{"path": "mixed.yaml"}]},
        "blend_epochized inside of blend: one kind of blend",
    ),
    "itself": ({"path": "refused.yaml"}, "holds itself: refused.yaml -> refused.yaml"),
    "an empty blend": ({"blend": []}, "expected a list of data sets"),
    "a missing file": ({"path": "nowhere.yaml"}, "nowhere.yaml cannot be read"),
    "a remote blend": ({"path": "msc://x/y/b.yaml"}, "a blend has to be a local file"),
}


@pytest.mark.parametrize(("train", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_a_plan_cannot_keep_is_refused_by_name(
    train: Any, message: str, tmp_path: Path
) -> None:
    blend_yaml(tmp_path / "mixed.yaml", {"blend_epochized": [{"path": "a"}]})
    path = blend_yaml(tmp_path / "refused.yaml", train)
    with pytest.raises(ConfigError, match=message) as error:
        using(path)
    assert str(error.value).startswith("stages.s.data.metadataset: ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "holds list, expected a metadataset"),
        ("{", "is not YAML"),
        ("__class__: Metadataset\n__module__: megatron.energon\n", "write the blend in version 2"),
        (
            "__class__: MetadatasetV2\n__module__: megatron.energon\nsplits: {val: {path: a}}\n",
            r"no split 'train' \(has: val\)",
        ),
    ],
)
def test_a_file_that_is_no_metadataset_is_named(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "blend.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_metadataset(path)


def test_a_subset_of_more_records_than_there_are_is_refused(
    folder: Path, vocabulary: Vocabulary, tmp_path: Path
) -> None:
    reference = {"path": str(folder / "a"), "subset": {"range": [0, 31]}}
    run = using(blend_yaml(tmp_path / "blend.yaml", {"blend": [reference]}))
    with (
        pytest.raises(ValueError, match=r"a has 30 records, its subset .* is \(0, 31\)"),
        open_loader(run, vocabulary, tmp_path),
    ):
        pass


def test_a_folder_of_tar_files_is_refused(vocabulary: Vocabulary, tmp_path: Path) -> None:
    (tmp_path / "tars" / ".nv-meta").mkdir(parents=True)
    run = using(blend_yaml(tmp_path / "blend.yaml", {"path": "tars"}))
    with (
        pytest.raises(ValueError, match="tars is not a data set"),
        open_loader(run, vocabulary, tmp_path),
    ):
        pass


@pytest.mark.parametrize(
    "overrides",
    [[f"{STAGE}.metadataset={EXAMPLE}"], [f"{STAGE}.sources=null"]],
    ids=["both", "none"],
)
def test_exactly_one_of_sources_and_metadataset(overrides: list[str]) -> None:
    with pytest.raises(ConfigError, match="give exactly one of `sources` and `metadataset`"):
        load_recipe("debug", overrides)


def test_the_example_is_relative_to_its_file() -> None:
    here = os.path.relpath(EXAMPLE)
    run = load_recipe("debug", [f"{STAGE}.sources=null", f"{STAGE}.metadataset={here}"])
    parts = run.stages["contrastive"].data.blend
    assert list(parts) == ["drawings", "validation"]
    assert all(Path(part.path).is_dir() for part in parts.values())


@edataclass
class Caption(Sample):
    text: str
    pictures: int


@stateless
def cook(sample: CrudeSample) -> Caption:
    words = " ".join(part.text for part in sample["query"] if part.kind == "text")
    return Caption(**basic_sample_keys(sample), text=words, pictures=len(sample["images"]))


class OwnEncoder(DefaultTaskEncoder):  # type: ignore[misc]
    cookers = [Cooker(cook)]  # noqa: RUF012


@pytest.mark.filterwarnings("ignore:.*pin_memory.*")  # energon asks for it without a GPU
def test_energon_s_own_loader_gives_our_records(folder: Path) -> None:
    """An operator's own script, without anything of our trainer."""
    dataset = get_train_dataset(
        str(nested(folder)),
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=0),
        batch_size=None,
        shuffle_buffer_size=None,
        max_samples_per_sequence=None,
        task_encoder=OwnEncoder(),
    )
    samples = [sample for sample, _ in zip(get_loader(dataset), range(200), strict=False)]
    seen: dict[str, set[str]] = {}
    for sample in samples:
        seen.setdefault(sample.__key__[0], set()).add(sample.__key__)
        assert sample.text == f"thing {int(sample.__key__[1:])}"
        assert sample.pictures == 1
    assert {name: len(keys) for name, keys in seen.items()} == {"a": 30, "b": 8, "c": 3}
    assert samples[0].__sources__[0].shard_name.endswith(".arrow")
    flavours = {sample.__key__[0]: sample.__subflavors__ for sample in samples}
    assert flavours["b"] == {"source": "bees", "task": "t"}
