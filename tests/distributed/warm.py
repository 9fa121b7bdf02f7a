"""Ranks forked from a process that has already imported what they need.

Imports are nine tenths of what a short-lived rank costs (benchmarks/restart_cpu.md), and these
tests start a hundred of them. Each is a process of its own, with its own environment, log, signals
and exit code; it is only its interpreter that is not new. Tests of the launcher start trainers as
users do.

    warm.py     serves on stdin and stdout: {"fork": ...} gives a process id, {"poll": id} a code
"""

import atexit
import ctypes
import functools
import json
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_READ_AT_IMPORT = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


class Rank:
    """One rank, with the methods of subprocess.Popen that the tests use."""

    def __init__(
        self, script: Path, arguments: Sequence[str], *, environment: Mapping[str, str], log: Path
    ) -> None:
        """Run `python script arguments...`; what it says is appended to `log`."""
        for name, value in _READ_AT_IMPORT.items():
            assert environment.get(name, value) == value, f"{name} is read before a rank is forked"
        order = {
            "script": str(script),
            "arguments": list(arguments),
            "environment": dict(environment),
            "log": str(log),
            "cwd": os.getcwd(),
        }
        self.pid: int = _ask({"fork": order})
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = _ask({"poll": self.pid})
        return self.returncode

    def wait(self, timeout: float = float("inf")) -> int:
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(f"rank {self.pid}", timeout)
            time.sleep(0.01)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


@functools.cache
def _server() -> "subprocess.Popen[str]":
    """Start the process that ranks are forked from; it ends with this one."""
    process = subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, **_READ_AT_IMPORT},
        text=True,
    )

    def end() -> None:
        assert process.stdin is not None
        process.stdin.close()
        process.wait()

    atexit.register(end)
    return process


def _ask(request: dict[str, Any]) -> Any:
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    answer = server.stdout.readline()
    assert answer, f"the server of warm ranks has left with {server.wait()}"
    return json.loads(answer)


def serve() -> None:
    """Fork ranks until stdin is closed."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # a library that says something must not say it in between
    from cocoa_dist.runtime import imports_that_stay

    with imports_that_stay():
        import cocoa_dist.train.session  # noqa: F401
        from cocoa_dist.train.engine import import_deepspeed

        import_deepspeed()
    # A lock that another thread holds would stay locked in every rank.
    tasks = [
        Path(f"/proc/self/task/{task}/comm").read_text() for task in os.listdir("/proc/self/task")
    ]
    assert sum("jemalloc" not in name for name in tasks) == 1, f"threads before a fork: {tasks}"
    parent = os.getpid()
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                become(request["fork"], parent=parent)
        answers.write(f"{json.dumps(answer)}\n")
        answers.flush()


def become(order: dict[str, Any], *, parent: int) -> NoReturn:
    """Be a rank: run the script as `python script` would, and leave with its exit code."""
    import torch

    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)
    os.environ.clear()
    os.environ.update(order["environment"])
    torch.distributed.set_debug_level_from_env()
    os.chdir(order["cwd"])
    nothing = os.open(os.devnull, os.O_RDONLY)
    log = os.open(order["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    sys.stdin = open(0)
    sys.argv = [order["script"], *order["arguments"]]
    sys.path[0] = str(Path(order["script"]).parent)
    code = 1
    try:
        runpy.run_path(order["script"], run_name="__main__")
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            sys.stderr.write(f"{error.code}\n")
    except BaseException:
        traceback.print_exc()
    # The interpreter's own end would write to every object, and so copy every page of the server.
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    serve()
