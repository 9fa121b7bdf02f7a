"""A model that no rank holds is exported from its parts: same files, same vectors, no hangs."""

from pathlib import Path

import pytest
import torch
from ranks import launch
from safetensors.torch import load_file

FULL = ["full disk", "full disk at the index", "full disk at the end"]
WORKER = Path(__file__).with_name("export_worker.py")


def job(name: str, engine: str, *overrides: str) -> dict[str, object]:
    return {
        "name": name,
        "recipe": "debug",
        "stage": "contrastive",
        "overrides": ["stages.contrastive.batch_size=8", *overrides],
        "steps": 2,
        "engine": engine,
    }


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    jobs = [
        job("zero", "deepspeed"),
        job("half", "deepspeed", "model.dtype=bfloat16"),
        job("fsdp2", "fsdp2"),
        *(job(name, "deepspeed") for name in FULL),
    ]
    return folder, launch(
        jobs, world_size=2, folder=folder, worker=WORKER, compare_collectives=True
    )


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 1
    return {name: value for file in files for name, value in load_file(file).items()}


def by_model_name(name: str) -> str:
    """Released names of Qwen2-VL: `model.` is the text model, `visual.` the tower."""
    head, _, rest = name.partition(".")
    return {"model": f"backbone.model.language_model.{rest}"}.get(head, f"backbone.model.{name}")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero", "half", "fsdp2"])
def test_the_files_are_the_ranks_weights(exported, name) -> None:
    folder, results = exported
    found, expected = weights_in(folder / name), results[name]["weights"]
    assert {by_model_name(key) for key in found} == {k for k in expected if "similarity" not in k}
    for key, value in found.items():
        assert torch.equal(value, expected[by_model_name(key)].to(value.dtype)), key
    assert {value.dtype for value in found.values()} == {
        torch.bfloat16 if name == "half" else torch.float32
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero", "half"])
def test_a_folder_that_is_shared_out_is_written_again_to_the_bit(exported, name) -> None:
    folder, results = exported
    assert results[name]["again"] < (1e-2 if name == "half" else 1e-4)
    once, twice = folder / name, folder / f"{name} again"
    for file in once.rglob("*"):
        if file.is_file() and file.name not in {"selftest.json", "README.md"}:
            assert (twice / file.relative_to(once)).read_bytes() == file.read_bytes(), file.name


@pytest.mark.slow
@pytest.mark.parametrize("when", FULL)
def test_a_full_disk_of_rank_0_stops_all_ranks_and_leaves_nothing(exported, when) -> None:
    folder, results = exported
    first, second = results[when]["error"].split(" / ")
    assert first == second
    assert first.startswith("rank 0: [Errno 28] No space left on device")
    assert not [path for path in folder.iterdir() if "full" in path.name]
