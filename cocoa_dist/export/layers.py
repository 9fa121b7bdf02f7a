"""A model's weights one layer at a time, wherever they lie: in memory, in files, cut by ZeRO-3.

What is written or computed through here never needs more of the model at once than its largest
layer. Nothing is written here; see weights.py.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from cocoa_dist.distributed import raise_together, rank
from cocoa_dist.train.zero_weights import cut_up, gathered, give_freed_memory_back, whole_shape


@dataclass(frozen=True)
class Layer:
    """Parameters that are used, and so had, together."""

    name: str  # of the module
    module: nn.Module
    parameters: Mapping[str, nn.Parameter]  # by their names in the model

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the whole parameters, whatever of them is here."""
        return {name: whole_shape(parameter) for name, parameter in self.parameters.items()}


class LayerWeights(Protocol):
    """Where the weights of a model are had, one layer after the other."""

    def layer(self, layer: Layer) -> AbstractContextManager[Mapping[str, Tensor]]:
        """Give the whole tensors of a layer by name, on the host; good within the context."""
        ...


class ModelWeights:
    """The weights that a model holds, whole or cut up by ZeRO-3.

    Collective where they are cut up: call on all ranks, for the same layers in the same order.
    """

    @contextmanager
    def layer(self, layer: Layer) -> Iterator[Mapping[str, Tensor]]:
        """Gather a layer; its memory is given back on leaving."""
        with gathered(list(layer.parameters.values())) as whole:
            yield dict(zip(layer.parameters, whole, strict=True))


def layers_of(model: PreTrainedModel) -> list[Layer]:
    """Return a model's layers in its own order: elements of its lists, other modules one by one.

    Every parameter is in one of them; tied ones count under their first name. Raises ValueError
    for a model with buffers that belong to its weights: none of ours has any.
    """
    kept = set(model.state_dict(keep_vars=True)) - set(
        dict(model.named_parameters(remove_duplicate=False))
    )
    if kept:
        raise ValueError(
            f"the model has buffers among its weights, first {min(kept)}: they are not exported"
        )
    owners = dict(model.named_modules())
    in_lists = [
        f"{name}.{number}"
        for name, module in owners.items()
        if isinstance(module, nn.ModuleList)
        for number in range(len(module))
    ]
    found: dict[str, dict[str, nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        parents = (layer for layer in in_lists if name.startswith(f"{layer}."))
        found.setdefault(next(parents, name.rpartition(".")[0]), {})[name] = parameter
    return [Layer(name, owners[name], parameters) for name, parameters in found.items()]


def share_out(model: PreTrainedModel, weights: LayerWeights, *, dtype: torch.dtype) -> None:
    """Give a model without weights those that rank 0 reads, cut up over the ranks as ZeRO-3 does.

    One layer at a time is in memory whole. Collective: call on all ranks. Raises ValueError on all
    of them if rank 0 cannot read.
    """
    give_freed_memory_back()
    for layer in layers_of(model):
        with ExitStack() as stack:
            open_layer = partial(_enter_on_rank_0, stack, weights, layer)
            tensors = raise_together(open_layer)
            cut_up(model, layer.parameters, tensors, dtype=dtype)


def _enter_on_rank_0(
    stack: ExitStack, weights: LayerWeights, layer: Layer
) -> Mapping[str, Tensor] | None:
    return stack.enter_context(weights.layer(layer)) if rank() == 0 else None


def stored_names(model: PreTrainedModel) -> dict[str, str]:
    """Return under which name each parameter lies in a Hugging Face folder, as released.

    Raises ValueError for a model whose folders hold other tensors than the model does.
    """
    names = [name for name, _ in model.named_parameters()]
    # Each stands for its own number: nothing else of a tensor without values can be recognised.
    numbered = {name: torch.empty(number, device="meta") for number, name in enumerate(names)}
    found = {
        names[value.numel()]: stored
        for stored, value in revert_weight_conversion(model, numbered).items()
    }
    if len(found) != len(names) or len(set(found.values())) != len(names):
        raise ValueError(
            f"transformers stores a '{model.config.model_type}' as other tensors than it has: its "
            "weights cannot be written layer by layer"
        )
    return found


@contextmanager
def weights_on_demand(model: PreTrainedModel, weights: LayerWeights) -> Iterator[None]:
    """Run forward passes of a model whose own parameters hold nothing.

    A layer gets its weights when it is called and loses them when it returns. Collective where
    `weights` is: every rank runs the same forward passes.
    """
    give_freed_memory_back()
    with ExitStack() as hooks:
        for layer in layers_of(model):
            before, after = _visit(layer, weights)
            hooks.callback(layer.module.register_forward_pre_hook(before).remove)
            hooks.callback(layer.module.register_forward_hook(after, always_call=True).remove)
        yield


def _visit(layer: Layer, weights: LayerWeights) -> tuple[Callable[..., None], Callable[..., None]]:
    """Return what a layer does before and after it is called."""
    open_: list[ExitStack] = []
    owners = {name: _owner(layer, name) for name in layer.parameters}

    def before(*_: Any) -> None:
        stack = ExitStack()
        tensors = stack.enter_context(weights.layer(layer))
        for name, (module, attribute) in owners.items():
            whole = nn.Parameter(tensors[name], requires_grad=False)
            module._parameters[attribute] = whole
        open_.append(stack)

    def after(*_: Any) -> None:
        if not open_:  # the layer could not be had, which is an error of its own
            return
        for name, (module, attribute) in owners.items():
            module._parameters[attribute] = layer.parameters[name]
        open_.pop().close()

    return before, after


def _owner(layer: Layer, name: str) -> tuple[nn.Module, str]:
    """Return the module that holds a parameter, and under which attribute."""
    path, _, attribute = name.removeprefix(f"{layer.name}.").rpartition(".")
    return layer.module.get_submodule(path), attribute
