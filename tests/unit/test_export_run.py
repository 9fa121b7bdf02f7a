"""Runs are exported at any point: the trainer's vectors, and a card that says how far it came."""

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from test_report import finished_run, manifest_of

from cocoa_dist.config import dump_yaml, load_recipe
from cocoa_dist.export.selftest import check_self_test, load_encoder
from cocoa_dist.manifest import FileEntry, sha256_file, step_folder, write_manifest
from cocoa_dist.model.adapter import merge_adapter
from cocoa_dist.report.export_run import export_run
from cocoa_dist.train import shards
from cocoa_dist.train.build import build_parts
from cocoa_dist.train.evaluate import Item, load_embedder
from cocoa_dist.train.zero_state import WEIGHT, Counters, ParameterSlice

TEXTS = ["a cat", "two words and a few more"]
LORA = "{kind: lora, rank: 4, alpha: 8, targets: [q_proj, down_proj]}"


@pytest.fixture(scope="module")
def tool():
    path = Path(__file__).parents[2] / "tools" / "export_model.py"
    spec = importlib.util.spec_from_file_location("export_model", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return finished_run(tmp_path_factory.mktemp("runs") / "run")


def same_vectors(folder: Path, embedder) -> None:
    report = check_self_test(folder)
    assert report.passed, report.describe()
    found = load_encoder(folder).encode([{"text": text} for text in TEXTS])
    expected = embedder.embed([Item(text=text) for text in TEXTS])
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_finished_run_is_exported_from_its_files(tool, run_dir, tmp_path, capsys) -> None:
    assert tool.main([str(run_dir), "--out", str(tmp_path / "out")]) == 0
    assert "stage contrastive at step 8\n" in capsys.readouterr().out
    config = load_recipe("debug")
    same_vectors(tmp_path / "out", load_embedder(config, run_dir=run_dir))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "**Note.**" not in card
    assert "unfinished" not in card
    assert "12 s of CPU time" in card
    assert len(json.loads((tmp_path / "out" / "selftest.json").read_text())) == 7


def test_an_earlier_stage_is_exported_with_a_note(run_dir, tmp_path) -> None:
    export_run(run_dir, tmp_path / "out", stage="joint_reconstruction")
    config = load_recipe("debug")
    embedder = load_embedder(config, run_dir=run_dir, after_stage="joint_reconstruction")
    same_vectors(tmp_path / "out", embedder)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Not trained in: `eos_bridged_reconstruction`, `contrastive`." in card
    assert "unfinished" not in card


@pytest.mark.parametrize("adapter", [False, True])
def test_a_checkpoint_in_the_middle_of_a_stage_is_exported_with_a_note(
    run_dir, tmp_path, adapter
) -> None:
    run = tmp_path / "run"
    shutil.copytree(run_dir, run)
    more = [f"stages.contrastive.adapter={LORA}"] if adapter else []
    config = load_recipe("debug", more)
    (run / "resolved.yaml").write_text(dump_yaml(config))
    shutil.rmtree(step_folder(run, stage="contrastive", step=8))
    weights = write_half_way(run, config)
    export_run(run, tmp_path / "out")
    embedder = load_embedder(config, run_dir=None, after_stage="model")
    with torch.no_grad():
        for name, parameter in embedder.model.named_parameters():
            parameter.copy_(weights[name])
    same_vectors(tmp_path / "out", embedder)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Stage `contrastive` is not finished: this is a checkpoint at step 5 of 8." in card
    assert "**unfinished**: 5 of 8 steps" in card


def write_half_way(run: Path, config) -> dict[str, torch.Tensor]:
    """Write what two ranks save at step 5 of the last stage; return the weights, merged."""
    parts = build_parts(config, "contrastive", run_dir=run)
    draw = torch.Generator().manual_seed(4)
    folder = step_folder(run, stage="contrastive", step=5)
    with torch.no_grad():
        for parameter in parts.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))
    trained = {n: p.detach() for n, p in parts.model.named_parameters() if p.requires_grad}
    entries = []
    for rank in range(2):
        slices = []
        for name, value in trained.items():
            middle = value.numel() // 3
            start, stop = (0, middle) if rank == 0 else (middle, value.numel())
            part = {WEIGHT: value.reshape(-1)[start:stop].contiguous()}
            slices.append(ParameterSlice(name, tuple(value.shape), start, stop, part))
        live = shards.live_state(
            slices, buffers={}, counters=Counters(5, 5, 0, 0), rank=rank, world_size=2
        )
        chunks = shards.safetensors_chunks(live.tensors, live.metadata)
        path = shards.write_file(folder, shards.shard_name(rank), chunks).path
        found = folder / path
        entries.append(FileEntry(path=path, bytes=found.stat().st_size, sha256=sha256_file(found)))
    manifest = manifest_of("contrastive", 5, cpu=1.0, complete=False)
    update = {"target_step": 8, "files": tuple(entries)}
    write_manifest(folder, manifest.model_copy(update=update))
    weights = {n: p.detach() for n, p in parts.model.named_parameters()}
    adapter = config.stages["contrastive"].adapter
    return weights if adapter is None else merge_adapter(weights, adapter)


def test_what_cannot_be_exported_is_said(tool, run_dir, tmp_path, capsys) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    begun = tmp_path / "begun"
    begun.mkdir()
    shutil.copyfile(run_dir / "resolved.yaml", begun / "resolved.yaml")
    damaged = tmp_path / "damaged"
    shutil.copytree(run_dir, damaged)
    weights = step_folder(damaged, stage="contrastive", step=8) / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4000])
    for arguments, message in (
        ([str(empty)], "is not a run folder"),
        ([str(begun)], "has no checkpoint of any stage yet"),
        ([str(run_dir), "--stage", "x"], "the run has no stage 'x'"),
        ([str(damaged)], "bytes too early"),
    ):
        assert tool.main([*arguments, "--out", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("version", ["4.57.0", "5.1.0", "5.3.0", "5.17.1"])
def test_a_transformers_that_would_run_causal_is_refused(
    run_dir, tmp_path, monkeypatch, version
) -> None:
    export_run(run_dir, tmp_path / "out")
    monkeypatch.setattr(transformers, "__version__", version)
    with pytest.raises(ValueError, match="bidirectional, which older versions ignore in silence"):
        load_encoder(tmp_path / "out")
    with pytest.raises(ValueError, match=r"needs transformers >= 5\.18, found"):
        check_self_test(tmp_path / "out")
