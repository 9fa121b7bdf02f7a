#!/usr/bin/env python3
"""Train methods on equal footing, over seeds, and write one table of how they compare.

  compare_methods.py --preset debug --seeds 2 --out OUT                  minutes: does it work?
  compare_methods.py --preset quickstart --seeds 3 --out OUT             the real one, hours
  compare_methods.py --preset quickstart --seeds 3 --out OUT --pilots    costs and plan alone
  compare_methods.py --preset quickstart --seeds 3 --out OUT --dry-run   starts nothing

An arm is a recipe in a preset (cocoa_dist/comparison/presets/*.yaml; --preset takes a file of your
own as well). Every arm is trained with every seed by `python -m launcher run`, into a folder of its
own. Killed at any moment, the same command goes on; what is finished is not trained again; an arm
that fails is named, and the others go on; --arms and --seeds can grow from call to call. An arm
that has been changed since is refused.

Equal footing. All arms of a group have one budget:
  equal-compute  CPU seconds of all ranks inside steps, over all stages (the default)
  equal-tokens   tokens over all stages
  equal-steps    contrastive steps; reconstruction comes on top
It is what the preset's reference arm uses as its recipe stands, or --amount, or what a finished run
used (--reference). Pilots of a few steps measure what a step of each stage costs. The stages before
the contrastive one get, in every arm, what those of the reference arm take (--split recipe: their
recipe's steps); the contrastive one gets what the budget leaves. The table says what was really
used. --reconstruction 3x gives three times as much before the contrastive stage; every such factor
is a group with its own budget and its own control.

The table (methods.md, .html, .json in --out; written after every run, says what it lacks): held-out
recall by one scorer, mean and standard deviation over seeds, differences to the control on the same
seeds, learning curves on the validation set, steps, CPU seconds, tokens, and the data each arm saw.
Choose settings by the validation columns alone: --choose names each method's best row by them.

How long: --pilots measures for some minutes and prints the CPU time of all runs before any is
trained. docs/comparison.md has figures.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # works in a checkout that is not installed

from cocoa_dist.comparison.arms import preset_names, read_preset  # noqa: E402
from cocoa_dist.comparison.budget import Budget, Split  # noqa: E402
from cocoa_dist.comparison.compare import (  # noqa: E402
    Comparison,
    Request,
    describe,
    reference_amount,
)
from cocoa_dist.comparison.runs import InterruptedByUserError  # noqa: E402

EXIT_BAD_INPUT = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Do what was asked for; returns the exit code (1: incomplete, 2: bad input)."""
    words = list(sys.argv[1:] if argv is None else argv)
    options = parse(words)
    if options.list:
        print(listing(options.preset))
        return 0
    try:
        comparison = Comparison.of(request_of(options, words), say=say)
        if options.dry_run:
            print(describe(comparison))
            return 0
        if options.table_only:
            missing = comparison.write(comparison.plan())["missing"]
            code = 1 if missing else 0
        else:
            code = comparison.go(pilots_only=options.pilots)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except InterruptedByUserError as interrupt:
        print(f"\n{interrupt}", file=sys.stderr)
        return interrupt.code
    if options.pilots:
        print(describe(comparison))
    else:
        print(f"look at {options.out / 'methods.html'}, or read {options.out / 'methods.md'}")
        if code:
            print("the table is partial and says what it lacks; the same command tries that again")
    return code


def request_of(options: argparse.Namespace, words: Sequence[str]) -> Request:
    """Return the request. Raises ValueError for a reference run that is not finished."""
    budget = Budget(options.budget)
    amount = options.amount
    if options.reference is not None:
        amount = reference_amount(options.reference, budget)
    return Request(
        preset=options.preset,
        seeds=options.seeds,
        out=options.out,
        arms=names_of(options.arms),
        factors=options.reconstruction,
        ablations=names_of(options.ablate),
        budget=budget,
        split=Split(options.split),
        amount=amount,
        nproc=options.nproc,
        jobs=options.jobs,
        choose=options.choose,
        pilots_from=options.pilots_from,
        words=("python", "tools/compare_methods.py", *map(shlex.quote, words)),
    )


def listing(preset_name: str) -> str:
    """Return the arms and ablations of a preset in words."""
    preset = read_preset(preset_name)
    lines = [f"arms of {preset_name} (control: {preset.control}, budget: {preset.reference}'s)"]
    lines += [f"  {name:26} {arm.about}" for name, arm in preset.arms.items()]
    lines.append("ablations")
    for name, ablation in preset.ablations.items():
        values = ", ".join("all" if v is None else str(v) for v in ablation.values)
        lines.append(f"  {name:26} {ablation.about} {f'[{values}]' if values else ''}")
        lines.append(f"  {'':26} of {', '.join(ablation.arms)}")
    return "\n".join(lines)


def names_of(text: str | None) -> tuple[str, ...]:
    """Return the names of a list with commas."""
    return tuple(name.strip() for name in (text or "").split(",") if name.strip())


def factors_of(text: str) -> tuple[float, ...]:
    """Read `1x,3x,10x`."""
    found = []
    for word in text.split(","):
        try:
            value = float(word.strip().removesuffix("x"))
        except ValueError:
            value = 0.0
        if not 0.01 <= value <= 1000:
            raise argparse.ArgumentTypeError(f"'{word}': expected factors as in 1x,3x,10x")
        found.append(value)
    return tuple(dict.fromkeys(found))


def say(text: str) -> None:
    """Tell how it goes."""
    print(text, flush=True)


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Return what was asked for; argparse leaves with 2 if it makes no sense."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--preset",
        required=True,
        help=f"{', '.join(preset_names())}, or a .yaml file of arms",
    )
    parser.add_argument("--out", type=Path, help="folder of the comparison; made if new")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="0 to N-1 (%(default)s)")
    parser.add_argument("--arms", metavar="A,B", help="some of the arms (default: all)")
    parser.add_argument("--list", action="store_true", help="name arms and ablations, and leave")
    parser.add_argument(
        "--budget",
        choices=[budget.value for budget in Budget],
        default=Budget.COMPUTE.value,
        help="what all arms have alike (%(default)s)",
    )
    parser.add_argument(
        "--split",
        choices=[split.value for split in Split],
        default=Split.REFERENCE.value,
        help="what the stages before the contrastive one get: what the reference arm's take, or "
        "the steps of the arm's recipe (%(default)s)",
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--amount", type=float, metavar="X", help="of every group, in its unit")
    size.add_argument(
        "--reference", type=Path, metavar="DIR", help="a finished run that used the amount"
    )
    parser.add_argument(
        "--reconstruction",
        type=factors_of,
        default=(1.0,),
        metavar="1x,3x",
        help="factors of the steps before the contrastive stage (1x)",
    )
    parser.add_argument(
        "--ablate", metavar="A,B", help="rows for the values of these, and the control"
    )
    parser.add_argument("--choose", action="store_true", help="name best rows by validation")
    parser.add_argument(
        "--nproc", type=int, default=1, metavar="N", help="processes of a run (%(default)s)"
    )
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="runs at the same time (%(default)s)"
    )
    parser.add_argument(
        "--pilots-from", type=Path, metavar="DIR", help="take pilots of another comparison"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="print the plan as far as known")
    what.add_argument("--pilots", action="store_true", help="measure costs, print the plan, leave")
    what.add_argument("--table-only", action="store_true", help="write the table of what is there")
    options = parser.parse_args(words)
    if options.out is None and not options.list:
        parser.error("the following arguments are required: --out")
    return options


if __name__ == "__main__":
    sys.exit(main())
