"""How many parameters a stage has and trains, from its shape and its recipe."""

from cocoa_dist.config import ReconstructionConfig, StageConfig
from launcher.plan.shapes import ModelShape


def trainable_parameters(stage: StageConfig, *, shape: ModelShape) -> int:
    """Parameters of a stage that the optimizer holds."""
    if stage.adapter is not None:
        with_vision = not stage.freeze_vision
        return shape.adapter_parameters(stage.adapter, with_vision=with_vision) + extra_parameters(
            stage, shape
        )
    frozen = shape.vision.parameters if stage.freeze_vision else 0
    return shape.parameters - frozen + extra_parameters(stage, shape)


def extra_parameters(stage: StageConfig, shape: ModelShape) -> int:
    """Parameters that a stage has beside the backbone's: decoder, learnt tokens, learnt mask."""
    objective, learnt = stage.objective, shape.learnt_tokens
    if not isinstance(objective, ReconstructionConfig):
        return learnt * shape.text.width
    learnt += objective.mask_replacement == "learned"
    decoder = shape.decoder_parameters if objective.image_mask_ratio > 0 else 0
    return decoder + learnt * shape.text.width
