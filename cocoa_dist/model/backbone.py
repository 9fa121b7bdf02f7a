"""Loads or makes a Qwen2-VL and routes its attention, text and vision, through segment plans.

Transformers' own modules, none copied: the text layers call a registered attention function, the
vision blocks get a subclass that makes one call over all pictures. No mask function is registered
under our names, so no dense mask is ever built.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl import modeling_qwen2_vl as qwen2_vl
from transformers.utils import logging as transformers_logging

from cocoa_dist.attention.kernels import BACKENDS, resolve_backend, segment_attention
from cocoa_dist.attention.plan import AttentionPlan
from cocoa_dist.config import ModelConfig, RandomModelConfig
from cocoa_dist.inputs import check_model_folder

SPECIAL_TOKENS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}


def load_backbone(
    config: ModelConfig, *, token_ids: dict[str, int], vocabulary_size: int
) -> Qwen2VLForConditionalGeneration:
    """Build the backbone of a recipe on the host, with its attention routed through plans.

    `token_ids`: token to id, for the special tokens of random models. Raises ValueError if the
    folder is missing, incomplete, or of a model type that is not supported.
    """
    if config.random is not None:
        model = _random_model(config.random, token_ids=token_ids, vocabulary_size=vocabulary_size)
    else:
        folder = check_model_folder(str(config.path))
        transformers_logging.disable_progress_bar()  # one bar a rank in the logs helps nobody
        model = Qwen2VLForConditionalGeneration.from_pretrained(
            folder, dtype=getattr(torch, config.dtype), attn_implementation="eager"
        )
        _grow_vocabulary(model, vocabulary_size)
    model = model.to(getattr(torch, config.dtype))
    route_attention(model, backend=config.attention_backend)
    if config.checkpoint_activations:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def route_attention(model: Qwen2VLForConditionalGeneration, *, backend: str) -> None:
    """Make text and vision attention of `model` run the plans given to its forward passes."""
    if getattr(model.config.text_config, "use_sliding_window", False):
        raise ValueError(
            "the text model uses sliding windows (use_sliding_window), which attention plans do "
            "not express; set use_sliding_window=false in its config.json"
        )
    resolved = resolve_backend(backend)
    for name in BACKENDS:
        AttentionInterface.register(f"cocoa_{name}", partial(_text_attention, backend=name))
    model.set_attn_implementation({"text_config": f"cocoa_{resolved}", "vision_config": "sdpa"})
    for block in model.model.visual.blocks:
        block.attn.__class__ = SegmentVisionAttention
        block.attn.backend = resolved


def patch_positions(grids_I3: Tensor, *, merge: int) -> Tensor:
    """Return the (row, column) of every patch, (P, 2), in the order of `pixel_values`.

    What the vision tower would work out picture by picture; equal pictures share one table.
    """
    grids: list[tuple[int, int, int]] = [tuple(grid) for grid in grids_I3.tolist()]
    tables = {grid: _grid_positions(*grid, merge=merge) for grid in set(grids)}
    return torch.cat([tables[grid] for grid in grids]).to(grids_I3.device)


def _grid_positions(time: int, height: int, width: int, *, merge: int) -> Tensor:
    """Positions of one picture: the patches of one visual token are neighbours."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    blocks = (height // merge, merge, width // merge, merge)
    ordered = [axis.reshape(blocks).transpose(1, 2).flatten() for axis in (rows, columns)]
    return torch.stack(ordered, dim=-1).repeat(time, 1)


def _text_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    backend: str,
    segment_plan: AttentionPlan,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention function in transformers' signature: q (1, H, T, K) -> (1, T, H, K)."""
    if attention_mask is not None or dropout:
        raise ValueError("segment attention takes neither an attention mask nor dropout")
    out_THK = segment_attention(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        plan=segment_plan,
        backend=backend,
        scale=scaling,
    )
    return out_THK[None], None


class SegmentVisionAttention(qwen2_vl.VisionAttention):  # type: ignore[misc]
    """Qwen2-VL's vision attention with one segment call for all pictures, not one for each."""

    backend: str

    def forward(
        self,
        hidden_states: Tensor,
        cu_seqlens: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        max_seqlen: int | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Patches (P, D) -> (P, D), each picture within itself, as `segment_plan` says."""
        assert position_embeddings is not None
        patches = hidden_states.shape[0]
        q, k, v = self.qkv(hidden_states).view(patches, 3, self.num_heads, -1).unbind(1)
        q, k = qwen2_vl.apply_rotary_pos_emb_vision(q, k, *position_embeddings)
        out = segment_attention(
            q, k, v, plan=kwargs["segment_plan"], backend=self.backend, scale=self.scaling
        )
        projected: Tensor = self.proj(out.flatten(1))
        return projected


def _random_model(
    shape: RandomModelConfig, *, token_ids: dict[str, int], vocabulary_size: int
) -> Qwen2VLForConditionalGeneration:
    config = Qwen2VLConfig(
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
                "mrope_section": _mrope_section(shape.hidden_size // shape.num_heads),
            },
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
        },
        vision_config={
            "depth": shape.vision_layers,
            "embed_dim": shape.vision_width,
            "hidden_size": shape.hidden_size,
            "num_heads": shape.vision_heads,
            "mlp_ratio": 3,
            "patch_size": shape.patch_size,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        tie_word_embeddings=True,
        **{name: token_ids[token] for name, token in SPECIAL_TOKENS.items()},
    )
    return Qwen2VLForConditionalGeneration(config)


def _mrope_section(head_width: int) -> list[int]:
    """Split half a head's width over time, height and width as Qwen2-VL does: 1/4, 3/8, 3/8."""
    half = head_width // 2
    spatial = 3 * half // 8
    return [half - 2 * spatial, spatial, spatial]


def _grow_vocabulary(model: Qwen2VLForConditionalGeneration, vocabulary_size: int) -> None:
    """Released models have spare rows; only a vocabulary beyond them needs new ones."""
    if vocabulary_size > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(vocabulary_size)
