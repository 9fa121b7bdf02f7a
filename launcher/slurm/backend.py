"""Runs one incarnation of one stage as a job step: one srun, one task a rank, no agent between.

SLURM kills what is left of a step, so nothing here does. Signals for the ranks go through srun;
what they agreed on comes back through `outcome.json`, what killed them through srun's messages.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cocoa_dist.config import RunConfig
from launcher.backend import BAD_INPUT_CODE, OUTCOME_NAME, Ending, Order, end_by_outcome
from launcher.claim import claimed
from launcher.faults import choose_culprit, last_error_line, last_lines
from launcher.history import Verdict, count_failures, new_job_epoch, read_incarnations
from launcher.runfolder import Holder
from launcher.signals import Interrupts
from launcher.slurm.allocation import Allocation
from launcher.slurm.cluster_file import ClusterFile
from launcher.slurm.health import check_health
from launcher.slurm.nodes import excluded_nodes, looks_like_hardware, record_fault, request_others
from launcher.slurm.scheduler import Job, show_job
from launcher.slurm.site_inputs import gone_inputs, names_an_input, wait_for_inputs
from launcher.slurm.step_report import StepReport, read_report

_POLL_SECONDS = 0.1
_LEAVE_SECONDS = 300  # between the first rank that leaves with 0 and the last
_WATCH_SECONDS = (0.0, 2.0, 5.0, 15.0, 30.0, 60.0)  # after the start of a step; then every 60 s
_ASK_SECONDS = 5.0  # a busy controller must not hold up the ranks' signals
_PAUSES = (2.0, 15.0)  # before the second and the third attempt: time for a site to recover
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_TOLD = (-signal.SIGTERM, -signal.SIGUSR2, -signal.SIGKILL)


@dataclass
class SlurmBackend:
    """Ranks as steps of the job this process runs in."""

    allocation: Allocation
    cluster: ClusterFile
    say: Callable[[str], None]
    keep: Callable[[Path], contextlib.AbstractContextManager[Path]]  # see `hold`
    leaves_when_preempted: bool = True
    size_option: str = "a number of tasks of"
    _code: Path | None = field(default=None, init=False)  # what the ranks import from
    _epoch: str | None = field(default=None, init=False)  # the one that was named last
    _attempt: int = field(default=0, init=False)
    _healthy: bool = field(default=False, init=False)

    @property
    def world_size(self) -> int:
        """Number of ranks: the tasks of the allocation."""
        return self.allocation.num_tasks

    @property
    def trainer(self) -> tuple[str, ...]:
        """Command of a rank, inside its container if there is one."""
        cluster = self.cluster
        container = cluster.container
        python = sys.executable if container is None else container.python
        command = cluster.rank_command or (python, "-m", "cocoa_dist.train")
        if container is None or container.kind == "pyxis":
            return command
        mounts = [word for mount in container.mounts for word in ("--bind", mount)]
        return ("apptainer", "exec", "--nv", *mounts, container.image, *command)

    @property
    def check_command(self) -> tuple[str, ...]:
        """Command that looks at the inputs: as a rank sees them, on one node."""
        options = ("--nodes=1", "--ntasks=1", *self._srun_options())
        return ("srun", *options, *self.trainer)

    def describe(self) -> str:
        """Say where the ranks run."""
        nodes = ",".join(self.allocation.nodes)
        return f"{self.world_size} ranks on {nodes}, job {self.allocation.name}"

    @contextlib.contextmanager
    def hold(self, run_dir: Path) -> Iterator[None]:
        """Hold the run folder in the name of the job, also while it waits in the queue.

        `keep` stores there what a later start needs, and gives the copy of the code to run.
        """
        holder = Holder.of_this_process(job=self.allocation.job)
        with claimed(run_dir, holder), self.keep(run_dir) as self._code:
            yield

    def new_epoch(self, run_dir: Path) -> str:
        """Name a new incarnation; refuse if a later start of the run has taken over."""
        self._epoch = new_job_epoch(run_dir, name=self.allocation.name, last=self._epoch)
        return self._epoch

    def failures_before(self, run_dir: Path, *, stage: str, from_step: int) -> int:
        """Count crashes at this very place, whichever start of whichever job they were in."""
        return count_failures(read_incarnations(run_dir), stage=stage, from_step=from_step)

    def prepare(self, config: RunConfig, *, run_dir: Path, interrupts: Interrupts) -> Ending | None:
        """Ask for other nodes if one is excluded or unfit; wait for inputs that went away."""
        allowed = self.cluster.failures_until_excluded
        sick: dict[str, str] = {}
        if not self._healthy and self.cluster.health.enabled:
            sick = check_health(
                self.allocation, self.cluster, run_dir=run_dir, options=self._srun_options()
            )
            if sick and (interrupts.count or self._is_leaving()):
                # SLURM's signals end the check's tasks as well: that says nothing about nodes.
                return Ending(Verdict.PREEMPTED, "told to leave during the health check")
            for node, reason in sick.items():
                self.say(f"node {node} is unfit: {reason}")
                record_fault(run_dir, node=node, job=self.allocation.name, reason=reason, weight=99)
            if "" in sick:
                return Ending(Verdict.CRASH, sick[""])
        bad = sorted(excluded_nodes(run_dir, allowed=allowed) & set(self.allocation.nodes))
        if bad and request_others(run_dir, nodes=bad, job=self.allocation.job, allowed=allowed):
            return Ending(Verdict.PREEMPTED, f"asks for other nodes than {','.join(bad)}")
        if sick:
            return Ending(Verdict.CRASH, f"was given {','.join(sick)} again, which are unfit")
        self._healthy = True
        return wait_for_inputs(
            config,
            run_dir=run_dir,
            seconds=self.cluster.input_wait_seconds,
            interrupts=interrupts,
            say=self.say,
        )

    def incarnate(
        self, order: Order, *, interrupts: Interrupts, tick: Callable[[], None]
    ) -> Ending:
        """Start the step, pass on what we are told, and judge how it ended."""
        (order.run_dir / OUTCOME_NAME).unlink(missing_ok=True)
        watch = _PreemptionWatch(self.allocation.job)
        if watch.sees_preemption():
            return Ending(Verdict.PREEMPTED, "preempted before the ranks were started")
        log = order.log_path(0).with_name(f"{order.stage}.srun.log")
        log.parent.mkdir(parents=True, exist_ok=True)
        self._attempt += 1
        with log.open("ab") as out:
            process = subprocess.Popen(
                self.step_command(order),
                env=self._environment(order),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                preexec_fn=_told_when_parent_dies(),  # one call, looked up before the fork
            )
        told: set[signal.Signals] = set()
        while process.poll() is None:
            number = signal.SIGUSR2 if interrupts.asks_for_requeue else signal.SIGTERM
            if interrupts.count and number not in told:
                told.add(number)
                process.send_signal(number)
            elif not told and watch.is_due() and watch.sees_preemption():
                told.add(signal.SIGUSR2)
                process.send_signal(signal.SIGUSR2)
            tick()
            time.sleep(_POLL_SECONDS)
        tick()
        ending = self._judge(order, code=process.returncode, log=log, told=bool(told))
        if ending.verdict is Verdict.CRASH and ending.node and looks_like_hardware(ending.reason):
            record_fault(
                order.run_dir, node=ending.node, job=self.allocation.name, reason=ending.reason
            )
        return ending

    def review(self, ending: Ending, *, config: RunConfig, run_dir: Path) -> Ending:
        """Take a refusal that names inputs as a fault of the site, if the run has had them once."""
        refused = ending.verdict is Verdict.BAD_INPUT
        begun = any(item.step for item in read_incarnations(run_dir))
        missing = refused and begun and (gone_inputs(config) or names_an_input(config, ending))
        return Ending(Verdict.CRASH, ending.reason, ending.log) if missing else ending

    def pause_seconds(self, failures: int) -> float:
        """Return a longer pause after each failure."""
        return _PAUSES[min(failures, len(_PAUSES)) - 1] if failures else _PAUSES[0]

    def step_command(self, order: Order) -> list[str]:
        """Return the srun command line of an incarnation."""
        allocation = self.allocation
        output = str(order.log_path("TASK")).replace("%", "%%").replace("rankTASK", "rank%t")
        return [
            "srun",
            f"--nodes={len(allocation.nodes)}",
            f"--ntasks={allocation.num_tasks}",
            f"--ntasks-per-node={allocation.tasks_per_node}",
            *([f"--cpus-per-task={allocation.cpus_per_task}"] if allocation.cpus_per_task else []),
            *(["--overcommit"] if allocation.overcommit else []),
            "--kill-on-bad-exit=1",
            f"--wait={_LEAVE_SECONDS}",
            f"--job-name={order.stage}",
            f"--output={output}",
            "--open-mode=append",
            *self._srun_options(),
            *order.command(),
        ]

    def _srun_options(self) -> list[str]:
        container = self.cluster.container
        options = ["--mpi=none", "--export=ALL", *self.cluster.srun_options]
        if container is not None and container.kind == "pyxis":
            options += [f"--container-image={container.image}", "--no-container-mount-home"]
            mounts = ",".join(container.mounts)
            options += [f"--container-mounts={mounts}"] if mounts else []
        return options

    def _environment(self, order: Order) -> dict[str, str]:
        interface = self.cluster.network_interface
        names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
        return {
            **os.environ,
            **self.cluster.environment,
            **({name: interface for name in names} if interface else {}),
            "MASTER_ADDR": self.allocation.nodes[0],
            "MASTER_PORT": str(self.allocation.port(attempt=self._attempt)),
            "COCOA_EPOCH": order.epoch,
            "COCOA_RANKS": "slurm",  # see cocoa_dist/runtime.py
            "OMP_NUM_THREADS": str(order.threads),
            "PYTHONPATH": str(self._code),
            "PYTHONSAFEPATH": "1",  # not what happens to lie in the working directory
            "PYTHONUNBUFFERED": "1",
        }

    def _judge(self, order: Order, *, code: int, log: Path, told: bool) -> Ending:
        if code == 0:
            return end_by_outcome(order)
        text = log.read_text(encoding="utf-8", errors="replace")
        report = read_report(text, log_of=order.log_path)
        if report.lost_nodes:
            node = report.lost_nodes[0]
            return Ending(Verdict.CRASH, f"node {node} was lost", log, node=node)
        if not report.departures:
            reason = f"srun left with {code}: {last_error_line(log) or 'it said nothing'}"
            return Ending(Verdict.PREEMPTED if told else Verdict.CRASH, reason, log)
        return self._judge_departures(report, told=told)

    def _judge_departures(self, report: StepReport, *, told: bool) -> Ending:
        refused = [item for item in report.departures if item.code == BAD_INPUT_CODE]
        if refused:
            return Ending(Verdict.BAD_INPUT, last_lines(refused[0].log), refused[0].log)
        if all(item.code in _TOLD for item in report.departures):
            first = report.departures[0].code
            if told or (first == -signal.SIGTERM and self._is_preempted()):
                return Ending(Verdict.PREEMPTED, "told to leave before the ranks could save")
        culprit = choose_culprit(report.departures)
        node = report.nodes.get(culprit.rank)
        reason = culprit.describe() + (f" (on {node})" if node else "")
        return Ending(Verdict.CRASH, reason, culprit.log, node=node)

    def _is_preempted(self) -> bool:
        """Whether SLURM is ending or preempting the job; also where it cannot be asked."""
        job = show_job(self.allocation.job)
        return job is None or _is_leaving(job)

    def _is_leaving(self) -> bool:
        """Whether SLURM says that it is ending or preempting the job."""
        job = show_job(self.allocation.job)
        return job is not None and _is_leaving(job)


class _PreemptionWatch:
    """Asks SLURM now and then whether the job is being preempted.

    SLURM tells the steps that run at that moment, once. Between two stages there is none, and a
    task that is just being started may lose the signal; the grace time would be wasted.
    """

    def __init__(self, job: str) -> None:
        self._job = job
        self._began = time.monotonic()
        self._asked = 0

    def is_due(self) -> bool:
        """Whether it is time to ask again: soon after a start, seldom later."""
        later = (self._asked - len(_WATCH_SECONDS) + 1) * _WATCH_SECONDS[-1]
        due = _WATCH_SECONDS[self._asked] if self._asked < len(_WATCH_SECONDS) else later
        return time.monotonic() - self._began > due

    def sees_preemption(self) -> bool:
        """Ask; False if nobody can say."""
        self._asked += 1
        job = show_job(self._job, seconds=_ASK_SECONDS)
        return job is not None and job.preempted


def _is_leaving(job: Job) -> bool:
    return job.preempted or job.state != "RUNNING"


def _told_when_parent_dies() -> Callable[[], None] | None:
    """Return what srun runs before exec so that it hears TERM when the launcher dies.

    Killed outright it would leave its tasks behind; TERM it passes on, and they save and leave.
    """
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
