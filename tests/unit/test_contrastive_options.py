"""Every option of the contrastive objective against slow loops over queries and candidates."""

import math
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from cocoa_dist.config import ContrastiveConfig
from cocoa_dist.model.embedder import ModelOutput
from cocoa_dist.objectives.contrastive import Contrastive
from cocoa_dist.objectives.matching import similarities

PAIRS, NEGATIVES, WIDTH = 6, 2, 8
IDENTITY = [7, 3, 7, 9, 3, 1]  # pairs 0 and 2, 1 and 4 are the same thing
USABLE = [1.0, 1.0, 1.0, 0.0, 1.0, 1.0]
# Identities and contents of negatives: one is another query's target by name, one by content.
NEGATIVE_IDENTITY = [[50, 51], [7, 53], [54, 55], [56, 57], [58, 59], [60, 61]]
NEGATIVE_CONTENT = [[150, 151], [152, 153], [101, 155], [156, 157], [158, 159], [160, 161]]
CONTENT = [100, 101, 102, 103, 104, 105]
THERE = [[1.0, 1.0], [1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [1.0, 1.0], [0.0, 0.0]]
OPTIONS = {
    "plain": {},
    "symmetric": {"symmetric": True},
    "no masks": {"mask_false_negatives": False},
    "margin": {"false_negative_margin": 0.1},
    "margin, symmetric": {"false_negative_margin": 0.0, "symmetric": True},
    "matryoshka": {"matryoshka": (2, 4, 8), "symmetric": True},
    "matryoshka, weighted": {"matryoshka": (3, 8), "matryoshka_weights": (1.0, 3.0)},
    "sigmoid": {"loss": "sigmoid", "bias": -2.0},
    "sigmoid, matryoshka": {"loss": "sigmoid", "bias": -2.0, "matryoshka": (4, 8)},
    "sigmoid, margin": {"loss": "sigmoid", "bias": -1.0, "false_negative_margin": 0.2},
    "guide": {"guide": "stage_start"},
    "guide and margin": {
        "guide": "stage_start",
        "guide_margin": 0.05,
        "false_negative_margin": 0.1,
        "symmetric": True,
    },
    "distillation": {"distillation_weight": 0.5, "teacher_temperature": 0.3},
}


@dataclass
class Made:
    """Embeddings (pairs, 2 + K, ...) of float64, and how a rank sees them."""

    vectors: torch.Tensor
    scores: torch.Tensor  # (pairs, 1 + K)
    packs: list
    outputs: list
    similarity: torch.Tensor | None


def made(
    *,
    negatives: int,
    split: bool = True,
    scale: torch.Tensor | None = None,
    shape: tuple[int, ...] = (WIDTH,),
) -> Made:
    """`shape` of an embedding: (width,), or (vectors, width)."""
    generator = torch.Generator().manual_seed(1)
    sides = 2 + negatives
    vectors = torch.randn(PAIRS, sides, *shape, generator=generator, dtype=torch.float64)
    vectors = F.normalize(vectors, dim=-1).requires_grad_()
    scores = torch.rand(PAIRS, sides - 1, generator=generator)
    scores[4] = math.nan  # a record without scores
    rows = [(pair, side) for pair in range(PAIRS) for side in range(sides)]
    order = torch.randperm(len(rows), generator=generator).tolist()
    cut = len(rows) // 3 if split else len(rows)
    packs, outputs = [], []
    for part in (order[:cut], order[cut:]):
        if not part:
            continue
        chosen = [rows[i] for i in part]
        packs.append(pack_of(chosen, scores))
        at = torch.tensor(chosen)
        outputs.append(ModelOutput(embeddings_ED=vectors[at[:, 0], at[:, 1]], similarity=scale))
    return Made(vectors, scores, packs, outputs, scale)


def pack_of(rows, scores):
    fields = {"sides": [], "pair_ids": [], "identities": [], "contents": [], "pair_weights": []}
    found = []
    for pair, side in rows:
        hard = side >= 2
        k = side - 2
        fields["sides"].append(side)
        fields["pair_ids"].append(pair)
        fields["identities"].append(NEGATIVE_IDENTITY[pair][k] if hard else IDENTITY[pair])
        fields["contents"].append(NEGATIVE_CONTENT[pair][k] if hard else CONTENT[pair])
        fields["pair_weights"].append(USABLE[pair] * (THERE[pair][k] if hard else 1.0))
        absent = side == 0 or (hard and not THERE[pair][k])
        found.append(math.nan if absent else scores[pair, side - 1].item())
    return SimpleNamespace(
        **{name: torch.tensor(values) for name, values in fields.items()},
        scores=torch.tensor(found),
    )


def guide_vectors(vectors: torch.Tensor) -> torch.Tensor:
    """What a guide makes of what a model makes `vectors` of: something like it."""
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(vectors.shape, generator=generator, dtype=vectors.dtype)
    return F.normalize(vectors.detach() + 0.3 * noise, dim=-1)


def guide_of(objective: Contrastive, found: Made) -> None:
    """Give an objective that guide."""

    def embed(pack) -> torch.Tensor:
        return guide[pack.pair_ids, pack.sides]

    guide = guide_vectors(found.vectors)
    objective.guide = embed


def slow(found: Made, config: ContrastiveConfig, *, negatives: int, temperature, bias):
    """Each term, candidate by candidate."""
    sizes = config.matryoshka or (WIDTH,)
    names = [f"contrastive_{size}" for size in config.matryoshka] or ["contrastive"]
    terms = {}
    for name, size in zip(names, sizes, strict=True):
        total = found.vectors.new_zeros(())
        for reverse in (False, True) if config.symmetric else (False,):
            for query in range(PAIRS):
                if USABLE[query]:
                    total = total + one_query(
                        found.vectors,
                        query,
                        config,
                        size=size,
                        reverse=reverse,
                        negatives=0 if reverse else negatives,
                        temperature=temperature,
                        bias=bias,
                    )
        terms[name] = total
    if config.distillation_weight:
        terms["distillation"] = distilled(found, config, negatives, temperature)
    return terms


def one_query(vectors, query, config, *, size, reverse, negatives, temperature, bias):
    left, right = (1, 0) if reverse else (0, 1)
    places = [(j, right) for j in range(PAIRS)]
    places += [(j, 2 + k) for j in range(PAIRS) for k in range(negatives)]
    own_cosine = similar(vectors[query, left], vectors[query, right])
    chosen = []
    for j, side in places:
        if (j, side) == (query, right):
            chosen.append((j, side))
            continue
        if side >= 2:
            usable = USABLE[j] and THERE[j][side - 2]
            same = (
                NEGATIVE_IDENTITY[j][side - 2] == IDENTITY[query]
                or NEGATIVE_CONTENT[j][side - 2] == CONTENT[query]
            )
        else:
            usable, same = USABLE[j], IDENTITY[j] == IDENTITY[query]
        margin = config.false_negative_margin
        close = margin is not None and (
            similar(vectors[query, left], vectors[j, side]) > own_cosine + margin
        )
        if config.guide is not None:
            guide = guide_vectors(vectors)
            own_guided = similar(guide[query, left], guide[query, right])
            guided = similar(guide[query, left], guide[j, side])
            close = close or guided > own_guided + config.guide_margin
        if usable and not (same and config.mask_false_negatives) and not close:
            chosen.append((j, side))
    cut = (lambda v: F.normalize(v[..., :size], dim=-1)) if config.matryoshka else (lambda v: v)
    unit = [cut(vectors[j, side]) for j, side in chosen]
    start = cut(vectors[query, left])
    scores = torch.stack([similar(start, one) / temperature for one in unit])
    own = chosen.index((query, right))
    if config.loss == "sigmoid":
        signs = [1.0 if index == own else -1.0 for index in range(len(chosen))]
        logs = [F.logsigmoid(sign * (s + bias)) for sign, s in zip(signs, scores, strict=True)]
        return -torch.stack(logs).sum()
    return scores.logsumexp(0) - scores[own]


def similar(asks, answers):
    """Cosine; of several vectors the mean of each one's best match."""
    if asks.dim() == 1:
        return asks @ answers
    best = [max((one @ other for other in answers), key=lambda one: one.item()) for one in asks]
    return torch.stack(best).mean()


def distilled(found: Made, config, negatives, temperature):
    total = found.vectors.new_zeros(())
    for query in range(PAIRS):
        if not USABLE[query] or found.scores[query, 0].isnan():
            continue
        sides = [1] + [2 + k for k in range(negatives) if THERE[query][k]]
        teacher = torch.stack([found.scores[query, side - 1] for side in sides]).double()
        teacher = (teacher / config.teacher_temperature).softmax(0)
        vectors = found.vectors
        student = torch.stack([similar(vectors[query, 0], vectors[query, s]) for s in sides])
        student = student / temperature
        total = total + (teacher * (teacher.log() - student.log_softmax(0))).sum()
    return total


@pytest.mark.parametrize("shape", [(WIDTH,), (3, WIDTH)], ids=["one vector", "three"])
@pytest.mark.parametrize("negatives", [0, NEGATIVES])
@pytest.mark.parametrize("option", OPTIONS)
def test_terms_and_gradients_equal_loops_over_candidates(option, negatives, shape) -> None:
    config = ContrastiveConfig(temperature=0.2, **OPTIONS[option])
    found = made(negatives=negatives, shape=shape)
    objective = Contrastive(config, negatives=negatives)
    guide_of(objective, found)
    terms = objective.sums(found.outputs, found.packs)
    expected = slow(found, config, negatives=negatives, temperature=0.2, bias=config.bias)
    assert terms.keys() == expected.keys() == objective.weights.keys()
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value, rtol=1e-6, atol=1e-7, msg=name)
        if not value.requires_grad or (name == "distillation" and not negatives):
            continue
        pair = [
            torch.autograd.grad(x, found.vectors, retain_graph=True)[0]
            for x in (terms[name], value)
        ]
        torch.testing.assert_close(*pair, rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize("option", ["plain", "matryoshka", "sigmoid", "distillation"])
def test_a_trained_scale_gets_its_gradient_through_every_pack(option) -> None:
    config = ContrastiveConfig(temperature=0.2, learnable_temperature=True, **OPTIONS[option])
    scale = torch.tensor([5.0, -2.0], dtype=torch.float64, requires_grad=True)
    found = made(negatives=NEGATIVES, scale=scale)
    objective = Contrastive(config, negatives=NEGATIVES)
    terms = objective.sums(found.outputs, found.packs)
    expected = slow(found, config, negatives=NEGATIVES, temperature=1.0 / scale[0], bias=scale[1])
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value, rtol=1e-6, atol=1e-7)
        pair = [torch.autograd.grad(x, scale, retain_graph=True)[0] for x in (terms[name], value)]
        torch.testing.assert_close(*pair, rtol=1e-6, atol=1e-7)
    measured = dict(zip(objective.measures.names, objective.measures.take(), strict=True))
    health = objective.health(measured)
    assert health["temperature"] == pytest.approx(0.2)
    assert health["similarity_bias"] == pytest.approx(-2.0)


def test_several_vectors_are_measured_as_one_end_to_end() -> None:
    found = made(negatives=NEGATIVES, shape=(3, WIDTH))
    flat = [
        ModelOutput(embeddings_ED=output.embeddings_ED.flatten(1) / 3**0.5)
        for output in found.outputs
    ]
    health = []
    for outputs in (found.outputs, flat):
        objective = Contrastive(ContrastiveConfig(mask_false_negatives=False), negatives=NEGATIVES)
        objective.sums(outputs, found.packs)
        taken = objective.measures.take()
        health.append(objective.health(dict(zip(objective.measures.names, taken, strict=True))))
    for name in ("alignment", "uniformity", "effective_rank"):
        assert health[0][name] == pytest.approx(health[1][name])


def test_what_asks_sums_over_its_own_vectors() -> None:
    """Late interaction asks in one direction: the best match of each vector that asks."""
    x, y = torch.eye(2)
    both, same = torch.stack([x, y]), torch.stack([x, x])
    assert similarities(same[None], both[None]).item() == pytest.approx(1.0)
    assert similarities(both[None], same[None]).item() == pytest.approx(0.5)


def test_counts_are_those_of_usable_queries_and_of_scored_ones() -> None:
    config = ContrastiveConfig(distillation_weight=1.0, symmetric=True, matryoshka=(4, 8))
    found = made(negatives=NEGATIVES)
    counts = Contrastive(config, negatives=NEGATIVES).counts(found.packs)
    assert counts == {"contrastive_4": 10.0, "contrastive_8": 10.0, "distillation": 4.0}


def test_the_loss_is_the_weighted_mean_over_dimensions() -> None:
    config = ContrastiveConfig(matryoshka=(3, 8), matryoshka_weights=(1.0, 3.0))
    assert Contrastive(config).weights == {"contrastive_3": 0.25, "contrastive_8": 0.75}


def test_what_is_left_out_and_missing_is_measured() -> None:
    found = made(negatives=NEGATIVES)
    objective = Contrastive(ContrastiveConfig(), negatives=NEGATIVES)
    objective.sums(found.outputs, found.packs)
    measured = dict(zip(objective.measures.names, objective.measures.take(), strict=True))
    assert measured["wanted"] == 10.0  # five usable pairs
    assert measured["missing"] == 3.0  # one of pair 1, both of pair 5
    assert measured["hard_couples"] == 5 * 7.0
    # the negative of pair 1 is what 0 and 2 look for, that of pair 2 is the target of pair 1
    assert measured["hard_left_out"] == 3.0
    health = objective.health(measured)
    assert health["missing_negative_ratio"] == pytest.approx(0.3)
    assert health["hidden_negative_ratio"] == pytest.approx(3 / 35)
    assert "temperature" not in health


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"matryoshka": (8, 4)}, "growing dimensions"),
        ({"matryoshka": (4, 4)}, "growing dimensions"),
        ({"matryoshka": (4, 8), "matryoshka_weights": (1.0,)}, "1 values for 2 dimensions"),
        ({"temperature": 0.005, "learnable_temperature": True}, "more than max_scale 100"),
        ({"loss": "sigmoid", "symmetric": True}, "count it twice"),
        ({"false_negative_margin": 3.0}, "less than or equal to 2"),
        ({"guide_margin": 0.1}, "there is no guide: name one"),
    ],
)
def test_options_that_do_not_fit_are_refused(fields, words) -> None:
    with pytest.raises(ValidationError, match=words):
        ContrastiveConfig(**fields)


def test_a_step_without_any_scores_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    objective = Contrastive(ContrastiveConfig(distillation_weight=1.0), negatives=NEGATIVES)
    found = made(negatives=NEGATIVES)
    for pack in found.packs:
        pack.scores.fill_(torch.nan)
    for _ in range(2):
        objective.sums(found.outputs, found.packs)
        taken = objective.measures.take()
        objective.health(dict(zip(objective.measures.names, taken, strict=True)))
    assert caplog.text.count("mine the data again") == 1
