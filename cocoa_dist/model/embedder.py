"""EmbeddingModel: the one module the engine wraps. It owns its forward pass.

Every forward embeds once, runs the vision tower exactly once and the language model once, on
every rank, whatever is in the batch: a pack without pictures carries a filler whose features get
weight zero. Under ZeRO-3 anything else hangs (ranks must gather parameters in the same order).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput as TransformersOutput

from cocoa_dist.batch import PackedBatch
from cocoa_dist.model.adapter import NewTokenRows
from cocoa_dist.model.backbone import vision_inputs
from cocoa_dist.model.heads import HeadsConfig, PatchDecoder, SimilarityScale, pool
from cocoa_dist.model.learnt import HiddenPatch, LearntTokens


@dataclass
class ModelOutput(TransformersOutput):  # type: ignore[misc]
    """What the heads of a stage computed; None where the stage did not ask.

    A mapping underneath, so that ZeRO-3's hooks find the tensors in it.
    """

    logits_SV: Tensor | None = None  # at batch.label_rows
    patches_RC: Tensor | None = None  # at batch.patch_rows
    embeddings_ED: Tensor | None = None  # float32, unit length; (E, K, D) where K vectors each
    bridges_BKD: Tensor | None = None  # hidden states, without gradient; of bridges of K > 1 tokens
    similarity: Tensor | None = None  # (2,) float32: scale and bias, where they are trained


class EmbeddingModel(nn.Module):
    """A multimodal backbone with the heads of one stage."""

    def __init__(self, backbone: PreTrainedModel, heads: HeadsConfig) -> None:
        super().__init__()
        self.backbone = backbone
        self.heads = heads
        self.keep_all_rows = False  # in the last layer too, for who looks at them
        self.new_tokens: NewTokenRows | None = None
        self.compression_tokens: LearntTokens | None = None
        if heads.patch_values:
            self.patch_decoder = PatchDecoder(
                self.core.language_model, patch_values=heads.patch_values
            )
        if heads.similarity is not None:
            dtype = self.core.language_model.embed_tokens.weight.dtype
            self.similarity = SimilarityScale(heads.similarity, dtype=dtype)

        if heads.learnt_mask:
            self.hidden_patch = HiddenPatch(self.core.language_model.embed_tokens)

    def add_compression_tokens(self, *, ids: range, known: bool) -> None:
        """Give the tokens `ids` embeddings of their own; `known`: they begin as the model's rows.

        Raises ValueError if the embedding has no such rows.
        """
        embedding: Any = self.backbone.get_input_embeddings()
        _check_rows(embedding, ids)
        self.compression_tokens = LearntTokens(
            embedding, first=ids.start, count=len(ids), known=known
        )

    @torch.no_grad()
    def write_compression_tokens(self) -> None:
        """Put learnt tokens into their rows of the input embedding, for a model without this class.

        What this model computes from text and pictures does not change.
        """
        learnt = self.compression_tokens
        if learnt is not None:
            embedding: Any = self.backbone.get_input_embeddings()
            embedding.weight[learnt.first : learnt.first + learnt.count] = learnt.rows

    def add_new_tokens(self, *, first: int, count: int) -> None:
        """Train `count` rows of the input embedding beside a frozen backbone, from id `first` on.

        Raises ValueError if the embedding has fewer rows.
        """
        embedding: Any = self.backbone.get_input_embeddings()
        _check_rows(embedding, range(first, first + count))
        self.new_tokens = NewTokenRows(
            first=first,
            count=count,
            width=embedding.embedding_dim,
            dtype=embedding.weight.dtype,
        )

    @property
    def core(self) -> Any:
        """The backbone without its text head and without an adapter's wrapper."""
        inner: Any = self.backbone
        if hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
        return inner.model

    def forward(self, batch: PackedBatch) -> ModelOutput:
        """Run one pack. Collective under ZeRO-3: call on all ranks, equally often."""
        visual = self.core.visual(
            batch.pixel_values, grid_thw=batch.image_grid_thw, **vision_inputs(batch.vision)
        )
        features = getattr(visual, "deepstack_features", None)
        reads, skips = self._reads(batch), self.skips_rows
        hidden = self.core.language_model(
            inputs_embeds=self._embed(batch, visual.pooler_output)[None],
            position_ids=batch.position_ids[:, None],
            use_cache=False,
            segment_plan=batch.plan,
            **_deepstack_inputs(self._shown(features, batch), batch.image_rows),
            **({"read_rows": torch.cat(reads)} if skips else {}),
        ).last_hidden_state[0]
        if skips:
            labels_SD, pooled_LD, bridges_ND = hidden.split([len(rows) for rows in reads])
        else:
            labels_SD, pooled_LD, bridges_ND = (hidden.index_select(0, rows) for rows in reads)
        return ModelOutput(
            logits_SV=self.backbone.get_output_embeddings()(labels_SD)
            if self.heads.text_logits
            else None,
            patches_RC=self._patches(hidden, batch) if self.heads.patch_values else None,
            embeddings_ED=self._pooled(pooled_LD, batch) if self.heads.embeddings else None,
            bridges_BKD=bridges_ND.detach().unflatten(0, tuple(batch.bridge_rows.shape))
            if batch.bridge_rows.shape[1] > 1
            else None,
            similarity=self.similarity() if self.heads.similarity is not None else None,
        )

    def _reads(self, batch: PackedBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Return the rows that heads read: of labels, of embeddings, of long bridges."""
        none = batch.label_rows[:0]
        return (
            batch.label_rows if self.heads.text_logits else none,
            batch.pool_rows if self.heads.embeddings else none,
            batch.bridge_rows.flatten() if batch.bridge_rows.shape[1] > 1 else none,
        )

    @property
    def skips_rows(self) -> bool:
        """Whether the last layer leaves out rows that no head reads; the same on all ranks.

        A patch decoder attends to all of them, and so may what is added behind the last layer.
        """
        if self.keep_all_rows or self.heads.patch_values:
            return False
        features = getattr(self.core.visual.config, "deepstack_visual_indexes", ())
        return len(features) < len(self.core.language_model.layers)

    def _embed(self, batch: PackedBatch, visual_MD: Tensor) -> Tensor:
        """Token embeddings (T, D) with the visual tokens put in their rows."""
        tokens_TD: Tensor = self.core.language_model.embed_tokens(batch.input_ids)
        if self.new_tokens is not None:
            tokens_TD = self.new_tokens(tokens_TD, batch.input_ids)
        if self.compression_tokens is not None:
            tokens_TD = self.compression_tokens(tokens_TD, batch.input_ids)
        used = len(batch.image_rows)
        filled_TD = tokens_TD.index_copy(0, batch.image_rows, visual_MD[:used].to(tokens_TD.dtype))
        if self.heads.learnt_mask:
            filled_TD = self.hidden_patch(filled_TD, _is_hidden(batch))
        filler = 0.0 * visual_MD[used:].sum()  # it keeps its place in backward
        embedded_TD: Tensor = filled_TD + filler
        return embedded_TD

    def _shown(self, features: list[Tensor] | None, batch: PackedBatch) -> list[Tensor] | None:
        """Return the features behind the first layers without those of hidden visual tokens."""
        if not features or not self.heads.learnt_mask:
            return features
        used = len(batch.image_rows)
        shown_M1 = (~_is_hidden(batch)[batch.image_rows])[:, None]
        return [torch.cat([f_MD[:used] * shown_M1, f_MD[used:]]) for f_MD in features]

    def _patches(self, hidden_TD: Tensor, batch: PackedBatch) -> Tensor:
        positions = self.core.language_model.rotary_emb(
            hidden_TD[None], batch.position_ids[:, None]
        )
        predicted: Tensor = self.patch_decoder(
            hidden_TD, rows=batch.patch_rows, plan=batch.plan, position_embeddings=positions
        )
        return predicted

    @staticmethod
    def _pooled(pooled_LD: Tensor, batch: PackedBatch) -> Tensor:
        return pool(
            pooled_LD,
            index=batch.pool_index,
            count=batch.num_embeddings,
            vectors=batch.num_vectors,
        )


def _is_hidden(batch: PackedBatch) -> Tensor:
    """Mark the rows (T,) of hidden visual tokens."""
    none_T = torch.zeros(len(batch.input_ids), dtype=torch.bool, device=batch.input_ids.device)
    return none_T.index_fill(0, batch.patch_rows, value=True)


def _check_rows(embedding: Any, ids: range) -> None:
    if ids.stop > embedding.num_embeddings:
        raise ValueError(
            f"new tokens have ids {ids.start} to {ids.stop - 1}, the model embeds only "
            f"{embedding.num_embeddings} tokens: load it with a vocabulary that has them"
        )


def _deepstack_inputs(features: list[Tensor] | None, rows_M: Tensor) -> dict[str, Any]:
    """Return what a text model takes that adds visual features behind its first layers."""
    if not features:
        return {}
    return {"visual_pos_masks": rows_M, "deepstack_visual_embeds": features}
