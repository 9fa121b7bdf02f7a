#!/usr/bin/env python3
"""One training step beside what people use today: sentence-transformers, colpali-engine, ms-swift.

    python tools/bench_peers.py
    python tools/bench_peers.py --batches 64 --sets short --repeats 5 --processes 1
    python tools/bench_peers.py --tables            write the page anew from the figures in OUT.json

The same model of 4.7 M weights, rows, batches and loss on all sides. Peers get environments of
their own below --cache, with the versions of PINS; one that cannot be had, or fails, is a row that
says why. An arm is a process that has imported its libraries and forks one for each turn; arms take
turns within each round. Rates are pairs a CPU second over all ranks: reading, decoding, tokens,
padding, forward, backward and the optimizer's step. That the work is equal is proved first: loss
and gradient of step 1, for those whose token ids are ours. OUT.json is written after every turn,
and a call with the same OUT goes on from there.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from peer_environments import CannotError, peer_python  # noqa: E402
from peers_page import page  # noqa: E402
from peers_rows import SETS, lay_down  # noqa: E402

# torchvision's CUDA build finds none of its operators beside torch for the CPU, and then cannot be
# imported; declared, they are never called.
TORCHVISION = """\
import torch

_operators = torch.library.Library("torchvision", "DEF")
_operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
_operators.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""
PINS = {
    "sentence_transformers": ["sentence-transformers==6.2.0", "datasets==5.0.1"],
    "colpali": ["torchvision==0.28.0", "colpali-engine==0.3.18"],
}
SWIFT_PINS = {"ms_swift": ["torchvision==0.28.0", "ms-swift==4.6.0", "qwen_vl_utils==0.0.14"]}
GRAD_CACHE = "stages.contrastive.objective.grad_cache.mode"
SECONDS = 900.0
WARM_BATCH = 64  # up to it a turn has a step that is not counted


@dataclass(frozen=True)
class Arm:
    """One way to train: the module that does it, and how it is told to."""

    name: str
    module: str
    settings: tuple[str, ...] = ()  # of our recipe
    cached: bool = False  # Cached MNRL
    proved: bool = True  # its token ids are ours, so that gradients must be equal
    everywhere: bool = True  # else one process and the smallest batch alone


ARMS = (
    Arm("ours", "ours", (f"{GRAD_CACHE}=never",)),
    Arm("ours, GradCache", "ours", (f"{GRAD_CACHE}=always", "data.tokens_per_pack=1024")),
    Arm("MNRL", "sentence_transformers"),
    Arm("Cached MNRL", "sentence_transformers", cached=True),
    Arm("plain loop", "plain_loop", everywhere=False),
    Arm("colpali", "colpali", proved=False, everywhere=False),
    Arm("ms-swift", "ms_swift", proved=False, everywhere=False),
)


@dataclass(frozen=True)
class Case:
    """What one table row of each arm is about."""

    kind: str
    batch: int
    processes: int

    @property
    def name(self) -> str:
        """Its key in the figures."""
        return f"{self.kind} {self.batch} x{self.processes}"

    @property
    def steps(self) -> tuple[int, int]:
        """Steps of a turn, and how many of them are not counted."""
        return (2, 1) if self.batch <= WARM_BATCH else (1, 0)


class Server:
    """The process of one module, started when it is first asked."""

    def __init__(self, module: str, python: Path, logs: Path) -> None:
        self._log = logs / f"{module}.log"
        with self._log.open("a") as errors:
            self._process = subprocess.Popen(
                [str(python), str(ROOT / "tools" / "peers_server.py"), module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={
                    **os.environ,
                    **{"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"},
                    **{"CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"},
                    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tools")]),
                },
            )
        self._read()

    def ask(self, job: dict[str, Any]) -> dict[str, Any]:
        """Run one turn. Raises CannotError with what it said."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({**job, "log": str(self._log)}) + "\n")
        self._process.stdin.flush()
        answer = self._read()
        if "error" in answer:
            raise CannotError(answer["error"])
        return answer

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            said = self._log.read_text().strip().splitlines() or ["nothing"]
            raise CannotError(f"ended with {self._process.wait()}: {said[-1][:200]}")
        answer: dict[str, Any] = json.loads(line)
        return answer


class Bench:
    """Runs turns and keeps their figures; what is in the file already is not run again."""

    def __init__(self, out: Path, folder: Path, pythons: dict[str, Path]) -> None:
        self.out, self.folder, self.pythons = out, folder, pythons
        self.figures: dict[str, Any] = {"proofs": {}, "turns": {}, "why": {}}
        if out.exists():
            self.figures = json.loads(out.read_text())
        self._servers: dict[str, Server] = {}

    def turn(self, arm: Arm, case: Case, *, proof: str = "") -> dict[str, Any] | None:
        """Run one arm once; None where it cannot, which is noted."""
        steps, warm = (1, 0) if proof else case.steps
        job = {
            **{"folder": str(self.folder), "kind": case.kind, "batch": case.batch},
            **{"nproc": case.processes, "steps": steps, "warm": warm, "proof": proof},
            **{"cached": arm.cached, "settings": list(arm.settings)},
        }
        try:
            if arm.module not in self._servers:
                python = self.pythons[arm.module]
                self._servers[arm.module] = Server(arm.module, python, self.folder)
            found = self._servers[arm.module].ask(job)
        except CannotError as error:
            self.figures["why"][f"{arm.name}, {case.name}"] = str(error)
            print(f"{case.name}: {arm.name}: {error}", file=sys.stderr, flush=True)
            return None
        return {**found, "pairs": case.batch * (steps - warm)}

    def prove(self, case: Case, arms: list[Arm]) -> None:
        """Compare loss and gradient of step 1 with ours, on the same rows and weights."""
        import torch

        if case.name in self.figures["proofs"]:
            return
        whole, rows = {}, {}
        for arm in (arm for arm in arms if arm.proved):
            path = self.folder / f"gradient-{os.getpid()}.pt"
            found = self.turn(arm, case, proof=str(path))
            if found is None:
                continue
            gradients = torch.load(path)
            path.unlink()
            names = sorted(gradients)
            flat = torch.cat([gradients[name].flatten() for name in names])
            first = whole.setdefault("ours", (names, flat))
            same = names == first[0]
            rows[arm.name] = {
                "loss": found["loss"],
                "parameters": len(names),
                "norm": float(flat.norm()),
                "difference": float((flat - first[1]).norm() / first[1].norm()) if same else None,
            }
        self.figures["proofs"][case.name] = rows
        self.save()

    def round(self, case: Case, arms: list[Arm], turn: int) -> None:
        """Let the arms take turns, the first of a round another one each time."""
        kept = self.figures["turns"].setdefault(case.name, {arm.name: [] for arm in arms})
        first = turn % len(arms)
        for arm in arms[first:] + arms[:first]:
            had = kept.setdefault(arm.name, [])
            if len(had) > turn or f"{arm.name}, {case.name}" in self.figures["why"]:
                continue
            found = self.turn(arm, case)
            if found is not None:
                had.append(found)
                rate = found["pairs"] / found["cpu_seconds"]
                said = f"{case.name}, round {turn + 1}: {arm.name}: {rate:.1f} pairs a CPU s"
                print(said, file=sys.stderr, flush=True)
            self.save()

    def save(self) -> None:
        """Write the figures so far."""
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.out.write_text(json.dumps(self.figures, indent=1) + "\n")

    def close(self) -> None:
        """End all processes."""
        for server in self._servers.values():
            server.close()


def environments(cache: Path, modules: set[str]) -> tuple[dict[str, Path], dict[str, str]]:
    """Return the Python of each module, and why some have none."""
    here = {"ours": Path(sys.executable)}
    pins = {name: pin for name, pin in PINS.items() if name in modules or "plain_loop" in modules}
    pythons, why = dict(here), {}
    for home, wanted in (("peers", pins), ("peers_swift", SWIFT_PINS)):
        names = [name for name in wanted if name in modules or home == "peers"]
        if not names or (home == "peers_swift" and "ms_swift" not in modules):
            continue
        python, missing = peer_python(cache / home, wanted, customise=TORCHVISION, seconds=SECONDS)
        why |= missing
        pythons |= {name: python for name in wanted if name not in missing}
    if "sentence_transformers" in pythons:
        pythons["plain_loop"] = pythons["sentence_transformers"]
    return pythons, why


def cases_of(arguments: argparse.Namespace) -> list[tuple[Case, int]]:
    """Return the cases with their rounds, the cheapest first."""
    found = []
    for batch in sorted(arguments.batches):
        for processes in arguments.processes:
            for kind in arguments.sets:
                rounds = arguments.repeats
                if batch >= arguments.large:
                    rounds = min(rounds, arguments.large_repeats)
                found.append((Case(kind, batch, processes), rounds))
    return found


def arms_of(case: Case, arguments: argparse.Namespace, have: dict[str, Path]) -> list[Arm]:
    """Return who takes part in a case."""
    smallest = case.batch == min(arguments.batches) and case.processes == 1
    wanted = [arm for arm in ARMS if arm.name in arguments.arms and arm.module in have]
    return [arm for arm in wanted if arm.everywhere or smallest]


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--arms", nargs="+", default=[arm.name for arm in ARMS])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--large", type=int, default=1024, help="batches with fewer rounds")
    parser.add_argument("--large-repeats", type=int, default=3)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "cocoa_bench_peers")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "peers_cpu")
    parser.add_argument("--no-proofs", action="store_true", help="rates and memory alone")
    parser.add_argument("--tables", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    unknown = set(arguments.arms) - {arm.name for arm in ARMS}
    if unknown or "ours" not in arguments.arms:
        have = ", ".join(repr(arm.name) for arm in ARMS)
        parser.error(f"--arms {arguments.arms}: expected 'ours' and others of {have}")
    if max(arguments.batches) > arguments.rows:
        parser.error(f"--rows {arguments.rows}: a batch of {max(arguments.batches)} needs as many")
    return arguments


def main() -> int:
    """Run the bench."""
    arguments = parse()
    out = arguments.out.with_suffix(".json")
    if not arguments.tables:
        run_all(arguments, out)
    text = page(json.loads(out.read_text()))
    arguments.out.with_suffix(".md").write_text(text)
    print(text)
    return 0


def run_all(arguments: argparse.Namespace, out: Path) -> None:
    """Run every case that is not in the file yet."""
    modules = {arm.module for arm in ARMS if arm.name in arguments.arms}
    arguments.cache.mkdir(parents=True, exist_ok=True)
    pythons, why = environments(arguments.cache, modules)
    facts, folder = rows_of(arguments)
    bench = Bench(out, folder, pythons)
    cases = cases_of(arguments)
    bench.figures["why"] |= why
    bench.figures |= {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python "
        f"{platform.python_version()}, torch {version('torch')}, deepspeed "
        f"{version('deepspeed')}, transformers {version('transformers')}",
        "pins": {**PINS, **SWIFT_PINS},
        "sets": facts,
        "arms": [asdict(arm) for arm in ARMS],
    }
    try:
        for case, _ in cases:
            if case.batch == min(arguments.batches) and not arguments.no_proofs:
                bench.prove(case, arms_of(case, arguments, pythons))
        for turn in range(max(repeats for _, repeats in cases)):
            for case, repeats in cases:
                if turn < repeats:
                    bench.round(case, arms_of(case, arguments, pythons), turn)
    finally:
        bench.close()


def rows_of(arguments: argparse.Namespace) -> tuple[dict[str, Any], Path]:
    """Lay the rows down, if they are not there yet; return what they are, and where."""
    batches = sorted(arguments.batches)
    name = "-".join(map(str, ["rows", arguments.rows, *batches]))
    folder = arguments.cache / name
    facts = folder / "facts.json"
    if not facts.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        found = lay_down(folder, batches=batches, most_rows=arguments.rows)
        facts.write_text(json.dumps(found))
    return json.loads(facts.read_text()), folder


if __name__ == "__main__":
    sys.exit(main())
