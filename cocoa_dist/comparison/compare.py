"""A comparison from its pilots to its table: what `tools/compare_methods.py` does.

Every step reads what the folder has and does what is missing, so that the same call goes on after
any end. The table is written after every run, and says what it lacks.
"""

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cocoa_dist.comparison import curves, markdown, page, table
from cocoa_dist.comparison.arms import (
    Preset,
    Variant,
    list_variants,
    read_preset,
    reconstruction_stages,
    resolve,
    stage_of_pairs,
)
from cocoa_dist.comparison.budget import (
    Budget,
    Costs,
    Split,
    expected,
    fitted,
    unmeasured,
)
from cocoa_dist.comparison.facts import run_facts, scores
from cocoa_dist.comparison.folder import (
    Kept,
    Place,
    Size,
    check_recipe,
    held,
    keep_recipe,
    read_plan,
    write_plan,
)
from cocoa_dist.comparison.runs import (
    LAUNCHER,
    Cell,
    Say,
    Signals,
    caught_signals,
    command,
    is_done,
    run_cells,
    run_pilots,
    steps_done,
)
from cocoa_dist.config import RunConfig
from cocoa_dist.manifest import write_atomic
from cocoa_dist.report.facts import read_run

NOT_RUN = "not run yet"


@dataclass(frozen=True)
class Request:
    """What was asked for on the command line."""

    preset: str
    seeds: int
    out: Path
    arms: tuple[str, ...] = ()
    factors: tuple[float, ...] = (1.0,)
    ablations: tuple[str, ...] = ()
    budget: Budget = Budget.COMPUTE
    split: Split = Split.REFERENCE
    amount: float | None = None  # in the budget's unit, of every group; None: the reference's
    nproc: int = 1
    jobs: int = 1  # runs at the same time
    choose: bool = False
    pilots_from: Path | None = None  # another comparison's folder
    words: tuple[str, ...] = ()  # the command itself, for the table
    launcher: tuple[str, ...] = LAUNCHER

    @property
    def needs_pilots(self) -> bool:
        """Whether steps cannot be known without pilots."""
        return self.budget is not Budget.STEPS or self.split is Split.REFERENCE

    @property
    def settings(self) -> dict[str, Any]:
        """What all calls for one folder have to have alike."""
        return {
            "preset": self.preset,
            "budget": self.budget.value,
            "split": self.split.value,
            "amount": self.amount,
            "nproc": self.nproc,
        }


@dataclass(frozen=True)
class Entry:
    """A row with the steps its budget buys; `why_not` if it buys none, or is not known yet."""

    variant: Variant
    config: RunConfig | None
    cpu_seconds: float | None  # expected, of one run
    why_not: str = ""


@dataclass(frozen=True)
class Plan:
    """All rows, and the budget of each group."""

    entries: tuple[Entry, ...]
    sizes: Mapping[float, Size]

    def cells(self, seeds: int) -> Iterator[Cell]:
        """Yield the runs, all rows of a seed before the next seed, none twice."""
        for seed in range(seeds):
            seen = set()
            for entry in self.entries:
                if entry.config is not None and entry.config.name not in seen:
                    seen.add(entry.config.name)
                    yield Cell(entry.variant, entry.config, seed, entry.cpu_seconds)


def make_plan(
    preset: Preset,
    variants: Sequence[Variant],
    kept: Kept,
    *,
    request: Request,
    failed: Mapping[str, str],
) -> Plan:
    """Give every variant the steps that its group's budget buys; what is settled stays."""
    sizes = {
        factor: size
        for factor in dict.fromkeys(variant.factor for variant in variants)
        if (size := kept.sizes.get(factor) or _size(preset, factor, kept.costs, request=request))
    }
    entries = []
    for variant in variants:
        size = sizes.get(variant.factor)
        missing = unmeasured(variant.config, kept.costs)
        if size is None or (missing and request.needs_pilots):
            what = f"of {', '.join(missing)}" if missing else f"of '{preset.reference}'"
            why = failed.get(variant.name, f"no pilot {what} yet")
            entries.append(Entry(variant, None, None, why))
            continue
        try:
            config = fitted(
                variant,
                kept.costs,
                budget=request.budget,
                amount=size.amount,
                before=size.before,
            )
        except ValueError as error:
            entries.append(Entry(variant, None, None, str(error)))
            continue
        if request.budget is Budget.STEPS and not reconstruction_stages(config):
            config = config.model_copy(update={"name": variant.label})  # one run for all factors
        cpu = None if missing else expected(config, kept.costs, budget=Budget.COMPUTE)
        entries.append(Entry(variant, config, cpu))
    return Plan(tuple(entries), sizes)


def _size(preset: Preset, factor: float, costs: Costs, *, request: Request) -> Size | None:
    """Return a group's budget; None if the reference arm has not been measured."""
    reference = resolve(preset, preset.reference, factor=factor).config
    budget = request.budget
    if request.needs_pilots and unmeasured(reference, costs):
        return None
    amount = request.amount
    if amount is None:
        amount = expected(reference, costs, budget=budget)
    earlier = reconstruction_stages(reference)
    shares = request.split is Split.REFERENCE
    before = expected(reference, costs, budget=budget, stages=earlier) if shares else None
    return Size(amount, before)


def reference_amount(run_dir: Path, budget: Budget) -> float:
    """Return what a finished run has used, in the budget's unit. Raises ValueError if it is not."""
    run = read_run(run_dir)
    if budget is Budget.COMPUTE:
        return run.train_cpu_seconds
    if budget is Budget.TOKENS:
        return float(sum(stage.manifest.tokens for stage in run.stages))
    return float(run.config.stages[stage_of_pairs(run.config)].steps)


@dataclass
class Comparison:
    """One call, with its folder held."""

    request: Request
    preset: Preset
    variants: Sequence[Variant]
    say: Say
    kept: Kept
    failed_pilots: dict[str, str] = field(default_factory=dict)
    known: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def of(cls, request: Request, *, say: Say) -> "Comparison":
        """Read preset and folder. Raises ValueError for what the caller has to change."""
        if request.seeds < 1:
            raise ValueError(f"--seeds is {request.seeds}, expected at least 1")
        if request.jobs < 1:
            raise ValueError(f"--jobs is {request.jobs}, expected at least 1")
        preset = read_preset(request.preset)
        variants = list_variants(
            preset, arms=request.arms, factors=request.factors, ablations=request.ablations
        )
        kept = read_plan(Place(request.out), request.settings)
        if request.pilots_from is not None:
            other = Place(request.pilots_from)
            settings = _settings_of(other, nproc=request.nproc)
            kept.costs = {**read_plan(other, settings).costs, **kept.costs}
        return cls(request, preset, variants, say, kept)

    @property
    def place(self) -> Place:
        """Where everything lies."""
        return Place(self.request.out)

    def plan(self) -> Plan:
        """Return the plan as far as it is known."""
        return make_plan(
            self.preset,
            self.variants,
            self.kept,
            request=self.request,
            failed=self.failed_pilots,
        )

    def go(self, *, pilots_only: bool = False) -> int:
        """Do what is missing and write the table; return the exit code.

        Raises ValueError for bad input, InterruptedByUserError if a signal came.
        """
        with held(self.place), caught_signals() as signals:
            for variant in self.variants:  # before anything is measured for it
                check_recipe(self.place, variant.config, with_steps=False)
            self._settle({})
            if self.request.needs_pilots or pilots_only:
                self._pilots(signals)
            plan = self.plan()
            self._settle(plan.sizes)
            for entry in plan.entries:
                if entry.config is not None:
                    keep_recipe(self.place, entry.config)
            if pilots_only:
                return 0
            self._run(plan, signals)
            return 1 if self.write(plan)["missing"] else 0

    def _settle(self, sizes: Mapping[float, Size]) -> None:
        """Write down what holds for all later calls."""
        self.kept.sizes |= sizes
        write_plan(self.place, self.request.settings, self.kept)

    def _pilots(self, signals: Signals) -> None:
        references = [
            resolve(self.preset, self.preset.reference, factor=factor)
            for factor in self.request.factors
        ]
        self.failed_pilots = run_pilots(
            self.place,
            [*references, *self.variants],
            self.kept.costs,
            steps=self.preset.pilot_steps,
            rounds=self.preset.pilot_rounds,
            nproc=self.request.nproc,
            say=self.say,
            signals=signals,
            keep=lambda: self._settle({}),
            launcher=self.request.launcher,
        )
        for name, why in self.failed_pilots.items():
            self.say(f"FAILED  {name}: {why}")

    def _run(self, plan: Plan, signals: Signals) -> None:
        cells = list(plan.cells(self.request.seeds))
        waiting = [c for c in cells if not is_done(self.place.run(c.name, c.seed), c.config)]
        if len(cells) > len(waiting):
            self.say(f"{len(cells) - len(waiting)} of {len(cells)} runs are done already")
        pace = _Pace(self.request.jobs)
        total = len(waiting)
        if waiting:
            self.say(f"{total} runs to go{pace.left([c.cpu_seconds for c in waiting])}")
        results = run_cells(
            self.place,
            waiting,
            jobs=self.request.jobs,
            nproc=self.request.nproc,
            say=self.say,
            signals=signals,
            launcher=self.request.launcher,
        )
        with closing(results):
            for index, result in enumerate(results, start=1):
                cell = result.cell
                waiting.remove(cell)
                name = f"[{index}/{total}] {cell.name}, seed {cell.seed}"
                if result.why is None:
                    pace.add(result.seconds, cell.cpu_seconds)
                    left = pace.left([c.cpu_seconds for c in waiting])
                    self.say(f"{name}: done in {result.seconds:.0f} s{left}")
                else:
                    self.say(f"FAILED  {name}: {result.why}")
                self.write(plan)

    def write(self, plan: Plan) -> dict[str, Any]:
        """Write methods.md, .html and .json of what is there; return the content."""
        rows = [self._row(entry) for entry in plan.entries]
        content = table.build(
            rows,
            preset=self.preset,
            settings=self.request.settings,
            sizes={factor: asdict(size) for factor, size in plan.sizes.items()},
            costs=self.kept.costs,
            commands=self._commands(plan),
            choose=self.request.choose,
        )
        drawn = self._curves(content)
        for name, (svg, labels) in drawn.items():
            text = curves.standalone(svg, labels)
            write_atomic(self.place.root / f"{name}.svg", text.encode())
        words = markdown.render(content, curves=[f"{name}.svg" for name in drawn])
        write_atomic(self.place.root / "methods.md", words.encode())
        write_atomic(self.place.root / "methods.html", page.render(content, curves=drawn).encode())
        write_atomic(
            self.place.root / "methods.json", (json.dumps(content, indent=1) + "\n").encode()
        )
        return content

    def _curves(self, content: Mapping[str, Any]) -> dict[str, tuple[str, list[str]]]:
        drawn = {}
        for group in content["groups"]:
            for split in content["validation"]:
                found = curves.mean_curves(group, split)
                if found:
                    name = f"methods-{split}-{group['reconstruction']:g}x"
                    label = f"{split}, R@10 in per cent over CPU seconds"
                    drawn[name] = (curves.draw(found, label=label), list(found))
        return drawn

    def _row(self, entry: Entry) -> table.Row:
        runs: dict[int, dict[str, Any]] = {}
        missing: dict[int, str] = {}
        for seed in range(self.request.seeds):
            if entry.config is None:
                missing[seed] = entry.why_not
                continue
            try:
                found = self._facts(entry.config, seed)
            except ValueError as error:
                missing[seed] = str(error)
                continue
            if found is None:
                missing[seed] = self._why_missing(entry.config, seed)
            else:
                runs[seed] = found
        steps = {} if entry.config is None else _steps(entry.config)
        return table.Row(entry.variant, steps, entry.cpu_seconds, runs, missing)

    def _facts(self, config: RunConfig, seed: int) -> dict[str, Any] | None:
        """Return what is known of a run, with scores; None if it is not finished."""
        key, run_dir = (config.name, seed), self.place.run(config.name, seed)
        if key not in self.known:
            if not is_done(run_dir, config):
                return None
            facts = run_facts(run_dir, expected=config, seed=seed)
            facts["splits"] = scores(
                self.place.score(config.name, seed),
                run_dir=run_dir,
                config=config.model_copy(update={"seed": seed}),
                preset=self.preset,
            )
            self.known[key] = facts
        return self.known[key]

    def _why_missing(self, config: RunConfig, seed: int) -> str:
        failure = self.place.failure(config.name, seed)
        if failure.is_file():
            return f"failed with {failure.read_text().strip()}"
        done = steps_done(self.place.run(config.name, seed))
        total = sum(stage.steps for stage in config.stages.values())
        return f"unfinished, step {done} of {total}" if done else NOT_RUN

    def _commands(self, plan: Plan) -> list[str]:
        launcher = ("python", "-m", "launcher", "run")
        each = [
            shlex.join(command(self.place, cell, nproc=self.request.nproc, launcher=launcher))
            for cell in plan.cells(self.request.seeds)
        ]
        whole = [" ".join(self.request.words)] if self.request.words else []
        return [*whole, "", "# or one by one, with the recipes that it wrote:", *each]


class _Pace:
    """Wall seconds that a CPU second takes here, from the runs of this call."""

    def __init__(self, jobs: int) -> None:
        self.jobs, self.wall, self.cpu = jobs, 0.0, 0.0

    def add(self, wall: float, cpu: float | None) -> None:
        """Count a run that was trained."""
        self.wall, self.cpu = self.wall + wall, self.cpu + (cpu or 0.0)

    def left(self, waiting: Sequence[float | None]) -> str:
        """Say how long the runs that wait will take."""
        if not waiting or any(cpu is None for cpu in waiting):
            return ""
        cpu = sum(c or 0.0 for c in waiting)
        if not self.cpu:
            return f"; {cpu / 60:.0f} CPU minutes to go, evaluation and starts not counted"
        return f"; about {cpu * self.wall / self.cpu / self.jobs / 60:.0f} minutes left"


def describe(comparison: Comparison) -> str:
    """Return the plan in words: arms, steps and expected CPU time."""
    plan, request = comparison.plan(), comparison.request
    rows = [["row", "stages and steps", "CPU s a run", "runs done"]]
    total, unknown, none = 0.0, 0, 0
    for entry in plan.entries:
        if entry.config is None:
            none += 1
            rows.append([entry.variant.name, entry.why_not, "-", "-"])
            continue
        done = sum(
            is_done(comparison.place.run(entry.config.name, seed), entry.config)
            for seed in range(request.seeds)
        )
        words = ", ".join(f"{name} {steps}" for name, steps in _steps(entry.config).items())
        cpu = "?" if entry.cpu_seconds is None else f"{entry.cpu_seconds:.0f}"
        rows.append([entry.variant.name, words, cpu, f"{done} of {request.seeds}"])
    for cell in plan.cells(request.seeds):
        if not is_done(comparison.place.run(cell.name, cell.seed), cell.config):
            unknown += cell.cpu_seconds is None
            total += cell.cpu_seconds or 0.0
    width = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(c.ljust(w) for c, w in zip(row, width, strict=True)).rstrip() for row in rows
    ]
    for factor, size in plan.sizes.items():
        share = "" if size.before is None else f", {size.before:.0f} of it before the last stage"
        kind = request.budget.value
        lines.append(f"budget at {factor:g}x reconstruction, {kind}: {size.amount:.0f}{share}")
    lines.append(f"to train: {total:.0f} CPU seconds ({total / 3600:.1f} hours)")
    if unknown or none:
        lines.append("not all is known: --pilots measures what a step of each stage costs")
    return "\n".join(lines)


def _steps(config: RunConfig) -> dict[str, int]:
    return {name: stage.steps for name, stage in config.stages.items()}


def _settings_of(place: Place, *, nproc: int) -> dict[str, Any]:
    """Return another comparison's settings. Raises ValueError if its pilots are not like ours."""
    path = place.root / "plan.json"
    try:
        settings: dict[str, Any] = json.loads(path.read_bytes())["settings"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"--pilots-from {place.root}: {path} cannot be read ({error})") from error
    if settings.get("nproc") != nproc:
        raise ValueError(
            f"--pilots-from {place.root}: its pilots ran on {settings.get('nproc')} processes, "
            f"this comparison runs on {nproc}, where a step costs something else"
        )
    return settings
