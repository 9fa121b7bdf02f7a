"""What all views of a stage share, from its recipe."""

from dataclasses import dataclass, field
from typing import Any, Literal

from cocoa_dist.config import DataConfig, ImageConfig, StageDataConfig
from cocoa_dist.data.geometry import ImageGeometry
from cocoa_dist.data.picture_cache import PictureCache


@dataclass(frozen=True)
class ViewSettings:
    """What all views of a stage share."""

    image: ImageConfig
    geometry: ImageGeometry
    max_text_tokens: int
    pictures: PictureCache = field(repr=False, compare=False)
    keywords: Literal["sample", "all", "none"] = "all"
    image_share: float = 1.0
    instruction: str = ""
    separate_views: bool = False
    max_turns: int = 10
    negatives: int = 0  # of each pair
    negatives_choice: Literal["first", "draw"] = "first"
    scored: bool = False  # read a teacher's scores of positives and negatives
    augment: bool = False  # shift and darken pictures; training only


def view_settings(
    data: DataConfig,
    *,
    geometry: ImageGeometry,
    stage: StageDataConfig | None = None,
    source: str | None = None,
    training: bool = False,
) -> ViewSettings:
    """Return a stage's settings; without `stage`, what evaluation and export need.

    `source`: whose instruction it is, where they differ; default: the first.
    """
    of_stage: dict[str, Any] = {}
    if stage is not None:
        same = {"keywords", "image_share", "separate_views", "max_turns"}
        same |= {"negatives", "negatives_choice"}
        instruction = stage.instruction_of(source or next(iter(stage.blend)))
        of_stage = {**stage.model_dump(include=same), "instruction": instruction}
    return ViewSettings(
        image=data.image,
        geometry=geometry,
        max_text_tokens=data.max_text_tokens,
        pictures=PictureCache(config=data.image, geometry=geometry),
        augment=training,
        **of_stage,
    )
