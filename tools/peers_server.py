"""One arm of tools/bench_peers.py: imports its libraries once, then forks a process for each turn.

    python tools/peers_server.py MODULE      a job a line on stdin, a line of figures on stdout

Figures of a turn are of the steps behind the first `warm` ones: CPU seconds over all ranks, wall
seconds of the slowest, and the most that resident memory grew on rank 0 from before the model was
loaded. A turn that fails gives {"error": ...}, and the server goes on.
"""

import ctypes
import gc
import itertools
import json
import os
import resource
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).parent))

from peers_arms import ARMS, Gradients, warm_up

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Stopwatch:
    """Counts the steps behind the first `warm` ones, and keeps what step 1 came to."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job
        self.figures: dict[str, float] = {}
        self._base = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the highest value starts anew

    def begin(self, step: int) -> None:
        """See peers_arms.Watch."""
        if step == self.job["warm"] and "cpu_seconds" not in self.figures:
            self._cpu, self._wall = time.process_time(), time.monotonic()
        if step == self.job["steps"] and step > self.job["warm"]:
            self.figures["cpu_seconds"] = time.process_time() - self._cpu
            self.figures["seconds"] = time.monotonic() - self._wall
            self.figures["grown"] = resident("VmHWM") - self._base
            self.figures["peak"] = resident("VmHWM")

    def proof(self, loss: float, gradients: Callable[[], Gradients]) -> None:
        """See peers_arms.Watch; `gradients` is a collective."""
        self.figures["loss"] = loss
        found = gradients()
        if int(os.environ.get("RANK", "0")) == 0:
            import torch

            torch.save(
                {name: value.detach().float().clone() for name, value in found.items()},
                self.job["proof"],
            )


def resident(key: str) -> int:
    """Return a line of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def available() -> int:
    """Return how many bytes can be taken without pushing others out, less a tenth."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    return free * 1024 * 9 // 10


def limit_memory(more: int) -> None:
    """Have this process fail, and say so, where it wants more: the kernel would kill, anyone."""
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = resident("VmData") + more
    soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def serve(module: str) -> int:
    """Answer jobs until stdin is closed."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # a library that says something must not say it in between
    warm_up(module)
    import torch

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    for line in itertools.chain([""], sys.stdin):
        answer = turn(module, json.loads(line)) if line else {"ready": os.getpid()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    return 0


def turn(module: str, job: dict[str, Any]) -> dict[str, Any]:
    """Run one job in processes of its own."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        children = [fork(module, job, rank, port, folder) for rank in range(job["nproc"])]
        codes = []
        for _ in children:
            pid, status = os.wait()
            codes.append(os.waitstatus_to_exitcode(status))
            if codes[-1]:
                for other in children:
                    if other != pid and not any(codes[:-1]):
                        os.kill(other, signal.SIGKILL)
        ranks = [folder / f"{rank}.json" for rank in range(job["nproc"])]
        told = [json.loads(path.read_text()) for path in ranks if path.exists()]
    faults = [one["error"] for one in told if "error" in one]
    if any(codes) or faults or len(told) < job["nproc"]:
        return {"error": faults[0] if faults else f"ended with {codes}"}
    return {
        **told[0],
        **{k: sum(one[k] for one in told) for k in ("cpu_seconds",) if k in told[0]},
        **{k: max(one[k] for one in told) for k in ("seconds",) if k in told[0]},
    }


def fork(module: str, job: dict[str, Any], rank: int, port: int, folder: Path) -> int:
    """Start one rank; return its process id."""
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        become(module, job, rank, port, folder, parent)
    return pid


def become(
    module: str, job: dict[str, Any], rank: int, port: int, folder: Path, parent: int
) -> NoReturn:
    """Be a rank until the job is done."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job["nproc"], "MASTER_PORT": port}
    if job["nproc"] > 1:  # one process has no group: peers would wrap its model for nothing
        os.environ.update({k: str(v) for k, v in world.items()}, MASTER_ADDR="127.0.0.1")
    watch = Stopwatch(job)
    code = 0
    limit_memory(available() // job["nproc"])
    try:
        ARMS[module](job, watch)
        told: dict[str, Any] = watch.figures
    except BaseException as error:
        traceback.print_exc()
        said = (str(error).strip() or repr(error)).splitlines()
        told, code = {"error": f"{type(error).__name__}: {said[0][:200]}"}, 1
    (folder / f"{rank}.json").write_text(json.dumps(told))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    sys.exit(serve(sys.argv[1]))
