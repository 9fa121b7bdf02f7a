"""InfoNCE against a slow loop over queries and candidates."""

import math
from types import SimpleNamespace

import pytest
import torch

from cocoa_dist.config import ContrastiveConfig
from cocoa_dist.model.embedder import ModelOutput
from cocoa_dist.objectives.contrastive import QUERY, TARGET, Contrastive

TEMPERATURE = 0.1


def packs_of(pairs: int, *, split: bool, seed: int = 0):
    """Embeddings of `pairs` pairs, shuffled over one pack or two, as a rank sees them."""
    generator = torch.Generator().manual_seed(seed)
    rows = [(pair, side) for pair in range(pairs) for side in (QUERY, TARGET)]
    order = torch.randperm(len(rows), generator=generator).tolist()
    vectors = torch.randn(len(rows), 8, generator=generator, dtype=torch.float64)
    vectors = torch.nn.functional.normalize(vectors, dim=-1).requires_grad_()
    cut = len(rows) // 3 if split else len(rows)
    identities = [7, 3, 7, 9, 3, 1][:pairs]  # pairs 0 and 2, 1 and 4 are the same thing
    weights = [1.0, 1.0, 1.0, 0.0, 1.0, 1.0][:pairs]  # pair 3 could not be used
    packs, outputs = [], []
    for part in (order[:cut], order[cut:]):
        if not part:
            continue
        chosen = [rows[i] for i in part]
        packs.append(
            SimpleNamespace(
                sides=torch.tensor([side for _, side in chosen]),
                pair_ids=torch.tensor([pair for pair, _ in chosen]),
                identities=torch.tensor([identities[pair] for pair, _ in chosen]),
                pair_weights=torch.tensor([weights[pair] for pair, _ in chosen]),
            )
        )
        outputs.append(ModelOutput(embeddings_ED=vectors[part]))
    return vectors, packs, outputs, identities, weights


def slow(vectors, identities, weights, *, symmetric: bool, mask: bool):
    """Sum of -log p over usable queries, candidate by candidate."""
    query, target = vectors[0::2], vectors[1::2]
    total = vectors.new_zeros(())
    directions = [(query, target), (target, query)] if symmetric else [(query, target)]
    for left, right in directions:
        for i in range(len(left)):
            if not weights[i]:
                continue
            candidates = [
                j
                for j in range(len(right))
                if j == i or (weights[j] and not (mask and identities[j] == identities[i]))
            ]
            scores = torch.stack([left[i] @ right[j] / TEMPERATURE for j in candidates])
            total = total + scores.logsumexp(0) - scores[candidates.index(i)]
    return total


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("split", [False, True])
def test_sum_and_gradient_equal_a_loop_over_candidates(symmetric, mask, split) -> None:
    vectors, packs, outputs, identities, weights = packs_of(6, split=split)
    objective = Contrastive(
        ContrastiveConfig(temperature=TEMPERATURE, symmetric=symmetric, mask_false_negatives=mask)
    )
    found = objective.sums(outputs, packs)["contrastive"]
    expected = slow(vectors, identities, weights, symmetric=symmetric, mask=mask)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(x, vectors, retain_graph=True)[0] for x in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)
    usable = 5 * (2 if symmetric else 1)
    assert objective.counts(packs) == {"contrastive": float(usable)}


def test_a_target_drawn_by_another_record_is_no_negative() -> None:
    """The second pair's target is one of several of its record, and the first one's own."""
    vectors = torch.nn.functional.normalize(torch.ones(6, 8), dim=-1)
    pack = SimpleNamespace(
        sides=torch.tensor([0, 1] * 3),
        pair_ids=torch.tensor([0, 0, 1, 1, 2, 2]),
        identities=torch.tensor([5, 5, 6, 5, 8, 8]),
        pair_weights=torch.ones(6),
    )
    objective = Contrastive(ContrastiveConfig(temperature=1.0))
    found = objective.sums([ModelOutput(embeddings_ED=vectors)], [pack])["contrastive"]
    assert found.item() == pytest.approx(2 * math.log(2) + math.log(3))


def test_same_thing_is_no_negative() -> None:
    """Two pairs with one identity and one pair beside them: each sees one negative only."""
    vectors = torch.nn.functional.normalize(torch.ones(6, 8), dim=-1)
    pack = SimpleNamespace(
        sides=torch.tensor([0, 1] * 3),
        pair_ids=torch.tensor([0, 0, 1, 1, 2, 2]),
        identities=torch.tensor([5, 5, 5, 5, 8, 8]),
        pair_weights=torch.ones(6),
    )
    objective = Contrastive(ContrastiveConfig(temperature=1.0))
    found = objective.sums([ModelOutput(embeddings_ED=vectors)], [pack])["contrastive"]
    assert found.item() == pytest.approx(2 * math.log(2) + math.log(3))
