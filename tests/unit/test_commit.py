"""Commit on files alone: fence, one rename, retention; and what a resume refuses."""

import hashlib
from pathlib import Path

import pytest

from cocoa_dist import distributed
from cocoa_dist import manifest as manifests
from cocoa_dist.distributed import raise_together
from cocoa_dist.manifest import FileEntry, Manifest
from cocoa_dist.runtime import Fence
from cocoa_dist.train import commit as commits
from cocoa_dist.train.checkpoint import Found
from cocoa_dist.train.commit import Fault, FencedError
from cocoa_dist.train.resume import refuse_other_base
from cocoa_dist.train.verify import find_newest_whole

STAGE = "one"
CONTENT = b"abc"
ENTRY = FileEntry(path="shards/a.bin", bytes=3, sha256=hashlib.sha256(CONTENT).hexdigest())


def manifest(*, step: int, **fields: object) -> Manifest:
    return Manifest(
        run="r", recipe_fingerprint="f", stage=STAGE, step=step, target_step=10,
        complete=step == 10, epoch="e", parent=None, world_size=1, engine="x", versions={},
        base_model="b", data_state={}, samples=0, tokens=0, skipped_steps=0, wall_seconds=0.0,
        productive_seconds=0.0, train_cpu_seconds=0.0, loss={}, files=(ENTRY,),
    ).model_copy(update=fields)  # fmt: skip


class Run:
    """A run folder held by incarnation `first`."""

    def __init__(self, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("COCOA_EPOCH", "first")
        self.run_dir, self.fence = run_dir, Fence(run_dir)
        self.root = run_dir / "checkpoints" / STAGE
        self.give_to("first")

    def give_to(self, epoch: str) -> None:
        (self.run_dir / "epoch").write_text(epoch)

    def stage(self, step: int, *, attempt: int = 1) -> tuple[Path, Path]:
        final = manifests.step_folder(self.run_dir, stage=STAGE, step=step)
        staging = commits.staging_folder(self.root, final, epoch="first", attempt=attempt)
        (staging / "shards").mkdir(parents=True)
        (staging / ENTRY.path).write_bytes(CONTENT)
        return staging, final

    def commit(self, step: int, **options: object) -> Path:
        staging, final = self.stage(step)
        options = {"fence": self.fence, "refused": (), **options}
        commits.commit(staging, final, manifest(step=step), **options)
        return final

    def names(self) -> list[str]:
        return sorted(path.name for path in self.root.iterdir())


@pytest.fixture
def run(tmp_path, monkeypatch) -> Run:
    return Run(tmp_path, monkeypatch)


def test_commit_leaves_what_is_listed_under_the_final_name(run) -> None:
    staging, final = run.stage(2)
    (staging / "shards" / "helper.py").write_text("not ours")
    commits.commit(staging, final, manifest(step=2), fence=run.fence, refused=())
    assert run.names() == ["step_00000002"]
    files = sorted(str(p.relative_to(final)) for p in final.rglob("*") if p.is_file())
    assert files == ["manifest.json", "shards/a.bin"]


def test_fenced_incarnation_does_not_commit(run) -> None:
    run.give_to("second")
    with pytest.raises(FencedError, match="first is fenced: second runs now"):
        run.commit(2)
    assert run.names() == [".staging-step_00000002-first-1"]


def test_take_over_after_the_manifest_is_noticed_before_the_rename(run, monkeypatch) -> None:
    write = manifests.write_manifest

    def taken_over_meanwhile(folder: Path, content: Manifest) -> None:
        write(folder, content)
        run.give_to("second")

    monkeypatch.setattr(manifests, "write_manifest", taken_over_meanwhile)
    with pytest.raises(FencedError):
        run.commit(2)
    assert manifests.step_folders(run.run_dir, stage=STAGE) == []


def test_whole_checkpoint_of_another_incarnation_is_never_replaced(run) -> None:
    final = run.commit(2)
    before = (final / "manifest.json").read_bytes()
    with pytest.raises(FencedError, match="step_00000002 was committed by another incarnation"):
        run.commit(2)
    assert (final / "manifest.json").read_bytes() == before


def test_checkpoint_that_comes_in_between_is_never_replaced(run, monkeypatch) -> None:
    """The process is stopped after its last look at the fence, and woken much later."""
    staging, final = run.stage(2)
    rename = commits.os.rename

    def stopped_here(old: Path, new: Path) -> None:
        final.mkdir()
        (final / "theirs").touch()
        rename(old, new)

    monkeypatch.setattr(commits.os, "rename", stopped_here)
    with pytest.raises(OSError, match="not empty"):
        commits.commit(staging, final, manifest(step=2), fence=run.fence, refused=())
    assert [path.name for path in final.iterdir()] == ["theirs"]


def test_checkpoint_that_was_found_broken_is_replaced(run) -> None:
    final = run.commit(2)
    (final / ENTRY.path).write_bytes(b"abd")  # its manifest can still be read
    run.commit(2, refused={"step_00000002"})
    assert manifests.find_fault(final, manifests.read_manifest(final)) is None
    (final / "manifest.json").write_text("{")
    run.commit(2)
    assert run.names() == ["step_00000002"]


def test_retention_keeps_the_last_ones_and_nothing_broken(run) -> None:
    for step in (2, 4, 6, 8, 10):
        run.commit(step)
    (run.root / "step_00000006" / "manifest.json").unlink()
    newest = run.root / "step_00000008"
    commits.retire(run.run_dir, stage=STAGE, newest=newest, keep_last=2)
    assert run.names() == ["step_00000004", "step_00000008", "step_00000010"]


def test_retention_keeps_the_best_one_beside_the_last_ones(run) -> None:
    for step in (2, 4, 6, 8, 10):
        run.commit(step)
    commits.retire(
        run.run_dir, stage=STAGE, newest=run.root / "step_00000010", keep_last=2, best_step=4
    )
    assert run.names() == ["step_00000004", "step_00000008", "step_00000010"]
    commits.retire(
        run.run_dir, stage=STAGE, newest=run.root / "step_00000010", keep_last=2, best_step=8
    )
    assert run.names() == ["step_00000008", "step_00000010"]


def test_left_overs_of_all_stages_are_cleared_but_not_by_a_fenced_incarnation(run) -> None:
    other = run.run_dir / "checkpoints" / "two" / ".staging-retired-step_00000002"
    other.mkdir(parents=True)
    run.commit(2)
    run.stage(4)
    run.give_to("second")
    commits.clear_left_overs(run.run_dir, fence=run.fence)
    assert other.exists()
    run.give_to("first")
    commits.clear_left_overs(run.run_dir, fence=run.fence)
    assert not other.exists()
    assert run.names() == ["step_00000002"]


def test_newest_whole_checkpoint_is_found_and_the_others_faults_are_told(run) -> None:
    for step in (2, 4, 6):
        run.commit(step)
    (run.root / "step_00000006" / "manifest.json").write_text("{")
    (run.root / "step_00000004" / ENTRY.path).write_bytes(b"abd")
    folder, found, faults = find_newest_whole(run.run_dir, stage=STAGE)
    assert found is not None
    assert (folder, found.step) == (run.root / "step_00000002", 2)
    assert list(faults) == ["step_00000006", "step_00000004"]
    assert "cannot be read" in faults["step_00000006"]
    assert "shards/a.bin has sha256" in faults["step_00000004"]


@pytest.mark.parametrize(
    ("error", "no_room", "final"),
    [
        (OSError(28, "No space left on device"), True, False),
        (OSError(5, "Input/output error"), False, False),
        (FencedError("fenced"), False, True),
        (ZeroDivisionError("a fault of this program"), False, True),
    ],
)
def test_only_troubles_of_the_file_system_are_tried_again(error, no_room, final) -> None:
    fault = Fault.of(error)
    assert (fault.no_room, fault.final) == (no_room, final)
    assert str(error) in fault.reason


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"base_model": "c"}, r"another base model .*it says b, found c"),
        ({"parent": "checkpoints/zero/step_00000001"}, "another parent stage"),
        ({"parent_sha256": "22"}, r"another version of its parent stage's weights.*11, found 22"),
    ],
)
def test_checkpoint_of_another_base_is_refused_by_name(fields, message, tmp_path) -> None:
    old = manifest(step=2, parent="checkpoints/zero/step_00000008", parent_sha256="11")
    found = Found(tmp_path, old, ())
    refuse_other_base(found, old)
    refuse_other_base(Found(None, None, ()), old)
    with pytest.raises(ValueError, match=message):
        refuse_other_base(found, old.model_copy(update=fields))


def test_checkpoint_of_an_older_version_does_not_say_its_parents_digest(tmp_path) -> None:
    old = manifest(step=2, parent="p")
    now = manifest(step=0, parent="p", parent_sha256="11")
    refuse_other_base(Found(tmp_path, old, ()), now)


def test_what_one_rank_cannot_read_is_raised_by_rank_and_name() -> None:
    def unreadable() -> None:
        raise OSError(5, "Input/output error", "shards/rank_00000.safetensors")

    assert raise_together(lambda: 3) == 3
    with pytest.raises(ValueError, match=r"rank 0: .*Input/output error: 'shards/rank_00000"):
        raise_together(unreadable)


def test_any_error_of_one_rank_ends_all(monkeypatch) -> None:
    """Rank 1 lacks a package; rank 0 and 2, who would wait for it for ever, stop too."""
    own = ImportError("no module named 'onnx'")

    def failing() -> None:
        raise own

    gathered: list[object] = []
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    monkeypatch.setattr(distributed, "gather_objects", lambda fault: gathered.append(fault) or [])
    with pytest.raises(ImportError) as raised:
        raise_together(failing)
    assert raised.value is own
    monkeypatch.setattr(distributed, "gather_objects", lambda fault: [fault, *gathered, None])
    with pytest.raises(RuntimeError, match=r"^rank 1: ImportError: no module named 'onnx'$"):
        raise_together(lambda: 3)
