"""The sizes of a backbone, from its config.json or from the published ones, and what follows.

Parameter counts are exact: the tests build the same models from transformers and compare.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cocoa_dist.config import AdapterConfig, ModelConfig, RandomModelConfig, resolve_path

_GATED = 3  # matrices of a gated feed-forward block: gate, up, down
_PLAIN = 2


@dataclass(frozen=True)
class TextShape:
    """The language model."""

    layers: int
    width: int  # hidden size
    heads: int
    kv_heads: int
    head_width: int
    inner_width: int  # of the feed-forward block
    vocabulary: int
    tied: bool  # output embeddings are the input ones
    qkv_bias: bool = True
    head_norms: bool = False  # a norm for queries and one for keys (Qwen3)

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of each linear of a layer, by the name adapters use."""
        q, kv = self.heads * self.head_width, self.kv_heads * self.head_width
        return {
            "q_proj": (self.width, q),
            "k_proj": (self.width, kv),
            "v_proj": (self.width, kv),
            "o_proj": (q, self.width),
            "gate_proj": (self.width, self.inner_width),
            "up_proj": (self.width, self.inner_width),
            "down_proj": (self.inner_width, self.width),
        }

    @property
    def layer_parameters(self) -> int:
        """Parameters of one layer."""
        weights = sum(a * b for a, b in self.linears.values())
        biases = (self.heads + 2 * self.kv_heads) * self.head_width if self.qkv_bias else 0
        norms = 2 * self.width + (2 * self.head_width if self.head_norms else 0)
        return weights + biases + norms

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the input embeddings."""
        return self.vocabulary * self.width

    @property
    def parameters(self) -> int:
        """Parameters of the language model and its head."""
        head = 0 if self.tied else self.embedding_parameters
        return self.layers * self.layer_parameters + self.embedding_parameters + self.width + head


@dataclass(frozen=True)
class VisionShape:
    """The vision tower, merger included."""

    layers: int
    width: int
    heads: int
    inner_width: int
    patch_size: int
    merge: int
    out_width: int
    gated: bool  # feed-forward with a gate and RMSNorm (Qwen2.5-VL), else LayerNorm
    temporal: int = 2
    patch_bias: bool = False
    grid_positions: int = 0  # learned positions (Qwen3-VL)
    deepstack: int = 0  # further mergers (Qwen3-VL)
    names: tuple[str, ...] = ("fc1", "fc2")

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of each linear of a block, by the name adapters use."""
        inner = {
            name: (self.inner_width, self.width)
            if name == self.names[-1]
            else (self.width, self.inner_width)
            for name in self.names
        }
        return {"qkv": (self.width, 3 * self.width), "proj": (self.width, self.width), **inner}

    @property
    def block_parameters(self) -> int:
        """Parameters of one block."""
        weights = sum(a * b + b for a, b in self.linears.values())
        return weights + 2 * self._norm

    @property
    def merger_parameters(self) -> int:
        """Parameters that turn the patches of a visual token into one embedding."""
        merged = self.width * self.merge**2
        linears = merged * merged + merged + merged * self.out_width + self.out_width
        further = linears + 2 * merged  # its norm comes after the merge
        return self._norm + linears + self.deepstack * further

    @property
    def parameters(self) -> int:
        """Parameters of the tower."""
        patch = 3 * self.temporal * self.patch_size**2 * self.width
        patch += self.width if self.patch_bias else 0
        positions = self.grid_positions * self.width
        return patch + positions + self.layers * self.block_parameters + self.merger_parameters

    @property
    def _norm(self) -> int:
        return self.width if self.gated else 2 * self.width


@dataclass(frozen=True)
class ModelShape:
    """A multimodal backbone."""

    name: str
    text: TextShape
    vision: VisionShape
    learnt_tokens: int = 0  # with embeddings of their own, no rows of the vocabulary
    bridge_tokens: int = 1

    @property
    def parameters(self) -> int:
        """All parameters of the backbone, tied ones once."""
        return self.text.parameters + self.vision.parameters

    @property
    def decoder_parameters(self) -> int:
        """Parameters of the patch decoder: one text layer, a norm, a linear to the pixels."""
        pixels = 3 * (self.vision.patch_size * self.vision.merge) ** 2
        width = self.text.width
        return self.text.layer_parameters + width + width * pixels + pixels

    def adapter_parameters(self, adapter: AdapterConfig, *, with_vision: bool) -> int:
        """Trainable parameters of an adapter on every linear it names."""
        towers: list[tuple[int, dict[str, tuple[int, int]]]] = [
            (self.text.layers, self.text.linears)
        ]
        if with_vision:
            towers.append((self.vision.layers, self.vision.linears))
        total = 0
        for layers, linears in towers:
            chosen = [linears[name] for name in linears if name in adapter.targets]
            total += layers * sum(adapter.rank * (a + b) for a, b in chosen)
            if adapter.kind == "dora":
                total += layers * sum(b for _, b in chosen)
        return total


def _qwen2_vision(out_width: int) -> VisionShape:
    return VisionShape(32, 1280, 16, 5120, 14, 2, out_width, gated=False)


def _qwen2_5_vision(out_width: int) -> VisionShape:
    names = ("gate_proj", "up_proj", "down_proj")
    return VisionShape(32, 1280, 16, 3420, 14, 2, out_width, gated=True, names=names)


# Of the released checkpoints' config.json (Qwen2-VL: arXiv 2409.12191; Qwen2.5-VL: 2502.13923).
PUBLISHED: Mapping[str, ModelShape] = {
    shape.name: shape
    for shape in (
        ModelShape(
            "Qwen2-VL-2B",
            TextShape(28, 1536, 12, 2, 128, 8960, 151936, tied=True),
            _qwen2_vision(1536),
        ),
        ModelShape(
            "Qwen2-VL-7B",
            TextShape(28, 3584, 28, 4, 128, 18944, 152064, tied=False),
            _qwen2_vision(3584),
        ),
        ModelShape(
            "Qwen2.5-VL-3B",
            TextShape(36, 2048, 16, 2, 128, 11008, 151936, tied=True),
            _qwen2_5_vision(2048),
        ),
        ModelShape(
            "Qwen2.5-VL-7B",
            TextShape(28, 3584, 28, 4, 128, 18944, 152064, tied=False),
            _qwen2_5_vision(3584),
        ),
    )
}


def model_shape(config: ModelConfig) -> ModelShape:
    """Return the shape of a recipe's model.

    Looks into its folder; where there is none, among the published sizes. Raises ValueError with
    the known names if neither says anything.
    """
    return replace(
        _backbone_shape(config),
        learnt_tokens=config.num_learnt_tokens,
        bridge_tokens=config.compression_tokens or config.num_bridge_tokens,
    )


def _backbone_shape(config: ModelConfig) -> ModelShape:
    if config.random is not None:
        return _random_shape(config.random)
    folder = resolve_path(str(config.path))
    if (folder / "config.json").is_file():
        return read_shape(folder / "config.json")
    for name, shape in PUBLISHED.items():
        if name.lower() in str(config.path).lower():
            return shape
    raise ValueError(
        f"model.path '{config.path}' is no folder with a config.json, and no published size that "
        f"is known here ({', '.join(PUBLISHED)})"
    )


def read_shape(path: Path) -> ModelShape:
    """Read the shape of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL from its config.json.

    Raises ValueError naming what is missing.
    """
    fields = json.loads(path.read_text())
    text, vision = fields.get("text_config") or fields, fields.get("vision_config") or {}
    try:
        reader = _VISION_READERS[fields["model_type"]]
        return ModelShape(
            fields["model_type"],
            _text_shape({**text, "tie_word_embeddings": _tied(fields, text)}),
            reader(vision, int(text["hidden_size"])),
        )
    except KeyError as error:
        raise ValueError(
            f"{path} lacks {error}, or is of a model type that is not known here "
            f"(have: {', '.join(_VISION_READERS)})"
        ) from None


def _tied(fields: Mapping[str, Any], text: Mapping[str, Any]) -> bool:
    return bool(fields.get("tie_word_embeddings", text.get("tie_word_embeddings", False)))


def _text_shape(text: Mapping[str, Any]) -> TextShape:
    width, heads = int(text["hidden_size"]), int(text["num_attention_heads"])
    is_qwen3 = "qwen3" in str(text.get("model_type", ""))
    return TextShape(
        layers=int(text["num_hidden_layers"]),
        width=width,
        heads=heads,
        kv_heads=int(text["num_key_value_heads"]),
        head_width=int(text.get("head_dim") or width // heads),
        inner_width=int(text["intermediate_size"]),
        vocabulary=int(text["vocab_size"]),
        tied=bool(text["tie_word_embeddings"]),
        qkv_bias=not is_qwen3,
        head_norms=is_qwen3,
    )


def _qwen2_tower(vision: Mapping[str, Any], text_width: int) -> VisionShape:
    width = int(vision.get("embed_dim", 1280))
    tower = _qwen2_vision(text_width)
    return replace(
        tower,
        layers=int(vision.get("depth", 32)),
        width=width,
        heads=int(vision.get("num_heads", 16)),
        inner_width=int(width * vision.get("mlp_ratio", 4)),
        patch_size=int(vision.get("patch_size", 14)),
        merge=int(vision.get("spatial_merge_size", 2)),
    )


def _qwen2_5_tower(vision: Mapping[str, Any], text_width: int) -> VisionShape:
    return replace(
        _qwen2_5_vision(int(vision.get("out_hidden_size", text_width))),
        layers=int(vision.get("depth", 32)),
        width=int(vision["hidden_size"]),
        heads=int(vision.get("num_heads", 16)),
        inner_width=int(vision.get("intermediate_size", 3420)),
        patch_size=int(vision.get("patch_size", 14)),
        merge=int(vision.get("spatial_merge_size", 2)),
    )


def _qwen3_tower(vision: Mapping[str, Any], text_width: int) -> VisionShape:
    return VisionShape(
        layers=int(vision.get("depth", 27)),
        width=int(vision["hidden_size"]),
        heads=int(vision.get("num_heads", 16)),
        inner_width=int(vision["intermediate_size"]),
        patch_size=int(vision.get("patch_size", 16)),
        merge=int(vision.get("spatial_merge_size", 2)),
        out_width=int(vision.get("out_hidden_size", text_width)),
        gated=False,
        patch_bias=True,
        grid_positions=int(vision.get("num_position_embeddings", 2304)),
        deepstack=len(vision.get("deepstack_visual_indexes", (8, 16, 24))),
        names=("linear_fc1", "linear_fc2"),
    )


_VISION_READERS = {
    "qwen2_vl": _qwen2_tower,
    "qwen2_5_vl": _qwen2_5_tower,
    "qwen3_vl": _qwen3_tower,
}


def _random_shape(config: RandomModelConfig) -> ModelShape:
    """Return a tiny Qwen2-VL's shape; its vocabulary is the shipped tokenizer's 2,048."""
    return ModelShape(
        "random",
        TextShape(
            layers=config.num_layers,
            width=config.hidden_size,
            heads=config.num_heads,
            kv_heads=config.num_key_value_heads,
            head_width=config.hidden_size // config.num_heads,
            inner_width=config.intermediate_size,
            vocabulary=2048,
            tied=True,
        ),
        replace(
            _qwen2_vision(config.hidden_size),
            layers=config.vision_layers,
            width=config.vision_width,
            heads=config.vision_heads,
            inner_width=3 * config.vision_width,
            patch_size=config.patch_size,
        ),
    )
