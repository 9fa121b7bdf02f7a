"""Low-rank adapters: wrapped round the backbone by peft, merged back at the end of a stage.

Merging works on named tensors alone, so nothing but the gathered weights has to be in memory.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cocoa_dist.config import AdapterConfig

_ADAPTER = "default"  # peft's name for an only adapter
_WRAPPER = "base_model.model."  # what peft puts in front of the backbone's names


def add_adapter(backbone: PreTrainedModel, config: AdapterConfig) -> PreTrainedModel:
    """Freeze the backbone and add trainable adapters to its `targets`.

    LoRA: arXiv 2106.09685; DoRA: arXiv 2402.09353. Raises ValueError if no module has a target's
    name.
    """
    from peft import LoraConfig, get_peft_model

    names = {name.rpartition(".")[2] for name, _ in backbone.named_modules()}
    absent = [target for target in config.targets if target not in names]
    if absent:
        raise ValueError(f"adapter.targets: the backbone has no module named {', '.join(absent)}")
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
