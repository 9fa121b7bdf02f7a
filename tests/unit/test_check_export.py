"""A check in fresh environments says what failed; stand-ins have the released sizes."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from cocoa_dist.export.layers import layers_of
from cocoa_dist.export.weights import layer_bytes
from cocoa_dist.model.families import FAMILIES
from cocoa_dist.model.shell import without_weights
from launcher.plan.shapes import PUBLISHED

TOOLS = Path(__file__).parents[2] / "tools"


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def check():
    return load("check_export")


def result(**changes):
    found = {
        "passed": True,
        "entries": 7,
        "difference": 1e-7,
        "cosine": 1.0,
        "task": {},
        "versions": {"torch": "2.13.0", "mteb": None},
    }
    return {**found, **changes}


def test_the_table_names_what_failed(check) -> None:
    results = {
        "transformers": result(),
        "mteb": result(task={"Mock": 0.5}),
        "sentence-transformers": result(passed=False),
        "other": {"passed": False, "error": "x"},
    }
    lines = check.table(results).splitlines()[2:]
    assert lines[0].startswith(
        "| transformers | 7 of 7 | 1.0e-07 | 1.0000000 | none | torch 2.13.0"
    )
    assert "Mock 0.500" in lines[1]
    assert "**FAILED**" in lines[2]
    assert "**FAILED**" in lines[3]


@pytest.mark.parametrize("passed", [True, False])
def test_the_exit_code_is_the_checks(check, monkeypatch, tmp_path, capsys, passed) -> None:
    (tmp_path / "selftest.json").write_text("[]")
    monkeypatch.setattr(check, "check", lambda *_, **__: {"mteb": result(passed=passed)})
    assert check.main([str(tmp_path)]) == (0 if passed else 1)
    assert "| mteb |" in capsys.readouterr().out


def test_no_folder_and_no_pip_end_with_2(check, monkeypatch, tmp_path, capsys) -> None:
    assert check.main([str(tmp_path)]) == 2
    assert "no selftest.json" in capsys.readouterr().err
    (tmp_path / "selftest.json").write_text("[]")
    monkeypatch.setattr(check, "_python", lambda _: "/bin/false")
    monkeypatch.setattr(check.venv, "create", lambda *_, **__: None)
    assert check.main([str(tmp_path)]) == 2
    assert "pip cannot install torch numpy" in capsys.readouterr().err


def test_a_stand_in_has_the_released_size(monkeypatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    tool = load("stand_in_model")
    for name, settings in tool.RELEASED.items():
        family = FAMILIES[settings["model_type"]]
        with without_weights():
            config = family.config_class.from_dict(dict(settings))
            model = family.model_class._from_config(config, dtype=torch.bfloat16)
        size = sum(layer_bytes(layer, torch.bfloat16) for layer in layers_of(model))
        shape = PUBLISHED[name.removeprefix("Qwen/").removesuffix("-Instruct")]
        assert size == 2 * shape.parameters
