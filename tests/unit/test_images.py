"""Decoding of every kind of picture people have, refusal by name, resize, and Qwen2-VL's sizes."""

import io
import struct
import warnings
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from cocoa_dist.data import images
from cocoa_dist.data.images import Pixels, decode_image, image_size, resize_image, smart_size

MAX_PIXELS = 10**6


def encode(image: Image.Image, file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def noise(height: int = 20, width: int = 33, *, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def smooth(height: int = 200, width: int = 330) -> Image.Image:
    small = Image.fromarray(noise(height // 10, width // 10))
    return small.resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("file_format", ["PNG", "BMP", "TIFF", "WEBP"])
def test_lossless_formats_give_the_exact_pixels(file_format: str) -> None:
    options = {"lossless": True, "exact": True} if file_format == "WEBP" else {}
    data = encode(Image.fromarray(noise()), file_format, **options)
    decoded = decode_image(data, max_pixels=MAX_PIXELS)
    np.testing.assert_array_equal(decoded, noise())
    assert decoded.flags.c_contiguous
    assert decoded.flags.writeable


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(10))
def test_exif_orientation_is_applied(orientation: int, file_format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(Image.fromarray(noise()), file_format, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    decoded = decode_image(data, max_pixels=MAX_PIXELS)
    np.testing.assert_array_equal(decoded, expected)
    assert image_size(data) == decoded.shape[:2]


def test_alpha_is_put_on_white() -> None:
    color_HW3 = noise()
    alpha_HW = np.tile(np.linspace(0, 255, 33).astype(np.uint8), (20, 1))
    rgba = Image.fromarray(np.dstack([color_HW3, alpha_HW]))
    weight_HW1 = alpha_HW[:, :, None] / 255
    expected = color_HW3 * weight_HW1 + 255 * (1 - weight_HW1)
    decoded = decode_image(encode(rgba, "PNG"), max_pixels=MAX_PIXELS)
    # 1 level: Pillow composites in integers
    np.testing.assert_allclose(decoded.astype(float), expected, atol=1.01)


def test_transparent_palette_entry_is_white() -> None:
    image = Image.new("P", (4, 4), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 2), 1)
    decoded = decode_image(encode(image, "PNG", transparency=0), max_pixels=MAX_PIXELS)
    assert decoded[0, 0].tolist() == [255, 255, 255]
    assert decoded[2, 1].tolist() == [0, 0, 255]


def test_transparent_color_of_rgb_is_white() -> None:
    image = Image.new("RGB", (4, 4), (10, 20, 30))
    image.putpixel((1, 2), (9, 9, 9))
    decoded = decode_image(encode(image, "PNG", transparency=(10, 20, 30)), max_pixels=MAX_PIXELS)
    assert decoded[0, 0].tolist() == [255, 255, 255]
    assert decoded[2, 1].tolist() == [9, 9, 9]


def test_grey_with_alpha() -> None:
    decoded = decode_image(encode(Image.new("LA", (3, 2), (100, 0)), "PNG"), max_pixels=MAX_PIXELS)
    assert decoded.shape == (2, 3, 3)
    assert (decoded == 255).all()


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    source = smooth(40, 60).convert("RGB")
    if mode == "LAB":
        pytest.importorskip("PIL.ImageCms")
        image = Image.new("LAB", source.size, (128, 128, 128))
    else:
        image = source.convert(mode)
    decoded = decode_image(encode(image, "TIFF"), max_pixels=MAX_PIXELS)
    assert decoded.shape == (40, 60, 3)
    assert decoded.dtype == np.uint8


def test_sixteen_bit_grey_keeps_its_range() -> None:
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    decoded = decode_image(encode(Image.fromarray(values), "PNG"), max_pixels=MAX_PIXELS)
    assert decoded[0, :, 0].tolist() == [0, 1, 128, 255]
    assert (decoded == decoded[:, :, :1]).all()


def test_float_values_beyond_sixteen_bits_are_refused() -> None:
    data = encode(Image.fromarray(np.full((4, 4), -1.5, dtype=np.float32)), "TIFF")
    with pytest.raises(ValueError, match=r"mode F has values from -1\.5"):
        decode_image(data, max_pixels=MAX_PIXELS)


def test_cmyk_jpeg_is_close_to_its_source() -> None:
    source = Image.new("RGB", (32, 32), (200, 40, 90))
    data = encode(source.convert("CMYK"), "JPEG", quality=95)
    decoded = decode_image(data, max_pixels=MAX_PIXELS)
    # 4 levels: JPEG at quality 95 of one flat colour
    np.testing.assert_allclose(decoded.astype(int), np.asarray(source).astype(int), atol=4)


def test_the_first_frame_of_an_animation_is_taken() -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    decoded = decode_image(data, max_pixels=MAX_PIXELS)
    assert decoded[0, 0].tolist() == [255, 0, 0]


@pytest.mark.skipif(images.simplejpeg is None, reason="simplejpeg is not installed")
@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_simplejpeg_and_pillow_agree(
    subsampling: int, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"subsampling": subsampling} if mode == "RGB" else {}
    data = encode(smooth().convert(mode), "JPEG", quality=80, **options)
    fast = decode_image(data, max_pixels=MAX_PIXELS)
    monkeypatch.setattr(images, "simplejpeg", None)
    reference = decode_image(data, max_pixels=MAX_PIXELS)
    # both are libjpeg-turbo: equal where tried; 2 levels allow another build's upsampling
    np.testing.assert_allclose(fast.astype(int), reference.astype(int), atol=2)


def truncated(data: bytes) -> bytes:
    return data[: len(data) // 2]


def png_of_size(width: int, height: int) -> bytes:
    """A PNG header that claims a size, with no pixels behind it."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", r"empty \(0 bytes\)"),
    "text": (b"not a picture at all", "not a readable picture"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a readable picture"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a readable picture"),
    "truncated_png": (truncated(encode(Image.fromarray(noise()), "PNG")), "truncated or damaged"),
    "truncated_jpeg": (truncated(encode(smooth(), "JPEG")), "truncated or damaged"),
    "truncated_webp": (truncated(encode(smooth(), "WEBP")), "readable picture|truncated"),
    "no_pixels": (png_of_size(8, 8), "truncated or damaged"),
    "zero_width": (png_of_size(0, 8), "zero size|not a readable picture"),
    "zero_height": (png_of_size(8, 0), "zero size|not a readable picture"),
    "over_the_limit": (png_of_size(1001, 1000), "too large: 1000x1001 is 1001000 pixels"),
    "bomb": (png_of_size(20000, 20000), "too large"),
    "pillow_warns": (png_of_size(10000, 10000), "too large"),
    "wide": (png_of_size(2010, 10), "aspect ratio: 10x2010, expected at most 200:1"),
    "tall": (png_of_size(1, 201), "aspect ratio: 201x1"),
}


@pytest.mark.parametrize(("data", "message"), BAD.values(), ids=BAD)
def test_a_bad_picture_is_refused_by_name(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode_image(data, max_pixels=MAX_PIXELS)


def test_the_size_is_read_without_decoding() -> None:
    assert image_size(png_of_size(30, 20)) == (20, 30)


def test_the_largest_allowed_picture_and_aspect_are_decoded() -> None:
    data = encode(Image.new("RGB", (200, 1)), "PNG")
    assert decode_image(data, max_pixels=200).shape == (1, 200, 3)


@settings(max_examples=150, deadline=None)
@given(
    source=st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"]),
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), max_size=6),
    keep=st.floats(0, 1),
)
def test_damage_gives_pixels_or_a_value_error(
    source: str, flips: list[tuple[float, int]], keep: float
) -> None:
    data = bytearray(encode(Image.fromarray(noise()), source))
    for where, mask in flips:
        data[int(where * len(data))] ^= mask
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns about damaged metadata; not our subject
        try:
            decoded = decode_image(bytes(data[: int(keep * len(data))]), max_pixels=MAX_PIXELS)
        except ValueError:
            return
    assert decoded.ndim == 3
    assert decoded.shape[2] == 3
    assert decoded.dtype == np.uint8


@pytest.mark.parametrize(("height", "width"), [(56, 84), (10, 400), (300, 300), (1, 1)])
def test_resize_is_pillows_antialiased_bicubic(height: int, width: int) -> None:
    source = smooth()
    expected = np.asarray(source.resize((width, height), Image.Resampling.BICUBIC))
    resized = resize_image(np.asarray(source), height=height, width=width)
    assert resized.shape == (height, width, 3)
    # 2 levels: both round their fixed-point weights and the result of each pass
    np.testing.assert_allclose(resized.astype(int), expected.astype(int), atol=2)


def test_resize_to_the_same_size_is_free() -> None:
    image = noise()
    assert resize_image(image, height=20, width=33) is image


def test_resize_accepts_views() -> None:
    flipped = noise()[::-1, ::2]
    expected = resize_image(np.ascontiguousarray(flipped), height=8, width=8)
    np.testing.assert_array_equal(resize_image(flipped, height=8, width=8), expected)


@pytest.mark.parametrize(
    ("image", "height", "message"),
    [
        (np.zeros((4, 4), np.uint8), 2, r"uint8 \(4, 4\), expected uint8 \(H, W, 3\)"),
        (np.zeros((4, 4, 3), np.float32), 2, "float32"),
        (np.zeros((4, 4, 3), np.uint8), 0, "0x2: both sides"),
    ],
)
def test_resize_refuses(image: Any, height: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resize_image(image, height=height, width=2)


@settings(max_examples=500, deadline=None)
@given(
    height=st.integers(1, 5000),
    width=st.integers(1, 5000),
    factor=st.sampled_from([16, 28, 32]),
    limits=st.sampled_from([(1024, 1024), (3136, 1003520), (50176, 200704), (1, 10**9)]),
)
def test_smart_size_is_transformers_rule(
    height: int, width: int, factor: int, limits: tuple[int, int]
) -> None:
    low, high = limits
    ours = {"factor": factor, "min_pixels": low, "max_pixels": high}
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(ValueError, match="aspect ratio"):
            smart_size(height, width, **ours)
        return
    assert smart_size(height, width, **ours) == smart_resize(height, width, **ours)


@pytest.mark.parametrize(
    "wrong", [{"factor": 0}, {"min_pixels": 10, "max_pixels": 9}, {"min_pixels": 0}]
)
def test_smart_size_refuses(wrong: dict[str, int]) -> None:
    values = {"factor": 28, "min_pixels": 3136, "max_pixels": 10**6, **wrong}
    with pytest.raises(ValueError, match="expected positive numbers"):
        smart_size(100, 100, **values)
