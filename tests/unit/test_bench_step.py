"""The stopwatch of a step, and the published tables of steps and of many ranks."""

import importlib.util
import json
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest

from launcher.plan.shapes import model_shape
from launcher.plan.traffic import reuse_distance, step_traffic

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))
from step_parts import PARTS, REST, Stopwatch  # noqa: E402

from cocoa_dist.config import load_recipe  # noqa: E402


def tool(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_time_is_charged_to_the_innermost_part_alone() -> None:
    watch = Stopwatch()
    watch.reset()
    with watch.part("backward"):
        time.sleep(0.02)
        with watch.part("communication"):
            time.sleep(0.05)
    watch._charge()
    assert 0.02 <= watch.wall["backward"] < 0.05
    assert watch.wall["communication"] >= 0.05
    assert watch.wall[REST] < 0.02
    assert sum(watch.cpu.values()) < 0.05  # sleeping costs none
    watch.reset()
    assert set(watch.wall.values()) == {0.0}


def test_what_is_watched_is_as_before_afterwards() -> None:
    class Engine:
        def step(self) -> int:
            return 7

    engine, watch = Engine(), Stopwatch()
    with ExitStack() as stack:
        watch.around(stack, engine, "step", "optimizer")
        assert "step" in vars(engine)
        assert engine.step() == 7
    assert "step" not in vars(engine)
    owner = SimpleNamespace(step=engine.step)
    kept = owner.step
    with ExitStack() as stack:
        watch.around(stack, owner, "step", "optimizer")
        assert owner.step is not kept
    assert owner.step is kept


def test_the_table_of_steps_is_that_of_the_figures_beside_it() -> None:
    found = json.loads((ROOT / "benchmarks" / "step_cpu.json").read_text())
    text = tool("bench_step").report(found["runs"], found["settings"])
    assert text + "\n" == (ROOT / "benchmarks" / "step_cpu.md").read_text()
    for runs in found["runs"].values():
        assert set(runs[0]["cpu"]) == set(PARTS)


@pytest.fixture(scope="module")
def scale():
    return json.loads((ROOT / "benchmarks" / "scale_cpu.json").read_text())


def test_the_table_of_many_ranks_is_that_of_the_figures_beside_it(scale) -> None:
    text = tool("bench_scale").report(scale["counted"], scale["built"], scale["machine"])
    assert text + "\n" == (ROOT / "benchmarks" / "scale_cpu.md").read_text()


def test_a_fake_group_counts_what_a_real_one_sends(scale) -> None:
    for name, real in scale["counted"]["real 4"].items():
        fake = scale["counted"]["fake 4"][name]
        assert (real["gathered"], real["reduced"]) == (fake["gathered"], fake["reduced"]), name
        assert real["sent"] == pytest.approx(fake["sent"], rel=0.01), name


def test_the_plan_reckons_with_what_was_counted(scale) -> None:
    """3 %: weights and gradients are padded to a multiple of the ranks, at 1,024 of a tiny model.

    Reckoned anew here, so that a change of the arithmetic has to explain the counts too.
    """
    settings = {setting.name: setting for setting in tool("bench_scale").SETTINGS}
    for group, found in scale["counted"].items():
        ranks = int(group.split()[1])
        if ranks == 1:
            continue  # alone nothing is gathered
        for name, one in found.items():
            setting = settings[name]
            overrides = [o for o in setting.overrides if o != "NOTHING_KEPT"]
            config = load_recipe(
                "debug",
                [f"stages.{setting.stage}.batch_size={setting.records * ranks}", *overrides],
            )
            if "NOTHING_KEPT" in setting.overrides:
                assert one["planned_gathered"] > 2 * one["packs"] * 1.4e6
                continue
            planned = step_traffic(
                config,
                setting.stage,
                shape=model_shape(config.model),
                packs=one["packs"],
                cards=ranks,
                resident="engine.resident_parameters=true" in overrides,
            )
            assert planned.gathered == one["planned_gathered"], (group, name)
            assert planned.reduced == one["planned_reduced"], (group, name)
        for one in found.values():
            if ranks <= 64:
                assert one["gathered"] == pytest.approx(one["planned_gathered"], rel=0.03)
                assert one["reduced"] == pytest.approx(one["planned_reduced"], rel=0.03)


def test_how_long_weights_are_kept_is_read_from_the_engines_file(tmp_path) -> None:
    assert reuse_distance(load_recipe("debug")) == 1e7
    assert reuse_distance(load_recipe("cocoa_qwen2_vl_2b")) == 1e9
    path = tmp_path / "mine.json"
    path.write_text('{"zero_optimization": {"stage3_max_reuse_distance": 5}}')
    assert reuse_distance(load_recipe("debug", [f"engine.ds_config={path}"])) == 5
    assert reuse_distance(load_recipe("debug", ["engine.ds_config=missing.json"])) == 1e9
    assert reuse_distance(load_recipe("debug", ["engine.kind=fsdp2"])) == 0
