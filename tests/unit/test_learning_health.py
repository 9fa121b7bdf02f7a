"""What an objective measures beside its loss: values of small known cases, and loops over pairs."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import normalize

from cocoa_dist.config import ContrastiveConfig
from cocoa_dist.model.embedder import ModelOutput
from cocoa_dist.objectives.base import Measures, mean_pairwise_cosine
from cocoa_dist.objectives.contrastive import Contrastive
from cocoa_dist.objectives.reconstruction import Reconstruction


def measured(objective) -> dict[str, float]:
    return dict(zip(objective.measures.names, objective.measures.take(), strict=True))


def health_of(query_BD, target_BD, *, identities=None, weights=None, mask=True, split=0):
    """Health of pairs on one rank; the first `split` of them in a pack of their own."""
    count = len(query_BD)
    identities = list(range(count)) if identities is None else identities
    weights = [1.0] * count if weights is None else weights
    objective = Contrastive(ContrastiveConfig(temperature=1.0, mask_false_negatives=mask))
    packs, outputs = [], []
    for part in (range(split), range(split, count)):
        if len(part):
            rows = list(part)
            vectors = torch.stack([query_BD[rows], target_BD[rows]], dim=1).flatten(0, 1)
            outputs.append(ModelOutput(embeddings_ED=vectors))
            packs.append(
                SimpleNamespace(
                    sides=torch.tensor([0, 1] * len(rows)),
                    pair_ids=torch.tensor(rows).repeat_interleave(2),
                    identities=torch.tensor([identities[i] for i in rows]).repeat_interleave(2),
                    pair_weights=torch.tensor([weights[i] for i in rows]).repeat_interleave(2),
                )
            )
    objective.sums(outputs, packs)
    return objective.health(measured(objective))


def test_targets_that_are_all_alike_are_a_collapse() -> None:
    same = normalize(torch.ones(5, 8), dim=1)
    found = health_of(same, same)
    assert found["alignment"] == pytest.approx(0.0, abs=1e-6)
    assert found["uniformity"] == pytest.approx(0.0, abs=1e-5)
    assert found["effective_rank"] == pytest.approx(1.0, rel=1e-5)
    assert found["false_negative_ratio"] == 0.0


def test_targets_on_all_axes_use_all_dimensions() -> None:
    axes = torch.eye(6)
    found = health_of(-axes, axes)
    assert found["alignment"] == pytest.approx(4.0)  # opposite unit vectors
    assert found["uniformity"] == pytest.approx(-4.0)  # all squared distances are 2
    assert found["effective_rank"] == pytest.approx(6.0)


@pytest.mark.parametrize("split", [0, 3])
def test_measures_equal_a_loop_over_usable_pairs(split: int) -> None:
    draw = torch.Generator().manual_seed(1)
    query, target = (normalize(torch.randn(7, 4, generator=draw).double(), dim=1) for _ in "qt")
    weights, identities = [1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0], [0, 1, 1, 1, 2, 3, 0]
    found = health_of(query, target, identities=identities, weights=weights, split=split)
    kept = [i for i in range(7) if weights[i]]
    couples = [(i, j) for i in kept for j in kept if i != j]
    close = [math.exp(-2.0 * float((target[i] - target[j]).square().sum())) for i, j in couples]
    moments = target[kept].T @ target[kept] / len(kept)
    assert found["alignment"] == pytest.approx(
        sum(float((query[i] - target[i]).square().sum()) for i in kept) / len(kept)
    )
    assert found["uniformity"] == pytest.approx(math.log(sum(close) / len(close)))
    rank = moments.trace().square() / (moments @ moments).trace()
    assert found["effective_rank"] == pytest.approx(rank.item())
    alike = sum(identities[i] == identities[j] for i, j in couples)
    assert found["false_negative_ratio"] == pytest.approx(alike / len(couples))


def test_without_masking_no_candidate_is_left_out() -> None:
    axes = torch.eye(3)
    assert health_of(axes, axes, identities=[0, 0, 0], mask=False)["false_negative_ratio"] == 0.0
    assert health_of(axes, axes, identities=[0, 0, 0])["false_negative_ratio"] == 1.0


def test_a_step_without_usable_pairs_says_nothing() -> None:
    assert health_of(torch.eye(2), torch.eye(2), weights=[0.0, 0.0]) == {}
    one = health_of(torch.eye(2)[:1], torch.eye(2)[:1])
    assert set(one) == {"alignment", "effective_rank"}  # there is no other target


def test_measuring_leaves_the_gradient_alone() -> None:
    draw = torch.Generator().manual_seed(2)
    vectors = normalize(torch.randn(8, 4, generator=draw), dim=1).requires_grad_()
    pack = SimpleNamespace(
        sides=torch.tensor([0, 1] * 4),
        pair_ids=torch.arange(4).repeat_interleave(2),
        identities=torch.arange(4).repeat_interleave(2),
        pair_weights=torch.ones(8),
    )
    gradients = []
    for measures in (True, False):
        objective = Contrastive(ContrastiveConfig(temperature=0.1))
        if not measures:
            objective._measure = lambda *_: None  # type: ignore[method-assign]
        loss = objective.sums([ModelOutput(embeddings_ED=vectors)], [pack])["contrastive"]
        gradients.append(torch.autograd.grad(loss, vectors)[0])
    assert torch.equal(*gradients)


def text_pack(*, labels: list[int], tokens: int, visual: int = 0, hidden: int = 0):
    return SimpleNamespace(
        labels=torch.tensor(labels, dtype=torch.int64),
        input_ids=torch.zeros(tokens),
        image_rows=torch.zeros(visual),
        patch_rows=torch.zeros(hidden),
        patch_targets=torch.zeros(hidden, 3),
    )


def logits_for(guesses: list[int]) -> ModelOutput:
    logits = torch.zeros(len(guesses), 9)
    logits[torch.arange(len(guesses)), torch.tensor(guesses, dtype=torch.int64)] = 5.0
    return ModelOutput(logits_SV=logits, patches_RC=torch.zeros(2, 3))


def test_accuracy_and_mask_ratios_are_shares_over_all_packs() -> None:
    objective = Reconstruction(image_weight=1.0, patch_values=3)
    packs = [
        text_pack(labels=[1, 2, 3], tokens=12, visual=4, hidden=2),
        text_pack(labels=[4], tokens=10, visual=6, hidden=2),
    ]
    objective.sums([logits_for([1, 2, 8]), logits_for([4])], packs)
    found = objective.health(measured(objective))
    assert found["token_accuracy"] == pytest.approx(3 / 4)
    assert found["asked_token_ratio"] == pytest.approx(4 / (8 + 4))
    assert found["hidden_patch_ratio"] == pytest.approx(4 / 10)


def test_a_pack_without_labels_or_pictures_says_nothing_of_them() -> None:
    objective = Reconstruction()
    objective.sums([logits_for([])], [text_pack(labels=[], tokens=5)])
    assert objective.health(measured(objective)) == {"asked_token_ratio": 0.0}


def test_taking_measures_forgets_them() -> None:
    measures = Measures("a", "b")
    assert measures.take() == [0.0, 0.0]
    measures.add(b=torch.tensor(2))
    measures.add(b=torch.tensor(1.5, requires_grad=True))
    measures.add(a=2, b=1.0)
    assert measures.take() == [2.0, 4.5]
    assert measures.take() == [0.0, 0.0]


def test_tokens_that_say_the_same_have_cosine_1_and_axes_0() -> None:
    alike, axes = torch.ones(4, 8) * torch.arange(1, 5)[:, None], torch.eye(8)[:4]
    found = mean_pairwise_cosine(torch.stack([alike, axes]))
    assert found.tolist() == pytest.approx([1.0, 0.0], abs=1e-6)


def test_similarity_of_tokens_equals_a_loop_over_pairs() -> None:
    draw = torch.Generator().manual_seed(3)
    tokens = torch.randn(3, 5, 7, generator=draw, dtype=torch.bfloat16).requires_grad_()
    found = mean_pairwise_cosine(tokens)
    assert found.dtype == torch.float32
    assert not found.requires_grad
    for sample, value in zip(tokens.detach().float(), found, strict=True):
        pairs = [(i, j) for i in range(5) for j in range(5) if i != j]
        cosines = [torch.cosine_similarity(sample[i], sample[j], dim=0) for i, j in pairs]
        assert float(value) == pytest.approx(float(sum(cosines) / len(pairs)), abs=1e-5)


def test_a_lone_token_has_no_similarity() -> None:
    with pytest.raises(ValueError, match="1 tokens a sample have no pairs, expected at least 2"):
        mean_pairwise_cosine(torch.ones(2, 1, 4))
