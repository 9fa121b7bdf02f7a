"""A real SLURM cluster on one machine: four nodes with their own network, processes and names.

Every node is a set of namespaces that lives exactly as long as its first process: killing that
process is a power cut, taking its link down is a cut network. Nothing is left in the machine's own
namespaces, /etc or /run; if the tests die, the kernel takes the cluster down with them.
"""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from live_prometheus import Place

PACKAGES = {
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
    "munged": "munge",
    "ip": "iproute2",
    "nsenter": "util-linux",
}
SYSTEM_PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
NODES = ("n1", "n2", "n3", "n4")
SLURMD_TIMEOUT = 8  # s without a sign of life until a node is down and its jobs are requeued
REQUEUE_HOLD = 5  # s a requeued job is held; the least SLURM takes; its default is 120
KILL_WAIT = 6  # s between SIGTERM and SIGKILL
SMALL_DISK = "60m"
GRACE_SECONDS = 30  # s a preempted job of partition `low` may take to leave
_NET = "10.213.78"
_PR_SET_PDEATHSIG = 1

_CONF = """\
ClusterName=cocoa
SlurmctldHost=login({net}.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={dir}/munge/socket,cred_expire={hold}
CredType=cred/munge
StateSaveLocation={dir}/state
SlurmdSpoolDir={dir}/spool/%n
SlurmctldPidFile={dir}/run/slurmctld.pid
SlurmdPidFile={dir}/run/slurmd.%n.pid
SlurmctldLogFile={dir}/log/slurmctld.log
SlurmdLogFile={dir}/log/slurmd.%n.log
# neither cgroups nor affinity: works in any container
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=500
GresTypes=gpu
SlurmdTimeout={slurmd_timeout}
MessageTimeout=5
TCPTimeout=1
KillWait={kill_wait}
MinJobAge=86400
InactiveLimit=0
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
PriorityType=priority/basic
NodeName=n[1-{count}] NodeAddr={net}.[11-{last}] CPUs=2 RealMemory=4000 Gres=gpu:2 State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace} \
MaxTime=INFINITE DefaultTime=30
PartitionName=nograce Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE GraceTime=0 \
MaxTime=INFINITE DefaultTime=30
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE DefaultTime=30
"""

# The first process of a machine: it holds the namespaces, reaps orphans and starts the daemon.
_INIT = """\
#!/bin/bash
name=$1 dir=$2
shift 2
hostname "$name"
mount -t proc proc /proc
mount -t tmpfs -o size=512m,mode=1777 shm /dev/shm
mount --bind "$dir/etc/hosts" /etc/hosts
[ "$name" != login ] || mount -t tmpfs -o size=@SMALL@,mode=1777 small "$dir/small"
until [ -e "$dir/run/$name.wired" ]; do sleep 0.02; done
export SLURM_CONF=$dir/etc/slurm.conf
"$@" &
while :; do
    wait -n 2>/dev/null || sleep 0.2
done
"""


def missing() -> str:
    """Return why no cluster can be started here; "" if it can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "a SLURM cluster for the tests needs Linux and root"
    lacking = sorted({p for b, p in PACKAGES.items() if not shutil.which(b, path=SYSTEM_PATH)})
    if lacking:
        return f"not installed: {' '.join(lacking)} (apt-get install {' '.join(lacking)})"
    trial = subprocess.run(
        ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "true"],
        capture_output=True,
        check=False,
    )
    return "" if trial.returncode == 0 else "this machine does not allow namespaces (unshare)"


@dataclass
class _Machine:
    """One set of namespaces; `pid` is its first process as seen from outside."""

    holder: "subprocess.Popen[bytes]"
    pid: int


class Cluster:
    """Four nodes n1..n4 of 2 CPUs and 2 pretended GPUs each, and a login node."""

    def __init__(self) -> None:
        self.dir = Path(tempfile.mkdtemp(prefix="cocoa-slurm-"))
        self._machines: dict[str, _Machine] = {}
        self._munged: subprocess.Popen[bytes] | None = None

    def up(self) -> float:
        """Start everything; return the seconds it took."""
        began = time.monotonic()
        for name in ("etc", "munge", "state", "spool", "log", "run", "dev", "small"):
            (self.dir / name).mkdir()
        self.dir.chmod(0o755)
        self._configure()
        self._start_munged()
        self._boot_machine("login", "slurmctld", "-D", "-i")
        wait_for(lambda: " UP" in self.login("scontrol", "ping", check=False), what="slurmctld")
        for node in NODES:
            self.boot(node)
        wait_for(lambda: self.idle() == set(NODES), what="idle nodes")
        return time.monotonic() - began

    def down(self, *, keep_logs: bool = False) -> None:
        """Stop everything and remove its folder."""
        for name in ("login", *NODES):
            self._cut_power(name)
        if self._munged is not None:
            self._munged.terminate()
            self._munged.wait()
        if not keep_logs:
            shutil.rmtree(self.dir, ignore_errors=True)

    # what a user does

    def login(
        self,
        *command: str,
        check: bool = True,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> str:
        """Run a command on the login node; return its stdout."""
        done = self.login_process(*command, cwd=cwd, env=env)
        if check and done.returncode:
            raise AssertionError(f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done.stdout

    def login_place(self) -> Place:
        """Return where servers on the login node run."""
        network = Path(f"/proc/{self._machines['login'].pid}/ns/net")
        return Place(enter=tuple(self._enter("login", self.dir)), network=network)

    def login_process(
        self, *command: str, cwd: Path | None = None, env: Mapping[str, str] | None = None
    ) -> "subprocess.CompletedProcess[str]":
        """Run a command on the login node; return how it ended."""
        return subprocess.run(
            [*self._enter("login", cwd or self.dir), *command],
            capture_output=True,
            text=True,
            check=False,
            env={**self.environment(), **(env or {})},
        )

    def environment(self) -> dict[str, str]:
        """Return what a user's shell on the login node has."""
        known = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))}
        return {**known, "PATH": SYSTEM_PATH, "SLURM_CONF": str(self.dir / "etc/slurm.conf")}

    def job(self, job: str) -> dict[str, str]:
        """Return the fields of `scontrol show job`; empty if it is not known."""
        text = self.login("scontrol", "show", "job", "-o", job, check=False)
        pairs = (word.partition("=") for word in text.split())
        return {key: value for key, _, value in pairs}

    def idle(self) -> set[str]:
        """Return the nodes that are up and free."""
        lines = self.login("sinfo", "-h", "-N", "-p", "low", "-o", "%N %T", check=False)
        return {line.split()[0] for line in lines.splitlines() if line.split()[1] == "idle"}

    # what goes wrong

    def cut_power(self, node: str) -> None:
        """Kill every process of a node at once."""
        self._cut_power(node)

    def boot(self, node: str) -> None:
        """Start a node, for the first time or after a power cut."""
        (self.dir / "spool" / node).mkdir(exist_ok=True)
        self._boot_machine(node, "slurmd", "-D", "-N", node)

    def cut_network(self, node: str) -> None:
        """Take the node's link down; its processes live on."""
        self._in_login_network("ip", "link", "set", f"v{node}", "down")

    def mend_network(self, node: str) -> None:
        """Plug the node in again."""
        self._in_login_network("ip", "link", "set", f"v{node}", "up")

    def processes(self, node: str, word: str) -> list[int]:
        """Return the processes of a node (pids as seen from outside) with `word` in the command."""
        if node not in self._machines:
            return []
        home = os.readlink(f"/proc/{self._machines[node].pid}/ns/pid")
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if os.readlink(path / "ns/pid") != home:
                    continue
                if word.encode() in (path / "cmdline").read_bytes():
                    found.append(int(path.name))
            except OSError:
                continue
        return found

    @property
    def small_disk(self) -> Path:
        """A folder of SMALL_DISK bytes that every node sees; `from_outside` tells where we do."""
        return self.dir / "small"

    def from_outside(self, path: Path) -> Path:
        """Return under which name this process sees a file of the login node."""
        return Path(f"/proc/{self._machines['login'].pid}/root{path}")

    def machine_pid(self, node: str) -> int:
        """Return the first process of a node, as seen from outside."""
        return self._machines[node].pid

    def on_node(self, node: str, *command: str) -> str:
        """Run a command inside a node."""
        done = subprocess.run(
            [*self._enter(node, self.dir), *command],
            capture_output=True,
            text=True,
            check=True,
            env=self.environment(),
        )
        return done.stdout

    # inside

    def _configure(self) -> None:
        for number in (0, 1):  # any device node will do for a pretended GPU
            os.mknod(self.dir / f"dev/gpu{number}", 0o666 | 0o020000, os.makedev(1, 3))
        (self.dir / "etc/gres.conf").write_text(
            f"NodeName=n[1-{len(NODES)}] Name=gpu File={self.dir}/dev/gpu[0-1]\n"
        )
        # slurmd 22.05 looks for a cgroup plugin even if nothing uses one, and dies without.
        (self.dir / "etc/cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        (self.dir / "etc/slurm.conf").write_text(
            _CONF.format(
                dir=self.dir,
                net=_NET,
                hold=REQUEUE_HOLD,
                kill_wait=KILL_WAIT,
                slurmd_timeout=SLURMD_TIMEOUT,
                grace=GRACE_SECONDS,
                count=len(NODES),
                last=10 + len(NODES),
            )
        )
        lines = ["127.0.0.1 localhost", f"{_NET}.1 login"]
        lines += [f"{self._address(node)} {node}" for node in NODES]
        (self.dir / "etc/hosts").write_text("\n".join(lines) + "\n")
        (self.dir / "run/init").write_text(_INIT.replace("@SMALL@", SMALL_DISK))
        (self.dir / "run/init").chmod(0o755)

    def _start_munged(self) -> None:
        folder = self.dir / "munge"
        key = folder / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        self._munged = _spawn(
            [
                *("munged", "--foreground", "--force", f"--key-file={key}"),
                *(f"--socket={folder}/socket", f"--pid-file={folder}/pid"),
                *(f"--log-file={self.dir}/log/munged.log", f"--seed-file={folder}/seed"),
            ],
            log=self.dir / "log/munged.out",
        )
        wait_for((folder / "socket").exists, what="munged")

    def _boot_machine(self, name: str, *daemon: str) -> None:
        wired = self.dir / f"run/{name}.wired"
        wired.unlink(missing_ok=True)
        # Nodes see the login node's mounts: the small disk is shared, and this machine has none.
        login = self._machines.get("login")
        within = ("nsenter", "-t", str(login.pid), "-m") if login else ()
        holder = _spawn(
            [
                *within,
                *("unshare", "--net", "--uts", "--ipc", "--mount", "--pid", "--fork"),
                *("--kill-child", str(self.dir / "run/init"), name, str(self.dir), *daemon),
            ],
            log=self.dir / f"log/{name}.out",
        )
        children = Path(f"/proc/{holder.pid}/task/{holder.pid}/children")
        wait_for(lambda: bool(children.read_text().split()), what=f"first process of {name}")
        self._machines[name] = _Machine(holder, int(children.read_text().split()[0]))
        self._wire(name)
        wired.touch()

    def _wire(self, name: str) -> None:
        if name == "login":
            self._in_login_network("ip", "link", "set", "lo", "up")
            self._in_login_network("ip", "link", "add", "br0", "type", "bridge")
            self._in_login_network("ip", "addr", "add", f"{_NET}.1/24", "dev", "br0")
            self._in_login_network("ip", "link", "set", "br0", "up")
            return
        pid = str(self._machines[name].pid)
        inside = ["nsenter", "-t", pid, "-n"]
        self._in_login_network(
            *("ip", "link", "add", f"v{name}", "type", "veth", "peer", "name", "eth0"),
            *("netns", pid),
        )
        self._in_login_network("ip", "link", "set", f"v{name}", "master", "br0", "up")
        _run([*inside, "ip", "link", "set", "lo", "up"])
        _run([*inside, "ip", "addr", "add", f"{self._address(name)}/24", "dev", "eth0"])
        _run([*inside, "ip", "link", "set", "eth0", "up"])

    def _cut_power(self, name: str) -> None:
        machine = self._machines.pop(name, None)
        if machine is None:
            return
        try:
            os.kill(machine.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        machine.holder.wait()

    def _in_login_network(self, *command: str) -> None:
        _run(["nsenter", "-t", str(self._machines["login"].pid), "-n", *command])

    def _enter(self, name: str, cwd: Path) -> list[str]:
        pid = str(self._machines[name].pid)
        return ["nsenter", "-t", pid, "-n", "-u", "-m", "-i", "env", "-C", str(cwd)]

    @staticmethod
    def _address(node: str) -> str:
        return f"{_NET}.{10 + int(node[1:])}"


def wait_for(
    condition: Callable[[], bool], *, what: str, seconds: float = 30.0, every: float = 0.1
) -> float:
    """Wait until something holds; return the seconds. AssertionError after `seconds`."""
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > seconds:
            raise AssertionError(f"not within {seconds:.0f} s: {what}")
        time.sleep(every)
    return time.monotonic() - began


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={"PATH": SYSTEM_PATH}
    )
    assert done.returncode == 0, f"{command}: {done.stderr}"


def _spawn(command: Sequence[str], *, log: Path) -> "subprocess.Popen[bytes]":
    """Start a process that dies with this one, in a session of its own."""
    prctl = ctypes.CDLL(None).prctl
    with log.open("ab") as out:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=lambda: prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0),
            env={"PATH": SYSTEM_PATH, "LC_ALL": "C"},
        )
