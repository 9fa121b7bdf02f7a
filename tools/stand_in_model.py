#!/usr/bin/env python3
"""Make a stand-in for a released model: its config.json, a tokenizer, and random weights.

    python tools/stand_in_model.py Qwen/Qwen2-VL-2B-Instruct --tokenizer TOKENIZER --out DIR
    python -m cocoa_dist.train cocoa_qwen2_vl_2b model.path=DIR ...

For trying a recipe of real size where the released weights are not at hand: shapes, memory, files
and speed are those of the model, what it computes is noise. TOKENIZER is a tokenizer folder, see
tools/convert_tokenizer.py. Weights are drawn and written one layer at a time; the same arguments
give the same bytes.
"""

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # works in a checkout that is not installed

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from cocoa_dist.export.layers import Layer  # noqa: E402
from cocoa_dist.export.weights import DEFAULT_FILE_BYTES, write_weights  # noqa: E402
from cocoa_dist.model.families import FAMILIES  # noqa: E402
from cocoa_dist.model.shell import without_weights  # noqa: E402

BLOCK = 4_000_037  # a prime
RELEASED: Mapping[str, Mapping[str, Any]] = {  # what decides a model in its config.json
    "Qwen/Qwen2-VL-2B-Instruct": {
        "model_type": "qwen2_vl",
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "image_token_id": 151655,
        "video_token_id": 151656,
        "hidden_act": "silu",
        "hidden_size": 1536,
        "initializer_range": 0.02,
        "intermediate_size": 8960,
        "max_position_embeddings": 32768,
        "num_attention_heads": 12,
        "num_hidden_layers": 28,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "vocab_size": 151936,
        "vision_config": {
            "depth": 32,
            "embed_dim": 1280,
            "hidden_size": 1536,
            "in_chans": 3,
            "mlp_ratio": 4,
            "num_heads": 16,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
        },
    }
}


class DrawnWeights:
    """Random weights, the same in every process and every time.

    Norms are one, other vectors zero. Matrices are normal with standard deviation `spread`: cut
    from one block of draws, which a place by the parameter's name begins in. Its length is prime,
    so no two rows are the same; drawing billions of numbers would take minutes.
    """

    def __init__(self, *, seed: int, spread: float, dtype: torch.dtype) -> None:
        self.dtype = dtype
        block = torch.empty(BLOCK, dtype=dtype)
        self._block = block.normal_(std=spread, generator=torch.Generator().manual_seed(seed))

    @contextmanager
    def layer(self, layer: Layer) -> Iterator[Mapping[str, Tensor]]:
        """Draw a layer's weights."""
        yield {name: self.draw(name, shape) for name, shape in layer.shapes.items()}

    def draw(self, name: str, shape: Sequence[int]) -> Tensor:
        """Return one parameter's values."""
        values = torch.empty(tuple(shape), dtype=self.dtype)
        if len(shape) == 1:
            return values.fill_(float(name.endswith("weight")))
        flat, filled = values.view(-1), 0
        begin = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") % BLOCK
        while filled < len(flat):
            part = self._block[begin : begin + len(flat) - filled]
            flat[filled : filled + len(part)] = part
            filled, begin = filled + len(part), 0
        return values


def write_model(
    settings: Mapping[str, Any], folder: Path, *, seed: int, max_file_bytes: int
) -> None:
    """Write config.json and weights of a model with these settings."""
    family = FAMILIES[settings["model_type"]]
    config = family.config_class.from_dict(dict(settings))
    with without_weights():
        model = family.model_class._from_config(config, dtype=torch.bfloat16)
    folder.mkdir(parents=True, exist_ok=True)
    spread = float(settings["initializer_range"])
    weights = DrawnWeights(seed=seed, spread=spread, dtype=torch.bfloat16)
    write_weights(model, weights, folder, dtype=torch.bfloat16, max_file_bytes=max_file_bytes)
    content = {**settings, "architectures": [family.model_class.__name__]}
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the folder; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("like", choices=sorted(RELEASED))
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-file-bytes", type=int, default=DEFAULT_FILE_BYTES)
    options = parser.parse_args(arguments)
    if not (options.tokenizer / "tokenizer.json").is_file():
        print(f"error: {options.tokenizer} has no tokenizer.json", file=sys.stderr)
        return 2
    write_model(
        RELEASED[options.like],
        options.out,
        seed=options.seed,
        max_file_bytes=options.max_file_bytes,
    )
    for path in options.tokenizer.glob("tokenizer*.json"):
        shutil.copyfile(path, options.out / path.name)
    print(f"{options.out}: random weights in the shape of {options.like}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
