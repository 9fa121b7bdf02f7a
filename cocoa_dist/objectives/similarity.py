"""Losses over similarities: each a sum over this rank's queries, in nats.

Similarities are in [-1, 1], see matching.py; what is hidden from a query is no part of its loss.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from cocoa_dist.objectives.candidates import Candidates
from cocoa_dist.objectives.matching import similarities


def info_nce_sum(
    from_BD: Tensor, candidates: Candidates, *, temperature: Tensor | float, weight_B: Tensor
) -> Tensor:
    """InfoNCE (arXiv 1807.03748, eq. 4): cross-entropy of the own candidate among all."""
    logits_BC = similarities(from_BD, candidates.rows_CD) / temperature
    logits_BC = logits_BC.masked_fill(candidates.hidden_BC, -torch.inf)
    loss_B = F.cross_entropy(logits_BC, candidates.own_B, reduction="none")
    return (loss_B * weight_B).sum()


def sigmoid_sum(
    from_BD: Tensor,
    candidates: Candidates,
    *,
    temperature: Tensor | float,
    bias: Tensor | float,
    weight_B: Tensor,
) -> Tensor:
    """SigLIP (arXiv 2303.15343, eq. 1): is each candidate the own one, summed over candidates."""
    logits_BC = similarities(from_BD, candidates.rows_CD) / temperature + bias
    sign_BC = torch.full_like(logits_BC, -1.0).scatter(1, candidates.own_B[:, None], 1.0)
    loss_BC = -F.logsigmoid(sign_BC * logits_BC)
    loss_B = loss_BC.masked_fill(candidates.hidden_BC, 0.0).sum(dim=1)
    return (loss_B * weight_B).sum()


def distillation_sum(
    similar_BS: Tensor,
    score_BS: Tensor,
    *,
    temperature: Tensor | float,
    teacher_temperature: float,
    weight_B: Tensor,
) -> Tensor:
    """KL divergence of a teacher's distribution over each query's own S sides from the model's.

    `score_BS` are the teacher's similarities, column 0 the target's; a side whose score is NaN
    takes no part.
    """
    absent_BS = score_BS.isnan()
    asked_BS = absent_BS.clone()
    asked_BS[:, 0] = False  # at least one entry, so that no row is empty
    teacher_BS = (score_BS.nan_to_num() / teacher_temperature).masked_fill(asked_BS, -torch.inf)
    student_BS = (similar_BS / temperature).masked_fill(asked_BS, -torch.inf)
    teacher_log_BS = F.log_softmax(teacher_BS, dim=1).masked_fill(asked_BS, 0.0)
    student_log_BS = F.log_softmax(student_BS, dim=1).masked_fill(asked_BS, 0.0)
    share_BS = teacher_BS.softmax(dim=1)
    loss_B = (share_BS * (teacher_log_BS - student_log_BS)).sum(dim=1)
    return (loss_B * weight_B * ~absent_BS[:, 0]).sum()
