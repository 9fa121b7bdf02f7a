"""Manifests and the run's own record."""

import pytest

from cocoa_dist import manifest as manifests
from cocoa_dist.manifest import FileEntry, Manifest, ManifestError
from cocoa_dist.metrics import JsonLines, cut_back, read_json_lines


def make(run_dir, *, step: int, stage: str = "one", files=()) -> Manifest:
    folder = manifests.step_folder(run_dir, stage=stage, step=step)
    folder.mkdir(parents=True)
    manifest = Manifest(
        run="r", recipe_fingerprint="f", stage=stage, step=step, target_step=10,
        complete=step == 10, epoch="e", parent=None, world_size=1, engine="x", versions={},
        base_model="b", data_state={}, samples=0, tokens=0, skipped_steps=0, wall_seconds=0.0,
        productive_seconds=0.0, train_cpu_seconds=0.0, loss={}, files=files,
    )  # fmt: skip
    manifests.write_manifest(folder, manifest)
    return manifest


def test_newest_is_the_highest_step_with_a_readable_manifest(tmp_path) -> None:
    for step in (2, 4, 10):
        make(tmp_path, step=step)
    newest = manifests.step_folder(tmp_path, stage="one", step=10)
    (newest / "manifest.json").unlink()
    folder, found = manifests.newest(tmp_path, stage="one")
    assert (folder.name, found.step) == ("step_00000004", 4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "schema_version None"),
        ('{"schema_version": 99}', "schema_version 99, expected 1"),
        ('{"schema_version": 1, "run": 3}', "field run"),
    ],
)
def test_unusable_manifest_says_why(tmp_path, content, message) -> None:
    make(tmp_path, step=2)
    folder = manifests.step_folder(tmp_path, stage="one", step=2)
    (folder / "manifest.json").write_text(content)
    with pytest.raises(ManifestError, match=message):
        manifests.read_manifest(folder)


def test_fault_names_file_found_and_expected(tmp_path) -> None:
    entry = FileEntry(path="a.bin", bytes=3, sha256=manifests.hashlib.sha256(b"abc").hexdigest())
    manifest = make(tmp_path, step=2, files=(entry,))
    folder = manifests.step_folder(tmp_path, stage="one", step=2)
    assert manifests.find_fault(folder, manifest) == "a.bin is missing"
    (folder / "a.bin").write_bytes(b"ab")
    assert manifests.find_fault(folder, manifest) == "a.bin has 2 bytes, expected 3"
    (folder / "a.bin").write_bytes(b"abd")
    assert "a.bin has sha256" in str(manifests.find_fault(folder, manifest))
    (folder / "a.bin").write_bytes(b"abc")
    assert manifests.find_fault(folder, manifest) is None


def test_cut_back_drops_a_stages_later_steps_and_a_torn_line(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = JsonLines(path)
    for stage, steps in (("one", 5), ("two", 3)):
        for step in range(1, steps + 1):
            lines.append({"stage": stage, "step": step})
    lines.sync()
    lines.close()
    with path.open("a") as file:
        file.write('{"stage": "tw')
    assert cut_back(path, stage="two", step=1) == 2
    assert cut_back(path, stage="one", step=3) == 2
    found = [(record["stage"], record["step"]) for record in read_json_lines(path)]
    assert found == [("one", 1), ("one", 2), ("one", 3), ("two", 1)]
    assert path.read_text().endswith("\n")


def test_line_that_is_no_json_is_named(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + bytes(8) + b"\n")
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2 is no JSON object"):
        list(read_json_lines(path))


def test_stage_end_is_checked_before_it_is_used(tmp_path) -> None:
    entry = FileEntry(path="a.bin", bytes=3, sha256=manifests.hashlib.sha256(b"abc").hexdigest())
    with pytest.raises(ManifestError, match="no complete checkpoint"):
        manifests.stage_end(tmp_path, stage="one")
    make(tmp_path, step=4)
    make(tmp_path, step=10, files=(entry,))
    folder = manifests.step_folder(tmp_path, stage="one", step=10)
    (folder / "a.bin").write_bytes(b"abd")
    with pytest.raises(ManifestError, match=r"not whole: .*a.bin has sha256"):
        manifests.stage_end(tmp_path, stage="one")
    (folder / "a.bin").write_bytes(b"abc")
    assert manifests.stage_end(tmp_path, stage="one")[0] == folder


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a/../../b", ""])
def test_file_entry_stays_in_its_folder(path) -> None:
    with pytest.raises(ValueError, match="leads out of the checkpoint"):
        FileEntry(path=path, bytes=1, sha256="")
