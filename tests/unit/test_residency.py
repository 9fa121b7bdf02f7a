"""The rule that decides whether weights stay gathered, in numbers of bytes."""

import pytest
import torch
from torch import nn

from cocoa_dist.train.residency import host_bytes, residency_for, resident_bytes

GIB = 2**30


def test_weights_stay_resident_when_half_of_the_memory_holds_them() -> None:
    fits = residency_for("auto", needed=4 * GIB, available=8 * GIB)
    assert fits.resident
    assert "need 4.00 GiB a rank, 4.00 GiB of 8.00 GiB available" in fits.reason
    tight = residency_for("auto", needed=4 * GIB + 1, available=8 * GIB)
    assert not tight.resident
    assert "gathered when they are used" in tight.reason


@pytest.mark.parametrize("choice", [True, False])
def test_a_choice_is_taken_whatever_the_numbers(choice) -> None:
    found = residency_for(choice, needed=9 * GIB, available=GIB)
    assert found.resident is choice
    assert f"engine.resident_parameters is {choice}" in found.reason


def test_need_is_all_weights_and_a_share_of_the_state_of_trained_ones() -> None:
    model = nn.Sequential(nn.Linear(10, 10, bias=False), nn.Linear(10, 5, bias=False))
    model = model.to(torch.bfloat16)
    model[1].requires_grad_(False)
    # 150 weights of 2 bytes; 100 trained: 2 + 2 shard and gradient, 12 master and moments
    assert resident_bytes(model, world_size=1) == 300 + 1600
    assert resident_bytes(model, world_size=4) == 300 + 400


def files(folder, *, available_kib: int, limit: str, used: int):
    meminfo = folder / "meminfo"
    meminfo.write_text(f"MemTotal: 99999999 kB\nMemAvailable: {available_kib} kB\n")
    (folder / "memory.max").write_text(limit + "\n")
    (folder / "memory.current").write_text(f"{used}\n")
    return {"cgroup": folder, "meminfo": meminfo}


def test_host_memory_is_the_least_of_machine_and_cgroup(tmp_path) -> None:
    paths = files(tmp_path, available_kib=1000, limit="900000", used=100000)
    assert host_bytes(**paths) == 800_000
    assert host_bytes(**files(tmp_path, available_kib=10, limit="900000", used=0)) == 10_240
    assert host_bytes(**files(tmp_path, available_kib=10, limit="max", used=0)) == 10_240
    assert host_bytes(**files(tmp_path, available_kib=10, limit="5", used=9)) == 0


def test_old_cgroups_are_read_too(tmp_path) -> None:
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("5000\n")
    (tmp_path / "memory" / "memory.usage_in_bytes").write_text("2000\n")
    assert host_bytes(cgroup=tmp_path, meminfo=tmp_path / "absent") == 3000


def test_a_system_that_says_nothing_needs_a_choice(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"set engine\.resident_parameters to true or false"):
        host_bytes(cgroup=tmp_path, meminfo=tmp_path / "absent")
