"""Reads a file of ds_configs/ and joins it with what the recipe owns; no torch, no DeepSpeed."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cocoa_dist.config import PACKAGE_DIR

DS_CONFIG_DIR = PACKAGE_DIR.parent / "ds_configs"
_OWNED_BY_RECIPE = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
    "scheduler",
    "bf16",
    "fp16",
    "steps_per_print",
)
_RESIDENCY_KEY = "stage3_param_persistence_threshold"
_WITHOUT_LIMIT = 10**12  # elements: more than any one parameter has


def read_ds_config(name_or_path: str) -> dict[str, Any]:
    """Read a DeepSpeed configuration by name in ds_configs/, or by path."""
    named = DS_CONFIG_DIR / f"{name_or_path}.json"
    path = named if named.is_file() else Path(name_or_path)
    if not path.is_file():
        have = ", ".join(sorted(file.stem for file in DS_CONFIG_DIR.glob("*.json")))
        raise ValueError(f"engine.ds_config '{name_or_path}' is neither a file nor one of: {have}")
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def build_ds_config(
    mechanics: Mapping[str, Any], *, max_grad_norm: float, dtype: str, resident: bool = False
) -> dict[str, Any]:
    """Join a file of ds_configs/ with what the recipe owns.

    `resident`: every rank keeps all weights gathered between steps (residency.py); else those
    below the file's own threshold, which are cheaper to hold than to gather.
    Raises ValueError for a key the recipe owns, and for any "auto": outside of transformers'
    Trainer DeepSpeed drops it without a word.
    """
    for key in _OWNED_BY_RECIPE:
        if key in mechanics:
            raise ValueError(f"ds_config sets '{key}', which belongs to the recipe; take it out")
    automatic = _find_auto(mechanics)
    if automatic:
        raise ValueError(f'ds_config has "auto" at {automatic}; give a value or take it out')
    return {
        **mechanics,
        "zero_optimization": _zero_section(mechanics, resident=resident),
        "train_micro_batch_size_per_gpu": 1,  # a nominal number: packs carry their own counts
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_grad_norm,
        "bf16": {"enabled": dtype == "bfloat16"},
        "steps_per_print": 10**9,
    }


def _zero_section(mechanics: Mapping[str, Any], *, resident: bool) -> dict[str, Any]:
    section = dict(mechanics.get("zero_optimization", {}))
    if resident:
        section[_RESIDENCY_KEY] = _WITHOUT_LIMIT
    return section


def _find_auto(node: Any, prefix: str = "") -> str:
    if node == "auto":
        return prefix
    if isinstance(node, Mapping):
        for key, value in node.items():
            found = _find_auto(value, f"{prefix}.{key}" if prefix else str(key))
            if found:
                return found
    return ""
