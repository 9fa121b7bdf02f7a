"""A sentence-transformers folder that is asked for vectors, and what it is asked is checked.

What would give a wrong vector quietly is refused: a pooled token that was cut, a picture that
cannot be decoded, a self-test that differs, a vector that is not finite.
"""

import json
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cocoa_dist.data.images import decode_image
from cocoa_dist.evaluation.scores import Vectors

MAX_PIXELS = 100_000_000  # of a picture; as data.image.max_decoded_pixels in recipes
_BATCHES_AHEAD = 2  # that are prepared while one goes through the model
_DECODERS = 4  # threads; decoding lets go of the interpreter's lock
_SELF_TEST_NAME = "selftest.json"  # as in cocoa_dist.export, which loads torch


@dataclass(frozen=True)
class Job:
    """One item to embed."""

    key: bytes
    text: str
    image: Path | None
    where: str  # for messages


@dataclass(frozen=True)
class Encoded:
    """The vectors of one batch."""

    vectors_ND: Vectors
    truncated: tuple[bool, ...]  # whether the end of the text was cut


@dataclass(frozen=True)
class Prepared:
    """What the model is given for a batch."""

    jobs: tuple[Job, ...]
    features: dict[str, Any]
    truncated: tuple[bool, ...]


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
        return self.vectors(self.prepare(jobs))

    def encode_all(self, batches: Iterable[Sequence[Job]]) -> Iterator[Encoded]:
        """Do as `encode` for one batch after the other; the next ones are prepared meanwhile.

        By one thread, because a tokenizer keeps settings between calls; pictures by several.
        """
        preparing = ThreadPoolExecutor(1, "prepare")
        ahead: deque[Future[Prepared]] = deque()
        try:
            for jobs in batches:
                ahead.append(preparing.submit(self.prepare, jobs))
                if len(ahead) > _BATCHES_AHEAD:
                    yield self.vectors(ahead.popleft().result())
            while ahead:
                yield self.vectors(ahead.popleft().result())
        finally:
            preparing.shutdown(cancel_futures=True)

    def prepare(self, jobs: Sequence[Job]) -> Prepared:
        """Decode, tokenize and check jobs of one kind. Raises ValueError naming the job."""
        with ThreadPoolExecutor(_DECODERS, "decode") as decoding:
            inputs = list(decoding.map(_input, jobs))
        features = self.model.preprocess(inputs)
        return Prepared(tuple(jobs), features, self._check_tokens(features, inputs, jobs))

    def vectors(self, prepared: Prepared) -> Encoded:
        """Run the model. Raises ValueError naming the job whose vector is wrong."""
        import torch

        features = {
            name: value.to(self.model.device) if isinstance(value, torch.Tensor) else value
            for name, value in prepared.features.items()
        }
        with torch.inference_mode():
            made = self.model(features)
            several = self._each > 1
            found = self._joined(made, prepared.jobs) if several else made["sentence_embedding"]
        vectors_ND: Vectors = found.float().cpu().numpy()
        finite_N = np.isfinite(vectors_ND).all(axis=1)
        if not finite_N.all():
            bad = prepared.jobs[int((~finite_N).argmax())]
            raise ValueError(f"{bad.where}: the model gives a vector that is not finite")
        return Encoded(vectors_ND, prepared.truncated)

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


def _input(job: Job) -> dict[str, Any]:
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


def _rows_of_ids(features: dict[str, Any]) -> list[list[int]]:
    """Return the tokens of each row without padding, whichever side the padding is on."""
    ids_NT, mask_NT = features["input_ids"].numpy(), features["attention_mask"].numpy() > 0
    return [row[kept].tolist() for row, kept in zip(ids_NT, mask_NT, strict=True)]
