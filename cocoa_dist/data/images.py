"""Encoded pictures to pixels: decoding that refuses by name, antialiased resize, Qwen2-VL's sizes.

Every decoded picture is uint8 RGB in (height, width, 3), upright, with transparency over white.
No torchvision (it breaks CPU builds of torch), and torch only where pixels are resized.
"""

import io
import math
import re
import warnings
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

try:  # half the time of Pillow on a JPEG; optional
    import simplejpeg
except ImportError:
    simplejpeg = None

Pixels = NDArray[np.uint8]  # (H, W, 3) RGB

MAX_ASPECT_RATIO = 200  # as in Qwen2-VL's processor
# Formats that Pillow decodes in process. EPS, which would start Ghostscript, is not among them.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # JPEG covers MPO, from cameras
_SIGNATURES = (
    *((b"\x89PNG", "PNG"), (b"\xff\xd8", "JPEG"), (b"GIF8", "GIF"), (b"BM", "BMP")),
    *((b"II*\0", "TIFF"), (b"MM\0*", "TIFF"), (b"II+\0", "TIFF"), (b"MM\0+", "TIFF")),
)
_ADDRESS = re.compile(r" ?<_io\.BytesIO object at 0x\w+>")  # a reason must be the same each time
_EXIF_ORIENTATION = 0x0112

# EXIF orientation to the operation that puts the picture upright; 1 and unknown values do nothing.
_UPRIGHT: dict[int, Callable[[Pixels], Pixels]] = {
    2: lambda image: image[:, ::-1],
    3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1],
    5: lambda image: image.swapaxes(0, 1),
    6: lambda image: image.swapaxes(0, 1)[:, ::-1],
    7: lambda image: image[::-1, ::-1].swapaxes(0, 1),
    8: lambda image: image.swapaxes(0, 1)[::-1],
}
_SWAPS_SIDES = frozenset({5, 6, 7, 8})


def decode_image(data: bytes, *, max_pixels: int) -> Pixels:
    """Decode the first frame of an encoded picture to (H, W, 3) uint8 RGB.

    `max_pixels` bounds height * width and is checked before any pixel is decoded.
    Raises ValueError that says which: empty, not a picture, too large, zero size, absurd aspect
    ratio, truncated, or unsupported pixel values.
    """
    with _open(data) as header:
        check_size(height=header.height, width=header.width, max_pixels=max_pixels)
        orientation = _orientation(header)
        pixels = _decode_jpeg(data, header) if header.format == "JPEG" else None
        if pixels is None:
            pixels = _decode_with_pillow(header)
    if orientation in _UPRIGHT:
        pixels = _UPRIGHT[orientation](pixels)
    return np.ascontiguousarray(pixels)


def image_size(data: bytes) -> tuple[int, int]:
    """Return (height, width) of the upright picture, from the header alone.

    Raises ValueError if the header is not that of a picture of a known format.
    """
    with _open(data) as header:
        height, width = header.height, header.width
        return (width, height) if _orientation(header) in _SWAPS_SIDES else (height, width)


def check_size(*, height: int, width: int, max_pixels: int) -> None:
    """Raise ValueError, naming which, for zero size, too many pixels, and an absurd aspect."""
    if height < 1 or width < 1:
        raise ValueError(f"image has zero size: {height}x{width}")
    if height * width > max_pixels:
        raise ValueError(
            f"image is too large: {height}x{width} is {height * width} pixels, "
            f"expected at most {max_pixels}"
        )
    _check_aspect(height, width)


def picture_format(data: bytes) -> str | None:
    """Return the format that the first bytes tell, without opening it; None if none of ours."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    return next((name for start, name in _SIGNATURES if data.startswith(start)), None)


def resize_image(image: Pixels, *, height: int, width: int) -> Pixels:
    """Resize (H, W, 3) uint8 to (height, width, 3), bicubic with antialiasing.

    Returns `image` itself, not a copy, if it has that size already.
    torch on uint8 in channels_last: 2.9 ms for 1024x768 -> 672x504, Pillow 14.5 ms.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"image is {image.dtype} {image.shape}, expected uint8 (H, W, 3)")
    if height < 1 or width < 1:
        raise ValueError(f"cannot resize to {height}x{width}: both sides must be at least 1")
    if image.shape[:2] == (height, width):
        return image
    import torch  # here, so that writing and reading shards neither needs nor waits for it

    writable = image if image.flags.writeable else image.copy()  # torch warns about read-only
    packed = torch.from_numpy(np.ascontiguousarray(writable))
    strides = (packed.numel(), 1, *packed.stride()[:2])  # channels last, and so is the result
    tensor = packed.as_strided((1, 3, *packed.shape[:2]), strides)
    resized = torch.nn.functional.interpolate(
        tensor, size=(height, width), mode="bicubic", antialias=True
    )
    result: Pixels = resized.squeeze(0).permute(1, 2, 0).contiguous().numpy()
    return result


def smart_size(
    height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """Return Qwen2-VL's input size (height, width) for a picture (arXiv 2409.12191, section 2.1).

    Both sides are multiples of `factor` (patch size times merge size); their product lies in
    [min_pixels, max_pixels] unless one side is already a single factor; the aspect ratio is kept
    as far as that allows.
    """
    if min(height, width, factor, min_pixels) < 1 or max_pixels < min_pixels:
        raise ValueError(
            f"height {height}, width {width}, factor {factor}, pixels {min_pixels} to {max_pixels}:"
            " expected positive numbers and min_pixels <= max_pixels"
        )
    _check_aspect(height, width)
    rounded = round(height / factor) * factor, round(width / factor) * factor
    area = rounded[0] * rounded[1]
    if area > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        return (
            max(factor, math.floor(height / shrink / factor) * factor),
            max(factor, math.floor(width / shrink / factor) * factor),
        )
    if area < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        return (
            math.ceil(height * grow / factor) * factor,
            math.ceil(width * grow / factor) * factor,
        )
    return rounded


def _open(data: bytes) -> Image.Image:
    """Read the header. Below Pillow's own limit, sizes are our callers' to judge."""
    if not data:
        raise ValueError("image is empty (0 bytes)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise ValueError(f"image is too large: {error}") from error
    except Exception as error:  # Pillow's plugins raise whatever their parser met
        kind = picture_format(data)
        if kind is None:
            raise ValueError(
                f"image of {len(data)} bytes starting with {data[:8]!r} is not a readable picture, "
                f"expected one of {', '.join(FORMATS)}"
            ) from error
        if kind == "PNG" and b"\0\0\0\0" in (data[16:20], data[20:24]):
            raise ValueError("image has zero size, says the header of this PNG") from error
        raise ValueError(
            f"image of {len(data)} bytes begins as {kind} and cannot be opened, it is truncated or "
            f"damaged: {_reason(error)}"
        ) from error


def _orientation(header: Image.Image) -> int:
    """Return the EXIF orientation, if it stands before the pixels (as cameras write it).

    The base class is called because PNG's own getexif decodes all pixels to look behind them.
    TIFF counts as upright: Pillow turns it while loading and reports the size after the turn.
    """
    if header.format == "TIFF":
        return 1
    try:
        value = Image.Image.getexif(header).get(_EXIF_ORIENTATION, 1)
    except Exception as error:  # as above
        raise ValueError(f"image has broken EXIF data ({_reason(error)})") from error
    return value if isinstance(value, int) else 1


def _check_aspect(height: int, width: int) -> None:
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise ValueError(
            f"image has an absurd aspect ratio: {height}x{width}, "
            f"expected at most {MAX_ASPECT_RATIO}:1"
        )


def _decode_jpeg(data: bytes, header: Image.Image) -> Pixels | None:
    """Decode RGB and grey JPEG with simplejpeg; None means: Pillow, the reference, shall decide.

    simplejpeg is strict about harmless warnings, so its refusal is not the last word.
    """
    if simplejpeg is None or header.mode not in ("RGB", "L"):
        return None
    try:
        pixels: Pixels = simplejpeg.decode_jpeg(data, colorspace="RGB")
    except ValueError:
        return None
    return pixels


def _decode_with_pillow(image: Image.Image) -> Pixels:
    try:
        image.load()
        if image.mode.startswith(("I", "F")):
            return _from_wide_grey(np.asarray(image), mode=image.mode)
        if image.has_transparency_data:
            top = image if image.mode == "RGBA" else image.convert("RGBA")
            image = Image.new("RGB", top.size, (255, 255, 255))
            image.paste(top, mask=top)  # as alpha_composite, in a fifth of the time
        return np.array(image.convert("RGB"), dtype=np.uint8)
    except Exception as error:  # truncated data shows as OSError, SyntaxError, struct.error, ...
        raise ValueError(
            f"image ({image.format}, mode {image.mode}, {image.height}x{image.width}) cannot be "
            f"decoded, it is truncated or damaged: {_reason(error)}"
        ) from error


def _from_wide_grey(grey_HW: NDArray[np.generic], *, mode: str) -> Pixels:
    """Map grey values of 16 bits, [0, 65535], to [0, 255] in three equal channels."""
    values_HW = grey_HW.astype(np.float64)
    low, high = float(values_HW.min()), float(values_HW.max())
    if not (low >= 0 and high <= 65535):
        raise ValueError(f"mode {mode} has values from {low} to {high}, expected 16 bits")
    scaled_HW = np.rint(values_HW / 257).astype(np.uint8)
    return np.repeat(scaled_HW[:, :, None], 3, axis=2)


def _reason(error: Exception) -> str:
    text = _ADDRESS.sub("", str(error)).splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__
