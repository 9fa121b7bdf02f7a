"""Find how many steps give a contrastive-only control the training CPU time of a finished run.

    python tools/equal_compute.py RUN_DIR CONTROL_RECIPE

Prints an override, `stages.contrastive.steps=N`, for `python -m launcher run CONTROL_RECIPE`.
N = CPU time of the run over all its stages / CPU time of one step of its own contrastive stage,
which is the same work in both arms. Reads files only: no torch.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # works in a checkout that is not installed

from cocoa_dist.config import RunConfig, load_recipe  # noqa: E402
from cocoa_dist.report.facts import RunFacts, read_run  # noqa: E402

STAGE = "contrastive"
COST_KEYS = ("batch_size", "data", "attention", "adapter", "freeze_vision")
WARM_STEPS = 5  # of the stage, not typical: caches fill


def main(argv: Sequence[str] | None = None) -> int:
    """Print the override; returns the exit code (2 for bad input)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", type=Path, help="folder of the finished run")
    parser.add_argument("control_recipe", help="recipe of the control: a name or a .yaml file")
    arguments = parser.parse_args(argv)
    try:
        run = read_run(arguments.run_dir)
        control = load_recipe(arguments.control_recipe)
        check_same_step(run, control)
        print(f"stages.{STAGE}.steps={equal_steps(run)}")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def equal_steps(run: RunFacts) -> int:
    """Return how many contrastive steps cost what the whole run did.

    Raises ValueError if the run has no such stage, or too few of its steps were timed.
    """
    timed = run.steps_of(STAGE)[WARM_STEPS:]
    seconds = [float(step["cpu_seconds"]) for step in timed if step.get("cpu_seconds")]
    if not seconds:
        raise ValueError(
            f"{run.run_dir}: stage '{STAGE}' has no timed step after its first {WARM_STEPS}; "
            "train it for more steps"
        )
    return max(1, round(run.train_cpu_seconds / statistics.median(seconds)))


def check_same_step(run: RunFacts, control: RunConfig) -> None:
    """Raise ValueError unless a contrastive step is the same work in both."""
    for name, config in ((str(run.run_dir), run.config), (control.name, control)):
        if STAGE not in config.stages:
            raise ValueError(f"{name} has no stage '{STAGE}' (has: {', '.join(config.stages)})")
    own, other = run.config.stages[STAGE], control.stages[STAGE]
    pairs = [(f"stages.{STAGE}.{key}", getattr(own, key), getattr(other, key)) for key in COST_KEYS]
    pairs.append(("model", run.config.model, control.model))
    for key, left, right in pairs:
        if left != right:
            raise ValueError(
                f"{key} differs, so a contrastive step does not cost the same: "
                f"{left!r} in {run.run_dir}, {right!r} in {control.name}"
            )


if __name__ == "__main__":
    sys.exit(main())
