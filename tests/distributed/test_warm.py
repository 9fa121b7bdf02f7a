"""A rank forked from the warm process is to its test what a started one would be."""

import json
import os
import signal
import subprocess
import sys

import pytest
from warm import Rank

pytestmark = pytest.mark.slow

SCRIPT = """
import atexit, json, os, signal, sys, threading, time
atexit.register(print, "at exit")
what = sys.argv[1]
if what == "show":
    warm = "deepspeed" in sys.modules
    shown = {"argv": sys.argv, "path": sys.path[0], "environment": dict(os.environ)}
    import torch.distributed
    shown["debug"] = torch.distributed.get_debug_level().name
    shown |= {"cwd": os.getcwd(), "name": __name__, "warm": warm}
    print(json.dumps(shown))
if what == "leave":
    sys.exit(int(sys.argv[2]))
if what == "raise":
    raise RuntimeError("on purpose")
if what == "say":
    sys.exit("a word")
if what == "thread":
    threading.Thread(target=lambda: (time.sleep(0.2), print("thread done"))).start()
if what == "wait":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(7))
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def run(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    log = tmp_path / "log"
    log.touch()

    def start(*arguments: str, **more: str) -> Rank:
        return Rank(script, arguments, environment={**os.environ, **more}, log=log)

    start.log = log
    start.script = script
    return start


def test_it_has_its_own_arguments_environment_and_folder(run, tmp_path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        rank = run("show", RANK="3", TORCH_DISTRIBUTED_DEBUG="INFO")
    assert rank.wait(60) == 0
    shown, at_exit = run.log.read_text().splitlines()
    found = json.loads(shown)
    assert found["argv"] == [str(run.script), "show"]
    assert (found["path"], found["cwd"]) == (str(tmp_path), str(tmp_path))
    assert (found["name"], found["warm"]) == ("__main__", True)
    assert (found["environment"]["RANK"], found["debug"]) == ("3", "INFO")
    assert "RANK" not in os.environ
    assert at_exit == "at exit"


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("leave", "0"), 0, ""),
        (("leave", "93"), 93, ""),
        (("say",), 1, "a word"),
        (("raise",), 1, "RuntimeError: on purpose"),
        (("thread",), 0, "thread done"),
    ],
)
def test_it_leaves_as_a_started_process_does(run, arguments, code, said) -> None:
    assert run(*arguments).wait(60) == code
    forked = run.log.read_text()
    assert said in forked
    started = subprocess.run(
        [sys.executable, str(run.script), *arguments], capture_output=True, text=True, check=False
    )
    assert started.returncode == code
    assert said in started.stdout + started.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 7)])
def test_signals_reach_it(run, number, code) -> None:
    rank = run("wait")
    while "ready" not in run.log.read_text():
        assert rank.poll() is None
    assert rank.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        rank.wait(0.05)
    rank.send_signal(number)
    assert rank.wait(60) == code
    rank.kill()  # nobody is there any more: nothing happens


def test_what_is_read_at_import_cannot_be_changed_afterwards(run) -> None:
    with pytest.raises(AssertionError, match="OMP_NUM_THREADS is read before a rank is forked"):
        run("show", OMP_NUM_THREADS="4")
