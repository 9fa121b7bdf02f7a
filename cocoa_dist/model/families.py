"""The model families that can be trained: one declaration each, and nothing about them elsewhere.

A family says which classes of transformers it is made of, how its pictures are normalised, what
its vision tower needs beside the places of patches, and what a small random model of it looks like.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isqrt
from types import MappingProxyType
from typing import Any

from torch import nn
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLVisionAttention
from transformers.models.qwen2_vl.modeling_qwen2_vl import VisionAttention
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionAttention

from cocoa_dist.config import RandomModelConfig

SPECIAL_TOKENS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # arXiv 2103.00020; red green blue
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_HALVES = (0.5, 0.5, 0.5)
_RANDOM_WINDOW = 2  # visual tokens, one side
_RANDOM_POSITION_SIDE = 8

Settings = dict[str, Any]


@dataclass(frozen=True)
class RandomShape:
    """What a random model of a family has beside what all families share."""

    vision: Settings
    mrope_section: list[int]  # half a head's width over time, height and width
    rope: Settings
    text: Settings


@dataclass(frozen=True)
class Family:
    """One kind of model, by the `model_type` of its config.json."""

    model_type: str
    config_class: type[PreTrainedConfig]
    model_class: type[PreTrainedModel]
    vision_attention: type[nn.Module]
    mean: tuple[float, float, float]  # of picture values in [0, 1], red green blue
    std: tuple[float, float, float]
    random_shape: Callable[[RandomModelConfig], RandomShape]
    has_windows: bool = False  # most vision blocks attend within windows
    has_learned_positions: bool = False  # a square grid, resampled to each picture
    has_deepstack: bool = False  # features of vision blocks are added behind the first layers

    def window_side(self, vision: PreTrainedConfig) -> int:
        """Return one side of an attention window in visual tokens; 0 where there are none."""
        if not self.has_windows:
            return 0
        factor = vision.patch_size * vision.spatial_merge_size
        if vision.window_size < factor:
            raise ValueError(
                f"vision_config.window_size is {vision.window_size} pixels, less than the "
                f"{factor} of one visual token"
            )
        return int(vision.window_size // vision.spatial_merge_size // vision.patch_size)

    def is_windowed(self, vision: PreTrainedConfig, block: int) -> bool:
        """Say whether a vision block attends within windows."""
        return self.has_windows and block not in vision.fullatt_block_indexes

    def position_side(self, vision: PreTrainedConfig) -> int:
        """Return one side of the grid of learned positions; 0 where there is none."""
        return isqrt(vision.num_position_embeddings) if self.has_learned_positions else 0

    def random_model(
        self, shape: RandomModelConfig, *, token_ids: dict[str, int], vocabulary_size: int
    ) -> PreTrainedModel:
        """Make a model with random weights, drawn from torch's global generator."""
        special = self.random_shape(shape)
        config = self.config_class(
            text_config={
                "vocab_size": vocabulary_size,
                "hidden_size": shape.hidden_size,
                "intermediate_size": shape.intermediate_size,
                "num_hidden_layers": shape.num_layers,
                "num_attention_heads": shape.num_heads,
                "num_key_value_heads": shape.num_key_value_heads,
                "max_position_embeddings": 1024,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "mrope_section": special.mrope_section,
                    **special.rope,
                },
                "tie_word_embeddings": True,
                "bos_token_id": None,
                "eos_token_id": None,
                "pad_token_id": None,
                **special.text,
            },
            vision_config={
                "depth": shape.vision_layers,
                "num_heads": shape.vision_heads,
                "patch_size": shape.patch_size,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
                **special.vision,
            },
            tie_word_embeddings=True,
            **{name: token_ids[token] for name, token in SPECIAL_TOKENS.items()},
        )
        return self.model_class(config)


def family_of(config: PreTrainedConfig) -> Family:
    """Return the family of a model. Raises ValueError if it is none of ours."""
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"a model of type '{config.model_type}' is not supported (have: {', '.join(FAMILIES)})"
        )
    return FAMILIES[config.model_type]


def _sections(shape: RandomModelConfig, *, spatial: tuple[int, int]) -> list[int]:
    """Split half a head's width over time, height and width; `spatial`: height's share of it."""
    half = shape.hidden_size // shape.num_heads // 2
    side = spatial[0] * half // spatial[1]
    return [half - 2 * side, side, side]


def _qwen2_vl(shape: RandomModelConfig) -> RandomShape:
    return RandomShape(
        vision={
            "embed_dim": shape.vision_width,
            "hidden_size": shape.hidden_size,
            "mlp_ratio": 3,
        },
        mrope_section=_sections(shape, spatial=(3, 8)),
        rope={},
        text={},
    )


def _qwen2_5_vl(shape: RandomModelConfig) -> RandomShape:
    """Windows in all blocks but the last, where the released models have every eighth full."""
    return RandomShape(
        vision={
            "hidden_size": shape.vision_width,
            "intermediate_size": 3 * shape.vision_width,
            "out_hidden_size": shape.hidden_size,
            "window_size": _RANDOM_WINDOW * 2 * shape.patch_size,
            "fullatt_block_indexes": [shape.vision_layers - 1],
        },
        mrope_section=_sections(shape, spatial=(3, 8)),
        rope={},
        text={},
    )


def _qwen3_vl(shape: RandomModelConfig) -> RandomShape:
    """Features of all vision blocks but the last go to as many of the first layers."""
    deep = max(1, min(shape.vision_layers - 1, shape.num_layers))
    return RandomShape(
        vision={
            "hidden_size": shape.vision_width,
            "intermediate_size": 3 * shape.vision_width,
            "out_hidden_size": shape.hidden_size,
            "num_position_embeddings": _RANDOM_POSITION_SIDE**2,
            "deepstack_visual_indexes": list(range(deep)),
        },
        mrope_section=_sections(shape, spatial=(5, 16)),
        rope={"mrope_interleaved": True},
        text={"head_dim": shape.hidden_size // shape.num_heads},
    )


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        family.model_type: family
        for family in (
            Family(
                "qwen2_vl",
                config_class=Qwen2VLConfig,
                model_class=Qwen2VLForConditionalGeneration,
                vision_attention=VisionAttention,
                mean=_CLIP_MEAN,
                std=_CLIP_STD,
                random_shape=_qwen2_vl,
            ),
            Family(
                "qwen2_5_vl",
                config_class=Qwen2_5_VLConfig,
                model_class=Qwen2_5_VLForConditionalGeneration,
                vision_attention=Qwen2_5_VLVisionAttention,
                mean=_CLIP_MEAN,
                std=_CLIP_STD,
                random_shape=_qwen2_5_vl,
                has_windows=True,
            ),
            Family(
                "qwen3_vl",
                config_class=Qwen3VLConfig,
                model_class=Qwen3VLForConditionalGeneration,
                vision_attention=Qwen3VLVisionAttention,
                mean=_HALVES,
                std=_HALVES,
                random_shape=_qwen3_vl,
                has_learned_positions=True,
                has_deepstack=True,
            ),
        )
    }
)
