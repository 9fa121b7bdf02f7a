"""Models without weights of their own, for ranks that are given them parameter by parameter.

One rank reads the weights. The others build the same modules around memory that nobody has touched
yet, which costs none: it is filled and cut into shards one parameter after the other.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def without_weights(*, wanted: bool = True) -> Iterator[None]:
    """Build modules whose parameters are on the meta device; buffers are real.

    Nothing else differs, so what constructors draw, copy or fill is left out at no cost. Not for
    two threads at once. `wanted=False` does nothing.
    """
    if not wanted:
        yield
        return
    register = nn.Module.register_parameter

    def without_memory(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(module, name, param)
        if param is not None and not param.is_meta:
            meta = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
            module._parameters[name] = meta

    nn.Module.register_parameter = without_memory  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def reserve_memory(model: nn.Module) -> None:
    """Give parameters on the meta device host memory of any content; shared ones stay shared."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.is_meta:
                continue
            if parameter not in made:
                values = torch.empty_like(parameter, device="cpu", requires_grad=False)
                made[parameter] = nn.Parameter(values, requires_grad=parameter.requires_grad)
            module._parameters[name] = made[parameter]
