#!/usr/bin/env python3
"""Export the model of a run folder, finished or not, as a folder for sentence-transformers.

    python tools/export_model.py runs/quickstart --out MODEL
    python tools/export_model.py RUN --out MODEL --stage contrastive

Takes the newest checkpoint of the stage (default: the last one that has any). One in the middle of
a stage is exported too; its model card says so first. At a stage's end weights are read and written
one layer at a time, so a model of any size needs little more memory than its largest layer. The
folder is loaded once more and compared with the trainer's vectors before it gets its name. Exit 2
for what cannot be exported.
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # works in a checkout that is not installed


def main(arguments: Sequence[str] | None = None) -> int:
    """Export; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--stage")
    options = parser.parse_args(arguments)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed searches one, and says so
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    from cocoa_dist.report.export_run import export_run  # loads torch

    try:
        point = export_run(options.run.absolute(), options.out.absolute(), stage=options.stage)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    found = point.manifest
    how_far = "" if found.complete else f" of {found.target_step}: not finished"
    print(f"{options.out}: stage {found.stage} at step {found.step}{how_far}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
