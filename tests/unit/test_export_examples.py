"""The examples run on an exported folder, and a report's figures come from the folder alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_report import finished_run
from tiny_exports import tiny_export

from cocoa_dist.export.selftest import load_encoder
from cocoa_dist.report.__main__ import main

ROOT = Path(__file__).parents[2]
TEXTS = ["a small test", "two words and a few more"]
# A process of its own, in which our package cannot be imported.
ALONE = """
import importlib.abc, runpy, sys
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"cocoa_dist", "launcher"}:
            raise ImportError(f"{name} was imported")
sys.meta_path.insert(0, Refuse())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_alone(script: Path, *arguments: object) -> subprocess.CompletedProcess:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", ALONE, script, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=environment,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_export(tmp_path_factory.mktemp("export") / "tiny")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[Path]:
    paths = [tmp_path_factory.mktemp("pictures") / f"{number}.png" for number in range(3)]
    for number, path in enumerate(paths):
        pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return paths


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "modules"),
    [
        ("embed_with_sentence_transformers", {"sentence_transformers"}),
        ("embed_with_transformers", {"torch", "transformers"}),
    ],
)
def test_an_example_prints_the_cosines_of_the_folder(name, modules, folder, pictures) -> None:
    script = ROOT / "examples" / f"{name}.py"
    imports = {line.split()[1] for line in script.read_text().splitlines() if "import" in line[:6]}
    imports |= {line.split()[1] for line in script.read_text().splitlines() if line[:5] == "from "}
    assert imports == {"argparse", "PIL", *modules}
    done = run_alone(script, folder, *pictures, "--text", *TEXTS)
    assert done.returncode == 0, done.stderr[-2000:]
    encoder = load_encoder(folder)
    texts = encoder.encode([{"text": text} for text in TEXTS])
    images = encoder.encode([{"image": Image.open(path)} for path in pictures])
    expected = {
        (text, str(path)): float(vector @ other)
        for text, vector in zip(TEXTS, texts, strict=True)
        for path, other in zip(pictures, images, strict=True)
    }
    lines = [line.split("  ") for line in done.stdout.splitlines()]
    found = {(text, path): float(cosine) for cosine, text, path in lines}
    assert found.keys() == expected.keys()
    # Four digits are printed; a padded batch sums in another order.
    assert all(abs(found[key] - expected[key]) < 1e-4 for key in expected)


@pytest.mark.slow
def test_the_figures_of_a_report_come_from_the_folder_alone(tmp_path) -> None:
    run = finished_run(tmp_path / "run")
    assert main([str(run)]) == 0
    tool = ROOT / "tools" / "recheck_retrieval.py"
    done = run_alone(tool, run)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "unseen_concept, 32 pairs" in done.stdout
    assert "DIFFERENT" not in done.stdout
    stated = json.loads((run / "report" / "retrieval.json").read_text())
    stated["arms"]["cocoa"]["splits"]["unseen_concept"]["i2t"]["r10"] += 0.01
    (run / "report" / "retrieval.json").write_text(json.dumps(stated))
    done = run_alone(tool, run)
    assert done.returncode == 1
    assert done.stdout.count("DIFFERENT") == 1
