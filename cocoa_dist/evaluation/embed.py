"""Items to vectors through plain sentence-transformers, in one process or several.

Batches are a pure function of the items, so a vector does not depend on how many processes there
are. What would give a wrong vector quietly is refused, see encoder.py.
"""

import multiprocessing
import os
import queue
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cocoa_dist.evaluation.cache import CacheWriter
from cocoa_dist.evaluation.encoder import Encoder, Job

if TYPE_CHECKING:
    from multiprocessing.queues import Queue

_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Batch:
    """What goes through the model together, and which vectors of it are new."""

    jobs: tuple[Job, ...]
    wanted: tuple[bool, ...]


@dataclass(frozen=True)
class EmbedSettings:
    """How vectors are made. Settings that change a vector's bits: `device`, `batch_size`."""

    model: Path
    device: str = "cpu"
    batch_size: int = 32
    nproc: int = 1
    threads: int = 1  # of each process; more of them sum in another order


def batches(jobs: Sequence[Job], sizes: Sequence[int], *, batch_size: int) -> list[list[Job]]:
    """Return jobs of a kind and of like size together; `sizes` are pixels, 0 without a picture.

    A pure function of the set of jobs, whatever their order.
    """

    def order(number: int) -> tuple[bool, bool, int, int, bytes]:
        job = jobs[number]
        return (job.image is not None, bool(job.text), sizes[number], len(job.text), job.key)

    found: list[list[Job]] = []
    last: tuple[bool, bool] | None = None
    for number in sorted(range(len(jobs)), key=order):
        kind = order(number)[:2]
        if kind != last or len(found[-1]) == batch_size:
            found.append([])
        found[-1].append(jobs[number])
        last = kind
    return found


def embed(
    work: Sequence[Batch],
    folder: Path,
    *,
    settings: EmbedSettings,
    progress: Callable[[int], None],
) -> None:
    """Embed batches into the cache in `folder`; `progress` is told of items as they come.

    Batches are dealt to processes in turn, as many or as few as there are. Raises ValueError for
    what an item or the model has wrong, RuntimeError if a process dies: what is made is kept.
    """
    if not work:
        return
    if settings.nproc == 1:
        for count in _work(work, folder, settings, rank=0):
            progress(count)
        return
    context = multiprocessing.get_context("spawn")
    reports: Queue[Any] = context.Queue()
    processes = [
        context.Process(
            target=_process,
            args=(list(work[rank :: settings.nproc]), folder, settings, rank, os.getpid(), reports),
            daemon=True,
        )
        for rank in range(min(settings.nproc, len(work)))
    ]
    for process in processes:
        process.start()
    try:
        _follow(processes, reports, progress)
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _work(
    work: Sequence[Batch], folder: Path, settings: EmbedSettings, *, rank: int
) -> Iterator[int]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        encoder = Encoder(settings.model, device=_device(settings.device, rank))
        if rank == 0 and settings.device == "cpu":
            wrong = encoder.check_self_test(settings.model)
            if wrong:
                raise ValueError(
                    f"{settings.model}: the model is not the one that was exported, with these "
                    f"libraries: {wrong}"
                )
        with CacheWriter(folder) as writer:
            made = encoder.encode_all(batch.jobs for batch in work)
            for batch, encoded in zip(work, made, strict=True):
                writer.append(
                    [job.key for job, new in zip(batch.jobs, batch.wanted, strict=True) if new],
                    encoded.vectors_ND[np.array(batch.wanted)],
                    truncated=[
                        cut for cut, new in zip(encoded.truncated, batch.wanted, strict=True) if new
                    ],
                )
                yield len(batch.jobs)
    finally:
        torch.set_num_threads(threads)


def _device(name: str, rank: int) -> str:
    """Return the device of a process; `cuda` without a number is shared out."""
    if name != "cuda":
        return name
    import torch

    return f"cuda:{rank % torch.cuda.device_count()}"


def _process(
    work: Sequence[Batch],
    folder: Path,
    settings: EmbedSettings,
    rank: int,
    parent: int,
    reports: "Queue[Any]",
) -> None:
    """Body of one process: reports counts, then None; or the text of a ValueError."""
    try:
        for count in _work(work, folder, settings, rank=rank):
            reports.put(count)
            if os.getppid() != parent:  # nobody is there to ask for more; what is made is kept
                reports.cancel_join_thread()
                return
        reports.put(None)
    except ValueError as error:
        reports.put(str(error))


def _follow(
    processes: Sequence[Any], reports: "Queue[Any]", progress: Callable[[int], None]
) -> None:
    left = len(processes)
    while left:
        try:
            report = reports.get(timeout=_POLL_SECONDS)
        except queue.Empty:
            for rank, process in enumerate(processes):
                if process.exitcode not in (None, 0):
                    raise RuntimeError(
                        f"process {rank} died with exit code {process.exitcode}; the vectors made "
                        "so far are kept, the same command goes on"
                    ) from None
            continue
        if report is None:
            left -= 1
        elif isinstance(report, str):
            raise ValueError(report)
        else:
            progress(report)
