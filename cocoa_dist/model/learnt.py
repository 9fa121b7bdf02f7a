"""Vectors of their own: compression tokens, and what a hidden visual token becomes.

Each is a small parameter whose module runs in every forward on every rank, whatever is in the pack
(ZeRO-3), and stands in the gradient with zeros where nothing used it.
"""

import torch
from torch import Tensor, nn

_ROWS_LOOKED_AT = 8192


class LearntTokens(nn.Module):
    """Embeddings (K, D) of the tokens [first, first + K): CoMa's compression tokens.

    Not rows of the vocabulary's embedding: 32 rows of it would have moments for all the others.
    """

    def __init__(self, embedding: nn.Embedding, *, first: int, count: int, known: bool) -> None:
        """Draw them as wide as the embedding's rows; `known`: begin as the rows at their ids."""
        super().__init__()
        self.first, self.count = first, count
        weight_VD = embedding.weight
        rows_KD = torch.empty(count, embedding.embedding_dim, dtype=weight_VD.dtype)
        if weight_VD.is_meta:
            pass  # some other rank has the weights
        elif known:
            rows_KD.copy_(weight_VD.detach()[first : first + count])
        else:
            rows_KD.normal_(std=_spread(weight_VD))
        self.rows = nn.Parameter(rows_KD)

    def forward(self, embedded_TD: Tensor, token_ids_T: Tensor) -> Tensor:
        """Embedded tokens (T, D) -> (T, D), the learnt ones in place of what was there."""
        ids_K = torch.arange(self.first, self.first + self.count, device=token_ids_T.device)
        is_learnt_TK = token_ids_T[:, None] == ids_K
        # A product, not an index: its backward pass gives the same sums every time on a GPU.
        own_TD = is_learnt_TK.to(self.rows.dtype) @ self.rows
        return torch.where(is_learnt_TK.any(dim=1)[:, None], own_TD, embedded_TD)


class HiddenPatch(nn.Module):
    """One vector (1, D) in place of every hidden visual token, behind the vision tower."""

    def __init__(self, embedding: nn.Embedding) -> None:
        """Draw it as wide as the embedding's rows."""
        super().__init__()
        weight_VD = embedding.weight
        vector_1D = torch.empty(1, embedding.embedding_dim, dtype=weight_VD.dtype)
        if not weight_VD.is_meta:
            vector_1D.normal_(std=_spread(weight_VD))
        self.vector = nn.Parameter(vector_1D)

    def forward(self, embedded_TD: Tensor, hidden_T: Tensor) -> Tensor:
        """Embedded tokens (T, D) -> (T, D); `hidden_T` (bool) says which become the vector."""
        here_T1 = hidden_T.to(embedded_TD.dtype)[:, None]
        return embedded_TD * (1 - here_T1) + here_T1 @ self.vector


def _spread(weight_VD: Tensor) -> float:
    """Return the standard deviation of an embedding's values, of its first rows."""
    return float(weight_VD.detach()[:_ROWS_LOOKED_AT].float().std())
