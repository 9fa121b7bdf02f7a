#!/usr/bin/env python3
"""Search a folder of pictures by words or by a picture: an index, a command and a web page.

    pip install sentence-transformers pillow faiss-cpu nicegui
    python examples/search_pictures.py index PICTURES --model MODEL --index INDEX
    python examples/search_pictures.py find INDEX --model MODEL --text "an octopus"
    python examples/search_pictures.py find INDEX --model MODEL --picture photo.jpg
    python examples/search_pictures.py serve INDEX --model MODEL

MODEL is a folder that cocoa_dist exported, or any model of sentence-transformers that reads both
texts and pictures. Nothing of cocoa_dist is used here. `index` is run again after pictures came
or went. The page of `serve` is for this machine alone unless --host says otherwise, loads nothing
from elsewhere, and shows indexed pictures only.
"""

import argparse
import io
import json
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
PROBE = "a text whose vector tells one model from another"
SAME_VECTOR = 0.999  # cosine: another machine or library differs less, another model far more
UNREADABLE = (
    OSError,
    ValueError,
    SyntaxError,
    UnidentifiedImageError,
    Image.DecompressionBombError,
)


@dataclass(frozen=True)
class Found:
    """A picture of the index and its cosine with what was asked for."""

    number: int
    file: Path
    score: float


@dataclass(frozen=True)
class Listing:
    """What lies beside the vectors: whose they are."""

    model: str  # as it was named, for messages
    probe: list[float]  # the model's vector of PROBE
    folder: str  # absolute; `files` are below it, in the order of the vectors
    files: list[str]
    left_out: dict[str, str]  # file: why it could not be read


class Searcher:
    """A model, and the pictures it has indexed. Its methods may be called from any thread."""

    def __init__(self, model: Any, index: Any, listing: Listing) -> None:
        self.model, self.index, self.listing = model, index, listing
        self._lock = threading.Lock()  # one query at a time

    def by_text(self, text: str, *, count: int) -> list[Found]:
        """Return the `count` pictures that are nearest to a text, best first."""
        return self._nearest(self._embed({"text": text}), count)

    def by_picture(self, picture: Image.Image, *, count: int) -> list[Found]:
        """Return the `count` pictures that are nearest to another one, best first."""
        return self._nearest(self._embed({"image": picture}), count)

    def like(self, number: int, *, count: int) -> list[Found]:
        """Return the pictures nearest to an indexed one, which comes first; needs no model."""
        return self._nearest(self.index.reconstruct(number)[None], count)

    def file(self, number: int) -> Path:
        """Return the file of an indexed picture."""
        return Path(self.listing.folder, self.listing.files[number])

    def _embed(self, query: dict[str, Any]) -> np.ndarray:
        with self._lock:
            return embed(self.model, [query])

    def _nearest(self, vector_1D: np.ndarray, count: int) -> list[Found]:
        scores, numbers = self.index.search(vector_1D, min(count, self.index.ntotal))
        return [
            Found(int(number), self.file(number), float(score))
            for number, score in zip(numbers[0], scores[0], strict=True)
        ]


def load_model(name: str) -> Any:
    """Load a model. Raises ValueError if it is none that reads texts and pictures.

    Nor may it give several vectors each: they would be averaged, which nobody has trained.
    """
    settings = Path(name, "config_sentence_transformers.json")
    if settings.is_file() and "MultiVectorEncoder" in settings.read_text(encoding="utf-8"):
        raise ValueError(
            f"{name} gives several vectors for each input, for late interaction, and the index "
            "holds one each: take a model of single vectors"
        )
    from sentence_transformers import SentenceTransformer

    try:
        model = SentenceTransformer(name)
    except Exception as error:  # of many kinds: no such folder, no network, a broken file
        raise ValueError(f"{name} is no model that sentence-transformers loads: {error}") from error
    missing = {"text", "image"} - set(getattr(model, "modalities", ()))
    if missing:
        raise ValueError(
            f"{name} does not read {' and '.join(sorted(missing))}: take another model"
        )
    return model


def embed(model: Any, inputs: list[dict[str, Any]]) -> np.ndarray:
    """Return vectors (N, D) of length 1, float32. A text is always given as {"text": ...}.

    A bare string that names a picture file, or a URL, would be read as that picture.
    """
    vectors = model.encode(inputs, normalize_embeddings=True, show_progress_bar=False)
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    if not np.isfinite(vectors).all():
        raise ValueError("the model gives vectors that are not numbers: its weights are damaged")
    return vectors


def read_picture(source: Path | io.BytesIO) -> Image.Image:
    """Return a picture, upright. Raises one of UNREADABLE."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)  # more than 89 megapixels
        try:
            with Image.open(source) as picture:
                picture.load()
                upright = ImageOps.exif_transpose(picture)
        except Image.DecompressionBombWarning as error:
            raise ValueError(str(error)) from error
    return upright.convert("RGBA" if upright.has_transparency_data else "RGB")


def find_files(folder: Path) -> list[str]:
    """Return the pictures below a folder, as paths inside it. Raises ValueError if none is."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: name the one with your pictures")
    files = sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES and path.is_file()
    )
    if not files:
        raise ValueError(f"{folder} has no pictures: looked for {', '.join(sorted(SUFFIXES))}")
    return files


def build_index(model: Any, *, name: str, folder: Path, destination: Path, batch: int) -> Listing:
    """Embed all pictures below a folder, write the index; what cannot be read is left out.

    Raises ValueError if no picture can be read.
    """
    import faiss
    from tqdm import tqdm

    files, left_out = find_files(folder), {}
    kept: list[str] = []
    vectors: list[np.ndarray] = []
    with tqdm(total=len(files), desc="pictures", unit="", disable=None) as bar:
        for part in parts(files, batch):
            pictures = []
            for file in part:
                try:
                    pictures.append({"image": read_picture(folder / file)})
                    kept.append(file)
                except UNREADABLE as error:
                    left_out[file] = str(error) or type(error).__name__
            if pictures:
                vectors.append(embed(model, pictures))
            bar.update(len(part))
    if not kept:
        raise ValueError(f"none of {len(files)} files of {folder} can be read: {left_out}")
    index = faiss.IndexFlatIP(vectors[0].shape[1])  # exact; IndexHNSWFlat from a million on
    index.add(np.concatenate(vectors))
    probe = embed(model, [{"text": PROBE}])[0].tolist()
    listing = Listing(name, probe, str(folder.resolve()), kept, left_out)
    destination.mkdir(parents=True, exist_ok=True)
    (destination / "index.json").unlink(missing_ok=True)  # what was cut short is no index
    faiss.write_index(index, str(destination / "vectors.faiss"))
    (destination / "index.json").write_text(json.dumps(asdict(listing)), encoding="utf-8")
    return listing


def parts(files: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    """Yield the files in pieces of at most `size`."""
    for start in range(0, len(files), size):
        yield files[start : start + size]


def open_index(folder: Path, *, model: Any, name: str) -> Searcher:
    """Return a searcher. Raises ValueError if there is no index, or if another model made it."""
    import faiss

    try:
        listing = Listing(**json.loads((folder / "index.json").read_text(encoding="utf-8")))
        index = faiss.read_index(str(folder / "vectors.faiss"))
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{folder} is no index, build one with `index`: {error}") from error
    probe, known = embed(model, [{"text": PROBE}])[0], np.array(listing.probe, dtype=np.float32)
    if probe.shape != known.shape or float(probe @ known) < SAME_VECTOR:
        raise ValueError(
            f"{folder} was made with another model ({listing.model}) than {name}: "
            "their vectors do not compare; name that model, or run `index` again"
        )
    if index.ntotal != len(listing.files):
        raise ValueError(
            f"{folder}: {index.ntotal} vectors, {len(listing.files)} files; rebuild it"
        )
    return Searcher(model, index, listing)


def serve(searcher: Searcher, *, host: str, port: int, count: int) -> None:
    """Show the page until Ctrl-C."""
    from fastapi import HTTPException
    from fastapi.responses import FileResponse
    from nicegui import app, ui

    @app.get("/picture/{number}")
    def picture(number: int) -> FileResponse:
        if not 0 <= number < len(searcher.listing.files) or not searcher.file(number).is_file():
            raise HTTPException(404, "no such picture: it may have gone since it was indexed")
        return FileResponse(searcher.file(number))

    def page() -> None:
        draw_page(searcher, count)

    ui.run(page, host=host, port=port, title="Search pictures", reload=False, show=False)


def draw_page(searcher: Searcher, count: int) -> None:
    """Draw what one visitor sees: a field for words, one for a picture, and a grid of results."""
    from nicegui import events, run, ui

    def show(results: list[Found], what: str) -> None:
        heading.set_text(what)
        grid.clear()
        with grid:
            for found in results:
                with (
                    ui.card()
                    .tight()
                    .classes("result cursor-pointer")
                    .tooltip("click: more like this")
                    .on("click", lambda found=found: more(found))
                ):
                    ui.image(f"/picture/{found.number}").classes("w-36 h-36").props("fit=contain")
                    ui.label(found.file.stem).classes("name w-36 px-2 truncate text-sm")
                    ui.label(f"{found.score:.3f}").classes("px-2 pb-1 text-xs text-gray-500")

    def more(found: Found) -> None:
        show(searcher.like(found.number, count=count), f"like {found.file.name}")

    async def search() -> None:
        text = (words.value or "").strip()
        if text:
            results = await run.io_bound(searcher.by_text, text, count=count)
            show(results, f"\N{LEFT DOUBLE QUOTATION MARK}{text}\N{RIGHT DOUBLE QUOTATION MARK}")

    async def search_upload(upload: events.UploadEventArguments) -> None:
        try:
            asked = read_picture(io.BytesIO(await upload.file.read()))
        except UNREADABLE as error:
            ui.notify(f"{upload.file.name} cannot be read: {error}", type="negative")
            return
        results = await run.io_bound(searcher.by_picture, asked, count=count)
        show(results, f"like {upload.file.name}")

    ui.add_css(".q-uploader__list { display: none }")
    with ui.column().classes("w-full max-w-5xl mx-auto"):
        ui.label("Search pictures").classes("text-2xl")
        folder = Path(searcher.listing.folder)
        ui.label(f"{len(searcher.listing.files)} pictures of {folder.name}").classes(
            "text-gray-500"
        ).tooltip(str(folder))
        with ui.row().classes("w-full items-center"):
            words = ui.input("what is in the picture").classes("grow").props("autofocus clearable")
            words.on("keydown.enter", search)
            ui.button("Search", on_click=search)
        ui.upload(label="or drop a picture here", auto_upload=True, on_upload=search_upload).props(
            'accept="image/*" flat bordered'
        ).classes("w-full")
        heading = ui.label().classes("heading text-lg")
        grid = ui.row().classes("grid-of-results")


def command_line() -> argparse.ArgumentParser:
    """Return the parser of the three commands."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    index = commands.add_parser("index", help="embed all pictures below a folder")
    index.add_argument("pictures", type=Path, help="folder, looked through with all below it")
    index.add_argument("--index", type=Path, required=True, help="folder to write")
    index.add_argument("--batch", type=int, default=32, help="pictures at a time (32)")
    find = commands.add_parser("find", help="print the pictures that are nearest to a query")
    find.add_argument("index", type=Path, help="folder that `index` wrote")
    query = find.add_mutually_exclusive_group(required=True)
    query.add_argument("--text", help="what is in the picture")
    query.add_argument("--picture", type=Path, help="a picture that they are to be like")
    page = commands.add_parser("serve", help="a web page to search from")
    page.add_argument("index", type=Path, help="folder that `index` wrote")
    page.add_argument("--host", default="127.0.0.1", help="0.0.0.0: all who reach this machine")
    page.add_argument("--port", type=int, default=8080)
    for command in (index, find, page):
        command.add_argument("--model", required=True, help="folder or name of the model")
    for command in (find, page):
        command.add_argument("--count", type=int, default=12, help="pictures to show (12)")
    return parser


def answer(options: argparse.Namespace) -> None:
    """Do what the command line says. Raises ValueError for what is wrong with its input."""
    if options.command == "index":
        find_files(options.pictures)  # before the model is loaded
    model = load_model(options.model)
    if options.command == "index":
        listing = build_index(
            model,
            name=options.model,
            folder=options.pictures,
            destination=options.index,
            batch=options.batch,
        )
        for file, why in listing.left_out.items():
            print(f"left out: {file}: {why}", file=sys.stderr)
        print(f"{options.index}: {len(listing.files)} pictures, {len(listing.left_out)} left out")
        return
    searcher = open_index(options.index, model=model, name=options.model)
    if options.command == "serve":
        serve(searcher, host=options.host, port=options.port, count=options.count)
        return
    if options.picture is None:
        results = searcher.by_text(options.text, count=options.count)
    else:
        try:
            picture = read_picture(options.picture)
        except UNREADABLE as error:
            raise ValueError(f"{options.picture} cannot be read: {error}") from error
        results = searcher.by_picture(picture, count=options.count)
    for found in results:
        print(f"{found.score:6.3f}  {found.file}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what was asked; returns the exit code (2: bad input, 130: stopped by hand)."""
    try:
        answer(command_line().parse_args(arguments))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
