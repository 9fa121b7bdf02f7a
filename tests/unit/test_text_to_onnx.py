"""The text side of an exported model as ONNX: it gives the model's vectors, or is not there."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tiny_exports import tiny_export

from cocoa_dist.export.templates import sentence_transformers_config

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "text_to_onnx.py"


def example():
    spec = importlib.util.spec_from_file_location("text_to_onnx", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_export(tmp_path_factory.mktemp("export") / "tiny")


@pytest.fixture(scope="module")
def written(folder, tmp_path_factory) -> Path:
    for name in ("onnx", "onnxruntime", "onnxscript"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed: pip install -e .[examples]")
    file = tmp_path_factory.mktemp("onnx") / "text.onnx"
    done = subprocess.run(
        [sys.executable, EXAMPLE, folder, file], capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr
    assert "differs from the model by at most" in done.stdout
    return file


def test_what_is_no_exported_model_is_refused(tmp_path, capsys):
    assert example().main([str(tmp_path), str(tmp_path / "text.onnx")]) == 2
    assert f"{tmp_path} is no exported model" in capsys.readouterr().err


def test_a_model_of_several_vectors_is_refused(tmp_path, capsys):
    """sentence-transformers would load it all the same, with the mean of all tokens."""
    (tmp_path / "modules.json").write_text("[]")
    settings = sentence_transformers_config({}, pooling="late_interaction")
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(settings))
    assert example().main([str(tmp_path), str(tmp_path / "text.onnx")]) == 2
    assert "gives several vectors for each text" in capsys.readouterr().err


def test_a_file_that_could_not_be_compared_is_removed(tmp_path, monkeypatch):
    (tmp_path / "modules.json").write_text("[]")
    library = SimpleNamespace(SentenceTransformer=lambda *_, **__: None)
    monkeypatch.setitem(sys.modules, "sentence_transformers", library)
    module, file = example(), tmp_path / "text.onnx"
    monkeypatch.setattr(module, "write", lambda model, file: file.write_bytes(b"x"))

    def compare(model, file):
        raise ImportError("no onnxruntime")

    monkeypatch.setattr(module, "largest_difference", compare)
    with pytest.raises(ImportError, match="no onnxruntime"):
        module.main([str(tmp_path), str(file)])
    assert not file.exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_it_gives_the_vectors_of_the_model_without_torch(written, folder):
    """Also for numbers of texts and tokens that it was not traced with."""
    import onnxruntime
    from sentence_transformers import SentenceTransformer
    from transformers import AutoTokenizer

    texts = ["cat", "a pink flamingo that stands on one leg", *(f"word {n}" for n in range(7))]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    session = onnxruntime.InferenceSession(str(written), providers=["CPUExecutionProvider"])
    model = SentenceTransformer(str(folder))
    for part in (texts, texts[:1], texts[1:2]):
        batch = tokenizer(part, return_tensors="np", padding=True)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        (found,) = session.run(None, inputs)
        expected = model.encode([{"text": text} for text in part])
        np.testing.assert_allclose(found, expected, atol=1e-5)  # float32, another order of sums


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_file_that_differs_is_removed(written, folder, tmp_path, capsys, monkeypatch):
    module = example()
    monkeypatch.setattr(module, "write", lambda model, file: file.write_bytes(written.read_bytes()))
    monkeypatch.setattr(module, "largest_difference", lambda model, file: float("nan"))
    assert module.main([str(folder), str(tmp_path / "text.onnx")]) == 2
    assert "text.onnx was removed" in capsys.readouterr().err
    assert not (tmp_path / "text.onnx").exists()
