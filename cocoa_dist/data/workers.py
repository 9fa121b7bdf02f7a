"""The worker processes of a DataLoader iterator: whether one has died, and how to be rid of them.

torch raises for a dead worker wherever the rank happens to be, in the midst of a backward pass
for instance. Here it may raise only while the rank waits for a batch, where the loader can start
the workers again.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any

from torch._C import _remove_worker_pids, _set_worker_pids


@dataclass(frozen=True)
class Death:
    """A worker process that ended by itself."""

    pid: int
    exit_code: int  # negative: the number of the signal that ended it

    def __str__(self) -> str:
        if self.exit_code >= 0:
            return f"process {self.pid} ended with {self.exit_code}"
        name = signal.Signals(-self.exit_code).name
        often = " (often: out of memory)" if -self.exit_code == signal.SIGKILL else ""
        return f"process {self.pid} was ended by {name}{often}"


@contextmanager
def watched(iterator: Any) -> Iterator[None]:
    """Let the death of a worker raise RuntimeError at once, and only inside.

    `iterator`: a DataLoader's own, None or without processes if it has none (yet).
    """
    processes = getattr(iterator, "_workers", ())
    if processes and not iterator._worker_pids_set:
        _set_worker_pids(id(iterator), tuple(one.pid for one in processes))
        iterator._worker_pids_set = True
    try:
        yield
    finally:
        unwatch(iterator)


def unwatch(iterator: Any) -> None:
    """Make sure that no death of these workers raises. May be called twice."""
    if getattr(iterator, "_worker_pids_set", False):
        iterator._worker_pids_set = False
        _remove_worker_pids(id(iterator))


def first_death(iterator: Any, *, patience: float = 0.0) -> Death | None:
    """Return a worker that is no longer there, None if all are.

    `patience`: seconds to wait for one; a process loses its connections before it is seen to end.
    """
    processes = getattr(iterator, "_workers", ())
    ended = wait([process.sentinel for process in processes], timeout=patience)
    for process in processes:
        if process.sentinel in ended:
            process.join()
            return Death(process.pid, process.exitcode or 0)
    return None


def end_at_once(iterator: Any) -> None:
    """Kill all workers and forget what they have sent.

    torch's own way asks them, through locks that a dead worker may hold for ever.
    """
    unwatch(iterator)
    for process in iterator._workers:
        process.kill()
    for process in iterator._workers:
        process.join()
    for queue in iterator._index_queues:
        queue.cancel_join_thread()
        queue.close()
    iterator._shutdown = True  # nothing is left for its destructor to do
