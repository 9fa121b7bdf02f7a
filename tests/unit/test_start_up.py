"""What a rank leaves out at its start, because every death pays for it."""

import gc
import subprocess
import sys

import pytest

from cocoa_dist.runtime import imports_that_stay

_START = """
import sys
from cocoa_dist.train.session import import_engine
from cocoa_dist.config import load_recipe
import_engine(load_recipe("debug"))
import torch
from deepspeed.runtime import compiler
from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam
assert compiler.compile() is torch.compile
print(sorted({"torch._inductor.compile_fx", "peft", "matplotlib"} & sys.modules.keys()))
"""


@pytest.mark.slow
def test_a_rank_does_not_import_the_compiler_for_an_optimizer_it_never_uses() -> None:
    done = subprocess.run([sys.executable, "-c", _START], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    assert done.stdout.decode().splitlines()[-1] == "[]"


def test_nothing_is_collected_among_imports_and_everything_after() -> None:
    assert gc.isenabled()
    before = gc.get_freeze_count()
    try:
        with imports_that_stay():
            assert not gc.isenabled()
        assert gc.isenabled()
        assert gc.get_freeze_count() > before
    finally:
        gc.unfreeze()


def test_an_import_that_fails_leaves_collection_on() -> None:
    try:
        with pytest.raises(ImportError), imports_that_stay():
            raise ImportError("no such library")
        assert gc.isenabled()
    finally:
        gc.unfreeze()
