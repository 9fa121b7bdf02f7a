"""What all tests share: one thread, no network, no display, and skips that say why.

Markers and the treatment of warnings are in pyproject.toml.
"""

import os
from collections.abc import Iterator, Sequence
from unittest import mock

import pytest

# Before any test imports torch; child processes inherit them. Set by the caller, they stay.
for _name, _value in {
    "OMP_NUM_THREADS": "1",  # tests start several processes on few cores
    "TOKENIZERS_PARALLELISM": "false",  # no warning, and no threads before a fork
    "HF_HUB_OFFLINE": "1",  # a test that wants a download fails at once
    "MPLBACKEND": "Agg",
    "COCOA_STRICT_METRICS": "1",  # a metric that is not in the registry raises
}.items():
    os.environ.setdefault(_name, _value)


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    """Skip tests marked `gpu` where no CUDA device is; torch is imported only if there are any."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    reason = _why_no_gpu()
    if reason:
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))


def _why_no_gpu() -> str:
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA (see COCOA_TORCH_INDEX)"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    return ""


@pytest.fixture(autouse=True)
def _environment_stays() -> Iterator[None]:
    """Undo what a test does to the environment: the next one may start processes in it."""
    with mock.patch.dict(os.environ):
        yield
