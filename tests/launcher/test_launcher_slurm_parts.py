"""The parts of the SLURM side that need no SLURM: its texts, its files, its refusals."""

import json
import os
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cocoa_dist.config import PACKAGE_DIR
from cocoa_dist.runtime import adopt_ranks
from launcher.__main__ import main
from launcher.backend import BadInputError
from launcher.claim import claimed
from launcher.history import Incarnation, SupersededError, Verdict, count_failures, new_job_epoch
from launcher.runfolder import Holder, RunFolderError
from launcher.slurm.allocation import Allocation, read_allocation
from launcher.slurm.cluster_file import ClusterFile, load_cluster_file
from launcher.slurm.codecopy import code_digest, copy_code, moved_on
from launcher.slurm.explain import explain
from launcher.slurm.health import _blame, check_health
from launcher.slurm.hostlist import expand_counts, expand_hosts
from launcher.slurm.nodes import excluded_nodes, looks_like_hardware, record_fault, request_others
from launcher.slurm.scheduler import parse_job
from launcher.slurm.step_report import read_report
from launcher.slurm.submission import harmless

CHECKOUT = PACKAGE_DIR.parent


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("n1", "n1"),
        ("n[1-3,7]", "n1 n2 n3 n7"),
        ("gpu[008-010],login", "gpu008 gpu009 gpu010 login"),
        ("r[1-2]n[01-02]", "r1n01 r1n02 r2n01 r2n02"),
        ("a-b[1-2]-ib,c", "a-b1-ib a-b2-ib c"),
    ],
)
def test_a_node_list_is_expanded_as_scontrol_would(text, names):
    assert expand_hosts(text) == tuple(names.split())


@pytest.mark.parametrize("text", ["n[1-", "n[a-b]", "", "n1,,n2", "n[]"])
def test_what_is_no_node_list_is_refused(text):
    with pytest.raises(ValueError, match="is not a list of nodes"):
        expand_hosts(text)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 5)), min_size=1, max_size=5))
def test_task_counts_are_expanded(pairs):
    text = ",".join(f"{n}(x{times})" if times > 1 else str(n) for n, times in pairs)
    assert expand_counts(text) == tuple(n for n, times in pairs for _ in range(times))


def allocation(**variables: str) -> Allocation:
    base = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]"}
    return read_allocation({**base, **variables})


def test_ranks_are_the_tasks_that_were_asked_for():
    found = allocation(SLURM_NTASKS="4", SLURM_TASKS_PER_NODE="2(x2)", SLURM_GPUS_ON_NODE="8")
    assert (found.num_tasks, found.tasks_per_node, found.name) == (4, 2, "7.0")


def test_without_a_wish_there_is_one_rank_a_gpu():
    assert allocation(SLURM_GPUS_ON_NODE="8", SLURM_TASKS_PER_NODE="1(x2)").num_tasks == 16


def test_more_ranks_than_gpus_are_refused():
    with pytest.raises(BadInputError, match="4 tasks a node would share 2 GPUs"):
        allocation(SLURM_NTASKS="8", SLURM_TASKS_PER_NODE="4(x2)", SLURM_GPUS_ON_NODE="2")


def test_unequal_nodes_are_refused():
    with pytest.raises(BadInputError, match="different numbers of tasks"):
        allocation(SLURM_NTASKS="3", SLURM_TASKS_PER_NODE="2,1")


@pytest.mark.parametrize(("cpus", "few"), [("1(x2)", True), ("8(x2)", False), ("8,4", False)])
def test_fewer_cpus_than_ranks_are_shared(cpus, few):
    found = allocation(SLURM_GPUS_ON_NODE="4", SLURM_JOB_CPUS_PER_NODE=cpus)
    assert found.overcommit is few


def test_an_array_task_is_requeued_alone():
    found = allocation(SLURM_ARRAY_JOB_ID="5", SLURM_ARRAY_TASK_ID="3", SLURM_RESTART_COUNT="2")
    assert (found.requeue_id, found.name) == ("5_3", "7.2")


def test_outside_of_a_job_the_backend_says_how_to_get_into_one(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert main(["run", "debug", "--run-dir", str(tmp_path / "r"), "--backend", "slurm"]) == 2
    assert "sbatch slurm/cocoa_pipeline.sh" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_attempts_get_ports_of_their_own():
    ports = {
        allocation(SLURM_RESTART_COUNT=str(r)).port(attempt=a)
        for r in range(4)
        for a in "12"
        for a in [int(a)]
    }
    assert len(ports) == 8
    assert all(20000 <= port < 32768 for port in ports)


def test_a_port_that_is_taken_is_passed_over():
    here = allocation(SLURM_JOB_NODELIST=socket.gethostname())
    with socket.create_server(("", here.port(attempt=1))) as taken:
        assert here.port(attempt=1) != taken.getsockname()[1]


def test_a_rank_takes_its_numbers_from_srun_only_if_told_to(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {
        "SLURM_PROCID": "5",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_NUM_TASKS": "8",
        "SLURM_STEP_TASKS_PER_NODE": "2(x4)",
    }.items():
        monkeypatch.setenv(name, value)
    adopt_ranks()
    assert "RANK" not in os.environ
    monkeypatch.setenv("COCOA_RANKS", "slurm")
    adopt_ranks()
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    assert [os.environ[name] for name in names] == ["5", "1", "8", "2"]
    for name in names:  # what adopt_ranks set is not monkeypatch's to take back
        monkeypatch.delenv(name)


# what srun and scontrol say


def test_srun_says_which_ranks_died_of_what(tmp_path):
    text = """\
srun: error: n2: task 1: Killed
srun: launch/slurm: _step_signal: Terminating StepId=5.0
srun: error: n1: tasks 0,2-3: Exited with exit code 1
srun: error: n3: task 4: Terminated
srun: error: n3: task 5: Out Of Memory
srun: error: n[4-5]: tasks 6-7: User defined signal 2
srun: error: Node failure on n9
"""
    report = read_report(text, log_of=lambda rank: tmp_path / f"{rank}.log")
    codes = {item.rank: item.code for item in report.departures}
    assert codes == {1: -9, 0: 1, 2: 1, 3: 1, 4: -15, 5: -9, 6: -12, 7: -12}
    assert report.departures[0].rank == 1
    assert report.nodes[1] == "n2"
    assert report.lost_nodes == ("n9",)


LINE = (
    "JobId=12 JobName=my job UserId=me(1) Restarts=2 JobState={state} Reason={reason} "
    "Dependency=(null) TimeLimit=1-00:00:00 StartTime={start} EndTime=2026-11-22T01:00:00 "
    "PreemptTime={preempt} Partition=gpu NodeList=n[1-2] NumNodes=2 ExitCode={code} "
    "Command=/a b/x.sh k=v WorkDir=/tmp"
)


def job(state: str, *, reason="None", start="Unknown", preempt="None", code="0:0"):
    return parse_job(
        LINE.format(state=state, reason=reason, start=start, preempt=preempt, code=code)
    )


def test_a_job_line_is_read_with_its_spaces_and_equals_signs():
    found = job("RUNNING")
    assert found["JobName"] == "my job"
    assert found["Command"] == "/a b/x.sh k=v" or found["Command"].startswith("/a b/x.sh")
    assert (found.state, found.restarts, found.preempted) == ("RUNNING", 2, False)
    assert job("RUNNING", preempt="2026-11-21T01:00:00").preempted


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (job("PENDING", reason="Priority"), "behind jobs of higher priority"),
        (job("PENDING", reason="Resources", start="T1"), "expected at T1"),
        (job("PENDING", reason="BeginTime", start="T2"), "starts by itself at T2"),
        (job("PENDING", reason="DependencyNeverSatisfied"), "scancel 12"),
        (job("PENDING", reason="JobHeldUser"), "scontrol release 12"),
        (job("PENDING", reason="QOSMaxJobsPerUserLimit"), "limits of its QOS"),
        (job("PENDING", reason="AssocGrpGRES"), "limits of its account"),
        (job("PENDING", reason="ReqNodeNotAvail,_UnavailableNodes:n3"), "n3"),
        (job("PENDING", reason="PartitionTimeLimit"), "will never start: 1-00:00:00"),
        (job("PENDING", reason="SomethingNew"), "waits (SomethingNew)"),
        (job("PENDING"), "waits to be looked at"),
        (job("RUNNING"), "runs on n[1-2]"),
        (job("RUNNING", preempt="T"), "has to leave for another job"),
        (job("CANCELLED"), "was cancelled"),
        (job("FAILED", code="93:0"), "gave up"),
        (job("FAILED", code="2:0"), "has to be changed"),
        (job("FAILED", code="7:0"), "failed with 7:0"),
        (job("TIMEOUT"), "time limit"),
        (job("REVOKED"), "is revoked"),
    ],
)
def test_why_a_job_does_not_run_is_said_in_words(found, words):
    assert words in explain(found)


# who holds a run, and which incarnation may write


def me(job: str) -> Holder:
    return Holder.of_this_process(job=job)


def test_a_live_job_keeps_its_run_while_it_waits_in_the_queue(tmp_path):
    with claimed(tmp_path, me("3")):
        pass
    refusal = claimed(tmp_path, me("4"), state_of=lambda _: "PENDING")
    with pytest.raises(RunFolderError, match=r"belongs to job 3 \(PENDING\).*scancel 3"), refusal:
        pass


def test_a_job_that_is_gone_loses_its_run_even_with_its_lock(tmp_path):
    with claimed(tmp_path, me("3")), claimed(tmp_path, me("4"), state_of=lambda _: ""):
        assert json.loads((tmp_path / ".lock").read_text())["job"] == "4"


def test_a_later_start_of_the_same_job_takes_over(tmp_path):
    with claimed(tmp_path, me("3")), claimed(tmp_path, me("3")):
        pass


def test_where_nobody_can_say_the_lock_decides(tmp_path):
    with claimed(tmp_path, me("3")):
        refusal = claimed(tmp_path, me("4"), state_of=lambda _: None)
        with pytest.raises(RunFolderError, match="belongs to job 3"), refusal:
            pass
    with claimed(tmp_path, me("4"), state_of=lambda _: None):
        pass


def test_epochs_of_a_job_count_up_and_an_earlier_start_cannot_fence_a_later_one(tmp_path):
    first = new_job_epoch(tmp_path, name="7.0", last=None)
    second = new_job_epoch(tmp_path, name="7.0", last=first)
    assert (first, second) == ("7.0-1", "7.0-2")
    assert new_job_epoch(tmp_path, name="7.1", last=None) == "7.1-1"
    with pytest.raises(SupersededError, match=r"taken over by 7\.1-1"):
        new_job_epoch(tmp_path, name="7.0", last=second)
    with pytest.raises(SupersededError):
        new_job_epoch(tmp_path, name="7.0", last=None)
    assert new_job_epoch(tmp_path, name="8.0", last=None) == "8.0-1"


def test_failures_are_counted_across_jobs_until_something_moves():
    def item(verdict: Verdict, step: int = 4) -> Incarnation:
        return Incarnation(
            epoch="e", stage="a", from_step=step, world_size=2, started_at=0.0, verdict=verdict
        )

    def count(*items: Incarnation) -> int:
        return count_failures(items, stage="a", from_step=4)

    assert count(item(Verdict.CRASH), item(Verdict.PREEMPTED), item(Verdict.CRASH)) == 2
    assert count(item(Verdict.CRASH), item(Verdict.LOST)) == 1
    assert count(item(Verdict.CRASH), item(Verdict.GIVEN_UP), item(Verdict.CRASH)) == 1
    assert count(item(Verdict.CRASH), item(Verdict.CRASH, step=2)) == 0
    assert count() == 0


# nodes


def test_a_node_is_excluded_after_two_faults_and_others_are_asked_for_twice(tmp_path):
    record_fault(tmp_path, node="n1", job="7.0", reason="was killed by SIGKILL")
    assert excluded_nodes(tmp_path, allowed=2) == set()
    record_fault(tmp_path, node="n1", job="7.0", reason="was killed by SIGKILL")
    assert excluded_nodes(tmp_path, allowed=2) == {"n1"}
    assert request_others(tmp_path, nodes=["n1"], job="7", allowed=2)
    assert (tmp_path / "submit/7.exclude").read_text() == "n1"
    assert request_others(tmp_path, nodes=["n1"], job="7", allowed=2)
    assert not request_others(tmp_path, nodes=["n1"], job="7", allowed=2)
    assert request_others(tmp_path, nodes=["n1"], job="8", allowed=2)


@pytest.mark.parametrize(
    ("reason", "hardware"),
    [
        ("rank 3 was killed by SIGKILL (out of memory?)", True),
        ("RuntimeError: CUDA error: uncorrectable ECC error", True),
        ("OSError: [Errno 5] Input/output error", True),
        ("RuntimeError: boom", False),
        ("ValueError: bad recipe", False),
    ],
)
def test_only_what_looks_like_hardware_counts_against_a_node(reason, hardware):
    assert looks_like_hardware(reason) is hardware


def fake_srun(folder: Path, body: str) -> None:
    """Put an `srun` on PATH that runs `body` with the command after its options in "$@"."""
    path = folder / "bin" / "srun"
    path.parent.mkdir()
    path.write_text("#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\n" + body + "\nwait\n")
    path.chmod(0o755)


@pytest.fixture
def on_path(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return tmp_path


ALL_NODES = 'for n in localhost; do SLURMD_NODENAME=$n "$@" & done'
ONE = Allocation("7", 0, "7", ("localhost",), 1, None)


def test_a_healthy_node_passes(on_path):
    fake_srun(on_path, ALL_NODES)
    assert check_health(ONE, ClusterFile(), run_dir=on_path / "run", options=[]) == {}


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"min_free_disk_mb": 10**9}, "MB free for the run folder, 1000000000 needed"),
        ({"min_free_memory_mb": 10**9}, "MB of memory free"),
    ],
)
def test_a_node_that_lacks_something_is_named_with_numbers(on_path, limits, words):
    fake_srun(on_path, ALL_NODES)
    cluster = ClusterFile.model_validate({"health": limits})
    assert words in check_health(ONE, cluster, run_dir=on_path / "run", options=[])["localhost"]


@pytest.mark.parametrize(
    ("says", "words"),
    [
        ("echo '0, 0'; echo '1, 0'", None),
        ("echo '0, [N/A]'; echo '1, [N/A]'", None),
        ("echo '0, 0'; echo '1, 3'", "uncorrected memory errors on GPU 1"),
        ("echo '0, 0'", "1 GPUs answer, 2 expected"),
        ("echo 'fallen off the bus' >&2; exit 6", "0 GPUs answer, 2 expected fallen off the bus"),
    ],
)
def test_gpus_are_asked_where_there_are_any(on_path, monkeypatch, says, words):
    fake_srun(on_path, ALL_NODES)
    tool = on_path / "bin/nvidia-smi"
    tool.write_text(f"#!/bin/bash\n{says}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "2")
    faults = check_health(ONE, ClusterFile(), run_dir=on_path / "run", options=[])
    assert faults == ({} if words is None else {"localhost": words})


def test_a_missing_interface_is_named(on_path):
    fake_srun(on_path, ALL_NODES)
    cluster = ClusterFile(network_interface="ib7")
    faults = check_health(ONE, cluster, run_dir=on_path / "run", options=[])
    assert faults == {"localhost": "no network interface ib7"}


def test_a_folder_that_is_not_shared_is_found(on_path):
    fake_srun(
        on_path,
        'cp -r "$5" "$5.other"; echo old > "$5.other/word"; '
        'SLURMD_NODENAME=localhost "$1" "$2" "$3" "$4" "$5.other" "${@:6}"; '
        'cp "$5.other/localhost.json" "$5/"',
    )
    faults = check_health(ONE, ClusterFile(), run_dir=on_path / "run", options=[])
    assert "the run folder is not shared" in faults["localhost"]


def test_nodes_that_do_not_answer_are_no_fault_of_one(on_path):
    fake_srun(on_path, "echo 'srun: error: no route' >&2; exit 1")
    two = Allocation("7", 0, "7", ("n1", "n2"), 1, None)
    faults = check_health(two, ClusterFile(), run_dir=on_path / "run", options=[])
    assert list(faults) == [""]
    assert "no route" in faults[""]


def test_a_node_that_cannot_be_reached_is_found_by_the_one_before_it(on_path):
    both = 'for n in localhost nowhere.invalid; do SLURMD_NODENAME=$n "$@" & done'
    fake_srun(on_path, both)
    two = Allocation("7", 0, "7", ("localhost", "nowhere.invalid"), 1, None)
    cluster = ClusterFile.model_validate({"health": {"network_seconds": 1.0}})
    faults = check_health(two, cluster, run_dir=on_path / "run", options=[])
    assert "localhost cannot reach nowhere.invalid" in faults[""]


@pytest.mark.parametrize(
    ("complaints", "known", "blamed"),
    [
        ({}, set(), set()),
        ({"n1": "n2", "n4": "n2"}, set(), {"n2"}),
        ({"n1": "n2", "n2": "n1", "n3": "n1"}, set(), {"n1"}),
        ({"n3": "n1", "n2": "n3"}, set(), {"n3"}),
        ({"n1": "n2", "n2": "n1"}, set(), {"n1", "n2"}),
        ({"n1": "n2", "n3": "n2"}, {"n2"}, set()),
        ({"n1": "n2", "n2": "n1", "n3": "n4", "n4": "n3"}, set(), {"n1", "n2", "n3", "n4"}),
    ],
)
def test_the_node_that_most_complaints_are_about_is_the_unfit_one(complaints, known, blamed):
    found = _blame({node: (other, "timed out") for node, other in complaints.items()}, known=known)
    assert set(found) == blamed


# cluster files, secrets, code


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("partiton: gpu", "partiton: unknown key, did you mean 'partition'?"),
        ("health: {disk: 1}", "health.disk: unknown key"),
        ("nodes: 0", "nodes: Input should be greater than 0, found 0"),
        ("environment: {RANK: '1'}", "RANK is set by the launcher"),
        ("container: {kind: docker, image: x}", "container.kind"),
        ("[1, 2]", "holds list"),
        ("a: [", "is not YAML"),
    ],
)
def test_a_cluster_file_that_is_wrong_says_where(tmp_path, text, words):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(BadInputError) as caught:
        load_cluster_file(path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_cluster_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(BadInputError, match=r"none\.yaml cannot be read"):
        load_cluster_file(tmp_path / "none.yaml")


@pytest.mark.parametrize("name", ["example", "local"])
def test_the_cluster_files_that_ship_are_valid(name):
    load_cluster_file(CHECKOUT / f"slurm/clusters/{name}.yaml")


def test_secrets_stay_out_of_the_recorded_environment():
    kept = harmless(
        {
            "PATH": "/bin",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_TOKEN": "x",
            "AWS_SECRET_ACCESS_KEY": "x",
            "MY_API_KEY": "x",
            "DB_PASSWORD": "x",
            "SSH_AUTH_SOCK": "x",
            "URL": "https://me:word@host/",
            "HIDDEN": "hf_" + "a" * 30,
            "BASH_FUNC_module%%": "() { x; }",
            "KEYBOARD": "us",
        }
    )
    assert set(kept) == {"PATH", "TOKENIZERS_PARALLELISM", "KEYBOARD"}


def make_code(root: Path) -> Path:
    for name in ("cocoa_dist/a.py", "launcher/b.py", "slurm/c.sh", "cocoa_dist/__pycache__/x.pyc"):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return root


def test_the_same_code_is_copied_once_and_a_change_is_noticed(tmp_path):
    root, run_dir = make_code(tmp_path / "checkout"), tmp_path / "run"
    copy = copy_code(run_dir, source=root)
    assert copy_code(run_dir, source=root) == copy
    assert copy.name == code_digest(copy) == code_digest(root)
    assert not list(copy.rglob("__pycache__"))
    assert not moved_on(root, copy)
    (root / "launcher/b.py").write_text("other")
    assert moved_on(root, copy)
    assert copy_code(run_dir, source=root) != copy
    assert copy_code(run_dir, source=copy) == copy
