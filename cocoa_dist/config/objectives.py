"""The fields of a stage's objective: what it minimises."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from cocoa_dist.config.fields import Positive, Ratio, Strict


class ReconstructionConfig(Strict):
    """Masked text cross-entropy and masked patch error."""

    kind: Literal["reconstruction"] = "reconstruction"
    text_mask_ratio: Ratio = 0.2
    image_mask_ratio: Ratio = 0.0
    image_loss_weight: Annotated[float, Field(ge=0.0)] = 0.5
    label_shift: bool = True  # predict a masked token from the hidden state before it
    normalise_patches: bool = False  # per-patch normalised targets
    context_mask_ratio: Ratio = 0.0  # of CONTEXT beside a TARGET; hidden, and never asked for
    mask_replacement: Literal["gaussian", "learned"] = "gaussian"  # of hidden visual tokens
    mask_sampling: Literal["bernoulli", "exact"] = "bernoulli"  # exact: a share's count
    text_mask_span: Positive = 1  # neighbouring tokens that are hidden together
    image_mask_block: Positive = 1  # side of the squares of visual tokens hidden together

    @model_validator(mode="after")
    def _something_is_replaced(self) -> "ReconstructionConfig":
        if self.mask_replacement == "learned" and not (
            self.image_mask_ratio or self.context_mask_ratio
        ):
            raise ValueError(
                "mask_replacement learned is of hidden visual tokens, and image_mask_ratio and "
                "context_mask_ratio are 0: raise one, or leave it gaussian"
            )
        return self


class NextTokenConfig(Strict):
    """Next-token cross-entropy over the supervised tokens."""

    kind: Literal["next_token"] = "next_token"


class GradCacheConfig(Strict):
    """GradCache (arXiv 2101.06983): memory of one chunk, for one more forward pass."""

    mode: Literal["auto", "always", "never"] = "auto"  # auto: where a rank has several chunks
    packs: Positive = 1  # of a chunk


STAGE_START = "stage_start"  # `guide` of a stage: its model as it began


class ContrastiveConfig(Strict):
    """Queries against the candidates of all ranks: targets, and hard negatives (data.negatives)."""

    kind: Literal["contrastive"] = "contrastive"
    loss: Literal["infonce", "sigmoid"] = "infonce"  # sigmoid: arXiv 2303.15343
    temperature: Annotated[float, Field(gt=0.0)] = 0.05
    learnable_temperature: bool = False  # begins at `temperature`; the sigmoid's bias learns too
    max_scale: Annotated[float, Field(gt=0.0)] = 100.0  # a learnt 1 / temperature stays below
    bias: float = -10.0  # of the sigmoid loss
    symmetric: bool = False  # also target to query
    mask_false_negatives: bool = True
    # Candidates more similar to the query than its target by more than this are no negatives, by
    # what the model says itself (arXiv 2506.05176, eq. 1, has 0.1).
    false_negative_margin: Annotated[float, Field(ge=-2.0, le=2.0)] | None = None
    # The same by a frozen model, `stage_start` or a folder: what it finds more similar than the
    # target by more than the margin (arXiv 2402.16829 has 0).
    guide: str | None = None
    guide_margin: Annotated[float, Field(ge=-2.0, le=2.0)] = 0.0
    # Prefixes of the embedding that are trained to serve alone (arXiv 2205.13147), and their parts
    # in the loss; default: equal ones.
    matryoshka: Annotated[tuple[Positive, ...], Field(max_length=8)] = ()
    matryoshka_weights: tuple[Annotated[float, Field(gt=0.0)], ...] = ()
    distillation_weight: Annotated[float, Field(ge=0.0)] = 0.0  # KL to meta.scores of the records
    teacher_temperature: Annotated[float, Field(gt=0.0)] = 0.05
    grad_cache: GradCacheConfig = GradCacheConfig()

    @model_validator(mode="after")
    def _options_fit(self) -> "ContrastiveConfig":
        dims, parts = self.matryoshka, self.matryoshka_weights
        if list(dims) != sorted(set(dims)):
            raise ValueError(f"matryoshka is {list(dims)}, expected growing dimensions")
        if parts and len(parts) != len(dims):
            raise ValueError(
                f"matryoshka_weights has {len(parts)} values for {len(dims)} dimensions in "
                "matryoshka, expected as many, or none"
            )
        if self.guide_margin and self.guide is None:
            raise ValueError(
                f"guide_margin is {self.guide_margin} and there is no guide: name one, "
                f"{STAGE_START} or a folder, or take the margin out (that of the model itself is "
                "false_negative_margin)"
            )
        if self.learnable_temperature and 1.0 / self.temperature > self.max_scale:
            raise ValueError(
                f"temperature {self.temperature} is a scale of {1.0 / self.temperature:g}, more "
                f"than max_scale {self.max_scale:g}: a learnable one could never leave its limit"
            )
        if self.loss == "sigmoid" and self.symmetric:
            raise ValueError(
                "the sigmoid loss scores every pair of the batch once, so symmetric=true would "
                "count it twice: take it out"
            )
        return self


ObjectiveConfig = Annotated[
    ReconstructionConfig | NextTokenConfig | ContrastiveConfig, Field(discriminator="kind")
]
