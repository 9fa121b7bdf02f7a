"""An exported folder in mteb: its mock tasks, a task of ours, and the scorer's own figure."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_exports import tiny_export

from cocoa_dist.evaluation.embed import EmbedSettings
from cocoa_dist.evaluation.mteb_bridge import as_mteb, as_task
from cocoa_dist.evaluation.run import Evaluation, evaluate

# mteb, and what it imports, warn of their own deprecations.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def mteb():
    return pytest.importorskip("mteb")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_export(tmp_path_factory.mktemp("export") / "tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Three sets: text to picture, picture to text, and both to both."""
    import json

    folder = tmp_path_factory.mktemp("data")
    (folder / "images").mkdir()
    words = [f"thing {i}" for i in range(24)]
    for i in range(24):
        pixels = np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{i}.png")
    sides = {
        "t2i": (lambda i: (words[i], ""), lambda i: ("", f"{i}.png")),
        "i2t": (lambda i: ("", f"{i}.png"), lambda i: (words[i], "")),
        "it2it": (lambda i: (words[i], f"{i}.png"), lambda i: (words[i], f"{(i + 1) % 24}.png")),
    }
    for name, (query, target) in sides.items():
        rows = []
        for i in range(24):
            order = [i, *((i + step) % 24 for step in range(1, 10))]
            text, image = query(i)
            rows.append(
                {
                    "qry_text": text,
                    "qry_img_path": image,
                    "tgt_text": [target(o)[0] for o in order],
                    "tgt_img_path": [target(o)[1] for o in order],
                }
            )
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines)
    return folder


def test_without_mteb_it_says_what_to_install(monkeypatch, tmp_path):
    import sys

    monkeypatch.setitem(sys.modules, "mteb", None)
    with pytest.raises(ValueError, match=r"install cocoa_dist\[export\]"):
        as_mteb(tmp_path)
    with pytest.raises(ValueError, match="is no folder"):
        as_mteb(tmp_path / "none")


@pytest.mark.parametrize("name", ["MockAny2AnyRetrievalT2ITask", "MockAny2AnyRetrievalI2TTask"])
def test_mock_tasks_of_mteb_run_without_a_network(mteb, folder, name):
    import mteb.mocks.mock_tasks as tasks

    result = mteb.evaluate(as_mteb(folder), [getattr(tasks, name)()], cache=None)
    assert 0 <= result.task_results[0].get_score() <= 1


@pytest.mark.parametrize("name", ["t2i", "i2t", "it2it"])
def test_hit_rate_at_1_is_our_precision(mteb, folder, data, name):
    """Random vectors do not tie, so both rules agree; mteb rounds to five places."""
    result = mteb.evaluate(as_mteb(folder), [as_task(data, name)], cache=None)
    scores = result.task_results[0].scores["test"][0]
    ours = evaluate(
        Evaluation(data=data, embed=EmbedSettings(model=folder), only=(name,)),
        progress=lambda done, total: None,
    )
    entry = ours["sets"][name]
    assert entry["tied_rows"] == 0
    assert 100 * scores["hit_rate_at_1"] == pytest.approx(entry["precision_at_1"], abs=1e-2)
    assert scores["hit_rate_at_1"] <= scores["ndcg_at_5"] <= 1


def test_a_set_that_is_not_there_is_named(mteb, data):
    with pytest.raises(ValueError, match=r"no set x in .* \(have: i2t, it2it, t2i\)"):
        as_task(data, "x")
