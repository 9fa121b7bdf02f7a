"""PackedBatch: the contract between data and model, checked once on the host, then moved.

Samples lie end to end, nothing is padded. Rows that carry a loss are listed, so that no head ever
runs on a row nobody reads. Built by `data/packing.py`; read by `model/` and `objectives/`.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from cocoa_dist.attention.plan import AttentionPlan, moved_to

_Value = TypeVar("_Value", "VisionLayout", "PackedBatch")
_ROWS_AND_VALUES = (
    ("label_rows", "labels"),
    ("patch_rows", "patch_targets"),
    ("pool_rows", "pool_index"),
)
_OF_EMBEDDINGS = ("pair_ids", "sides", "identities", "contents", "scores", "pair_weights")


@dataclass(frozen=True)
class VisionLayout:
    """Where the P patches of a pack lie: all that the vision tower would work out by itself.

    What a model family has no use for is None. Built by `data/vision_layout.py`.
    """

    positions: Tensor  # (P, 2) int64: row and column of each patch in its picture
    plan: AttentionPlan  # over the P patches: each frame sees itself; also in window order
    window_plan: AttentionPlan | None = None  # over the P patches in window order
    window_index: Tensor | None = None  # (P / merge^2,) int64: visual tokens in window order
    taps: Tensor | None = None  # (P, 4) int64: learned positions that a patch mixes
    tap_weights: Tensor | None = None  # (P, 4) float32

    def __post_init__(self) -> None:
        """Check that the parts are for the same patches."""
        patches = self.plan.num_tokens
        windows = self.window_plan
        found = {
            "positions": len(self.positions),
            "window_plan": patches if windows is None else windows.num_tokens,
            "taps": patches if self.taps is None else len(self.taps),
            "tap_weights": patches if self.tap_weights is None else len(self.tap_weights),
        }
        wrong = [f"{name} for {count}" for name, count in found.items() if count != patches]
        if wrong:
            raise ValueError(f"the plan is for {patches} patches, but {', '.join(wrong)}")
        pairs = ((windows, self.window_index), (self.taps, self.tap_weights))
        if any((left is None) != (right is None) for left, right in pairs):
            raise ValueError("a window_plan needs a window_index, and taps need tap_weights")

    def to(self, device: torch.device | str) -> "VisionLayout":
        """Return the layout with its tensors on `device`."""
        return _map_tensors(self, lambda part: _part_to(part, device))

    def pin_memory(self) -> "VisionLayout":
        """Return the layout in page-locked memory, so that `to` does not wait."""
        return _map_tensors(self, lambda part: part.pin_memory())


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch: samples end to end in T tokens, their pictures end to end in P patches.

    It always holds at least one picture: a pack without one carries a filler (the last
    `num_filler_images` pictures), whose visual tokens have no row in `input_ids`, so that every
    rank runs the vision tower in every forward (ZeRO-3).
    """

    input_ids: Tensor  # (T,) int64, after corruption
    position_ids: Tensor  # (3, T) int64: time, height, width of M-RoPE
    plan: AttentionPlan  # over the T tokens
    pixel_values: Tensor  # (P, C) float32, after corruption
    image_grid_thw: Tensor  # (images, 3) int64, in patches
    vision: VisionLayout  # of the P patches
    image_rows: Tensor  # (M,) int64: rows of input_ids that take the visual tokens, in order
    label_rows: Tensor  # (S,) int64: rows whose hidden state predicts a token
    labels: Tensor  # (S,) int64: the tokens they predict
    patch_rows: Tensor  # (R,) int64: rows of masked visual tokens
    patch_targets: Tensor  # (R, C') float32: pixels of the masked visual tokens, one frame
    pool_rows: Tensor  # (L,) int64: rows an embedding is averaged from
    pool_index: Tensor  # (L,) int64: which embedding each belongs to, ascending from 0
    bridge_rows: Tensor  # (B, K) int64: bridges of K > 1 tokens, of real samples that have one
    pair_ids: Tensor  # (E,) int64: position of an embedding's pair in the global batch
    sides: Tensor  # (E,) int64: 0 query, 1 target, 2 on its hard negatives
    identities: Tensor  # (E,) int64: equal for records, of a target for targets, that are the same
    contents: Tensor  # (E,) int64: equal for equal texts and pictures; where there are negatives
    scores: Tensor  # (E,) float32: a teacher's, of this against the pair's query; NaN: none
    pair_weights: Tensor  # (E,) float32: 1, or 0 for what could not be used or is not there
    num_filler_images: int
    num_samples: int
    num_image_tokens: int  # M plus the filler's
    num_vectors: int = 1  # of an embedding; above 1 `pool_rows` has so many for each, in order

    def __post_init__(self) -> None:
        """Check the contract; costs nothing beside building the batch."""
        tokens, patches = len(self.input_ids), len(self.pixel_values)
        if self.position_ids.shape != (3, tokens) or self.plan.num_tokens != tokens:
            raise ValueError(
                f"{tokens} tokens, but positions {tuple(self.position_ids.shape)} and a plan "
                f"for {self.plan.num_tokens}"
            )
        if self.vision.plan.num_tokens != patches:
            raise ValueError(f"{patches} patches, a layout for {self.vision.plan.num_tokens}")
        for rows, values in _ROWS_AND_VALUES:
            left, right = len(getattr(self, rows)), len(getattr(self, values))
            if left != right:
                raise ValueError(f"{left} {rows}, but {right} {values}")
        counts = {len(getattr(self, name)) for name in _OF_EMBEDDINGS}
        if len(counts) != 1:
            raise ValueError(f"fields of embeddings differ in length: {sorted(counts)}")
        pooled = len(self.pool_rows)
        if self.num_vectors > 1 and pooled != self.num_embeddings * self.num_vectors:
            raise ValueError(
                f"{self.num_embeddings} embeddings of {self.num_vectors} vectors, but {pooled} "
                "pool_rows"
            )

    @property
    def num_tokens(self) -> int:
        """Tokens of the pack, T; all are real."""
        return len(self.input_ids)

    @property
    def num_embeddings(self) -> int:
        """Embeddings the pack asks for, E."""
        return len(self.pair_ids)

    def to(self, device: torch.device | str) -> "PackedBatch":
        """Return the batch with every tensor on `device`.

        From page-locked memory the copies run beside the host's work.
        """
        if self.input_ids.device == torch.device(device):
            return self
        return _map_tensors(self, lambda part: _part_to(part, device))

    def pin_memory(self) -> "PackedBatch":
        """Return the batch in page-locked memory, so that `to` does not wait."""
        return _map_tensors(self, lambda part: part.pin_memory())


@dataclass(frozen=True)
class BadRecord:
    """A record that could not be used, as the quarantine file has it."""

    dataset: str
    number: int  # in its data set
    shard: str  # file name
    row: int  # in the shard
    key: str  # `?` if it cannot be read
    kind: str  # a few words, to be counted
    reason: str

    def __str__(self) -> str:
        return f"{self.dataset} {self.number} {self.key}: {self.reason}"


@dataclass(frozen=True)
class StepBatch:
    """One rank's part of one optimizer step: the same number of packs on every rank."""

    step: int  # 1 for the first optimizer step of a stage
    datasets: tuple[str, ...]  # the source of each record; one and the same without task blocks
    record_ids: tuple[int, ...]  # of the whole step, over all ranks, in plan order
    record_keys: tuple[str, ...]  # of this rank's part
    digest: str  # hash of data sets, passes and record ids: equal on every world size
    packs: tuple[PackedBatch, ...]
    num_samples: int  # real samples in this rank's packs
    num_tokens: int
    fill_ratio: float  # tokens / (packs x budget)
    num_truncated: int  # texts that were cut
    num_shrunk: int  # pictures that had more than data.image.max_pixels
    bad_records: tuple[BadRecord, ...]  # of this rank's part
    cpu_seconds: float  # CPU time it took to make, where a worker process made it

    @property
    def dataset(self) -> str:
        """Name of the data set, or of all that the step has, in the order they begin in."""
        return " + ".join(dict.fromkeys(self.datasets))

    @property
    def blocks(self) -> list[tuple[str, int]]:
        """Data sets in plan order, each with the number of records that follow each other."""
        return [(name, len(list(group))) for name, group in itertools.groupby(self.datasets)]


def _part_to(part: Any, device: torch.device | str) -> Any:
    return moved_to(part, device) if isinstance(part, Tensor) else part.to(device)


def _map_tensors(value: _Value, change: Callable[[Any], Any]) -> _Value:
    """Return a dataclass with `change(part)` in place of every part that holds tensors."""
    kinds = Tensor | AttentionPlan | VisionLayout
    changed: dict[str, Any] = {
        field.name: change(part)
        for field in fields(value)
        if isinstance(part := getattr(value, field.name), kinds)
    }
    return replace(value, **changed)
