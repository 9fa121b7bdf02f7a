"""How similar embeddings are: cosine of single vectors, late interaction of several.

An embedding is one unit vector (D,), or K of them (K, D) where a stage keeps the tokens of its
bridge apart. What asks sums over its own vectors: the similarity of several is not symmetric.
"""

import math

import torch.nn.functional as F
from torch import Tensor


def similarities(from_BD: Tensor, rows_CD: Tensor) -> Tensor:
    """Return how similar each of B embeddings is to each of C: (B, C), in [-1, 1].

    Single vectors (B, D) and (C, D): their cosine. Several, (B, K, D) and (C, K, D): for each
    vector that asks its best match, averaged (ColBERT, arXiv 2004.12832, eq. 3, over K; in both
    directions as FILIP, arXiv 2111.07783, eq. 4 and 5).
    """
    if from_BD.dim() == 2:
        return from_BD @ rows_CD.T
    count, vectors, _ = rows_CD.shape
    flat_WD = rows_CD.flatten(0, 1)
    total = from_BD.new_zeros(len(from_BD), count)
    for number in range(from_BD.shape[1]):  # one by one: all at once would be K times the memory
        cosine_BW = from_BD[:, number] @ flat_WD.T
        total = total + cosine_BW.view(-1, count, vectors).max(dim=-1).values
    return total / from_BD.shape[1]


def own_similarities(from_BD: Tensor, sides_BSD: Tensor) -> Tensor:
    """Return how similar each of B embeddings is to S of its own: (B, S); as `similarities`.

    `sides_BSD`: (B, S, D), or (B, S, K, D) for several vectors each.
    """
    if from_BD.dim() == 2:
        return (from_BD[:, None] * sides_BSD).sum(dim=-1)
    cosine_BSKK: Tensor = from_BD[:, None] @ sides_BSD.transpose(-1, -2)
    best_BSK: Tensor = cosine_BSKK.max(dim=-1).values
    return best_BSK.mean(dim=-1)


def first(rows_ND: Tensor, dimension: int) -> Tensor:
    """Return unit vectors of the first dimensions (arXiv 2205.13147), of several vectors each."""
    return F.normalize(rows_ND[..., :dimension], dim=-1)


def end_to_end(rows_ND: Tensor) -> Tensor:
    """Return one unit vector for each embedding: several (N, K, D) laid end to end (N, K D)."""
    if rows_ND.dim() == 2:
        return rows_ND
    return rows_ND.flatten(1) / math.sqrt(rows_ND.shape[1])
