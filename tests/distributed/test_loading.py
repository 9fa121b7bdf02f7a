"""Two ranks and one model: only rank 0 reads it, and no other ever holds the whole of it."""

import shutil
from pathlib import Path

import pytest
import torch
from ranks import launch
from safetensors.torch import load_file, save_file

from cocoa_dist.config import load_recipe
from cocoa_dist.inputs import tokenizer_folder
from cocoa_dist.train.build import build_parts, load_weights
from cocoa_dist.train.checkpoint import WEIGHTS_NAME

WORKER = Path(__file__).parent / "loading_worker.py"
STAGE = "contrastive"
LARGE = (
    "model.random.hidden_size=512",
    "model.random.num_layers=8",
    "model.random.intermediate_size=2048",
)
SMALL = ("model.random.hidden_size=64",)

pytestmark = pytest.mark.slow


def model_folder(folder: Path, *shape: str) -> Path:
    """Write a model with random weights as Hugging Face has it."""
    config = load_recipe("debug", [*shape, f"stages.{STAGE}.init_from=model"])
    torch.manual_seed(1)
    backbone = build_parts(config, STAGE, run_dir=None).model.backbone
    backbone.bfloat16().save_pretrained(folder)  # float32 is a copy then, not a view of the file
    shutil.copy(tokenizer_folder(config.model) / "tokenizer.json", folder)
    return folder


def load(tmp_path: Path, *overrides: str, world_size: int = 2) -> tuple[list[dict], dict]:
    """Return what each rank saw, and the weights before the first step."""
    job = {"overrides": list(overrides), "stage": STAGE, "run_dir": str(tmp_path)}
    folder = tmp_path / f"ranks{world_size}"
    seen = launch([job], world_size=world_size, folder=folder, worker=WORKER)
    return seen["ranks"], seen["weights"]


def from_folder(folder: Path, init_from: str = "model") -> tuple[str, ...]:
    return ("model.random=null", f"model.path={folder}", f"stages.{STAGE}.init_from={init_from}")


@pytest.mark.parametrize("kind", ["deepspeed", "fsdp2"])
def test_one_rank_reads_the_model_and_all_train_it(kind, tmp_path) -> None:
    folder = model_folder(tmp_path / "model", *LARGE)
    stored = load_file(next(folder.glob("*.safetensors")))
    size = 4 * sum(value.numel() for value in stored.values())
    resident = "engine.resident_parameters=false"
    ranks, weights = load(tmp_path, *from_folder(folder), f"engine.kind={kind}", resident)
    assert size > 130e6  # or what follows says nothing
    assert ranks[0]["built"] > 0.9 * size
    assert ranks[1]["built"] < 0.4 * size  # imports and buffers
    if kind == "deepspeed":
        assert ranks[1]["given"] < 0.75 * size  # half of it are its shards
    assert ranks[0]["loss"] == ranks[1]["loss"]
    assert ranks[0]["buffers"] == ranks[1]["buffers"]
    names = {name.removeprefix("backbone."): value for name, value in weights.items()}
    kept = {_ours(name): value.float() for name, value in stored.items()}
    assert names.keys() == kept.keys()
    assert all(torch.equal(names[name], kept[name]) for name in kept)


def _ours(stored: str) -> str:
    """Files keep the names of an older transformers."""
    if stored.startswith("visual."):
        return f"model.{stored}"
    head, _, rest = stored.partition(".")
    known = rest.startswith(("language_model.", "visual."))
    return stored if known else f"{head}.language_model.{rest}"


@pytest.mark.parametrize("adapter", ["dora", "none"])
def test_a_stage_begins_on_weights_that_only_rank_zero_has_read(adapter, tmp_path) -> None:
    """New tokens, an adapter and the end of an earlier stage, on ranks with and without weights."""
    folder = model_folder(tmp_path / "model", *SMALL)
    overrides = list(from_folder(folder))
    if adapter != "none":
        overrides.append(f"stages.{STAGE}.adapter={{kind: {adapter}, rank: 4, targets: [q_proj]}}")
    alone, weights_alone = load(tmp_path, *overrides, world_size=1)
    together, weights = load(tmp_path, *overrides, world_size=2)
    assert together[0]["loss"] == pytest.approx(alone[0]["loss"], rel=1e-5)
    assert weights.keys() == weights_alone.keys()
    assert all(torch.equal(weights[name], weights_alone[name]) for name in weights)


def test_what_rank_zero_cannot_read_is_raised_on_all(tmp_path) -> None:
    folder = model_folder(tmp_path / "model", *SMALL)
    weights = next(folder.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    ranks, _ = load(tmp_path, *from_folder(folder))
    assert ranks[0]["error"] == ranks[1]["error"]
    assert f"rank 0: the weights in {folder} cannot be read: " in ranks[0]["error"]


def test_end_of_a_stage_is_read_one_parameter_at_a_time(tmp_path) -> None:
    config = load_recipe("debug", [f"stages.{STAGE}.init_from=model"])
    model = build_parts(config, STAGE, run_dir=None).model
    weights = {name: value.detach() + 1.0 for name, value in model.named_parameters()}
    save_file(weights, tmp_path / WEIGHTS_NAME)
    load_weights(model, tmp_path / WEIGHTS_NAME)
    assert all(torch.equal(value, weights[name]) for name, value in model.named_parameters())
    name = next(iter(weights))
    save_file({n: v for n, v in weights.items() if n != name}, tmp_path / WEIGHTS_NAME)
    with pytest.raises(ValueError, match=f"lacks 1 parameters, first {name}"):
        load_weights(model, tmp_path / WEIGHTS_NAME)
