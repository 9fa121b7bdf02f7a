"""The last text layer, which goes no further than its attention for rows that nobody reads.

Keys and values are needed of all rows; what lies behind attention, two thirds of a layer's weights,
only of those that a head reads. Nothing is approximated: other rows lead nowhere.
"""

from functools import cache
from typing import Any

from torch import Tensor, nn


class ReadRowsLayer(nn.Module):
    """A decoder layer that can be told which rows are read.

    Mixed into a family's own class, which has the parameters. Without `read_rows` it is that class.
    """

    def forward(
        self, hidden_states: Tensor, *args: Any, read_rows: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """Hidden states (1, T, D) -> (1, R, D): the rows listed in `read_rows` (R,), in its order.

        (1, T, D) without `read_rows`.
        """
        layer: Any = self
        if read_rows is None:
            whole: Tensor = super().forward(hidden_states, *args, **kwargs)
            return whole
        attended, _ = layer.self_attn(layer.input_layernorm(hidden_states), *args, **kwargs)
        read_1RD = (hidden_states + attended).index_select(1, read_rows)
        rebuilt: Tensor = read_1RD + layer.mlp(layer.post_attention_layernorm(read_1RD))
        return rebuilt


def let_last_layer_skip(language_model: nn.Module) -> None:
    """Make the last layer of a text model take `read_rows`; its parameters keep their names."""
    layers: Any = language_model.layers
    if not isinstance(layers[-1], ReadRowsLayer):
        kind: Any = type(layers[-1])
        layers[-1].__class__ = _reading(kind)


@cache
def _reading(layer: type[nn.Module]) -> type[nn.Module]:
    return type(layer.__name__, (ReadRowsLayer, layer), {})
