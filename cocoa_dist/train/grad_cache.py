"""GradCache: the exact gradient of a loss over many packs, with one chunk's activations at a time.

arXiv 2101.06983, section 3: embed every chunk without gradient; take the loss and its gradient with
respect to the embeddings; run each chunk again and feed it the part of that gradient that is its
own. The generators are put back before the second run, so that dropout drops the same values. The
last chunk keeps its activations from the first run and goes back first: one forward less.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from cocoa_dist.batch import PackedBatch
from cocoa_dist.model.embedder import ModelOutput
from cocoa_dist.objectives.base import Objective, measure_bridge, weighted_total


class Backward(Protocol):
    """Runs backward from a scalar; `last` marks a step's last call."""

    def __call__(self, loss: Tensor, *, last: bool) -> None: ...  # noqa: D102


@dataclass(frozen=True)
class GeneratorState:
    """Where torch's global generators stand; dropout draws from them."""

    cpu: Tensor
    cuda: Tensor | None

    @staticmethod
    def now() -> "GeneratorState":
        """Read the generators of the CPU and of the current CUDA device."""
        cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
        return GeneratorState(torch.get_rng_state(), cuda)

    def restore(self) -> None:
        """Put the generators back."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda)


def cached_backward(
    packs: Sequence[PackedBatch],
    *,
    objective: Objective,
    factors: Mapping[str, float],
    packs_per_chunk: int,
    forward: Callable[[PackedBatch], ModelOutput],
    backward: Backward,
) -> dict[str, float]:
    """Do what one backward over all packs does; returns this rank's sum of each term.

    The generators end where a plain step leaves them. Collective: call on all ranks, with the
    same number of packs.
    """
    chunks = [packs[i : i + packs_per_chunk] for i in range(0, len(packs), packs_per_chunk)]
    states: list[GeneratorState] = []
    outputs: list[list[ModelOutput]] = []
    for chunk in chunks:
        states.append(GeneratorState.now())
        with torch.set_grad_enabled(len(states) == len(chunks)):
            outputs.append([_measured(forward(pack), pack, objective) for pack in chunk])
    end = GeneratorState.now()
    sums, cached = _loss_gradient(outputs, packs, objective=objective, factors=factors)
    last_chunk = outputs.pop()
    backward(_product(last_chunk, cached.pop()), last=len(chunks) == 1)
    del last_chunk  # and with it its activations
    for index, (chunk, gradients) in enumerate(zip(chunks[:-1], cached, strict=True)):
        states[index].restore()
        again = [what_is_read(forward(pack)) for pack in chunk]
        backward(_product(again, gradients), last=index == len(chunks) - 2)
        del again
    end.restore()
    return sums


def _measured(output: ModelOutput, pack: PackedBatch, objective: Objective) -> ModelOutput:
    """Return what is read of a pack, after measuring what is not kept of it."""
    measure_bridge(objective.measures, output, pack)
    return what_is_read(output)


def what_is_read(output: ModelOutput) -> ModelOutput:
    """Return the embeddings of a pack, and the scale where it is trained; nothing else is kept.

    GradCache is for objectives that read these alone.
    """
    assert output.embeddings_ED is not None, "a step-wide objective reads embeddings"
    return ModelOutput(embeddings_ED=output.embeddings_ED, similarity=output.similarity)


def _product(outputs: Sequence[ModelOutput], gradients: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """Return a scalar whose gradient is `gradients`, chained through the outputs."""
    products = [
        (output[name] * gradient).sum()
        for output, of_pack in zip(outputs, gradients, strict=True)
        for name, gradient in of_pack.items()
    ]
    total: Tensor = sum(products[1:], start=products[0])
    return total


def _loss_gradient(
    chunks: Sequence[Sequence[ModelOutput]],
    packs: Sequence[PackedBatch],
    *,
    objective: Objective,
    factors: Mapping[str, float],
) -> tuple[dict[str, float], list[list[dict[str, Tensor]]]]:
    """Return each term's sum, and for each pack of a chunk the gradient of the weighted loss.

    The gradient is by name of what the objective reads, in its shape.
    """
    leaves = [[_leaf(output) for output in chunk] for chunk in chunks]
    sums = objective.sums([leaf for chunk in leaves for leaf in chunk], packs)
    weighted_total(sums, factors).backward()  # type: ignore[no-untyped-call]
    gradients = [
        [{name: _gradient_of(value) for name, value in leaf.items()} for leaf in chunk]
        for chunk in leaves
    ]
    return {name: value.detach().item() for name, value in sums.items()}, gradients


def _leaf(output: ModelOutput) -> ModelOutput:
    """Return an output cut off from what made it, whose gradients are kept."""
    return ModelOutput(**{name: v.detach().requires_grad_() for name, v in output.items()})


def _gradient_of(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None, "the loss reads every output"
    return leaf.grad
