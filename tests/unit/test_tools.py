"""The small tools, on run folders written by hand: what they print and how they refuse."""

import importlib.util
import json
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from cocoa_dist.config import dump_yaml, load_recipe
from cocoa_dist.manifest import Manifest, step_folder, write_manifest

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ["stages.contrastive.steps=20"]


def run_tool(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def show_batch():
    """The tool as a module: its imports take seconds, so they are made once."""
    path = ROOT / "tools" / "show_batch.py"
    spec = importlib.util.spec_from_file_location("show_batch_tool", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def write_run(folder: Path, *, overrides=(), finished=True, seconds=0.5, cpu=(3.0, 2.0, 10.0)):
    """Write a finished debug run; `cpu` holds the CPU seconds of its stages."""
    config = load_recipe("debug", [*RECIPE, *overrides])
    folder.mkdir(parents=True)
    (folder / "resolved.yaml").write_text(dump_yaml(config))
    lines = []
    for (name, stage), total in zip(config.stages.items(), cpu, strict=True):
        last = finished or name != "contrastive"
        where = step_folder(folder, stage=name, step=stage.steps)
        where.mkdir(parents=True)
        write_manifest(where, manifest_of(name, stage.steps, cpu=total, complete=last))
        for step in range(1, stage.steps + 1):
            spent = 50.0 if step <= 5 else seconds + 0.1 * (-1) ** step  # the first steps are slow
            lines.append(
                {
                    "stage": name,
                    "step": step,
                    "loss": 5.0 / step,
                    f"loss/{name[:4]}": 5.0 / step,
                    "cpu_seconds": spent,
                    "batch_digest": f"{name}{step}",
                    "samples": 24,
                    "tokens": 100,
                    "step_seconds": 0.3,
                }
            )
    write_metrics(folder, lines)
    return lines


def manifest_of(stage: str, steps: int, *, cpu: float, complete: bool) -> Manifest:
    return Manifest(
        run="debug",
        recipe_fingerprint="f",
        stage=stage,
        step=steps,
        target_step=steps if complete else steps + 4,
        complete=complete,
        epoch="local-1-test",
        parent=None,
        world_size=1,
        engine="test",
        versions={},
        base_model="b",
        data_state={},
        samples=1,
        tokens=1,
        skipped_steps=0,
        wall_seconds=1.0,
        productive_seconds=1.0,
        train_cpu_seconds=cpu,
        loss={},
        files=(),
    )


def write_metrics(folder: Path, lines) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_equal_compute_is_total_over_the_median_step(tmp_path):
    write_run(tmp_path / "run", seconds=0.5, cpu=(3.0, 2.0, 10.0))
    # 15 steps stay: 8 with 0.6 s (even) and 7 with 0.4 s, so the median is 0.6; 15 / 0.6 = 25
    done = run_tool("equal_compute.py", tmp_path / "run", "debug")
    assert (done.returncode, done.stdout) == (0, "stages.contrastive.steps=25\n")


def test_equal_compute_refuses_an_unfinished_run(tmp_path):
    write_run(tmp_path / "run", finished=False)
    done = run_tool("equal_compute.py", tmp_path / "run", "debug")
    assert done.returncode == 2
    assert "not finished: stage 'contrastive' is at step 20 of 24" in done.stderr


def test_equal_compute_refuses_a_control_without_the_stage(tmp_path):
    write_run(tmp_path / "run")
    done = run_tool("equal_compute.py", tmp_path / "run", "quickstart_backbone")
    assert done.returncode == 2
    assert "quickstart_backbone has no stage 'contrastive' (has: next_token)" in done.stderr


def test_equal_compute_refuses_steps_of_another_size(tmp_path):
    write_run(tmp_path / "run", overrides=["stages.contrastive.batch_size=48"])
    done = run_tool("equal_compute.py", tmp_path / "run", "debug")
    assert done.returncode == 2
    assert "stages.contrastive.batch_size differs" in done.stderr


def test_equal_compute_refuses_a_run_without_timed_steps(tmp_path):
    lines = write_run(tmp_path / "run")
    write_metrics(tmp_path / "run", lines[:20])
    done = run_tool("equal_compute.py", tmp_path / "run", "debug")
    assert done.returncode == 2
    assert "no timed step after its first 5" in done.stderr


def test_equal_compute_refuses_what_is_no_run(tmp_path):
    done = run_tool("equal_compute.py", tmp_path, "debug")
    assert done.returncode == 2
    assert "is not a run folder" in done.stderr


@pytest.mark.parametrize("tool", ["equal_compute", "compare_runs"])
def test_tool_does_not_import_torch(tool):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'tools')!r}); import {tool}; "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_compare_runs_says_identical(tmp_path):
    write_run(tmp_path / "a")
    lines = write_run(tmp_path / "b")
    write_metrics(tmp_path / "b", [{**line, "step_seconds": 9.0, "time": 1.0} for line in lines])
    done = run_tool("compare_runs.py", tmp_path / "a", tmp_path / "b")
    assert (done.returncode, done.stdout) == (0, "identical: 36 steps\n")


def test_compare_runs_names_first_and_largest_difference(tmp_path):
    lines = write_run(tmp_path / "a")
    write_run(tmp_path / "b")
    lines[3]["loss"] += 1e-4
    lines[30]["loss"] += 0.5
    write_metrics(tmp_path / "b", lines)
    done = run_tool("compare_runs.py", tmp_path / "a", tmp_path / "b")
    assert done.returncode == 1
    assert "first:   joint_reconstruction step 4: loss" in done.stdout
    assert "largest: contrastive step 15: loss" in done.stdout
    assert "(0.5)" in done.stdout


def test_compare_runs_forgives_within_the_tolerance(tmp_path):
    lines = write_run(tmp_path / "a")
    write_run(tmp_path / "b")
    lines[3]["loss"] += 1e-4
    write_metrics(tmp_path / "b", lines)
    folders = (tmp_path / "a", tmp_path / "b")
    assert run_tool("compare_runs.py", *folders, "--tolerance", "1e-3").returncode == 0
    assert run_tool("compare_runs.py", *folders, "--tolerance", "1e-5").returncode == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"batch_digest": "other"}, "batch_digest"),
        ({"loss": float("nan")}, "loss"),
        ({"loss": None}, "loss"),
    ],
)
def test_no_tolerance_forgives_other_records_or_lost_losses(tmp_path, change, said):
    lines = write_run(tmp_path / "a")
    write_run(tmp_path / "b")
    lines[7].update(change)
    write_metrics(tmp_path / "b", lines)
    done = run_tool("compare_runs.py", tmp_path / "a", tmp_path / "b", "--tolerance", "1e9")
    assert done.returncode == 1
    assert f"first:   joint_reconstruction step 8: {said}" in done.stdout


def test_compare_runs_names_a_missing_step(tmp_path):
    lines = write_run(tmp_path / "a")
    write_run(tmp_path / "b")
    write_metrics(tmp_path / "b", lines[:-1])
    done = run_tool("compare_runs.py", tmp_path / "a", tmp_path / "b")
    assert done.returncode == 1
    assert "contrastive step 20: step 'there' and 'missing'" in done.stdout


def test_compare_runs_refuses_an_empty_folder(tmp_path):
    done = run_tool("compare_runs.py", tmp_path, tmp_path)
    assert done.returncode == 2
    assert "does not exist" in done.stderr


def test_show_batch_tells_segments_and_labels(show_batch, capsys):
    assert show_batch.main(["debug", "--stage", "eos_bridged_reconstruction"]) == 0
    shown = capsys.readouterr().out
    assert "segments  CONTEXT [0, " in shown
    assert "BRIDGE [" in shown
    assert "TARGET [" in shown
    assert "[mask]" in shown
    assert "fill      " in shown


def test_show_batch_mask_hides_the_context_from_the_target(show_batch, capsys):
    assert show_batch.main(["debug", "--stage", "eos_bridged_reconstruction"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines if line.startswith(" " * 12)]
    seen = {
        letter: {mark for who, row in rows if who == letter for mark in row} for letter in "cbt"
    }
    assert seen == {"c": {"c", "b", "."}, "b": {"c", "b", "t"}, "t": {"b", "t", "."}}


def test_show_batch_labels_are_what_the_mask_hides(show_batch):
    """Independent of the printed text: every hidden token's label is the token of the sample."""
    shown = show_batch.load_step(load_recipe("debug"), "joint_reconstruction", step=2)
    plain = [int(token) for row in shown.rows for token in row.sample.input_ids]
    hidden = [i for i, token in enumerate(shown.pack.input_ids.tolist()) if token != plain[i]]
    assert [plain[i] for i in hidden] == shown.pack.labels.tolist()
    assert len(hidden) > 5


def test_show_batch_goes_on_from_a_checkpoint(show_batch, tmp_path, capsys):
    config = load_recipe("debug")
    later = show_batch.load_step(config, "contrastive", step=4)
    unfinished = manifest_of("contrastive", 3, cpu=1.0, complete=False)
    state = state_before(config, step=4)
    write_manifest(tmp_path, unfinished.model_copy(update={"data_state": state}))
    arguments = ["debug", "--stage", "contrastive", "--manifest", str(tmp_path)]
    assert show_batch.main(arguments) == 0
    said = capsys.readouterr().out
    assert "stage contrastive, step 4" in said
    assert later.batch.digest in said


BLEND = [
    *("stages.contrastive.batch_size=12", "stages.contrastive.data.sources.more.limit=32"),
    "stages.contrastive.data.sources.more.path=asset:emoji/validation",
]


def test_show_batch_shows_what_a_changed_blend_goes_on_with(show_batch, tmp_path, capsys):
    old, changed = load_recipe("debug"), load_recipe("debug", [*BLEND, "data.on_change=continue"])
    state = state_before(old, step=4)
    seen = {number for step in (1, 2, 3) for number in records_of(old, step=step)}
    unfinished = manifest_of("contrastive", 3, cpu=1.0, complete=False)
    write_manifest(tmp_path, unfinished.model_copy(update={"data_state": state}))
    arguments = ["debug", *BLEND, "--stage", "contrastive", "--manifest", str(tmp_path)]
    assert show_batch.main(arguments) == 2
    assert "data.on_change" in capsys.readouterr().err
    arguments.insert(1, "data.on_change=continue")
    assert show_batch.main(arguments) == 0
    expected = show_batch.load_step(changed, "contrastive", step=4, state=state).batch
    assert expected.digest in capsys.readouterr().out
    assert len(expected.record_ids) == 12
    assert len(seen) == 64  # a pass of the old source, and 8 of the next
    fresh = show_batch.load_step(changed, "contrastive", step=4).batch
    assert (fresh.dataset, fresh.record_ids) != (expected.dataset, expected.record_ids)


def test_show_batch_shows_a_step_in_blocks_of_several_data_sets(show_batch, capsys):
    more = "stages.contrastive.data.sources.more"
    overrides = [
        *("stages.contrastive.data.task_block=4", "data.tokens_per_pack=2048"),
        *(f"{more}.path=asset:emoji/validation", f"{more}.limit=32"),
    ]
    arguments = ["debug", *overrides, "--stage", "contrastive", "--samples", "48"]
    assert show_batch.main(arguments) == 0
    said = capsys.readouterr().out
    assert "records   24 (" in said
    assert " of 'more'" in said
    assert {"of 'emoji', tokens", "of 'more', tokens"} <= {
        f"of {line.split(' of ')[1].split(',')[0]}, tokens"
        for line in said.splitlines()
        if line.startswith("sample ")
    }


def test_show_batch_refuses_a_checkpoint_of_other_data(show_batch, tmp_path, capsys):
    state = {**state_before(load_recipe("debug"), step=4), "plan_hash": "another"}
    unfinished = manifest_of("contrastive", 3, cpu=1.0, complete=False)
    write_manifest(tmp_path, unfinished.model_copy(update={"data_state": state}))
    arguments = ["debug", "--stage", "contrastive", "--manifest", str(tmp_path)]
    assert show_batch.main(arguments) == 2
    assert "data plan is another" in capsys.readouterr().err


def test_show_batch_refuses_the_end_of_a_stage(show_batch, tmp_path, capsys):
    write_manifest(tmp_path, manifest_of("contrastive", 8, cpu=1.0, complete=True))
    arguments = ["debug", "--stage", "contrastive", "--manifest", str(tmp_path)]
    assert show_batch.main(arguments) == 2
    assert "no batch comes after it" in capsys.readouterr().err


def test_show_batch_draws_the_mask(show_batch, tmp_path, capsys):
    target = tmp_path / "mask.png"
    arguments = ["debug", "--stage", "joint_reconstruction", "--png", str(target)]
    assert show_batch.main(arguments) == 0
    assert target.read_bytes().startswith(b"\x89PNG")
    assert "hidden    " in capsys.readouterr().out


def test_show_batch_names_the_stages_there_are(show_batch, capsys):
    assert show_batch.main(["debug", "--stage", "joint"]) == 2
    assert "stage 'joint' is not in debug (has: joint_reconstruction," in capsys.readouterr().err


def state_before(config, *, step: int):
    """The data state that a checkpoint after step - 1 of the contrastive stage holds."""
    with contrastive_loader(config, step=step) as loader:
        return loader.state(step)


def records_of(config, *, step: int) -> tuple[int, ...]:
    with contrastive_loader(config, step=step) as loader:
        return loader.plan.step(step, 1).record_ids


@contextmanager
def contrastive_loader(config, *, step: int):
    import tempfile

    from cocoa_dist.data.loader import StageLoader
    from cocoa_dist.data.samples import ImageGeometry
    from cocoa_dist.train.build import load_vocabulary

    with tempfile.TemporaryDirectory() as folder:
        loader = StageLoader(
            config,
            "contrastive",
            vocabulary=load_vocabulary(config.model),
            geometry=ImageGeometry(patch_size=8),
            rank=0,
            world_size=1,
            start_step=step,
            folder=Path(folder),
        )
        yield loader
        loader.close()
