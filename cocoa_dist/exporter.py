"""Serves this process's metrics to Prometheus, and says where by a target file for file_sd.

A thread answers scrapes from values in memory: it touches neither torch nor a device and answers
while the main thread waits in a collective. Nothing here ends a run: what cannot be done is told
once, counted, and left.
"""

import atexit
import bisect
import hashlib
import json
import logging
import os
import socket
import socketserver
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric as Family

from cocoa_dist.config import MetricsConfig
from cocoa_dist.manifest import write_atomic
from cocoa_dist.metrics import FAULTS, METRICS, Kind, Metric, Source

log = logging.getLogger("cocoa_dist.exporter")

STRICT_VARIABLE = "COCOA_STRICT_METRICS"  # set by tests: a metric nobody declared is an error
TARGET_FOLDER = "sd"
_CONNECTION_SECONDS = 10.0  # a scraper that says nothing is hung up on
_LOOPBACK = "127.0.0.1"
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")

_Labels = tuple[tuple[str, str], ...]


class _Histogram:
    """Counts of observed values by bucket."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.total += value

    def cumulative(self) -> list[tuple[str, float]]:
        seen, rows = 0, []
        for bound, count in zip((*self.bounds, float("inf")), self.counts, strict=True):
            seen += count
            rows.append(("+Inf" if bound == float("inf") else str(bound), float(seen)))
        return rows


class Values:
    """The current values of one process; only what was set is exported.

    A name, label or label value that the registry does not have raises ValueError under tests; in
    production it is dropped, counted, and told once.
    """

    def __init__(self, *sources: Source, strict: bool | None = None) -> None:
        """Take what this process may export; `strict` is by default as STRICT_VARIABLE says."""
        self._sources = sources
        self._strict = bool(os.environ.get(STRICT_VARIABLE)) if strict is None else strict
        self._numbers: dict[str, dict[_Labels, float]] = {}
        self._histograms: dict[str, _Histogram] = {}
        self._told: set[str] = set()
        self._lock = threading.Lock()
        self._later: dict[str, Callable[[], None]] = {}

    def set(self, name: str, value: float, /, **labels: str) -> None:
        """Replace a value. A counter that is read from files is set, too."""
        if self._declared(name, labels):
            with self._lock:
                self._numbers.setdefault(name, {})[_key(labels)] = float(value)

    def add(self, name: str, amount: float = 1.0, /, **labels: str) -> None:
        """Add to a value that begins at 0; adding 0 makes it known before anything happens."""
        if self._declared(name, labels):
            with self._lock:
                values = self._numbers.setdefault(name, {})
                key = _key(labels)
                values[key] = values.get(key, 0.0) + amount

    def observe(self, name: str, value: float) -> None:
        """Count a value in its histogram's buckets."""
        if self._declared(name, {}):
            with self._lock:
                known = self._histograms.setdefault(name, _Histogram(METRICS[name].buckets))
                known.observe(value)

    def choose(self, name: str, chosen: str, *, among: tuple[str, ...], label: str) -> None:
        """Set a 0/1 gauge to 1 for one value of a label and to 0 for the others."""
        for value in among:
            self.set(name, float(value == chosen), **{label: value})

    def later(self, subject: str, update: Callable[[], None]) -> None:
        """Keep an update until somebody asks; a later one of the same subject takes its place.

        For gauges of every step: steps are many, scrapes are few. A strict process sets them at
        once, so that a name that is not registered fails where it was given.
        """
        if self._strict:
            update()
        else:
            self._later[subject] = update

    def _catch_up(self) -> None:
        while self._later:
            try:
                _, update = self._later.popitem()
            except KeyError:  # another thread has just done it
                return
            update()

    def get(self, name: str, /, **labels: str) -> float | None:
        """Return a value; None if it was never set."""
        self._catch_up()
        with self._lock:
            return self._numbers.get(name, {}).get(_key(labels))

    def collect(self) -> Iterator[Family]:
        """Yield all metrics, as prometheus_client asks for them at a scrape."""
        self._catch_up()
        with self._lock:
            numbers = {name: dict(values) for name, values in self._numbers.items()}
            counts = {n: (h.cumulative(), h.total) for n, h in self._histograms.items()}
        for name, values in {**numbers, **self._of_the_process()}.items():
            declared = METRICS[name]
            kind = CounterMetricFamily if declared.kind is Kind.COUNTER else GaugeMetricFamily
            family = kind(name, declared.help, labels=sorted(declared.labels))
            for key, value in values.items():
                family.add_metric([text for _, text in key], value)
            yield family
        for name, (buckets, total) in counts.items():
            histogram = HistogramMetricFamily(name, METRICS[name].help)
            histogram.add_metric([], buckets=buckets, sum_value=total)
            yield histogram

    def _of_the_process(self) -> dict[str, dict[_Labels, float]]:
        if Source.EVERY_RANK not in self._sources:
            return {}
        times = os.times()
        found: dict[str, dict[_Labels, float]] = {
            "cocoa_process_cpu_seconds_total": {(): times.user + times.system}
        }
        try:
            pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        except (OSError, ValueError, IndexError):
            return found  # not Linux
        return {**found, "cocoa_process_resident_bytes": {(): float(pages * _PAGE_BYTES)}}

    def _declared(self, name: str, labels: dict[str, str]) -> bool:
        fault = self._fault(METRICS.get(name), labels)
        if fault is None:
            return True
        if self._strict:
            raise ValueError(f"metric '{name}': {fault}; declare it in cocoa_dist/registry/")
        if name not in self._told:
            self._told.add(name)
            log.warning("metric '%s' is not exported: %s", name, fault)
        self.add("cocoa_exporter_dropped_values_total")
        return False

    def _fault(self, declared: Metric | None, labels: dict[str, str]) -> str | None:
        if declared is None:
            return "the registry has no such metric"
        if declared.source not in (*self._sources, Source.EVERYBODY):
            has = ", ".join(source.value for source in self._sources)
            return f"it is exported by {declared.source.value}, this process is {has}"
        if set(labels) != set(declared.labels):
            return f"its labels are {sorted(declared.labels)}, found {sorted(labels)}"
        known = self._numbers.get(declared.name, {})
        if (
            len(known) >= declared.most_series
            and _key(labels) not in known
            and not declared.buckets
        ):
            return f"it has {len(known)} series already, as many as the registry allows"
        return None


def _key(labels: dict[str, str]) -> _Labels:
    return tuple(sorted(labels.items()))


class Exporter:
    """The endpoint of one process and its target file."""

    def __init__(self, values: Values) -> None:
        self.values = values
        self.port: int | None = None  # None: it could not be opened
        self.target: Path | None = None  # None: it could not be written
        self._server: _Server | None = None
        self._owner = os.getpid()

    def start(
        self, settings: MetricsConfig, *, port: int, folder: Path, name: str, labels: dict[str, str]
    ) -> None:
        """Open the endpoint and announce it as `folder/name`; faults are told and counted."""
        for reason in FAULTS:
            self.values.add("cocoa_exporter_faults_total", 0.0, reason=reason)
        self.values.add("cocoa_exporter_dropped_values_total", 0.0)
        address, host = addresses(settings.bind_address)
        try:
            self._server = _serve(self.values, address=address, port=port)
        except OSError as error:
            where = f"{address}:{port}" if port else address
            self.fault("port", f"no metrics from this process: cannot listen on {where}: {error}")
            return
        self.port = self._server.server_port
        target = [{"targets": [f"{host}:{self.port}"], "labels": labels}]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomic(folder / name, json.dumps(target).encode())
        except OSError as error:
            self.fault("target", f"Prometheus will not find {host}:{self.port}: {error}")
            return
        self.target = folder / name
        atexit.register(self.stop)

    def fault(self, reason: str, message: str) -> None:
        """Tell and count what of the monitoring could not be done."""
        log.warning("%s; the run goes on", message)
        self.values.add("cocoa_exporter_faults_total", reason=reason)

    def stop(self) -> None:
        """Take the target away and close the endpoint; does nothing in a forked child."""
        if os.getpid() != self._owner:
            return
        if self.target is not None:
            try:
                self.target.unlink(missing_ok=True)
            except OSError as error:
                log.warning("%s stays: %s; the next start removes it", self.target, error)
            self.target = None
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None
        atexit.unregister(self.stop)


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    """One thread a connection; binding asks no name server, which may be slow."""

    daemon_threads = True

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = "metrics", int(self.socket.getsockname()[1])
        self.setup_environ()


class _Handler(WSGIRequestHandler):
    timeout = _CONNECTION_SECONDS

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing about scrapes."""


def _serve(values: Values, *, address: str, port: int) -> _Server:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(values)
    server = _Server((address, port), _Handler)
    server.set_app(make_wsgi_app(registry))
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
    return server


def addresses(bind_address: str) -> tuple[str, str]:
    """Return the address to listen on and the host that Prometheus is told.

    `auto`: outside SLURM all ranks are on this machine, and the loopback is enough; in a job every
    interface, under the name of the node.
    """
    if bind_address != "auto":
        everywhere = bind_address == "0.0.0.0"
        return bind_address, socket.gethostname() if everywhere else bind_address
    if "SLURM_JOB_ID" not in os.environ:
        return _LOOPBACK, _LOOPBACK
    return "0.0.0.0", socket.gethostname()


def target_folder(run_dir: Path, settings: MetricsConfig) -> Path:
    """Return where target files go: `metrics.targets`, or `sd/` in the run folder."""
    return Path(settings.targets) if settings.targets else run_dir / TARGET_FOLDER


def target_name(run_dir: Path, *, epoch: str, who: str) -> str:
    """Return the file name of a process's target; one folder may serve many runs."""
    return f"{_prefix(run_dir)}{epoch or 'by_hand'}-{who}.json"


def target_labels(run_dir: Path, *, who: str, stage: str = "", rank: str = "") -> dict[str, str]:
    """Return the labels of a target; `instance` stays the same whatever node and port it gets.

    Prometheus leaves out the empty ones.
    """
    return {
        "instance": f"{run_dir.name}/{who}",
        "run_id": run_dir.name,
        "stage": stage,
        "rank": rank,
        "node": socket.gethostname(),
        "slurm_job_id": os.environ.get("SLURM_JOB_ID", ""),
    }


def collect_stale_targets(folder: Path, run_dir: Path, *, epoch: str | None = None) -> list[str]:
    """Remove the targets that dead ranks and launchers of a run left; return their names.

    Call while none of them lives. `epoch`: only of the ranks of this incarnation. Targets of other
    runs in the same folder are not touched. A folder that cannot be read is told and left.
    """
    removed: list[str] = []
    which = "*" if epoch is None else f"{epoch}-r*"
    try:
        for path in sorted(folder.glob(f"{_prefix(run_dir)}{which}.json")):
            path.unlink(missing_ok=True)
            removed.append(path.name)
    except OSError as error:
        log.warning("old targets in %s stay: %s", folder, error)
    return removed


def _prefix(run_dir: Path) -> str:
    digest = hashlib.sha256(str(run_dir.absolute()).encode()).hexdigest()
    return f"cocoa-{digest[:10]}-"
