"""Low-rank adapters: wrapped round the backbone by peft, merged back at the end of a stage.

Merging works on named tensors alone, so nothing but the gathered weights has to be in memory.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cocoa_dist.config import AdapterConfig

_ADAPTER = "default"  # peft's name for an only adapter
_WRAPPER = "base_model.model."  # what peft puts in front of the backbone's names


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
    # One dtype for everything that is trained: ZeRO-3 flattens it together.
    wrapped: PreTrainedModel = get_peft_model(backbone, settings, autocast_adapter_dtype=False)
    return wrapped


def _modules_named(backbone: PreTrainedModel, target: str) -> dict[str, nn.Module]:
    """Return the modules that peft will take for `target`."""
    return {n: m for n, m in backbone.named_modules() if f".{n}".endswith(f".{target}")}


def merge_adapter(weights: Mapping[str, Tensor], config: AdapterConfig) -> dict[str, Tensor]:
    """Fold adapters into the weights they sit on; names become those of the bare backbone.

    LoRA: W + s B A with s = alpha / rank. DoRA: its rows rescaled to length m, the learnt
    magnitude.
    """
    merged: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if ".lora_" in name:
            continue
        stem = name.removesuffix(".base_layer.weight")
        value = weight
        if stem != name:
            value = _merged(weights, stem, scale=config.alpha / config.rank)
        merged[name.replace(_WRAPPER, "").replace(".base_layer.", ".")] = value
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
