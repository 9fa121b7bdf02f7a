"""The trainer of a rank, with one thing added: it dies (kill -9), leaves or waits at a set moment.

    dying_trainer.py MOMENT RANK COUNT [arguments of `python -m cocoa_dist.train`]

MOMENT is a name of `_MOMENTS`; the COUNT-th time that rank RANK comes there, it happens. Nothing in
the package knows of it: the functions it passes through are replaced here.
"""

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

from cocoa_dist.runtime import StopRequest

_STOP = StopRequest()
_STOP.install()

from cocoa_dist import metrics  # noqa: E402
from cocoa_dist.train import __main__ as trainer  # noqa: E402
from cocoa_dist.train import build, checkpoint, commit, loop, shards  # noqa: E402


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class At:
    """Does something at the COUNT-th call, on one rank."""

    def __init__(self, count: int, action: Callable[[], None] = die) -> None:
        self.left, self.action = count, action

    def __call__(self) -> None:
        self.left -= 1
        if self.left == 0:
            self.action()


def in_copy(now: At) -> None:
    take = shards.HostCopy.take

    def half(self, live):
        names = list(live.tensors)[: len(live.tensors) // 2]
        take(self, shards.LiveState({name: live.tensors[name] for name in names}, {}))
        now()
        return take(self, live)

    shards.HostCopy.take = half


def in_write(now: At, *, of: str = "rank_") -> None:
    """Half of a file is written."""
    write = shards.write_file

    def half(folder, name, chunks):
        def cut(found):
            yield found[0][: len(found[0]) // 2]
            now()
            yield found[0][len(found[0]) // 2 :]
            yield from found[1:]

        return write(folder, name, cut([bytes(c) for c in chunks]) if of in name else chunks)

    shards.write_file = half


def in_failing_write(now: At) -> None:
    """The disk refuses once."""

    def refuse() -> None:
        raise OSError(5, "Input/output error")

    now.action = refuse
    in_write(now)


def in_write_of_weights(now: At) -> None:
    in_write(now, of="weights")


def in_digest_gather(now: At) -> None:
    """Its own part is whole and durable; the other ranks wait for its word."""
    exchange, seen = checkpoint.Exchange, set()

    def telling(text, **how):
        _, _, files, _ = json.loads(text)
        if files and text not in seen:  # told again until all ranks have written
            seen.add(text)
            now()
        return exchange(text, **how)

    checkpoint.Exchange = telling


def before_rename(now: At) -> None:
    renaming(now, after=False)


def after_rename(now: At) -> None:
    renaming(now, after=True)


def renaming(now: At, *, after: bool) -> None:
    rename = os.rename

    def watched(old, new):
        commits = Path(old).name.startswith(".staging-") and Path(new).name.startswith("step_")
        if commits and not after:
            now()
        rename(old, new)
        if commits and after:
            now()

    os.rename = watched


def in_retention(now: At) -> None:
    """An old checkpoint is half deleted."""
    remove = shutil.rmtree

    def half(path, *args, **options):
        if "retired" in str(path):
            next(p for p in Path(path).rglob("*") if p.is_file()).unlink()
            now()
        remove(path, *args, **options)

    commit.shutil.rmtree = half


def in_hand_over(now: At) -> None:
    """The stage before has ended; its weights are half read, by the one rank that reads them."""
    opened = build.safe_open

    @contextmanager
    def opening(*args, **options):
        with opened(*args, **options) as file:
            names = list(file.keys())
            read = iter(range(len(names)))

            def get_tensor(name):
                if next(read) == len(names) // 2:
                    now()
                return file.get_tensor(name)

            yield SimpleNamespace(keys=lambda: names, get_tensor=get_tensor)

    build.safe_open = opening


def in_load(now: At) -> None:
    """Half of the parameters are taken from the shards."""
    copy = shards._copy_overlap

    def copying(*args):
        now()
        return copy(*args)

    shards._copy_overlap = copying


def in_cut_back(now: At) -> None:
    """A resume rewrites the run's record; half of the new one is on disk."""
    write = metrics.write_atomic

    def half(path, data):
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.write_bytes(data[: len(data) // 2])
        now()
        temporary.unlink()
        write(path, data)

    metrics.write_atomic = half


def leaves(now: At) -> None:
    """Be asked to leave, as by SIGTERM, after so many steps."""
    one_step = loop.StageRun._one_step

    def stepping(self, step):
        now.action = lambda: setattr(_STOP, "requested", True)
        now()
        return one_step(self, step)

    loop.StageRun._one_step = stepping


def loses_a_worker(now: At) -> None:
    """A process of this rank's loader is killed before so many steps; the rank lives on."""
    one_step = loop.StageRun._one_step

    def stepping(self, step):
        workers = getattr(self.loader._loader._iterator, "_workers", ())
        now.action = lambda: os.kill(workers[0].pid, signal.SIGKILL)
        now()
        return one_step(self, step)

    loop.StageRun._one_step = stepping


def waits_before_rename(now: At) -> None:
    """Stand still before a commit, as a stopped process does, until a file says go on."""
    run_dir = Path(sys.argv[sys.argv.index("--run-dir") + 1])

    def stand() -> None:
        (run_dir / "standing").touch()
        while not (run_dir / "go_on").exists():
            time.sleep(0.02)

    now.action = stand
    write = commit.manifests.write_manifest

    def writing(folder, manifest):
        write(folder, manifest)
        now()

    commit.manifests.write_manifest = writing


_MOMENTS = {
    moment.__name__: moment
    for moment in (
        *(in_copy, in_write, in_failing_write, in_write_of_weights, in_digest_gather),
        *(before_rename, after_rename, in_retention, in_hand_over, in_load),
        *(in_cut_back, leaves, loses_a_worker, waits_before_rename),
    )
}


def main() -> int:
    moment, rank, count, *arguments = sys.argv[1:]
    if moment != "never" and rank in (os.environ["RANK"], "all"):
        _MOMENTS[moment](At(int(count)))
    trainer._STOP = _STOP
    return trainer.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
