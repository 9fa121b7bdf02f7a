"""Everything about the places of a pack's patches that a vision tower works with.

A tower by itself would loop over pictures on the device in every forward; here it is worked out
on the host, once for each size of picture. Reads no pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cocoa_dist.attention import AttentionPlan, compile_plan
from cocoa_dist.batch import VisionLayout
from cocoa_dist.data.geometry import Grid, ImageGeometry
from cocoa_dist.segments import Role, Segment, attention_rule

_KEPT_LAYOUTS = 32  # pictures of one size give the same layout in every step
_KEPT_SIZES = 256  # of one picture each: up to 64 bytes a patch, in every loader process
_EACH_ALONE = attention_rule("bidirectional")


@lru_cache(maxsize=_KEPT_LAYOUTS)
def vision_layout(grids: tuple[Grid, ...], geometry: ImageGeometry) -> VisionLayout:
    """Lay pictures end to end: patches in the order of `pixel_values`, P in all.

    Raises ValueError for a picture whose sides are no multiples of `geometry.merge`.
    """
    merge = geometry.merge
    for grid in grids:
        if min(grid) < 1 or grid[1] % merge or grid[2] % merge:
            raise ValueError(
                f"a picture of {grid[1]} x {grid[2]} patches ({grid[0]} frames) does not divide "
                f"into visual tokens of {merge} x {merge} patches"
            )
    taps = [_position_taps(grid, geometry) for grid in grids] if geometry.position_side else []
    windows = [_windows(grid, geometry) for grid in grids] if geometry.window else []
    return VisionLayout(
        positions=torch.from_numpy(np.concatenate([_positions(grid, merge) for grid in grids])),
        plan=_plan([high * wide for time, high, wide in grids for _ in range(time)]),
        window_plan=_plan(chain.from_iterable(w.lengths for w in windows)) if windows else None,
        window_index=_window_index(windows) if windows else None,
        taps=torch.from_numpy(np.concatenate([t.index for t in taps])) if taps else None,
        tap_weights=torch.from_numpy(np.concatenate([t.weight for t in taps])) if taps else None,
    )


def _plan(lengths: Sequence[int] | chain[int]) -> AttentionPlan:
    """Return the plan in which each run of so many patches sees itself."""
    stops = np.cumsum(list(lengths)).tolist()
    runs = zip([0, *stops[:-1]], stops, strict=True)
    return compile_plan([[Segment(a, b, Role.CONTEXT)] for a, b in runs], _EACH_ALONE)


@lru_cache(maxsize=_KEPT_SIZES)
def _positions(grid: Grid, merge: int) -> NDArray[np.int64]:
    """Return (row, column) of a picture's patches: those of one visual token are neighbours."""
    time, height, width = grid
    rows, columns = np.indices((height, width))
    blocks = (height // merge, merge, width // merge, merge)
    ordered = [axis.reshape(blocks).swapaxes(1, 2).ravel() for axis in (rows, columns)]
    return np.tile(np.stack(ordered, axis=-1), (time, 1))


@dataclass(frozen=True, eq=False)
class _Windows:
    """One picture's visual tokens, window by window."""

    order: NDArray[np.int64]  # (m,): tokens in raster order -> window by window
    lengths: tuple[int, ...]  # patches of each window


@lru_cache(maxsize=_KEPT_SIZES)
def _windows(grid: Grid, geometry: ImageGeometry) -> _Windows:
    """Cut a picture into windows of `geometry.window` tokens a side; those at its edges are less.

    Tokens stay in raster order inside a window, windows in raster order inside a frame.
    """
    time, high, wide = grid[0], grid[1] // geometry.merge, grid[2] // geometry.merge
    side = geometry.window
    frame, row, column = np.indices((time, high, wide))
    down, across = -(-high // side), -(-wide // side)
    window = ((frame * down + row // side) * across + column // side).ravel()
    sizes = np.bincount(window) * geometry.merge**2
    return _Windows(np.argsort(window, kind="stable"), tuple(sizes.tolist()))


def _window_index(windows: Sequence[_Windows]) -> Tensor:
    sizes = np.array([len(w.order) for w in windows])
    shift = np.repeat(np.cumsum(sizes) - sizes, sizes)
    return torch.from_numpy(np.concatenate([w.order for w in windows]) + shift)


@dataclass(frozen=True, eq=False)
class _Taps:
    """Which learned positions each patch of a picture mixes, and how much of each."""

    index: NDArray[np.int64]  # (p, 4)
    weight: NDArray[np.float32]  # (p, 4), sums to 1


@lru_cache(maxsize=_KEPT_SIZES)
def _position_taps(grid: Grid, geometry: ImageGeometry) -> _Taps:
    """Resample the square grid of learned positions to a picture, bilinear, corners on corners."""
    patches = _positions(grid, geometry.merge)
    side = geometry.position_side
    down = _axis_taps(patches[:, 0], grid[1], side)
    across = _axis_taps(patches[:, 1], grid[2], side)
    index = down.index[:, :, None] * side + across.index[:, None, :]
    weight = down.weight[:, :, None] * across.weight[:, None, :]
    return _Taps(index.reshape(-1, 4), weight.reshape(-1, 4))


def _axis_taps(place: NDArray[np.int64], size: int, side: int) -> _Taps:
    """Return the two neighbours (p, 2) on one axis; float32, as the tower would work it out."""
    source = place.astype(np.float32) * np.float32(side - 1) / np.float32(max(size - 1, 1))
    below = np.floor(source)
    near = np.stack([below, below + 1], axis=1)
    weight = np.maximum(np.float32(1) - np.abs(source[:, None] - near), np.float32(0))
    return _Taps(np.clip(near, 0, side - 1).astype(np.int64), weight)
