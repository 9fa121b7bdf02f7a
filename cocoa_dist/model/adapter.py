"""What is trained beside frozen weights: low-rank adapters and the rows of new tokens.

Adapters are wrapped round the backbone by peft; a new token gets a difference to its frozen row.
Both begin as nothing and are merged at the end of a stage. Merging works on named tensors alone,
so nothing but the gathered weights has to be in memory.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cocoa_dist.config import AdapterConfig

_ADAPTER = "default"  # peft's name for an only adapter
_WRAPPER = "base_model.model."  # what peft puts in front of the backbone's names
_EMBEDDING = "embed_tokens.weight"  # end of the name of the input embedding's weight
_NEW_ROWS = "new_tokens.from_"  # and the id of the first new token: a merge sees names alone


def add_adapter(backbone: PreTrainedModel, config: AdapterConfig) -> PreTrainedModel:
    """Freeze the backbone and add trainable adapters to its `targets`.

    LoRA: arXiv 2106.09685; DoRA: arXiv 2402.09353. A target is a module's last name, or more of
    its end (`attn.proj`). Raises ValueError if no module has it, or one that is not linear.
    """
    from peft import LoraConfig, get_peft_model

    found = {target: _modules_named(backbone, target) for target in config.targets}
    absent = [target for target, modules in found.items() if not modules]
    if absent:
        raise ValueError(f"adapter.targets: the backbone has no module named {', '.join(absent)}")
    for target, modules in found.items():
        for name, module in modules.items():
            if not isinstance(module, nn.Linear):
                raise ValueError(
                    f"adapter.targets: '{target}' names {name} too, a {type(module).__name__}; "
                    "only linear layers can be merged: give more of the name, as in attn.proj"
                )
    settings = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=list(config.targets),
        use_dora=config.kind == "dora",
    )
    dtype = next(backbone.parameters()).dtype
    wrapped: PreTrainedModel = get_peft_model(backbone, settings, autocast_adapter_dtype=False)
    for parameter in wrapped.parameters():
        # One dtype for everything that is trained: ZeRO-3 flattens it together. On the meta device
        # peft leaves its own in float32.
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return wrapped


def _modules_named(backbone: PreTrainedModel, target: str) -> dict[str, nn.Module]:
    """Return the modules that peft will take for `target`."""
    return {n: m for n, m in backbone.named_modules() if f".{n}".endswith(f".{target}")}


class NewTokenRows(nn.Module):
    """Differences to the embedding's rows of the tokens [first, first + count).

    The embedding has every other row as well, all frozen, and an optimizer would keep moments for
    each: only a small parameter of its own is trained. A head tied to the embedding keeps the
    rows it has until the merge; new tokens are never predicted.
    """

    def __init__(self, *, first: int, count: int, width: int, dtype: torch.dtype) -> None:
        """All zero: the model begins as it is without them."""
        super().__init__()
        self.first, self.count = first, count
        self._name = f"{_NEW_ROWS.rpartition('.')[2]}{first}"
        self.register_parameter(self._name, nn.Parameter(torch.zeros(count, width, dtype=dtype)))

    def forward(self, embedded_TD: Tensor, token_ids_T: Tensor) -> Tensor:
        """Embedded tokens (T, D) -> (T, D), the new ones moved by their difference.

        The parameter is in the graph on every rank, whatever is in its pack (ZeRO-3).
        """
        rows_ND: Tensor = getattr(self, self._name)
        new_N = torch.arange(self.first, self.first + self.count, device=token_ids_T.device)
        is_new_TN = (token_ids_T[:, None] == new_N).to(rows_ND.dtype)
        return embedded_TD + is_new_TN @ rows_ND


def merge_adapter(weights: Mapping[str, Tensor], config: AdapterConfig) -> dict[str, Tensor]:
    """Fold adapters into the weights they sit on; names become those of the bare backbone.

    LoRA: W + s B A with s = alpha / rank. DoRA: its rows rescaled to length m, the learnt
    magnitude. Differences of new tokens are added to their rows of the input embedding.
    """
    merged: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if ".lora_" in name or name.startswith(_NEW_ROWS):
            continue
        stem = name.removesuffix(".base_layer.weight")
        value = weight
        if stem != name:
            value = _merged(weights, stem, scale=config.alpha / config.rank)
        merged[name.replace(_WRAPPER, "").replace(".base_layer.", ".")] = value
    for name, difference_ND in weights.items():
        if name.startswith(_NEW_ROWS):
            first = int(name.removeprefix(_NEW_ROWS))
            (embedding,) = (n for n in merged if n.endswith(_EMBEDDING))
            merged[embedding] = merged[embedding].clone()
            merged[embedding][first : first + len(difference_ND)] += difference_ND
    return merged


def _merged(weights: Mapping[str, Tensor], stem: str, *, scale: float) -> Tensor:
    base = weights[f"{stem}.base_layer.weight"]
    down = weights[f"{stem}.lora_A.{_ADAPTER}.weight"]
    up = weights[f"{stem}.lora_B.{_ADAPTER}.weight"]
    moved = base + scale * (up @ down)
    magnitude = weights.get(f"{stem}.lora_magnitude_vector.{_ADAPTER}.weight")
    if magnitude is None:
        return moved
    rescaled: Tensor = moved * (magnitude / torch.linalg.norm(moved, dim=1))[:, None]
    return rescaled
