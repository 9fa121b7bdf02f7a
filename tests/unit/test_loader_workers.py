"""Worker processes that die: the loader starts them again at the step that is due, or gives up."""

import logging
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from test_loader import NUM_RECORDS, TOKENIZER, config, open_loader, read, record, summary, write
from torch.utils.data import dataloader

from cocoa_dist.batch import StepBatch
from cocoa_dist.data.encoder import StepEncoder
from cocoa_dist.data.loader import MAX_DEATHS_IN_A_ROW, StageLoader
from cocoa_dist.data.samples import Vocabulary

STEPS = 6

pytestmark = pytest.mark.slow  # each starts worker processes, several times


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary.load(TOKENIZER, config({"a": "x"}).model)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("good") / "a", [record(n) for n in range(NUM_RECORDS)])


@pytest.fixture(scope="module")
def expected(
    dataset: Path, vocabulary: Vocabulary, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("blend")
    steps = read(config({"a": dataset}), vocabulary, folder, steps=STEPS)
    return [summary(ranks) for ranks in steps]


def processes(loader: StageLoader) -> list[Any]:
    return list(loader._loader._iterator._workers)


def kill(process: Any) -> None:
    os.kill(process.pid, signal.SIGKILL)


def slow_encoder(monkeypatch: pytest.MonkeyPatch, *, seconds: float) -> None:
    encode = StepEncoder.encode

    def late(self: StepEncoder, *arguments: Any, **options: Any) -> StepBatch:
        time.sleep(seconds)
        return encode(self, *arguments, **options)

    monkeypatch.setattr(StepEncoder, "encode", late)


@pytest.mark.parametrize("which", [0, 1])
def test_a_loader_goes_on_after_a_worker_was_killed(
    which: int,
    dataset: Path,
    expected: list[dict[str, Any]],
    vocabulary: Vocabulary,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with open_loader(config({"a": dataset}, workers=2), vocabulary, tmp_path) as loader:
        found = [loader.next_step() for _ in range(2)]
        before, state = processes(loader), torch.get_rng_state()
        kill(before[which])
        before[which].join()
        with caplog.at_level(logging.WARNING, logger="cocoa_dist.data"):
            found += [loader.next_step() for _ in range(STEPS - 2)]
        assert torch.equal(torch.get_rng_state(), state)
        assert loader.worker_deaths == 1
        (told,) = loader.take_deaths()
        assert told == f"process {before[which].pid} was ended by SIGKILL (often: out of memory)"
        assert loader.take_deaths() == []
        assert not any(process.is_alive() for process in before)
    assert [summary([batch]) for batch in found] == expected
    (line,) = caplog.messages
    assert "stage 's', waiting for step 3: loader process" in line
    assert f"{before[which].pid} was ended by SIGKILL" in line


def test_a_death_raises_nothing_while_the_rank_computes(
    dataset: Path, vocabulary: Vocabulary, tmp_path: Path
) -> None:
    """torch would raise out of whatever line of the training step is running."""
    with open_loader(config({"a": dataset}, workers=2), vocabulary, tmp_path) as loader:
        loader.next_step()
        for process in processes(loader):
            kill(process)
        until = time.monotonic() + 0.3
        while time.monotonic() < until:  # where a signal's handler would run
            sum(range(100))
        assert loader.next_step().step == 2


def test_a_death_ends_the_wait_for_its_batch_at_once(
    dataset: Path, vocabulary: Vocabulary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_encoder(monkeypatch, seconds=1.0)
    looking = dataloader._MultiProcessingDataLoaderIter._try_get_data
    monkeypatch.setattr(looking, "__defaults__", (120.0,))  # seconds between torch's own looks
    with open_loader(config({"a": dataset}, workers=1), vocabulary, tmp_path) as loader:
        loader.next_step()
        timer = threading.Timer(0.3, kill, processes(loader))
        timer.start()
        began = time.monotonic()
        assert loader.next_step().step == 2
        assert time.monotonic() - began < 60
        assert loader.worker_deaths == 1
        timer.join()


def test_workers_that_die_over_one_step_again_and_again_end_the_run(
    dataset: Path, vocabulary: Vocabulary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = StepEncoder.encode

    def deadly(self: StepEncoder, *arguments: Any, **options: Any) -> StepBatch:
        if options["step"] == 3:
            os.kill(os.getpid(), signal.SIGSEGV)
        return encode(self, *arguments, **options)

    monkeypatch.setattr(StepEncoder, "encode", deadly)
    with open_loader(config({"a": dataset}, workers=1), vocabulary, tmp_path) as loader:
        every = iter(loader.next_step, None)  # a worker prepares steps ahead: any may be lost
        with pytest.raises(RuntimeError, match=r"SIGSEGV; it was the 5th death without a") as info:
            assert [batch.step for batch in every] == []
        assert "stage 's', waiting for step" in str(info.value)
        assert "data.num_workers=0" in str(info.value)
        assert loader.worker_deaths >= MAX_DEATHS_IN_A_ROW


def test_what_an_encoder_raises_is_no_death(
    dataset: Path, vocabulary: Vocabulary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def faulty(self: StepEncoder, *arguments: Any, **options: Any) -> StepBatch:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(StepEncoder, "encode", faulty)
    with open_loader(config({"a": dataset}, workers=1), vocabulary, tmp_path) as loader:
        with pytest.raises(RuntimeError, match="a fault of ours"):
            loader.next_step()
        assert loader.worker_deaths == 0


def test_a_loader_of_which_a_worker_is_dead_can_be_closed(
    dataset: Path, vocabulary: Vocabulary, tmp_path: Path
) -> None:
    with open_loader(config({"a": dataset}, workers=2), vocabulary, tmp_path) as loader:
        loader.next_step()
        workers = processes(loader)
        kill(workers[0])
        workers[0].join()
    assert not any(process.is_alive() for process in workers)
