"""Items to vectors through plain sentence-transformers, in one process or several.

Batches are a pure function of the items, so a vector does not depend on how many processes there
are. What would give a wrong vector quietly is refused: a pooled token that was cut, a picture that
cannot be decoded, a self-test that differs, a vector that is not finite.
"""

import json
import multiprocessing
import os
import queue
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from cocoa_dist.data.images import decode_image
from cocoa_dist.evaluation.cache import CacheWriter
from cocoa_dist.evaluation.scores import Vectors

if TYPE_CHECKING:
    from multiprocessing.queues import Queue

MAX_PIXELS = 100_000_000  # of a picture; as data.image.max_decoded_pixels in recipes
_POLL_SECONDS = 0.5
_SELF_TEST_NAME = "selftest.json"  # as in cocoa_dist.export, which loads torch


@dataclass(frozen=True)
class Job:
    """One item to embed."""

    key: bytes
    text: str
    image: Path | None
    where: str  # for messages


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


@dataclass(frozen=True)
class Encoded:
    """The vectors of one batch."""

    vectors_ND: Vectors
    truncated: tuple[bool, ...]  # whether the end of the text was cut


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


def vectors_each(model: Path) -> int:
    """Return how many vectors a folder's embeddings are, by its self-test; 1 without one."""
    file = model / _SELF_TEST_NAME
    if not file.is_file():
        return 1
    try:
        vector = json.loads(file.read_text(encoding="utf-8"))[0]["vector"]
        return len(vector) if isinstance(vector[0], list) else 1
    except (ValueError, LookupError, TypeError):
        return 1  # it is read, and refused, where the model is checked with it


class Encoder:
    """A sentence-transformers folder that checks what it is asked and what it gives.

    Where its embeddings are several vectors each (K, W), they come end to end: (K W,).
    """

    def __init__(self, path: Path, *, device: str) -> None:
        from transformers.utils import logging

        from cocoa_dist.export.selftest import encoder_class, has_several_vectors

        self._each = vectors_each(path)
        if has_several_vectors(path) != (self._each > 1):
            raise ValueError(
                f"{path}: whether an embedding is one vector or several is told by "
                f"{_SELF_TEST_NAME}, which is missing or another model's: export the model again"
            )
        logging.disable_progress_bar()  # ours is the one to look at
        self.model: Any = encoder_class(path)(str(path), device=device, local_files_only=True)
        self.model.eval()
        self._limit = self.model.get_max_seq_length()
        self._tail = self._pooled_tail()

    def encode(self, jobs: Sequence[Job]) -> Encoded:
        """Return the vectors of jobs of one kind. Raises ValueError naming the job."""
        import torch

        inputs = [self._input(job) for job in jobs]
        features = self.model.preprocess(inputs)
        truncated = self._check_tokens(features, inputs, jobs)
        features = {
            name: value.to(self.model.device) if isinstance(value, torch.Tensor) else value
            for name, value in features.items()
        }
        with torch.inference_mode():
            made = self.model(features)
            found = made["sentence_embedding"] if self._each == 1 else self._joined(made, jobs)
        vectors_ND: Vectors = found.float().cpu().numpy()
        finite_N = np.isfinite(vectors_ND).all(axis=1)
        if not finite_N.all():
            bad = jobs[int((~finite_N).argmax())]
            raise ValueError(f"{bad.where}: the model gives a vector that is not finite")
        return Encoded(vectors_ND, truncated)

    def _joined(self, made: dict[str, Any], jobs: Sequence[Job]) -> Any:
        """Return the vectors of each input end to end. Raises ValueError unless all have K."""
        kept_BT = made["attention_mask"].bool()
        for job, count in zip(jobs, kept_BT.sum(dim=1).tolist(), strict=True):
            if count != self._each:
                raise ValueError(
                    f"{job.where}: the model gives {count} vectors, expected {self._each}: does "
                    "the text spell out a token of the model's own?"
                )
        return made["token_embeddings"][kept_BT].reshape(len(jobs), -1)

    def check_self_test(self, path: Path) -> str | None:
        """Return what is wrong with the vectors of the folder's selftest.json, if there is one."""
        from cocoa_dist.export.selftest import DEFAULT_TOLERANCE, SELF_TEST_NAME, compare

        if not (path / SELF_TEST_NAME).is_file():
            return None
        report = compare(self.model, path, tolerance=DEFAULT_TOLERANCE)
        return None if report.passed else report.describe()

    def _input(self, job: Job) -> dict[str, Any]:
        parts: dict[str, Any] = {}
        if job.image is not None:
            try:
                pixels = decode_image(job.image.read_bytes(), max_pixels=MAX_PIXELS)
            except (OSError, ValueError) as error:
                raise ValueError(f"{job.where}: {job.image} cannot be read: {error}") from error
            parts["image"] = Image.fromarray(pixels)
        if job.text:
            parts["text"] = job.text
        return parts

    def _pooled_tail(self) -> tuple[int, ...]:
        """Return the tokens that end every input and are pooled; none if all of it is pooled.

        The last one for last-token pooling; what all inputs share for tokens that weigh more.
        """
        last = any(getattr(module, "pooling_mode", None) == "lasttoken" for module in self.model)
        chosen = ("word_weights", "skiplist_words")
        weighed = any(hasattr(module, name) for module in self.model for name in chosen)
        if not last and not weighed:
            return ()
        probes = [self.model.preprocess([{"text": text}]) for text in ("a", "7 b")]
        first, second = (_rows_of_ids(probe)[0][::-1] for probe in probes)
        shared = []
        for one, other in zip(first, second, strict=False):
            if one != other:
                break
            shared.append(one)
        return tuple(reversed(shared if weighed else shared[:1]))

    def _check_tokens(
        self, features: dict[str, Any], inputs: Sequence[dict[str, Any]], jobs: Sequence[Job]
    ) -> tuple[bool, ...]:
        """Return which texts were cut. Raises ValueError if the pooled token was cut with them."""
        if self._tail:
            for job, ids in zip(jobs, _rows_of_ids(features), strict=True):
                if tuple(ids[-len(self._tail) :]) != self._tail:
                    raise ValueError(
                        f"{job.where}: the text ends on tokens {ids[-len(self._tail) :]}, not on "
                        f"{list(self._tail)} that the model pools: it was cut; raise the "
                        "tokenizer's model_max_length, or leave the item out"
                    )
        lengths = features["attention_mask"].sum(dim=1).tolist()
        return tuple(
            self._limit is not None and length >= self._limit and self._is_cut(one, length)
            for one, length in zip(inputs, lengths, strict=True)
        )

    def _is_cut(self, one: dict[str, Any], length: int) -> bool:
        """Whether more room would have given more tokens."""
        room = {"text": {"max_length": length + 1}}
        longer = self.model.preprocess([one], processing_kwargs=room)
        return int(longer["attention_mask"].sum()) > length


def _rows_of_ids(features: dict[str, Any]) -> list[list[int]]:
    """Return the tokens of each row without padding, whichever side the padding is on."""
    ids_NT, mask_NT = features["input_ids"].numpy(), features["attention_mask"].numpy() > 0
    return [row[kept].tolist() for row, kept in zip(ids_NT, mask_NT, strict=True)]


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
            for batch in work:
                encoded = encoder.encode(batch.jobs)
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
