"""Stores: patience with one that fails, none with what is not there, nothing shared by forks."""

import os
import pickle
from collections.abc import Iterable
from pathlib import Path
from unittest.mock import Mock

import pytest

from cocoa_dist.config import is_remote
from cocoa_dist.data import store
from cocoa_dist.data.store import (
    DOWN_SECONDS,
    LOCAL_PAUSES,
    REMOTE_PAUSES,
    LocalStore,
    MscStore,
    PatientStore,
    absolute,
    open_store,
)


class Clock:
    """Time that passes when somebody sleeps."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds


class Moody:
    """A store that fails until a moment of the clock, with an error of choice."""

    location = "moody"

    def __init__(self, clock: Clock, well_at: float, error: Exception | None = None) -> None:
        self.asked = 0
        self._clock, self._well_at = clock, well_at
        self._error = error or OSError(5, "Input/output error")

    def read(self, name: str) -> bytes:
        self.asked += 1
        if self._clock.seconds < self._well_at:
            raise self._error
        return name.encode()

    def read_range(self, name: str, *, offset: int, length: int) -> bytes:
        return self.read(name)[offset : offset + length]

    def sizes(self, names: Iterable[str]) -> dict[str, int]:
        return {name: len(self.read(name)) for name in names}

    def close(self) -> None: ...


def patient(moody: Moody, clock: Clock, pauses: tuple[float, ...]) -> PatientStore:
    return PatientStore(moody, pauses, sleep=clock.sleep, now=lambda: clock.seconds)


@pytest.mark.parametrize(
    ("pauses", "outage"), [(LOCAL_PAUSES, 1.5), (REMOTE_PAUSES, 40.0)], ids=["local", "remote"]
)
def test_an_outage_is_waited_for(pauses: tuple[float, ...], outage: float) -> None:
    clock = Clock()
    waiting = patient(Moody(clock, well_at=outage), clock, pauses)
    assert waiting.read_range("abc", offset=1, length=1) == b"b"
    assert waiting.sizes(["abc"]) == {"abc": 3}
    assert outage < clock.seconds < 3 * outage + 1


def test_a_store_that_is_down_fails_at_once_and_is_tried_again_later() -> None:
    clock = Clock()
    moody = Moody(clock, well_at=1e9)
    waiting = patient(moody, clock, (1.0, 2.0))
    with pytest.raises(OSError, match="Input/output error"):
        waiting.read("a")
    spent = clock.seconds
    assert 2.25 <= spent <= 3.75
    for _ in range(5):
        with pytest.raises(OSError, match="Input/output error"):
            waiting.read("a")
    assert (clock.seconds, moody.asked) == (spent, 3 + 5)
    clock.seconds += DOWN_SECONDS + 1
    moody._well_at = clock.seconds + 1
    assert waiting.read("a") == b"a"  # with patience again


@pytest.mark.parametrize("error", [FileNotFoundError, NotADirectoryError, PermissionError])
def test_what_is_not_there_is_not_waited_for(error: type[OSError]) -> None:
    clock = Clock()
    waiting = patient(Moody(clock, 1e9, error(2, "no")), clock, REMOTE_PAUSES)
    with pytest.raises(error):
        waiting.read("a")
    assert clock.seconds == 0


def test_a_descriptor_that_failed_is_opened_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A handle of a network file system stays stale for ever."""
    (tmp_path / "a").write_bytes(b"old")
    local = LocalStore(tmp_path)
    assert local.read_range("a", offset=0, length=3) == b"old"
    (tmp_path / "b").write_bytes(b"new")
    (tmp_path / "b").replace(tmp_path / "a")
    with monkeypatch.context() as patch:

        def stale(*_: int) -> bytes:
            raise OSError(116, "Stale file handle")

        patch.setattr(os, "pread", stale)
        with pytest.raises(OSError, match="Stale"):
            local.read_range("a", offset=0, length=3)
    assert local.read_range("a", offset=0, length=3) == b"new"
    local.close()


def test_locations_keep_their_meaning_through_paths(tmp_path: Path) -> None:
    url = "msc://store/bucket/folder"
    assert is_remote(url)
    assert is_remote(Path(url))  # which has lost a slash
    assert absolute(Path(url)) == absolute(url) == url
    assert absolute(tmp_path / "a") == str(tmp_path / "a")
    assert not is_remote(tmp_path)


@pytest.mark.parametrize("where", ["msc://store/bucket/folder", "/somewhere"])
def test_stores_are_pickled_without_what_they_hold(where: str) -> None:
    opened = open_store(where)
    again = pickle.loads(pickle.dumps(opened))
    assert again.location == opened.location == where
    assert again.pauses == opened.pauses


def test_a_child_makes_a_client_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    class Client:
        def read(self, path: str) -> bytes:
            return f"{path} {os.getpid()}".encode()

    def new_client(url: str) -> tuple[Client, str]:
        made.append(os.getpid())
        return Client(), "folder"

    monkeypatch.setattr(store, "_new_client", new_client)
    remote = MscStore("msc://p/folder")
    assert made == []
    remote.read("a")
    remote.read("b")
    assert made == [os.getpid()]
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        remote.read("c")
        os.write(writing, str(made == [os.getppid(), os.getpid()]).encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reading, 10) == b"True"


def test_what_a_client_raises_is_an_oserror_with_the_address(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Client:
        def read(self, path: str) -> bytes:
            raise RuntimeError("slow down")

    monkeypatch.setattr(store, "_new_client", lambda url: (Client(), "folder"))
    with pytest.raises(OSError, match="msc://p/folder/a: RuntimeError: slow down"):
        MscStore("msc://p/folder").read("a")


def test_the_kernel_is_asked_to_read_ahead_what_it_has_not_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_bytes(bytes(5000))
    local = LocalStore(tmp_path)
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _, *where: asked.append(where[:2]))
    local.expect("a", offset=10, length=4000)  # just written
    assert asked == []

    def wait(*_: object) -> int:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "preadv", wait)
    local.expect("a", offset=10, length=4000)
    assert asked == [(10, 4000)]
    local.expect("nowhere", offset=0, length=1)  # whoever reads it will say so
    local.close()


def test_a_descriptor_that_failed_is_opened_anew_under_its_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread may be about to read by that number: it must never become another file."""
    (tmp_path / "a").write_bytes(b"old")
    folder = LocalStore(tmp_path)
    assert folder.read_range("a", offset=0, length=3) == b"old"
    number = folder._descriptor("a")
    (tmp_path / "b").write_bytes(b"new")
    (tmp_path / "b").rename(tmp_path / "a")  # the descriptor still has the old one
    with monkeypatch.context() as failing:
        failing.setattr(os, "pread", Mock(side_effect=OSError(116, "Stale file handle")))
        with pytest.raises(OSError, match="Stale"):
            folder.read_range("a", offset=0, length=3)
    assert folder._descriptor("a") == number
    assert os.pread(number, 3, 0) == b"new"
    folder.close()
