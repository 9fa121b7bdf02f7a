"""Pictures as the model takes them, decoded once: in every pass the same ones come again."""

import hashlib
from collections import OrderedDict

from cocoa_dist.config import ImageConfig
from cocoa_dist.data.geometry import ImageGeometry
from cocoa_dist.data.images import Pixels, decode_image, resize_image, smart_size


class PictureCache:
    """Decoded pictures at the model's size, the least recently used dropped first.

    Keyed by content, so that one picture in two data sets is decoded once.
    """

    def __init__(self, *, config: ImageConfig, geometry: ImageGeometry) -> None:
        self._config = config
        self._geometry = geometry
        self.num_shrunk = 0  # pictures asked for so far that had more than max_pixels
        self._kept: OrderedDict[bytes, tuple[Pixels, bool]] = OrderedDict()
        self._num_bytes = 0

    def load(self, data: bytes) -> Pixels:
        """Return the decoded and resized picture, read-only. Raises ValueError by name."""
        key = hashlib.blake2b(data, digest_size=16).digest()
        found = self._kept.get(key)
        if found is not None:
            self._kept.move_to_end(key)
            self.num_shrunk += found[1]
            return found[0]
        decoded = decode_image(data, max_pixels=self._config.max_decoded_pixels)
        picture = self.fit(decoded)
        picture.setflags(write=False)
        shrunk = decoded.shape[0] * decoded.shape[1] > self._config.max_pixels
        self.num_shrunk += shrunk
        self._kept[key] = picture, shrunk
        self._num_bytes += picture.nbytes
        while self._num_bytes > self._config.cache_bytes:
            _, (dropped, _) = self._kept.popitem(last=False)
            self._num_bytes -= dropped.nbytes
        return picture

    @property
    def factor(self) -> int:
        """Pixels of one side that a visual token covers."""
        return self._geometry.factor

    def fit(self, image: Pixels) -> Pixels:
        """Resize to the model's size; a picture that has it is returned as it is."""
        height, width = self.model_size(*image.shape[:2])
        return resize_image(image, height=height, width=width)

    def model_size(self, height: int, width: int) -> tuple[int, int]:
        """Return (height, width) in pixels of a picture of that size at the model's input."""
        return smart_size(
            height,
            width,
            factor=self._geometry.factor,
            min_pixels=self._config.min_pixels,
            max_pixels=self._config.max_pixels,
        )
