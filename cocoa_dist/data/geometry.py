"""How pixels become patches and patches become visual tokens; no torch."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Grid = tuple[int, int, int]  # (time, height, width) of a picture, in patches

# CLIP's statistics (arXiv 2103.00020), which Qwen2-VL keeps; of values in [0, 1], red green blue.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class ImageGeometry:
    """How pixels become patches and patches become visual tokens."""

    patch_size: int  # pixels, one side
    merge: int = 2  # patches merged into one token, one side
    temporal: int = 2  # frames of a patch; a picture is repeated
    mean: tuple[float, float, float] = CLIP_MEAN  # taken off values in [0, 1]; red green blue
    std: tuple[float, float, float] = CLIP_STD  # what they are divided by then
    window: int = 0  # visual tokens, one side of an attention window; 0: the tower has none
    position_side: int = 0  # one side of the grid of learned positions; 0: the tower has none

    @property
    def factor(self) -> int:
        """Pixels of one side that a visual token covers; sides are multiples of it."""
        return self.patch_size * self.merge

    def grid(self, image: NDArray[np.uint8]) -> Grid:
        """Return (1, height, width) of a picture at the model's size, in patches."""
        return 1, image.shape[0] // self.patch_size, image.shape[1] // self.patch_size

    def num_tokens(self, height: int, width: int) -> int:
        """Visual tokens of a picture of height x width pixels at the model's size."""
        return (height // self.factor) * (width // self.factor)
