"""Is this node fit for ranks? Run as a script on every node, before the first step of a job.

Each node writes what it finds into a folder of the run folder, which must then be there for the
launcher to read: a folder that is not shared shows itself that way. Nodes also connect to the
first one and to the next one, so that a cut or wrong network shows before a collective hangs.
The script needs Python alone.
"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from launcher.slurm.allocation import Allocation
    from launcher.slurm.cluster_file import ClusterFile

_WORD = b"cocoa health\n"
_SECRET_NAME = "word"
_GPU_SECONDS = 20.0


def check_health(
    allocation: "Allocation", cluster: "ClusterFile", *, run_dir: Path, options: Sequence[str]
) -> dict[str, str]:
    """Check all nodes of the allocation at once; return node to fault for those that are unfit.

    The key "" stands for a fault of no single node.
    """
    folder = run_dir / "health" / allocation.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    word = f"{allocation.name} {time.time()}"
    (folder / _SECRET_NAME).write_text(word)
    limits = cluster.health
    command = [
        *("srun", f"--nodes={len(allocation.nodes)}", f"--ntasks={len(allocation.nodes)}"),
        *("--ntasks-per-node=1", "--kill-on-bad-exit=0", "--input=none", *_plain(options)),
        *(sys.executable, "-I", "-S", __file__, str(folder)),
        *("--nodes", ",".join(allocation.nodes), "--network-seconds", str(limits.network_seconds)),
        *(["--interface", cluster.network_interface] if cluster.network_interface else []),
    ]
    began = time.time()
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=limits.timeout_seconds, check=False
        )
        said = done.stderr.strip().splitlines()[-1:] if done.returncode else []
    except subprocess.TimeoutExpired:
        said = [f"no answer within {limits.timeout_seconds} s"]
    faults: dict[str, str] = {}
    complaints: dict[str, tuple[str, str]] = {}  # node to (the one it cannot reach, how)
    for node in allocation.nodes:
        found = _read_report(folder / f"{node}.json")
        fault = _judge(found, word=word, cluster=cluster, began=began)
        if fault:
            faults[node] = f"{fault} {said[0] if said and found is None else ''}".strip()
        elif found is not None and found["unreached"]:
            complaints[node] = (found["unreached"], found["how"])
    for node, why in _blame(complaints, known=set(faults)).items():
        faults[node] = why
    if len(faults) == len(allocation.nodes) > 1:
        first = next(iter(faults.values()))
        return {"": f"no node passed the health check; the first: {first}"}
    return faults


def _blame(complaints: Mapping[str, tuple[str, str]], *, known: set[str]) -> dict[str, str]:
    """Say whose fault it is that nodes cannot reach each other; `known` have faults already.

    Of a pair that cannot talk, either may be cut off: it is the one that most complaints are by
    or about, and both if that does not tell.
    """
    left = {node: item for node, item in complaints.items() if item[0] not in known}
    blamed: dict[str, str] = {}
    while left:
        scores = Counter([*left, *(other for other, _ in left.values())])
        most = max(scores.values())
        for node in [node for node, score in scores.items() if score == most]:
            by = next((n for n, (other, _) in left.items() if other == node), node)
            blamed[node] = f"{by} cannot reach {left[by][0]}: {left[by][1]}"
        left = {n: item for n, item in left.items() if n not in blamed and item[0] not in blamed}
    return blamed


def _plain(options: Sequence[str]) -> list[str]:
    """Leave the container out: the check is about the node."""
    return [option for option in options if "container" not in option]


def _read_report(path: Path) -> dict[str, Any] | None:
    try:
        report: dict[str, Any] = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return report


def _judge(
    found: Mapping[str, Any] | None, *, word: str, cluster: "ClusterFile", began: float
) -> str:
    """Return what is wrong with a node by its own account, "" if nothing."""
    limits = cluster.health
    if found is None:
        return "it left no word in the run folder: not reachable, or the folder is not shared"
    if found["word"] != word:
        return f"the run folder is not shared: it reads {found['word']!r}, expected {word!r}"
    faults = [found[name] for name in ("interface", "gpus") if found[name]]
    free, memory = found["free_disk_mb"], found["free_memory_mb"]
    if free < limits.min_free_disk_mb:
        faults.append(f"{free} MB free for the run folder, {limits.min_free_disk_mb} needed")
    if memory < limits.min_free_memory_mb:
        faults.append(f"{memory} MB of memory free, {limits.min_free_memory_mb} needed")
    skew = max(began - found["time"], found["time"] - time.time())
    if skew > limits.max_clock_skew_seconds:
        faults.append(f"its clock is {skew:.0f} s off")
    return "; ".join(faults)


def main() -> None:
    """Look at this node and write what was found."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--nodes", required=True)
    parser.add_argument("--network-seconds", type=float, default=10.0)
    parser.add_argument("--interface")
    options = parser.parse_args()
    nodes = options.nodes.split(",")
    name = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    unreached, how = _try_network(
        options.folder, name=name, nodes=nodes, seconds=options.network_seconds
    )
    report = {
        "time": time.time(),
        "word": _read(options.folder / _SECRET_NAME),
        "free_disk_mb": shutil.disk_usage(options.folder).free // 2**20,
        "free_memory_mb": _free_memory_mb(),
        "unreached": unreached,
        "how": how,
        "interface": "",
        "gpus": _try_gpus(int(os.environ.get("SLURM_GPUS_ON_NODE") or 0)),
    }
    if options.interface and not Path(f"/sys/class/net/{options.interface}").exists():
        report["interface"] = f"no network interface {options.interface}"
    _write(options.folder / f"{name}.json", report)


def _try_network(
    folder: Path, *, name: str, nodes: Sequence[str], seconds: float
) -> tuple[str, str]:
    """Connect to the first node and to the next one; return whom it could not reach, and how."""
    if len(nodes) == 1:
        return "", ""
    deadline = time.monotonic() + seconds
    with socket.create_server(("", 0), backlog=len(nodes) + 8) as server:
        threading.Thread(target=_serve, args=(server,), daemon=True).start()
        _write(folder / f"{name}.port", {"port": server.getsockname()[1]})
        following = nodes[(nodes.index(name) + 1) % len(nodes)]
        for other in dict.fromkeys([nodes[0], following]):
            if other != name:
                fault = _reach(folder / f"{other}.port", other, deadline=deadline)
                if fault:
                    return other, fault
        (folder / f"{name}.done").touch()
        while time.monotonic() < deadline and not _all_done(folder, nodes):
            time.sleep(0.02)  # others may still want to reach this one
    return "", ""


def _reach(path: Path, other: str, *, deadline: float) -> str:
    fault = "it did not say where it listens"
    while time.monotonic() < deadline:
        try:
            port = json.loads(path.read_bytes())["port"]
            with socket.create_connection((other, port), timeout=1.0) as connection:
                connection.settimeout(1.0)
                if connection.recv(len(_WORD)) == _WORD:
                    return ""
        except (OSError, ValueError) as error:
            if not isinstance(error, FileNotFoundError):
                fault = str(error)
        time.sleep(0.02)
    return fault


def _serve(server: socket.socket) -> None:
    while True:
        try:
            connection, _ = server.accept()
            with connection:
                connection.sendall(_WORD)
        except OSError:
            return


def _try_gpus(expected: int) -> str:
    """Ask nvidia-smi, where there is one, whether all GPUs answer without memory errors."""
    if not expected or shutil.which("nvidia-smi") is None:
        return ""
    query = ["nvidia-smi", "--query-gpu=index,ecc.errors.uncorrected.volatile.total"]
    try:
        done = subprocess.run(
            [*query, "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=_GPU_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return f"nvidia-smi does not answer within {_GPU_SECONDS:.0f} s"
    lines = [line.split(", ") for line in done.stdout.splitlines() if line.strip()]
    if done.returncode or len(lines) < expected:
        return f"{len(lines)} GPUs answer, {expected} expected {done.stderr.strip()}".strip()
    bad = [line[0] for line in lines if line[-1].isdigit() and int(line[-1]) > 0]
    return f"uncorrected memory errors on GPU {', '.join(bad)}" if bad else ""


def _all_done(folder: Path, nodes: Sequence[str]) -> bool:
    return all((folder / f"{node}.done").exists() for node in nodes)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as error:
        return f"({error.strerror})"


def _write(path: Path, content: Mapping[str, object]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content))
    temporary.replace(path)


def _free_memory_mb() -> int:
    with open("/proc/meminfo", encoding="ascii") as file:
        sizes = {key: rest.split()[0] for key, _, rest in (line.partition(":") for line in file)}
    return int(sizes["MemAvailable"]) // 1024


if __name__ == "__main__":
    main()
