"""Adapter stages under ZeRO-3 on two ranks: train, merge, go on. As plain peft on one process.

Two recipes of two stages: an adapter and, from its merge, another one, with the row of a new token
trained beside both; an adapter and, from its merge, all weights.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import plain_peft
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from cocoa_dist.config import RunConfig, load_recipe, recipe_path
from cocoa_dist.export import CardInfo, export_folder
from cocoa_dist.manifest import newest, step_folders
from cocoa_dist.metrics import read_json_lines
from cocoa_dist.report import arms
from cocoa_dist.train.build import StageParts, build_parts
from cocoa_dist.train.evaluate import load_embedder

pytestmark = pytest.mark.slow

WORLD, STEPS = 2, 4
ADAPTED, NEXT = "adapted", "next"
TEXT = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VISION = ["attn.qkv", "attn.proj", "fc1", "fc2"]
DORA = {"kind": "dora", "rank": 4, "alpha": 8, "targets": TEXT}
LORA = {"kind": "lora", "rank": 4, "alpha": 8, "targets": [*TEXT, *VISION]}
# what the first stage trains, what the second one does
RECIPES = {
    "dora": ({"adapter": DORA, "freeze_vision": True}, {"adapter": LORA}),
    "lora_with_vision": ({"adapter": LORA}, {}),
}
EMBEDDING = "backbone.model.language_model.embed_tokens.weight"
NEW_MASK, NEW_BRIDGE = ("<|hidden|>", 2048), ("<|read|>", 2049)  # behind the tokenizer's last id


def recipe(name: str) -> dict[str, object]:
    """Adam's eps lies far above rounding noise, far below the gradients that move something.

    With 1e-8 a gradient that is zero but for rounding (of k_proj.bias: a shift of all scores)
    would become a step as large as any other, and no two programs would agree.
    """
    debug = yaml.safe_load(recipe_path("debug").read_text())
    joint, bridged = (
        debug["stages"][stage] for stage in ("joint_reconstruction", "eos_bridged_reconstruction")
    )
    optimizer = {**joint["optimizer"], "learning_rate": 2.0e-3, "eps": 1.0e-4}
    common = {"batch_size": 12, "steps": STEPS, "optimizer": optimizer}
    first, second = RECIPES[name]
    debug["stages"] = {
        ADAPTED: {**joint, **common, **first},
        NEXT: {**bridged, **common, "init_from": ADAPTED, **second},
    }
    debug["data"]["tokens_per_pack"] = 128  # several packs a rank
    if name == "dora":
        debug["model"]["mask_token"] = NEW_MASK[0]
        debug["model"]["bridge_token"] = NEW_BRIDGE[0]
        debug["model"]["new_tokens"] = [NEW_BRIDGE[0]]
    return debug


@dataclass(frozen=True)
class Both:
    """One recipe, trained by the launcher's ranks and in plain peft."""

    recipe: Path
    run_dir: Path
    plain: dict[str, plain_peft.PlainStage]

    @property
    def config(self) -> RunConfig:
        return load_recipe(str(self.recipe))

    def losses(self, stage: str) -> list[float]:
        lines = read_json_lines(self.run_dir / "metrics.jsonl")
        return [line["loss"] for line in lines if line["stage"] == stage]

    def end(self, stage: str) -> Path:
        found = newest(self.run_dir, stage=stage)
        assert found is not None
        folder, manifest = found
        assert manifest.complete
        assert (manifest.engine, manifest.world_size) == ("deepspeed_zero3", WORLD)
        return folder

    def weights(self, stage: str) -> dict[str, torch.Tensor]:
        return load_file(self.end(stage) / "weights.safetensors")

    def parts(self, stage: str) -> StageParts:
        return build_parts(self.config, stage, run_dir=self.run_dir)


def run_both(name: str, folder: Path) -> Both:
    path, run_dir = folder / "recipe.yaml", folder / "run"
    path.write_text(yaml.safe_dump(recipe(name)))
    command = [
        *(sys.executable, "-m", "launcher", "run", str(path)),
        *("--run-dir", str(run_dir), "--nproc", str(WORLD)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    torch.set_num_threads(1)
    plain = plain_peft.train(load_recipe(str(path)), run_dir=run_dir, world_size=WORLD)
    return Both(path, run_dir, plain)


@pytest.fixture(scope="module")
def dora(tmp_path_factory) -> Both:
    return run_both("dora", tmp_path_factory.mktemp("dora"))


@pytest.fixture(scope="module")
def lora_with_vision(tmp_path_factory) -> Both:
    return run_both("lora_with_vision", tmp_path_factory.mktemp("lora"))


@pytest.fixture(params=RECIPES)
def both(request) -> Both:
    found: Both = request.getfixturevalue(request.param)
    return found


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference over the largest value."""
    largest = expected.abs().max().item()
    return (found - expected).abs().max().item() / (largest or 1.0)


@pytest.mark.parametrize("stage", [ADAPTED, NEXT])
def test_every_loss_is_plain_pefts(both, stage) -> None:
    """1e-5: float32, and sums over packs run in another order on two ranks."""
    found, expected = both.losses(stage), both.plain[stage].losses
    assert len(found) == STEPS
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-5, atol=0.0)
    assert found[-1] < found[0]


@pytest.mark.parametrize("stage", [ADAPTED, NEXT])
def test_merged_and_final_weights_are_plain_pefts(both, stage) -> None:
    """1e-5 of a tensor's largest value, where training has moved some by a hundred times that."""
    found, expected = both.weights(stage), both.plain[stage].weights
    assert found.keys() == expected.keys()
    errors = {name: relative(found[name], value) for name, value in expected.items()}
    assert {name: error for name, error in errors.items() if error > 1e-5} == {}
    if stage == NEXT:
        before = both.weights(ADAPTED)
        assert max(relative(value, before[name]) for name, value in found.items()) > 1e-3


def test_of_the_embedding_adapter_stages_move_the_rows_of_new_tokens_alone(dora) -> None:
    """The joint stage hides tokens; the bridged one hides them and reads from the bridge."""
    base = load_base(dora)
    ends = [base[EMBEDDING], *(dora.weights(stage)[EMBEDDING] for stage in (ADAPTED, NEXT))]
    moved = [(old != new).any(dim=1).nonzero()[:, 0].tolist() for old, new in pairwise(ends)]
    assert moved == [[NEW_MASK[1]], [NEW_MASK[1], NEW_BRIDGE[1]]]


def test_an_exported_folder_embeds_with_the_new_tokens_as_training_did(dora, tmp_path) -> None:
    embedder = load_embedder(dora.config, run_dir=dora.run_dir)
    tokenizer = arms.export_tokenizer(dora.config.model)
    assert tokenizer.eos_token_id == NEW_BRIDGE[1]
    export_folder(  # compares the vectors of the folder with training's
        model=embedder.model.backbone,
        tokenizer=tokenizer,
        destination=tmp_path / "export",
        image_settings=arms.image_settings(dora.config, embedder),
        bidirectional=True,
        pooling="last",
        prompts={},
        card=CardInfo("x", base="x", stages=[], data="x", licence="other", compute="x"),
        self_test=arms.self_test_vectors(embedder, []),
        max_text_tokens=dora.config.data.max_text_tokens,
    )
    written = load_file(tmp_path / "export" / "model.safetensors")
    (name,) = (name for name in written if name.endswith("embed_tokens.weight"))
    assert torch.equal(written[name], dora.weights(NEXT)[EMBEDDING])


def load_base(dora: Both) -> dict[str, torch.Tensor]:
    """Return the weights that the first stage starts from, by the names of the bare model."""
    stages = {**dora.config.stages}
    stages[ADAPTED] = stages[ADAPTED].model_copy(update={"adapter": None})
    config = dora.config.model_copy(update={"stages": stages})
    model = build_parts(config, ADAPTED, run_dir=None).model
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("stage", [ADAPTED, NEXT])
def test_a_checkpoint_of_an_adapter_stage_holds_what_is_trained_and_no_more(dora, stage) -> None:
    """Weight and two moments of each trained parameter, once over all ranks, four bytes each."""
    parameters = dict(dora.parts(stage).model.named_parameters())
    trained = {name: p.numel() for name, p in parameters.items() if p.requires_grad}
    assert {name.partition(".")[0] for name in trained if ".lora_" not in name} == (
        {"new_tokens", "patch_decoder"} if stage == ADAPTED else {"new_tokens"}
    )
    held: dict[str, int] = {}
    num_bytes = 0
    for path in (dora.end(stage) / "shards").iterdir():
        num_bytes += path.stat().st_size
        for name, value in load_file(path).items():
            held[name] = held.get(name, 0) + value.numel()
    kinds = ("weight", "exp_avg", "exp_avg_sq")
    assert held == {f"{kind}/{name}": n for name, n in trained.items() for kind in kinds}
    headers = 1_000 * len(trained)
    assert num_bytes < 12 * sum(trained.values()) + headers * WORLD
    if stage == NEXT:
        assert 3 * num_bytes < 4 * sum(p.numel() for p in parameters.values())


class Cut:
    """A copy of a run in the middle of its second stage, and what a resume of it says."""

    def __init__(self, both: Both, run_dir: Path) -> None:
        self.recipe, self.run_dir = both.recipe, run_dir
        shutil.copytree(both.run_dir, run_dir)
        (run_dir / "epoch").unlink()  # no launcher's any more
        end, *earlier = step_folders(run_dir, stage=NEXT)
        shutil.rmtree(end)
        assert earlier
        self.parent = step_folders(run_dir, stage=ADAPTED)[0]

    def refusal(self) -> str:
        """Go on in one process, expect that it is refused, return the last line."""
        command = [
            *(sys.executable, "-m", "cocoa_dist.train", str(self.recipe)),
            *("--stage", NEXT, "--run-dir", str(self.run_dir)),
        ]
        before = self.checkpoints()
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=120, check=False, env=os.environ
        )
        assert done.returncode == 2, done.stdout + done.stderr
        assert self.checkpoints() == before
        return done.stderr.splitlines()[-1]

    def checkpoints(self) -> list[str]:
        return sorted(str(path) for path in (self.run_dir / "checkpoints").rglob("*"))


def test_a_parent_stage_with_a_flipped_byte_is_refused_by_name(dora, tmp_path) -> None:
    cut = Cut(dora, tmp_path / "run")
    path = cut.parent / "weights.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    said = cut.refusal()
    assert f"the end of stage '{ADAPTED}' is not whole" in said
    assert "weights.safetensors has sha256" in said


def test_a_parent_stage_that_was_trained_anew_is_refused_by_name(dora, tmp_path) -> None:
    """Whole in itself, but not what the adapters of the checkpoint were trained on."""
    cut = Cut(dora, tmp_path / "run")
    path = cut.parent / "weights.safetensors"
    weights = load_file(path)
    weights[EMBEDDING][0, 0] += 1.0
    save_file(weights, path)
    manifest = json.loads((cut.parent / "manifest.json").read_text())
    (entry,) = (entry for entry in manifest["files"] if entry["path"] == path.name)
    before = entry["sha256"]
    entry["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    entry["bytes"] = path.stat().st_size
    (cut.parent / "manifest.json").write_text(json.dumps(manifest))
    said = cut.refusal()
    assert "was trained on another version of its parent stage's weights" in said
    assert f"it says {before}, found {entry['sha256']}" in said
