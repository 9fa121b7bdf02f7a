"""Where the files of a data set lie: a folder, or an object store behind `msc://`; read only.

Every read is one `pread` or one ranged GET. A store that fails is asked again with growing pauses;
after that it is taken to be down for a while, and fails at once. Clients and descriptors belong to
one process and are made when they are first needed, so a fork is harmless.
"""

import contextlib
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from cocoa_dist.config import is_remote
from cocoa_dist.config.loading import REMOTE_SCHEME

LOCAL_PAUSES = (0.1, 0.5, 2.0)  # seconds before trying again: a network file system hiccups
REMOTE_PAUSES = (0.2, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0)  # a server that restarts takes a minute
DOWN_SECONDS = 30.0  # a store that used up its pauses fails at once for so long
_PERMANENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)
_NEVER = float("-inf")
_JITTER = 0.25  # of a pause, so that ranks do not come back all at once
_READ = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0)

log = logging.getLogger(__name__)

_Result = TypeVar("_Result")


class Store(Protocol):
    """Files by name. Raises FileNotFoundError for one that is not there, OSError for all else."""

    @property
    def is_far(self) -> bool:
        """Whether a read takes milliseconds: better one large than many small ones."""

    @property
    def location(self) -> str:
        """The folder's path or URL, as a recipe may name it."""

    def read(self, name: str) -> bytes:
        """Return a whole file."""

    def read_range(self, name: str, *, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset` on, fewer only at the end of the file."""

    def expect(self, name: str, *, offset: int, length: int) -> None:
        """Say that these bytes will soon be read piece by piece. Costs nothing, never fails."""

    def sizes(self, names: Iterable[str]) -> dict[str, int]:
        """Return the sizes, in bytes, of those files that are there."""

    def close(self) -> None:
        """Give descriptors or connections back; the next read makes new ones."""


def absolute(location: str | Path) -> str:
    """Return a location as other programs and other folders understand it."""
    return open_store(location).location


def open_store(location: str | Path) -> "Store":
    """Return the store of a location, with patience. Nothing is read or connected to yet."""
    if is_remote(location):
        rest = str(location).removeprefix(REMOTE_SCHEME).strip("/")
        return PatientStore(MscStore(f"msc://{rest}"), pauses=REMOTE_PAUSES)
    return PatientStore(LocalStore(Path(location)), pauses=LOCAL_PAUSES)


class LocalStore:
    """A folder. Descriptors stay open; one that failed is opened anew.

    A forked child goes on with the descriptors it was given: pread has no position to share.
    """

    is_far = False

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[str, int] = {}
        self._lock = _PerProcess[None](lambda: None)

    def __reduce__(self) -> tuple[Any, ...]:
        return (LocalStore, (self.folder,))

    @property
    def location(self) -> str:
        """The folder, absolute."""
        return str(self.folder.absolute())

    def read(self, name: str) -> bytes:
        """Return a whole file."""
        return (self.folder / name).read_bytes()

    def read_range(self, name: str, *, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset` on, fewer only at the end of the file."""
        descriptor = self._open.get(name, -1)
        if descriptor < 0:
            descriptor = self._descriptor(name)
        try:
            data = os.pread(descriptor, length, offset)
            while len(data) < length and (
                more := os.pread(descriptor, length - len(data), offset + len(data))
            ):
                data += more
        except OSError:
            self._renew(name, descriptor)  # a stale handle of a network file system stays stale
            raise
        return data

    def expect(self, name: str, *, offset: int, length: int) -> None:
        """Ask the kernel to read ahead (30 us) unless it has the last byte in its cache."""
        if not length or not hasattr(os, "posix_fadvise"):
            return
        with contextlib.suppress(OSError):
            descriptor = self._descriptor(name)
            if not _is_cached(descriptor, offset + length - 1):
                os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_WILLNEED)

    def sizes(self, names: Iterable[str]) -> dict[str, int]:
        """Return the sizes, in bytes, of those files that are there."""
        found = {name: self.folder / name for name in names}
        return {name: path.stat().st_size for name, path in found.items() if path.is_file()}

    def close(self) -> None:
        """Close all descriptors."""
        with self._lock.lock():
            for name in list(self._open):
                os.close(self._open.pop(name))

    def _descriptor(self, name: str) -> int:
        with self._lock.lock():
            if name not in self._open:
                self._open[name] = os.open(self.folder / name, _READ)
            return self._open[name]

    def _renew(self, name: str, descriptor: int) -> None:
        """Put the file behind the descriptor anew; its number may be in another thread's hands."""
        with self._lock.lock(), contextlib.suppress(OSError):
            if self._open.get(name) != descriptor:
                return
            opened = os.open(self.folder / name, _READ)
            try:
                os.dup2(opened, descriptor, inheritable=False)
            finally:
                os.close(opened)


def _is_cached(descriptor: int, offset: int) -> bool:
    """Whether a byte can be read without waiting; False where the kernel does not say."""
    try:
        return os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
    except (OSError, AttributeError):
        return False


class MscStore:
    """A folder of an object store, through multi-storage-client and its profiles."""

    is_far = True

    def __init__(self, url: str) -> None:
        self.url = url
        self._client = _PerProcess[list[Any]](list)

    def __reduce__(self) -> tuple[Any, ...]:
        return (MscStore, (self.url,))

    @property
    def location(self) -> str:
        """The URL."""
        return self.url

    def read(self, name: str) -> bytes:
        """Return a whole object."""
        return self._ask(lambda client, folder: bytes(client.read(f"{folder}/{name}")), name)

    def read_range(self, name: str, *, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset` on, by a ranged GET."""
        from multistorageclient.types import Range

        part = Range(offset=offset, size=length)
        return self._ask(lambda client, folder: bytes(client.read(f"{folder}/{name}", part)), name)

    def expect(self, name: str, *, offset: int, length: int) -> None:
        """Do nothing: there is no cache to fill."""

    def sizes(self, names: Iterable[str]) -> dict[str, int]:
        """Return the sizes, in bytes, of those objects that are there; one listing for all."""
        wanted = set(names)

        def listed(client: Any, folder: str) -> dict[str, int]:
            found = {}
            for item in client.list(path=f"{folder}/"):
                name = item.key.removeprefix("/").partition(f"{folder}/")[2]
                if name in wanted:
                    found[name] = int(item.content_length)
            return found

        return self._ask(listed, "")

    def close(self) -> None:
        """Forget the client; its connections go with it."""
        with self._client.lock() as clients:
            clients.clear()

    def _ask(self, question: Callable[[Any, str], _Result], name: str) -> _Result:
        """Ask the client; whatever it raises is an OSError to our callers."""
        with self._client.lock() as clients:
            if not clients:
                clients.append(_new_client(self.url))
            client, folder = clients[0]
        try:
            return question(client, folder)
        except OSError:
            raise
        except Exception as error:  # of botocore, of the client, of the provider: no common class
            raise OSError(f"{self.url}/{name}: {type(error).__name__}: {error}") from error


def _new_client(url: str) -> tuple[Any, str]:
    """Return a client of this process, and the folder inside it. Raises ValueError."""
    profile, _, folder = url.removeprefix("msc://").partition("/")
    try:
        from multistorageclient import StorageClient, StorageClientConfig

        return StorageClient(StorageClientConfig.from_file(profile=profile)), folder
    except ImportError as error:
        raise ValueError(
            f"{url} lies in an object store, whose client is missing here ({error}): install "
            "cocoa_dist[s3]"
        ) from error
    except (ValueError, RuntimeError, OSError) as error:
        raise ValueError(
            f"{url}: no client for profile '{profile}': {error}; MSC_CONFIG names the file with "
            "the profiles"
        ) from error


@dataclass
class PatientStore:
    """Another store, asked again with growing pauses when it fails.

    A file that is not there is not waited for.
    """

    store: Store
    pauses: tuple[float, ...]
    sleep: Callable[[float], None] = time.sleep
    now: Callable[[], float] = time.monotonic
    _down_until: float = field(default=_NEVER, repr=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return (PatientStore, (self.store, self.pauses))

    @property
    def location(self) -> str:
        """That of the store."""
        return self.store.location

    def read(self, name: str) -> bytes:
        """Return a whole file."""
        return self._patiently(lambda: self.store.read(name))

    def read_range(self, name: str, *, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset` on, fewer only at the end of the file."""
        if self._down_until == _NEVER:  # the common case, a microsecond sooner
            try:
                return self.store.read_range(name, offset=offset, length=length)
            except _PERMANENT:
                raise
            except OSError as error:
                failed = error
        else:
            failed = None
        return self._patiently(
            lambda: self.store.read_range(name, offset=offset, length=length), failed
        )

    @property
    def is_far(self) -> bool:
        """Whether the store is."""
        return self.store.is_far

    def expect(self, name: str, *, offset: int, length: int) -> None:
        """Pass it on."""
        self.store.expect(name, offset=offset, length=length)

    def sizes(self, names: Iterable[str]) -> dict[str, int]:
        """Return the sizes, in bytes, of those files that are there."""
        listed = list(names)
        return self._patiently(lambda: self.store.sizes(listed))

    def close(self) -> None:
        """Close the store."""
        self.store.close()

    def _patiently(self, question: Callable[[], _Result], failed: OSError | None = None) -> _Result:
        """Ask until there is an answer; `failed`: what it said when it was asked just now."""

        def ask() -> _Result:
            nonlocal failed
            if failed is None:
                return question()
            error, failed = failed, None
            raise error

        for pause in self.pauses if self.now() >= self._down_until else ():
            try:
                return ask()
            except _PERMANENT:
                raise
            except OSError as error:
                # Not a seeded generator: this must differ between ranks, and decides no number.
                seconds = pause * random.uniform(1 - _JITTER, 1 + _JITTER)
                log.warning("%s fails, trying again in %.1f s: %s", self.location, seconds, error)
                self.sleep(seconds)
        try:
            answer = ask()
        except _PERMANENT:
            raise
        except OSError:
            self._down_until = self.now() + DOWN_SECONDS
            raise
        self._down_until = _NEVER
        return answer


class _PerProcess(Generic[_Result]):
    """A value that every process makes for itself, and the lock of its threads.

    A lock that another thread of the parent held at a fork is not the child's.
    """

    def __init__(self, make: Callable[[], _Result]) -> None:
        self._make = make
        self._renew()

    @contextlib.contextmanager
    def lock(self) -> Iterator[_Result]:
        """Hold the lock and use the value."""
        if self._pid != os.getpid():
            self._renew()
        with self._lock:
            yield self._value

    def _renew(self) -> None:
        self._pid, self._lock, self._value = os.getpid(), threading.Lock(), self._make()
