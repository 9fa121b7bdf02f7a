"""Whether a running model keeps its rule: what a target is told of a picture, the bridge aside.

The rule is declared in one place and the kernels are tested against it; this looks at a whole model
with all of its layers. Pictures are changed while the bridge is held as it was in every layer: what
reaches a target then has gone past the bridge.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cocoa_dist.batch import PackedBatch
from cocoa_dist.model.embedder import EmbeddingModel


@dataclass(frozen=True)
class Leak:
    """What other pictures change; largest absolute differences of last hidden states."""

    past_the_bridge: float  # in rows that must not see a picture, the bridge being held: 0
    through_the_bridge: float  # in the same rows, nothing being held
    num_rows: int  # rows that must not see a picture but are in a sample with one


@torch.no_grad()
def picture_leak(model: EmbeddingModel, pack: PackedBatch) -> Leak | None:
    """Look at one pack; None if its rule lets every row of a sample with a picture see it.

    Runs the model three times; quadratic in the pack's tokens on the host.
    """
    rows = _rows(pack)
    if rows is None:
        return None
    blind_S, between_U = (part.to(pack.input_ids.device) for part in rows)
    generator = torch.Generator().manual_seed(0)
    other = torch.randn(pack.pixel_values.shape, generator=generator).to(pack.pixel_values)
    changed = replace(pack, pixel_values=other)
    with _watched(model) as first:
        model(pack)
    with _watched(model) as free:
        model(changed)
    with _watched(model, hold=between_U, at=first) as held:
        model(changed)
    last_TD = first[-1]
    return Leak(
        past_the_bridge=_difference(held[-1], last_TD, blind_S),
        through_the_bridge=_difference(free[-1], last_TD, blind_S),
        num_rows=len(blind_S),
    )


def _rows(pack: PackedBatch) -> tuple[Tensor, Tensor] | None:
    """Return the rows that see no picture though their sample has one, and what stands between."""
    visible_TT = torch.as_tensor(pack.plan.visibility()).cpu()
    picture_T = torch.zeros(pack.num_tokens, dtype=torch.bool)
    picture_T[pack.image_rows.cpu()] = True
    sees_T = (visible_TT & picture_T).any(dim=1)
    told_T = (visible_TT & sees_T).any(dim=1)  # sees somebody who sees a picture
    blind_T = told_T & ~sees_T
    between_T = (visible_TT & blind_T[:, None]).any(dim=0) & sees_T
    if not blind_T.any():
        return None
    assert not (between_T & picture_T).any(), "a row that sees no picture sees one"
    return blind_T.nonzero()[:, 0], between_T.nonzero()[:, 0]


def _difference(one_TD: Tensor, other_TD: Tensor, rows_S: Tensor) -> float:
    return float((one_TD - other_TD)[rows_S].abs().max())


@contextmanager
def _watched(
    model: EmbeddingModel, *, hold: Tensor | None = None, at: list[Tensor] | None = None
) -> Iterator[list[Tensor]]:
    """Keep what goes into each layer and comes out of the last, (T, D) each.

    `hold`: rows that are put back to what they were `at` another time before each layer.
    """
    seen: list[Tensor] = []

    def before(_: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden_1TD: Tensor = inputs[0]
        if hold is not None and at is not None:
            hidden_1TD = hidden_1TD.clone()
            hidden_1TD[0, hold] = at[len(seen)][hold]
        seen.append(hidden_1TD[0].clone())
        return (hidden_1TD, *inputs[1:])

    def after(_: Any, __: Any, output: Any) -> None:
        hidden_1TD = output[0] if isinstance(output, tuple) else output
        seen.append(hidden_1TD[0].clone())

    layers: Any = model.core.language_model.layers
    handles = [layer.register_forward_pre_hook(before) for layer in layers]
    handles.append(layers[-1].register_forward_hook(after))
    kept, model.keep_all_rows = model.keep_all_rows, True
    try:
        yield seen
    finally:
        model.keep_all_rows = kept
        for handle in handles:
            handle.remove()
