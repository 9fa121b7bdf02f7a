"""The example that searches pictures: its commands, what it refuses, and its page in a browser.

Needs the extra `examples` and Debian's chromium for all but its refusals. For the picture in the
documentation, name a trained model, a folder of pictures, and the file to write:

    COCOA_SEARCH_MODEL=runs/quickstart/export/quickstart COCOA_SEARCH_PICTURES=FOLDER \\
    COCOA_SCREENSHOT=docs/search_pictures.png pytest tests/unit/test_search_pictures.py -k page
"""

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from browser import Page, open_page
from PIL import Image
from tiny_exports import tiny_export

from cocoa_dist.data.shards import ShardReader
from cocoa_dist.export.templates import sentence_transformers_config

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "search_pictures.py"
QUERY = "cat face: cat, kitten, pet"
NAMES = "[...document.querySelectorAll('.result .name')].map(e => e.textContent)"
# faiss's wrapper has classes without a module, and models are loaded as users load them.
pytestmark = pytest.mark.filterwarnings("ignore")


def example():
    spec = importlib.util.spec_from_file_location("search_pictures", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def need(*packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed: pip install -e .[examples]")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    if "COCOA_SEARCH_MODEL" in os.environ:
        return Path(os.environ["COCOA_SEARCH_MODEL"]).resolve()
    return tiny_export(tmp_path_factory.mktemp("export") / "tiny")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Forty drawings named by what they show, one file that is none, and one cut short."""
    if "COCOA_SEARCH_PICTURES" in os.environ:
        return Path(os.environ["COCOA_SEARCH_PICTURES"]).resolve()
    folder = tmp_path_factory.mktemp("pictures")
    reader = ShardReader(ROOT / "cocoa_dist/assets/emoji/unseen_concept")
    for number in range(40):
        record = reader.record(number)
        place = folder / record.meta["group"]
        place.mkdir(exist_ok=True)
        (place / f"{record.meta['name']}.webp").write_bytes(record.images[0])
    (folder / "notes.jpg").write_text("no picture at all")
    (folder / "cut.webp").write_bytes(record.images[0][:100])
    (folder / "read me.txt").write_text("not looked at")
    reader.close()
    return folder


@pytest.fixture(scope="module")
def index(model, pictures, tmp_path_factory) -> Path:
    need("faiss")
    folder = tmp_path_factory.mktemp("index") / "made"
    command = ["index", str(pictures), "--model", str(model), "--index", str(folder)]
    assert example().main(command) == 0
    return folder


def found(printed: str) -> list[Path]:
    return [Path(line.split(maxsplit=1)[1]) for line in printed.splitlines()]


# -------------------------------------------------------------------------- without other packages


def test_help_names_the_three_commands():
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), "--help"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0
    assert all(word in done.stdout for word in ("index", "find", "serve", "pip install"))


@pytest.mark.parametrize(
    ("make", "said"), [(True, "has no pictures: looked for .bmp"), (False, "is not a folder")]
)
def test_a_folder_without_pictures_is_refused_before_a_model_is_loaded(
    tmp_path, capsys, make, said
):
    folder = tmp_path / "empty"
    if make:
        folder.mkdir()
        (folder / "notes.txt").write_text("x")
    command = ["index", str(folder), "--model", "nowhere", "--index", str(tmp_path / "index")]
    assert example().main(command) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "index").exists()


@pytest.mark.slow  # the first import of sentence-transformers
def test_a_model_that_is_none_is_refused_by_name(tmp_path, capsys):
    pytest.importorskip("sentence_transformers")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "model").mkdir()
    command = ["index", str(tmp_path), "--model", str(tmp_path / "model")]
    assert example().main([*command, "--index", str(tmp_path / "index")]) == 2
    assert f"{tmp_path / 'model'} is no model" in capsys.readouterr().err


# -------------------------------------------------------------------------------------- with faiss


@pytest.mark.slow
def test_a_model_of_several_vectors_is_refused(tmp_path):
    """sentence-transformers would load it all the same, with the mean of all tokens."""
    written = sentence_transformers_config({}, pooling="late_interaction")
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(written))
    with pytest.raises(ValueError, match="several vectors for each input"):
        example().load_model(str(tmp_path))


def test_unreadable_pictures_are_named_and_left_out(index, pictures):
    listing = json.loads((index / "index.json").read_text())
    if "COCOA_SEARCH_PICTURES" not in os.environ:
        assert set(listing["left_out"]) == {"notes.jpg", "cut.webp"}
        assert len(listing["files"]) == 40


@pytest.mark.slow
def test_results_are_those_of_a_plain_ranking(index, model, pictures, capsys):
    from sentence_transformers import SentenceTransformer

    command = ["find", str(index), "--model", str(model), "--count", "7", "--text", QUERY]
    assert example().main(command) == 0
    files = json.loads((index / "index.json").read_text())["files"]
    plain = SentenceTransformer(str(model))
    vectors = plain.encode([{"image": Image.open(pictures / file)} for file in files])
    scores = vectors @ plain.encode([{"text": QUERY}])[0]
    best = np.argsort(-scores)[:7]
    assert found(capsys.readouterr().out) == [pictures / files[number] for number in best]


@pytest.mark.slow
def test_a_picture_finds_itself_first(index, model, pictures, capsys):
    file = pictures / json.loads((index / "index.json").read_text())["files"][17]
    command = ["find", str(index), "--model", str(model), "--picture", str(file)]
    assert example().main(command) == 0
    printed = capsys.readouterr().out
    assert found(printed)[0] == file
    assert printed.split()[0] == "1.000"


@pytest.mark.slow
def test_a_query_that_is_no_picture_is_refused(index, model, tmp_path, capsys):
    (tmp_path / "query.png").write_text("words")
    command = ["find", str(index), "--model", str(model), "--picture", str(tmp_path / "query.png")]
    assert example().main(command) == 2
    assert "query.png cannot be read" in capsys.readouterr().err


@pytest.mark.slow
def test_an_index_of_another_model_is_refused(index, tmp_path, capsys):
    def other_weights(backbone):
        for parameter in backbone.parameters():
            parameter.neg_()

    other = tiny_export(tmp_path / "other", change=other_weights)
    assert example().main(["find", str(index), "--model", str(other), "--text", "x"]) == 2
    said = capsys.readouterr().err
    assert f"{index} was made with another model" in said
    assert str(other) in said


@pytest.mark.slow
def test_what_is_no_index_is_refused(model, tmp_path, capsys):
    need("faiss")
    assert example().main(["find", str(tmp_path), "--model", str(model), "--text", "x"]) == 2
    assert f"{tmp_path} is no index" in capsys.readouterr().err


# ------------------------------------------------------------------------------------ in a browser


@pytest.fixture(scope="module")
def address(index, model) -> Iterator[str]:
    need("nicegui", "websockets")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, str(EXAMPLE), "serve", index, "--model", model, "--port", str(port)],
        env={key: value for key, value in os.environ.items() if not key.startswith("PYTEST")},
    )
    try:
        wait_for_page(f"http://127.0.0.1:{port}/", server)
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.terminate()
        server.wait(timeout=30)


def wait_for_page(address: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while True:
        assert server.poll() is None, f"the server ended with code {server.returncode}"
        assert time.monotonic() < deadline
        try:
            urllib.request.urlopen(address, timeout=10).close()
            return
        except (urllib.error.URLError, TimeoutError):
            time.sleep(0.1)


@pytest.fixture(scope="module")
def page(address, tmp_path_factory) -> Iterator[Page]:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed: apt-get install chromium")
    profile = tmp_path_factory.mktemp("profile")
    with open_page(address, chromium=chromium, profile=profile, size=(1000, 900)) as opened:
        opened.wait_for("!!document.querySelector('input[type=file]') && window.did_handshake")
        yield opened


@pytest.mark.slow
def test_the_page_shows_the_pictures_of_a_typed_query(page, index, model, capsys, tmp_path):
    command = ["find", str(index), "--model", str(model), "--text", QUERY]
    assert example().main(command) == 0
    expected = [file.stem for file in found(capsys.readouterr().out)]
    page.type("input", QUERY)
    page.wait_for(NAMES, lambda names: names == expected)
    page.wait_for(
        "[...document.querySelectorAll('.result img')].filter(e => e.naturalWidth > 0).length",
        lambda number: number == len(expected),
    )
    shot = Path(os.environ.get("COCOA_SCREENSHOT", tmp_path / "page.png"))
    time.sleep(1.0)  # pictures fade in
    page.screenshot(shot)
    with Image.open(shot) as picture:
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 500  # a blank page has few


@pytest.mark.slow
def test_the_page_searches_by_a_picture_given_to_it(page, pictures, index):
    file = pictures / json.loads((index / "index.json").read_text())["files"][3]
    page.choose_file("input[type=file]", file)
    page.wait_for(NAMES, lambda names: names and names[0] == file.stem)
    assert page.value("document.querySelector('.heading').textContent") == f"like {file.name}"


@pytest.mark.slow
def test_a_click_on_a_result_shows_more_like_it(page):
    page.type("input", QUERY)
    page.wait_for("document.querySelector('.heading').textContent", lambda said: QUERY in said)
    second = page.value(NAMES)[1]
    page.value("document.querySelectorAll('.result')[1].click()")
    page.wait_for(NAMES, lambda names: names[0] == second)


@pytest.mark.slow
def test_the_page_says_what_it_cannot_read(page, tmp_path):
    (tmp_path / "query.png").write_text("words")
    page.choose_file("input[type=file]", tmp_path / "query.png")
    page.wait_for(
        "[...document.querySelectorAll('.q-notification')].map(e => e.textContent).join()",
        lambda said: "query.png cannot be read" in said,
    )


@pytest.mark.slow
def test_the_page_loads_nothing_from_elsewhere_and_has_no_errors(page, address):
    page.value("1")
    assert page.requests
    assert [url for url in page.requests if not url.startswith((address, "data:", "blob:"))] == []
    assert page.errors == []


@pytest.mark.slow
@pytest.mark.parametrize("number", ["40000", "-1", "index.json"])
def test_only_indexed_pictures_are_served(address, number):
    with pytest.raises(urllib.error.HTTPError, match=r"404|422"):
        urllib.request.urlopen(f"{address}picture/{number}", timeout=10)
