"""What a resume refuses and what it goes on with: every key of a recipe, bases, broken files."""

import errno
import hashlib
import json
from pathlib import Path

import pytest

from cocoa_dist import manifest as manifests
from cocoa_dist.config import differences, dump_yaml, load_recipe
from cocoa_dist.config.loading import flatten
from cocoa_dist.manifest import FileEntry, Manifest
from cocoa_dist.train.build import base_model_digest
from cocoa_dist.train.checkpoint import RECIPE_NAME, Found
from cocoa_dist.train.resume import refuse_other_recipe
from cocoa_dist.train.verify import find_newest_whole

STAGE = "stages.contrastive"
UNSAFE = (  # one change of every kind of key that decides the numbers
    "seed=1",
    "name=other",
    "method=other",
    "model.random.hidden_size=32",
    "model.tokenizer=elsewhere",
    "model.dtype=bfloat16",
    "model.attention_backend=dense",
    "model.bridge_token=<|endoftext|>",
    "model.mask_token=<|hidden|>",
    "model.new_tokens=[<|a|>]",
    "model.compression_tokens=2",
    "model.num_bridge_tokens=2",
    "model.checkpoint_activations=true",
    "model.compile_layers=true",
    "data.tokens_per_pack=256",
    "data.patches_per_pack=4096",
    "data.max_text_tokens=16",
    "data.image.max_pixels=4096",
    "data.shuffle.block_records=32",
    "data.left_out=unused.jsonl",
    f"{STAGE}.init_from=model",
    f"{STAGE}.attention.rule=causal",
    f"{STAGE}.objective.temperature=0.1",
    f"{STAGE}.data.sources.emoji.limit=32",
    f"{STAGE}.batch_size=12",
    f"{STAGE}.steps=9",
    f"{STAGE}.optimizer.learning_rate=0.5",
    f"{STAGE}.adapter={{targets: [q_proj]}}",
    f"{STAGE}.pooling=mean",
    f"{STAGE}.freeze_vision=true",
    "engine.kind=fsdp2",
    "engine.ds_config=zero3",
    "engine.reduction=coalesce",
    "runtime.threads=2",
)
SAFE = (  # how a run is watched, fed and kept
    "data.num_workers=1",
    "data.log_sample_ids=true",
    "data.bad_record_limit=1",
    "data.image.cache_bytes=0",
    "data.on_change=continue",
    "engine.timeout_seconds=60",
    "engine.resident_parameters=true",
    "guards.max_skipped=5",
    "checkpoint.every_steps=5",
    "metrics.log_every_steps=3",
    "evaluation.batch_size=2",
    "export.licence=MIT",
    "budget_gpu_hours=5.0",
)


def found(folder: Path) -> Found:
    (folder / RECIPE_NAME).write_text(dump_yaml(load_recipe("debug")))
    return Found(folder, None, ())


@pytest.mark.parametrize("change", UNSAFE)
def test_a_key_that_decides_the_numbers_is_refused_by_name(change, tmp_path) -> None:
    key = change.partition("=")[0]
    with pytest.raises(ValueError, match="was trained with other settings") as raised:
        refuse_other_recipe(found(tmp_path), load_recipe("debug", [change]))
    text = str(raised.value)
    assert f"  {key}" in text
    assert " -> " in text
    assert text.endswith("go on with the old values, or start another run folder")
    assert str(tmp_path) in text


@pytest.mark.parametrize("change", SAFE)
def test_a_key_that_changes_no_number_is_told_and_goes_on(change, tmp_path, caplog) -> None:
    caplog.set_level("INFO")
    refuse_other_recipe(found(tmp_path), load_recipe("debug", [change]))
    assert f"changed since checkpoint {tmp_path.name}: {change.partition('=')[0]}: " in caplog.text


@pytest.mark.parametrize(
    ("change", "goes_on"),
    [
        (f"{STAGE}.batch_size=12", True),
        (f"{STAGE}.data.sources.emoji.weight=2.0", True),
        (f"{STAGE}.data.sources.more={{path: asset:emoji/validation}}", True),
        ("data.left_out=unused.jsonl", True),
        ("data.shuffle.block_records=32", False),  # in the middle of a pass: twice, and never
        (f"{STAGE}.optimizer.learning_rate=0.5", False),
    ],
)
def test_a_recipe_that_goes_on_with_other_data_changes_nothing_else(
    change, goes_on, tmp_path
) -> None:
    new = load_recipe("debug", [change, "data.on_change=continue"])
    if goes_on:
        refuse_other_recipe(found(tmp_path), new)
        return
    with pytest.raises(ValueError, match="other settings"):
        refuse_other_recipe(found(tmp_path), new)


def test_every_group_of_keys_is_on_one_of_the_lists() -> None:
    """A new key of the recipe has to be sorted here before it can be forgotten."""

    def group(key: str) -> str:
        parts = key.split(".")
        if parts[0] == "stages":
            return ".".join(("stages", *parts[2:3]))
        return parts[0] if parts[0] in GROUPS else ".".join(parts[:2])

    listed = {group(change.partition("=")[0]) for change in (*UNSAFE, *SAFE)}
    known = {group(key) for key in flatten(load_recipe("debug"))}
    assert known - listed == {"model.path"}  # tested as another base model


GROUPS = ("guards", "checkpoint", "metrics", "evaluation", "export", "runtime", "seed", "name")


def test_an_unsafe_change_is_not_hidden_among_safe_ones(tmp_path) -> None:
    changes = ["metrics.log_every_steps=3", "seed=5", f"{STAGE}.steps=9"]
    with pytest.raises(ValueError, match="other settings") as raised:
        refuse_other_recipe(found(tmp_path), load_recipe("debug", changes))
    lines = str(raised.value).splitlines()[1:-1]
    assert lines == ["  seed: 0 -> 5", f"  {STAGE}.steps: 8 -> 9"]


def test_stages_in_another_order_are_another_recipe() -> None:
    old = load_recipe("quickstart_backbone")
    stages = {"first": old.stages["next_token"], "second": old.stages["next_token"]}
    one = old.model_copy(update={"stages": stages})
    other = old.model_copy(update={"stages": dict(reversed(stages.items()))})
    assert differences(one, one, free=False) == []
    assert "order of stages" in differences(one, other, free=False)[-1]


def test_a_base_model_is_known_by_the_bytes_of_its_weights(tmp_path) -> None:
    settings = {"rope_theta": 1e4, "transformers_version": "5.1"}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    for name in ("model-1.safetensors", "model-2.safetensors"):
        (tmp_path / name).write_bytes(name.encode())
    config = load_recipe("debug", ["model.random=null", f"model.path={tmp_path}"])
    before = base_model_digest(config)
    (tmp_path / "config.json").write_text(json.dumps(settings | {"transformers_version": "6.0"}))
    assert base_model_digest(config) == before
    (tmp_path / "config.json").write_text(json.dumps(settings | {"rope_theta": 1e6}))
    assert base_model_digest(config) != before
    (tmp_path / "config.json").write_text(json.dumps(settings))
    (tmp_path / "model-2.safetensors").write_bytes(b"model-3.safetensors")
    assert base_model_digest(config) != before


def test_random_base_models_of_other_seeds_are_other_models() -> None:
    digests = {base_model_digest(load_recipe("debug", [f"seed={n}"])) for n in range(3)}
    assert len(digests) == 3


def checkpoint(run_dir: Path, *, step: int, content: bytes = b"abc") -> Path:
    folder = manifests.step_folder(run_dir, stage="one", step=step)
    folder.mkdir(parents=True)
    (folder / "a.bin").write_bytes(content)
    entry = FileEntry(path="a.bin", bytes=3, sha256=hashlib.sha256(b"abc").hexdigest())
    manifests.write_manifest(
        folder,
        Manifest(
            run="r", recipe_fingerprint="f", stage="one", step=step, target_step=10,
            complete=False, epoch="e", parent=None, world_size=1, engine="x", versions={},
            base_model="b", data_state={}, samples=0, tokens=0, skipped_steps=0, wall_seconds=0.0,
            productive_seconds=0.0, train_cpu_seconds=0.0, loss={}, files=(entry,),
        ),
    )  # fmt: skip
    return folder


def test_truncated_missing_and_unreadable_files_are_named_and_the_older_one_is_used(
    tmp_path, monkeypatch
) -> None:
    whole = checkpoint(tmp_path, step=2)
    checkpoint(tmp_path, step=4, content=b"ab")
    (checkpoint(tmp_path, step=6) / "a.bin").unlink()
    unreadable = checkpoint(tmp_path, step=8)
    (checkpoint(tmp_path, step=10) / "manifest.json").write_text('{"schema_version"')
    read = manifests.sha256_file

    def failing(path: Path) -> str:
        if path.parent == unreadable:
            raise OSError(errno.EIO, "Input/output error")
        return read(path)

    monkeypatch.setattr(manifests, "sha256_file", failing)
    folder, manifest, faults = find_newest_whole(tmp_path, stage="one")
    assert manifest is not None
    assert folder == whole
    assert {name: fault.rpartition("/")[2] for name, fault in faults.items()} == {
        "step_00000010": faults["step_00000010"].rpartition("/")[2],
        "step_00000008": "output error",
        "step_00000006": "a.bin is missing",
        "step_00000004": "a.bin has 2 bytes, expected 3",
    }
    assert "cannot be read" in faults["step_00000010"]
    assert "a.bin cannot be read: Input" in faults["step_00000008"]


def test_a_run_whose_checkpoints_are_all_broken_begins_anew_and_says_why(tmp_path) -> None:
    checkpoint(tmp_path, step=2, content=b"")
    folder, manifest, faults = find_newest_whole(tmp_path, stage="one")
    assert (folder, manifest) == (None, None)
    assert faults == {"step_00000002": "a.bin has 0 bytes, expected 3"}
