"""Every file of ds_configs/ trains, and to the same losses: they differ in mechanics alone.

The gathering of weights, prefetching, buckets and offloading are exercised on CPU with gloo; what
the files gain on GPUs is not measured here.
"""

import pytest
import torch
from ranks import launch

from cocoa_dist.train.ds_config import DS_CONFIG_DIR

NAMES = sorted(path.stem for path in DS_CONFIG_DIR.glob("*.json"))
STEPS = 4


def job(name: str, *, resident: str) -> dict[str, object]:
    return {
        "name": f"{name} {resident}",
        "recipe": "debug",
        "stage": "eos_bridged_reconstruction",
        "overrides": [
            "data.tokens_per_pack=160",  # several packs a rank
            f"engine.ds_config={name}",
            f"engine.resident_parameters={resident}",
        ],
        "steps": STEPS,
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    jobs = [job(name, resident=resident) for name in NAMES for resident in ("true", "false")]
    return launch(jobs, world_size=2, folder=tmp_path_factory.mktemp("ds_configs"))


@pytest.mark.slow
@pytest.mark.parametrize("resident", ["true", "false"])
@pytest.mark.parametrize("name", NAMES)
def test_trains_to_the_losses_of_the_others(runs, name, resident) -> None:
    found, first = runs[f"{name} {resident}"], runs[f"{NAMES[0]} true"]
    assert found["packs"] > 1
    assert len(found["losses"]) == STEPS
    assert found["losses"][-1] < found["losses"][0]
    # float32; buckets of another size add in another order
    assert torch.allclose(torch.tensor(found["losses"]), torch.tensor(first["losses"]), rtol=1e-6)
    for key, weight in first["weights"].items():
        torch.testing.assert_close(found["weights"][key], weight, rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_residency_changes_no_bit(runs, name) -> None:
    assert runs[f"{name} true"]["losses"] == runs[f"{name} false"]["losses"]
