"""Loads or makes a backbone and routes its attention, text and vision, through segment plans.

Transformers' own modules, none copied: the text layers call a registered attention function, the
vision blocks get a subclass that makes one call over all pictures. No mask function is registered
under our names, so no dense mask is ever built.
"""

import logging
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision
from transformers.utils import logging as transformers_logging

from cocoa_dist.attention import AttentionPlan, choose_backend, segment_attention
from cocoa_dist.attention.kernels import BACKENDS
from cocoa_dist.batch import VisionLayout
from cocoa_dist.config import ModelConfig
from cocoa_dist.distributed import rank
from cocoa_dist.inputs import check_model_folder, model_type
from cocoa_dist.model.compiled import compile_layers
from cocoa_dist.model.families import FAMILIES, Family, family_of
from cocoa_dist.model.last_layer import let_last_layer_skip
from cocoa_dist.model.shell import without_weights

log = logging.getLogger("cocoa_dist.model")

# Names under which transformers finds our attention: it takes one with "flash" in it for a kernel
# to look up, and one with "flex_attention" for its own.
_ATTENTION_NAMES = {
    **{name: f"cocoa_{name}" for name in ("auto", *BACKENDS)},
    "flash_attn": "cocoa_fa",
    "flash_attn_4": "cocoa_fa4",
}


def load_backbone(
    config: ModelConfig,
    *,
    token_ids: dict[str, int],
    vocabulary_size: int,
    weights: bool = True,
) -> PreTrainedModel:
    """Build the backbone of a recipe on the host, with its attention routed through plans.

    `token_ids`: token to id, for the special tokens of random models. `weights=False`: the same
    modules with parameters on the meta device, no file of weights is opened. Raises ValueError if
    the folder is missing, incomplete, or of a model type that is not supported.
    """
    with without_weights(wanted=not weights):
        model = _backbone(
            config, token_ids=token_ids, vocabulary_size=vocabulary_size, weights=weights
        )
    _cast_parameters(model, getattr(torch, config.dtype))
    route_attention(model, backend=config.attention_backend)
    if config.checkpoint_activations:
        model.activation_checkpointing_enable(
            activation_checkpointing_kwargs={"use_reentrant": False}
        )
    if config.compile_layers:
        compile_layers(model)
    return model


def _backbone(
    config: ModelConfig, *, token_ids: dict[str, int], vocabulary_size: int, weights: bool
) -> PreTrainedModel:
    """Make or load a backbone as transformers has it."""
    if config.random is not None:
        return FAMILIES[config.random.family].random_model(
            config.random, token_ids=token_ids, vocabulary_size=vocabulary_size
        )
    folder = check_model_folder(str(config.path))
    family, dtype = FAMILIES[model_type(folder)], getattr(torch, config.dtype)
    model: PreTrainedModel
    if weights:
        transformers_logging.disable_progress_bar()  # one bar a rank in the logs helps nobody
        model = _read_weights(family, folder, dtype=dtype)
    else:
        settings = family.config_class.from_pretrained(folder)
        model = family.model_class._from_config(settings, dtype=dtype, attn_implementation="eager")
    _grow_vocabulary(model, vocabulary_size)
    return model


def _read_weights(family: Family, folder: Path, *, dtype: torch.dtype) -> PreTrainedModel:
    """Load a model folder whole. Raises ValueError for weights that are not there or do not fit.

    Transformers draws what it misses at random, with no more than a note.
    """
    try:
        model, report = family.model_class.from_pretrained(
            folder, dtype=dtype, attn_implementation="eager", output_loading_info=True
        )
    except (SafetensorError, OSError, RuntimeError) as error:
        raise ValueError(f"the weights in {folder} cannot be read: {error}") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(
            f"the weights in {folder} lack {len(missing)} parameters that its config.json asks "
            f"for, first {missing[0]}: fetch the model again, all of its files"
        )
    loaded: PreTrainedModel = model
    return loaded


def _cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast parameters alone: rounded to bfloat16, rotary frequencies turn far positions wrongly."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def route_attention(
    model: PreTrainedModel, *, backend: str, device: torch.device | str | None = None
) -> None:
    """Make text and vision attention of `model` run the plans given to its forward passes.

    `device`: where it will be trained; default: a GPU where there is one. `auto` looks again in
    every call, so that a model on another device runs too. Raises ValueError for a backend that
    is not there and for attention that plans do not express.
    """
    family = family_of(model.config)
    _refuse_unplanned(model.config.text_config)
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    choice = choose_backend(backend, device=where, dtype=next(model.parameters()).dtype)
    _announce(choice.name, choice.reason)
    for name, registered in _ATTENTION_NAMES.items():
        AttentionInterface.register(registered, partial(_text_attention, backend=name))
    text = _ATTENTION_NAMES[backend]
    model.set_attn_implementation({"text_config": text, "vision_config": "sdpa"})
    visual = model.model.visual
    for number, block in enumerate(visual.blocks):
        block.attn.__class__ = _segment_class(family)
        block.attn.backend = backend
        block.attn.windowed = family.is_windowed(visual.config, number)
    let_last_layer_skip(model.model.language_model)
    if family.has_deepstack:
        model.model.language_model._deepstack_process = _add_at_rows


def vision_inputs(layout: VisionLayout) -> dict[str, Any]:
    """Return what a vision tower takes instead of working it out, by transformers' names."""
    windows = layout.window_plan
    inputs: dict[str, Any] = {
        "position_ids": layout.positions,
        "cu_seqlens": layout.plan.calls[0].cu_seqlens_q,  # unread, but worked out if not given
        "segment_layout": layout,
    }
    if windows is not None:
        inputs["window_index"] = layout.window_index
        inputs["cu_window_seqlens"] = windows.calls[0].cu_seqlens_q
    if layout.taps is not None:
        inputs["interp_indices"] = layout.taps
        inputs["interp_weights"] = layout.tap_weights
    return inputs


def _refuse_unplanned(text: PreTrainedConfig) -> None:
    """Raise ValueError for what a text config asks of attention and plans do not express."""
    windows = "sliding_attention" in (getattr(text, "layer_types", None) or ())
    if getattr(text, "use_sliding_window", False) or windows:
        key = "layer_types has sliding_attention" if windows else "use_sliding_window is true"
        raise ValueError(
            f"text_config.{key}: attention plans do not express sliding windows; set "
            "use_sliding_window=false and full_attention in the model's config.json"
        )
    dropout = getattr(text, "attention_dropout", 0.0)
    if dropout:
        raise ValueError(
            f"text_config.attention_dropout is {dropout}: segment attention has no dropout; set "
            "attention_dropout=0.0 in the model's config.json"
        )


@cache  # said once, however many models a process loads
def _announce(name: str, reason: str) -> None:
    if rank() == 0:
        log.info("attention backend %s: %s", name, reason)


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
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention function in transformers' signature: q (1, H, T, K) -> (1, T, H, K)."""
    if attention_mask is not None or dropout or sliding_window is not None:
        raise ValueError(
            "segment attention takes no attention mask, no dropout and no sliding window, found "
            f"mask {None if attention_mask is None else tuple(attention_mask.shape)}, dropout "
            f"{dropout}, window {sliding_window}"
        )
    attend = getattr(module, "attend", segment_attention)
    out_THK = attend(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        plan=segment_plan,
        backend=backend,
        scale=scaling,
    )
    return out_THK[None], None


class SegmentVisionAttention(nn.Module):
    """A vision tower's attention with one segment call for all pictures, not one for each.

    Mixed into a family's own class, which has the parameters. `windowed`: it runs the window plan.
    """

    backend: str
    windowed: bool
    num_heads: int
    scaling: float
    qkv: nn.Module
    proj: nn.Module

    def forward(
        self,
        hidden_states: Tensor,
        cu_seqlens: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        max_seqlen: int | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Patches (P, D) -> (P, D), each within its picture or window, as `segment_layout` says."""
        assert position_embeddings is not None
        layout: VisionLayout = kwargs["segment_layout"]
        plan = layout.window_plan if self.windowed else layout.plan
        if plan is None:
            raise ValueError("the vision tower has windows, the batch was laid out without them")
        patches = hidden_states.shape[0]
        q, k, v = self.qkv(hidden_states).view(patches, 3, self.num_heads, -1).unbind(1)
        q, k = apply_rotary_pos_emb_vision(q, k, *position_embeddings)
        attend = getattr(self, "attend", segment_attention)
        out: Tensor = attend(q, k, v, plan=plan, backend=self.backend, scale=self.scaling)
        projected: Tensor = self.proj(out.flatten(1))
        return projected


@cache
def _segment_class(family: Family) -> type[nn.Module]:
    attention = family.vision_attention
    return type(f"Segment{attention.__name__}", (SegmentVisionAttention, attention), {})


def _add_at_rows(hidden_1TD: Tensor, rows_M: Tensor, features_ND: Tensor) -> Tensor:
    """Add a vision block's features to the rows of the visual tokens, by index.

    In place of Qwen3-VL's own, which takes a mask: to list its rows a GPU has to be waited for.
    Features behind the first M are the filler's: weight zero, but in the graph on every rank.
    """
    used = len(rows_M)
    features = features_ND.to(hidden_1TD.dtype)
    added = hidden_1TD.index_add(1, rows_M, features[None, :used])
    return added + 0.0 * features[used:].sum()


def _grow_vocabulary(model: PreTrainedModel, vocabulary_size: int) -> None:
    """Released models have spare rows; only a vocabulary beyond them needs new ones."""
    if vocabulary_size > model.get_input_embeddings().num_embeddings:
        # Drawn around the mean of the old rows; on the meta device there is nothing to average.
        meta = model.get_input_embeddings().weight.is_meta
        model.resize_token_embeddings(vocabulary_size, mean_resizing=not meta)
