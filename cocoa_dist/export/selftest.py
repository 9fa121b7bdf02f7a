"""Self-test of an exported folder: inputs with their vectors, stored beside the model.

The vectors come from training, the check goes through `SentenceTransformer(path).encode`: if they
agree, tokens, pictures, attention, pooling and weights all survived the export.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch.nn import functional as F
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from cocoa_dist.export.templates import MINIMUM_TRANSFORMERS, SEVERAL_VECTORS, ImageSettings

if TYPE_CHECKING:
    from sentence_transformers import MultiVectorEncoder, SentenceTransformer

    Encoder = SentenceTransformer | MultiVectorEncoder

SELF_TEST_NAME = "selftest.json"
SELF_TEST_FOLDER = "selftest"
DEFAULT_TOLERANCE = 1e-4
LEAST_COSINE = 0.9999  # of vectors in half precision, where sums of another order differ by 1e-2


@dataclass(frozen=True)
class SelfTestVector:
    """One input and the vector the trained model gives it. Text or picture or both are set."""

    text: str | None
    image: Image.Image | Path | None
    instruction: str | None
    vector: np.ndarray  # (D,) float32, L2 norm 1; (K, D) of a model of several vectors

    def __post_init__(self) -> None:
        if self.text is None and self.image is None:
            raise ValueError("self-test vector: text and image are both None, set at least one")
        vector = np.asarray(self.vector)
        if vector.ndim not in (1, 2) or not np.isfinite(vector).all():
            raise ValueError(
                "self-test vector: need one finite vector of shape (D,), or several (K, D), got "
                f"shape {vector.shape} with {int((~np.isfinite(vector)).sum())} values that are "
                "not finite"
            )


@dataclass(frozen=True)
class SelfTestReport:
    """What check_self_test measured; differences are max absolute ones between two vectors.

    A model in half precision is judged by cosines, any other by differences.
    """

    differences: tuple[float, ...]  # one per entry of selftest.json, in its order
    names: tuple[str, ...]  # what each entry is, for messages
    tolerance: float
    cosines: tuple[float, ...] = ()
    half_precision: bool = False

    @property
    def max_difference(self) -> float:
        """The largest difference; NaN if any is."""
        return float(np.max(self.differences))

    @property
    def min_cosine(self) -> float:
        """The smallest cosine between a vector and what it should be; NaN if any is."""
        return float(np.min(self.cosines))

    @property
    def passed(self) -> bool:
        """Whether every entry is within tolerance (NaN is not)."""
        if self.half_precision:
            return all(cosine >= LEAST_COSINE for cosine in self.cosines)
        return all(difference <= self.tolerance for difference in self.differences)

    def describe(self) -> str:
        """One line: how many entries failed and which was worst."""
        if self.half_precision:
            failed = sum(not cosine >= LEAST_COSINE for cosine in self.cosines)
            worst = int(np.argmin(self.cosines))
            return (
                f"{failed} of {len(self.cosines)} self-test entries have a cosine below "
                f"{LEAST_COSINE:g}; worst: {self.names[worst]} with {self.cosines[worst]:.6f}"
            )
        failed = sum(not difference <= self.tolerance for difference in self.differences)
        worst = int(np.argmax(self.differences))
        return (
            f"{failed} of {len(self.differences)} self-test entries differ by more than "
            f"{self.tolerance:g}; worst: {self.names[worst]} by {self.differences[worst]:.3g}"
        )


def check_self_test(path: Path, *, tolerance: float = DEFAULT_TOLERANCE) -> SelfTestReport:
    """Load the folder with SentenceTransformer and compare what it encodes with selftest.json.

    Needs sentence-transformers (extra `export`). Runs on CPU in the dtype of the weights; in half
    precision cosines of 0.9999 are asked for, and `tolerance` of nothing. Raises ValueError if
    selftest.json is missing, empty or malformed; a vector that differs is not an error here but
    `report.passed == False`.
    """
    return compare(load_encoder(path), path, tolerance=tolerance)


def compare(encoder: "Encoder", path: Path, *, tolerance: float) -> SelfTestReport:
    """check_self_test with a model that is already loaded."""
    entries = _read_entries(path)
    differences, cosines = [], []
    for index, entry in enumerate(entries):
        picture = entry["image"] and _open_inside(path, entry["image"])
        found = encode_one(encoder, entry["text"], picture or None, entry["instruction"])
        expected = np.asarray(entry["vector"], dtype=np.float64)
        if found.shape != expected.shape:
            raise ValueError(
                f"{path / SELF_TEST_NAME}: vector of entry {index} has shape {expected.shape}, "
                f"the model gives {found.shape}: the file belongs to another model"
            )
        differences.append(float(np.abs(found - expected).max()))
        lengths = np.linalg.norm(found, axis=-1) * np.linalg.norm(expected, axis=-1)
        cosines.append(float(((found * expected).sum(axis=-1) / lengths).min()))
    return SelfTestReport(
        cosines=tuple(cosines),
        half_precision=next(encoder.parameters()).dtype.itemsize < torch.float32.itemsize,
        differences=tuple(differences),
        names=tuple(_name(index, entry) for index, entry in enumerate(entries)),
        tolerance=tolerance,
    )


def load_encoder(path: Path, *, layer_by_layer: bool = False) -> "Encoder":
    """SentenceTransformer of a local folder on CPU; nothing is looked up elsewhere.

    Of a folder for late interaction it is a MultiVectorEncoder. `layer_by_layer`: weights stay in
    their files, each is read when it is used, every time.
    """
    settings = {"device_map": {"": "disk"}} if layer_by_layer else None
    kind = encoder_class(path)
    encoder: Encoder = kind(str(path), device="cpu", local_files_only=True, model_kwargs=settings)
    return encoder


def encoder_class(path: Path) -> Any:
    """Return the class of sentence-transformers that loads a folder. ValueError if it has none."""
    refuse_old_transformers(path)
    # Here and not at the top: exporting without verification works without the extra `export`.
    import sentence_transformers

    name = SEVERAL_VECTORS if has_several_vectors(path) else "SentenceTransformer"
    found = getattr(sentence_transformers, name, None)
    if found is None:
        raise ValueError(
            f"{path} needs {name} of sentence-transformers, version "
            f"{sentence_transformers.__version__} has none: install 6.2 or newer"
        )
    return found


def refuse_old_transformers(path: Path) -> None:
    """Raise ValueError where this environment's transformers would run the folder as another model.

    Versions before 5.4 make a bidirectional model causal, some for a part of its inputs and without
    a word; later ones miss weights with a warning. See templates.MINIMUM_TRANSFORMERS.
    """
    numbers = [int(part) for part in re.findall(r"\d+", transformers.__version__)[:2]]
    if numbers >= [int(part) for part in MINIMUM_TRANSFORMERS.split(".")]:
        return
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    direction = "causal"
    if config.get("text_config", {}).get("is_causal", True) is False:
        direction = "bidirectional, which older versions ignore in silence"
    raise ValueError(
        f"{path} needs transformers >= {MINIMUM_TRANSFORMERS}, found {transformers.__version__}: "
        f"its text model is {direction}; install a newer transformers"
    )


def has_several_vectors(path: Path) -> bool:
    """Whether a folder's embeddings are several vectors, for late interaction."""
    file = path / "config_sentence_transformers.json"
    if not file.is_file():
        return False
    found = json.loads(file.read_text(encoding="utf-8"))
    return isinstance(found, dict) and found.get("model_type") == SEVERAL_VECTORS


def refuse_several_vectors(path: Path, *, needed_by: str, instead: str) -> None:
    """Raise ValueError for a folder whose embeddings are several vectors, saying what to do."""
    if has_several_vectors(path):
        raise ValueError(
            f"{path}: its embeddings are several vectors each (pooling late_interaction), "
            f"{needed_by} takes one each: {instead}"
        )


def encode_one(
    encoder: "Encoder",
    text: str | None,
    picture: Image.Image | None,
    instruction: str | None,
) -> np.ndarray:
    """One vector (D,), or several (K, D), float64.

    Always of a dict: a bare string may be taken for a picture's path.
    """
    parts: dict[str, Any] = {}
    if picture is not None:
        parts["image"] = picture
    if text is not None:
        parts["text"] = text
    vectors_BD = encoder.encode([parts], prompt=instruction, show_progress_bar=False)
    return np.asarray(vectors_BD[0], dtype=np.float64)


def write_self_test(
    folder: Path, vectors: Sequence[SelfTestVector], settings: ImageSettings
) -> None:
    """Write selftest.json and selftest/*.png; pictures at the model's own input size.

    Resizing differs a little between libraries; a picture that needs none tests the model alone.
    """
    entries = []
    for index, item in enumerate(vectors):
        name = None
        if item.image is not None:
            name = f"{SELF_TEST_FOLDER}/{index:04d}.png"
            (folder / SELF_TEST_FOLDER).mkdir(exist_ok=True)
            to_model_size(open_picture(item.image), settings).save(folder / name)
        entries.append(
            {
                "text": item.text,
                "image": name,
                "instruction": item.instruction,
                "vector": np.asarray(item.vector, dtype=np.float32).tolist(),
            }
        )
    (folder / SELF_TEST_NAME).write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")


def resize_difference(
    encoder: "Encoder", vectors: Sequence[SelfTestVector], settings: ImageSettings
) -> float | None:
    """Max absolute difference of vectors when Pillow resizes a picture instead of training's torch.

    A picture already at the model's size is doubled first. None without pictures.
    """
    worst = None
    for item in vectors:
        if item.image is None:
            continue
        picture = open_picture(item.image)
        if picture.size == model_size(picture, settings):
            doubled = (2 * picture.width, 2 * picture.height)
            picture = picture.resize(doubled, Image.Resampling.BICUBIC)
        by_torch = encode_one(encoder, None, to_model_size(picture, settings), None)
        by_pillow = encode_one(encoder, None, picture, None)
        worst = max(worst or 0.0, float(np.abs(by_torch - by_pillow).max()))
    return worst


def open_picture(image: Image.Image | Path) -> Image.Image:
    """RGB picture; transparency is put over white, as in training."""
    if isinstance(image, Path):
        with Image.open(image) as opened:
            opened.load()
            return open_picture(opened)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def model_size(picture: Image.Image, settings: ImageSettings) -> tuple[int, int]:
    """(width, height) in pixels that the image processor gives the picture."""
    height, width = smart_resize(
        picture.height,
        picture.width,
        factor=settings.factor,
        min_pixels=settings.min_pixels,
        max_pixels=settings.max_pixels,
    )
    return width, height


def steady_picture(picture: Image.Image, settings: ImageSettings) -> Image.Image:
    """Resize a picture to a size that the image processor leaves as it is, as near as there is one.

    The model's own size need not be: where few pixel counts are allowed, 112 x 84 becomes 32 x 16,
    and that 48 x 32. Raises ValueError if the settings leave no size alone.
    """
    resized = to_model_size(picture, settings)
    if model_size(resized, settings) == resized.size:
        return resized
    sides = [settings.factor * n for n in range(1, settings.max_tokens + 1)]
    steady = [
        (width, height)
        for width in sides
        for height in sides
        if settings.min_pixels <= width * height <= settings.max_pixels
    ]
    if not steady:
        raise ValueError(
            f"no picture has {settings.min_pixels} to {settings.max_pixels} pixels in sides of "
            f"whole {settings.factor} pixels: widen data.image.min_pixels or max_pixels"
        )
    shape = math.log(picture.width / picture.height)
    nearest = min(steady, key=lambda size: (abs(math.log(size[0] / size[1]) - shape), size))
    return _resized(picture, *nearest)


def to_model_size(picture: Image.Image, settings: ImageSettings) -> Image.Image:
    """Resize as training does: torch's antialiased bicubic on uint8, channels last."""
    return _resized(picture, *model_size(picture, settings))


def _resized(picture: Image.Image, width: int, height: int) -> Image.Image:
    if (width, height) == picture.size:
        return picture
    pixels_HWC = torch.from_numpy(np.array(picture, dtype=np.uint8))
    pixels_BCHW = pixels_HWC.permute(2, 0, 1)[None]  # strides stay channels-last
    resized_BCHW = F.interpolate(
        pixels_BCHW, size=(height, width), mode="bicubic", antialias=True, align_corners=False
    )
    return Image.fromarray(resized_BCHW[0].permute(1, 2, 0).contiguous().numpy())


def _read_entries(path: Path) -> list[dict[str, Any]]:
    file = path / SELF_TEST_NAME
    if not file.is_file():
        raise ValueError(f"{file} does not exist: {path} is no folder written by export_folder")
    entries = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{file}: expected a list with at least one entry; export the model again")
    for index, entry in enumerate(entries):
        missing = {"text", "image", "instruction", "vector"} - set(entry)
        if missing:
            raise ValueError(f"{file}: entry {index} has no {sorted(missing)}; export again")
    return entries


def _open_inside(path: Path, name: str) -> Image.Image:
    """Open the picture `name` of the folder; ValueError if the name leads out of it."""
    file = (path / name).resolve()
    if not file.is_relative_to(path.resolve()) or not file.is_file():
        raise ValueError(
            f"{path / SELF_TEST_NAME}: image {name!r} is not a file inside {path}; export again"
        )
    return open_picture(file)


def _name(index: int, entry: dict[str, Any]) -> str:
    kinds = [kind for kind in ("instruction", "image", "text") if entry[kind] is not None]
    return f"entry {index} ({' + '.join(kinds)})"
