"""Runs on the test cluster: submitting, waiting, disturbing, and comparing with what should be."""

import json
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from cluster import NODES, Cluster, wait_for

from cocoa_dist.manifest import checkpoints
from launcher.runfolder import is_held

History = list[tuple[object, ...]]
CHECKOUT = Path(__file__).parents[2]
STEADY = Path(__file__).with_name("steady_trainer.py")
STAGES = ("joint_reconstruction", "eos_bridged_reconstruction", "contrastive")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
STEPS = 12


@dataclass
class Site:
    """One folder of one user, who submits from the login node."""

    cluster: Cluster
    checkout: Path
    folder: Path
    python: Path
    times: list[str] = field(default_factory=list)
    jobs: list[str] = field(default_factory=list)

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def write_recipe(self, *, steps: int = STEPS, every: int = 4, first: int | None = None) -> Path:
        """Write `debug` with its data in a folder of the test's own; `first`: steps of stage 1."""
        if not self.data.exists():
            shutil.copytree(CHECKOUT / "cocoa_dist/assets/emoji/train", self.data)
        text = (CHECKOUT / "cocoa_dist/recipes/debug.yaml").read_text()
        tree = yaml.safe_load(text.replace("asset:emoji/train", str(self.data)))
        for stage in tree["stages"].values():
            stage["steps"] = steps
        tree["stages"][STAGES[0]]["steps"] = first or steps
        tree["checkpoint"] = {"every_steps": every, "keep_last": 2}
        tree["data"]["log_sample_ids"] = True
        path = self.folder / "debug.yaml"
        path.write_text(yaml.safe_dump(tree, sort_keys=False))
        return path

    def write_cluster_file(
        self, *, steady: bool = True, trainer: tuple[str, ...] = (), **environment: object
    ) -> Path:
        """Write it for the steady trainer, for the real one, or for a script of the tests."""
        tree: dict[str, object] = {
            "environment": {name: str(value) for name, value in environment.items()},
            "network_interface": "eth0",
            "health": {"min_free_disk_mb": 10, "min_free_memory_mb": 100},
        }
        if steady or trainer:
            tree["rank_command"] = [str(self.python), *(trainer or (str(STEADY),))]
        path = self.folder / "cluster.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    def submit(
        self,
        *options: str,
        nodes: int = 2,
        tasks: int = 2,
        words: tuple[str, ...] = (),
        env: Mapping[str, str] | None = None,
    ) -> str:
        """Submit the recipe and cluster file that were written; return the job id."""
        command = [
            *("sbatch", "--parsable", f"--nodes={nodes}", f"--ntasks-per-node={tasks}", *options),
            str(self.checkout / "slurm/cocoa_pipeline.sh"),
            *("recipe=debug.yaml", "run_dir=run", "cluster=cluster.yaml", *words),
        ]
        venv = str(self.python.parents[1])
        out = self.cluster.login(*command, cwd=self.folder, env={"COCOA_VENV": venv, **(env or {})})
        self.jobs.append(out.strip())
        return self.jobs[-1]

    def occupy(self) -> str:
        """Take all nodes with a job of the partition that preempts others; return its id."""
        job = self.cluster.login(
            *("sbatch", "--parsable", "-p", "high", "-N4", "--ntasks-per-node=2"),
            *("-o", "/dev/null", "--wrap", "sleep 2"),
        ).strip()
        self.jobs.append(job)
        return job

    def start(self, *options: str, **environment: object) -> str:
        """Write both files and submit."""
        self.write_recipe()
        self.write_cluster_file(**environment)
        return self.submit(*options)

    def state(self, job: str) -> str:
        return self.cluster.job(job).get("JobState", "")

    def restarts(self, job: str) -> int:
        return int(self.cluster.job(job).get("Restarts", "0"))

    def wait_for_step(self, stage: str, step: int, *, seconds: float = 60) -> None:
        """Wait until a step is in metrics.jsonl."""
        self.wait(
            lambda: any(s == stage and n >= step for s, n in self.steps()),
            f"{stage} step {step}",
            seconds=seconds,
        )

    def wait(self, condition: Callable[[], bool], what: str, *, seconds: float = 60) -> float:
        """Wait and note how long it took; says what the job wrote if it takes too long."""
        try:
            took = wait_for(condition, what=what, seconds=seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.output()}") from None
        self.times.append(f"{what} {took:.1f} s")
        return took

    def wait_for_end(self, job: str, *, seconds: float = 90) -> str:
        """Wait until the job has ended for good; return its state."""
        self.wait(lambda: self.state(job) in ENDED, "end", seconds=seconds)
        return self.state(job)

    def batch_host(self, job: str) -> str:
        return self.cluster.job(job)["BatchHost"]

    def steps(self) -> list[tuple[str, int]]:
        return [(str(r["stage"]), int(str(r["step"]))) for r in self.metrics()]

    def metrics(self) -> list[dict[str, object]]:
        return read_lines(self.run_dir / "metrics.jsonl")

    def ends(self) -> list[str]:
        """Verdicts of the incarnations, in the order of their ends."""
        lines = read_lines(self.run_dir / "incarnations.jsonl")
        return [str(line["verdict"]) for line in lines if line["verdict"]]

    def output(self) -> str:
        """What the job wrote, and the ends of its ranks' logs."""
        files = [*self.folder.glob("*.out"), *sorted((self.run_dir / "logs").rglob("*.log"))[-6:]]
        return "\n".join(f"== {path.name}\n{path.read_text()[-3000:]}" for path in files)

    def ranks(self) -> list[int]:
        """Processes of all nodes that are at work for this run."""
        nodes = [pid for node in NODES for pid in self.cluster.processes(node, str(self.run_dir))]
        return nodes

    def clean_up(self) -> None:
        for job in self.jobs:
            if self.state(job) not in ENDED:
                self.cluster.login("scancel", job, check=False)


def aside(
    scenario: Callable[[Site, History], None],
) -> Callable[[dict[str, "Future[None]"]], None]:
    """Let a scenario that mostly waits run on a second cluster, beside the other tests.

    What pytest calls waits for it and raises what it raised; see `beside` in conftest.py.
    """

    def test(beside: dict[str, "Future[None]"]) -> None:
        beside[scenario.__name__].result()

    test.__name__, test.__doc__ = scenario.__name__, scenario.__doc__
    vars(test)["scenario"] = scenario
    return test


def read_lines(path: Path) -> list[dict[str, object]]:
    """Return the whole lines of a file of JSON objects."""
    lines = path.read_text().splitlines() if path.exists() else []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def history(run_dir: Path) -> History:
    """What must not depend on what happened: steps in order, records, losses to the last bit."""
    return [
        (r["stage"], r["step"], r["batch_digest"], r["loss"], r["grad_norm"])
        for r in read_lines(run_dir / "metrics.jsonl")
    ]


def assert_whole(site: Site, reference: History) -> None:
    """The run that would have been, and nothing left over."""
    assert history(site.run_dir) == reference, site.output()
    for stage in {str(line[0]) for line in reference}:
        records = read_lines(site.run_dir / "samples" / f"{stage}.jsonl")
        steps = [line[1] for line in reference if line[0] == stage]
        assert [r["step"] for r in records] == steps == list(range(1, len(steps) + 1))
        assert next(iter(checkpoints(site.run_dir, stage=stage)))[1].complete
    assert site.ranks() == []
    assert not is_held(site.run_dir)
    left_over = [path for path in site.run_dir.rglob(".staging-*") if "checkpoints" in path.parts]
    assert left_over == []
    assert list((site.run_dir / "sd").glob("*.json")) == []
