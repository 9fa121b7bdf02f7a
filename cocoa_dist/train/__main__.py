"""Command line of the trainer: one stage on one rank, or a look at a stage before it runs.

The launcher starts it once per rank; by hand it prints a resolved recipe, builds every part of a
stage without training, or drives one batch to zero.
"""

from cocoa_dist.runtime import EXIT_BAD_INPUT, StopRequest, imports_that_stay

# Before anything heavy: a signal during imports would otherwise kill the process.
_STOP = StopRequest()
if __name__ == "__main__":
    _STOP.install()

import argparse  # noqa: E402
import errno  # noqa: E402
import logging  # noqa: E402
import sys  # noqa: E402
import traceback  # noqa: E402
from collections.abc import Sequence  # noqa: E402
from pathlib import Path  # noqa: E402

from cocoa_dist.config import RunConfig, dump_yaml, load_recipe, resolve_path  # noqa: E402

_NOT_WRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
_EXAMPLES = """\
examples:
  see the resolved recipe, in under a second:
    python -m cocoa_dist.train cocoa_qwen2_vl_2b --stage contrastive --dump-config
  build every part, one batch, print what it costs, leave:
    python -m cocoa_dist.train quickstart --stage joint_reconstruction --dry-run
  check on the running model that nothing of a picture passes the bridge:
    python -m cocoa_dist.train quickstart_coma --stage compression --check-attention
  check that an objective can learn: one batch to near zero:
    python -m cocoa_dist.train debug --stage contrastive --overfit-one-batch
To train, use the launcher: python -m launcher run RECIPE --run-dir DIR
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (2 for bad input)."""
    arguments = _parser().parse_intermixed_args(argv)
    logging.basicConfig(
        level=logging.WARNING, format="%(asctime)s %(levelname).1s %(message)s", stream=sys.stdout
    )
    logging.getLogger("cocoa_dist").setLevel(logging.INFO)
    try:
        config = load_recipe(arguments.recipe, arguments.overrides)
        return _run(config, arguments)
    except ValueError as error:
        if arguments.run_dir is not None:
            traceback.print_exc()  # for the rank's log; the launcher passes on the last line
        sys.stderr.write(f"error: {error}\n")
        return EXIT_BAD_INPUT
    except OSError as error:
        if error.errno not in _NOT_WRITABLE:
            raise
        remedy = "make room or give permission, then start the same command again"
        sys.stderr.write(f"error: {error}; {remedy}\n")
        return EXIT_BAD_INPUT


def _run(config: RunConfig, arguments: argparse.Namespace) -> int:
    if arguments.dump_config:
        sys.stdout.write(dump_yaml(config))
        return 0
    if arguments.check_inputs:
        return _check_inputs(config)
    stage = _stage_name(config, arguments.stage)
    if arguments.dry_run:
        from cocoa_dist.train.rehearsal import dry_run

        return dry_run(config, stage, run_dir=arguments.run_dir)
    if arguments.check_attention:
        from cocoa_dist.train.rehearsal import check_attention

        return check_attention(config, stage, run_dir=arguments.run_dir)
    if arguments.overfit_one_batch:
        from cocoa_dist.train.rehearsal import overfit_one_batch

        return overfit_one_batch(config, stage, run_dir=arguments.run_dir, steps=arguments.steps)
    if arguments.run_dir is None:
        raise ValueError("training needs --run-dir; `python -m launcher run` gives it to its ranks")
    with imports_that_stay():
        from cocoa_dist.train.checkpoint import SaveError
        from cocoa_dist.train.session import import_engine, run_stage

        import_engine(config)
    try:
        run_stage(config, stage, run_dir=arguments.run_dir, stop=_STOP)
    except SaveError as error:
        if not error.no_room:
            raise
        raise ValueError(
            f"a checkpoint could not be written: {error}; older checkpoints are untouched, make "
            "room or give permission and start the same command again"
        ) from error
    return 0


def _check_inputs(config: RunConfig) -> int:
    """Look at everything the recipe names on disk, without torch; 0 if all is there."""
    from cocoa_dist.data.revision import check_origin
    from cocoa_dist.data.shards import check_dataset
    from cocoa_dist.inputs import check_model_folder, tokenizer_folder
    from cocoa_dist.train.ds_config import build_ds_config, read_ds_config

    if config.model.path is not None:
        check_model_folder(config.model.path)
    tokenizer_folder(config.model)
    for name, stage in config.stages.items():
        if stage.guide_folder is not None:
            check_model_folder(stage.guide_folder, named=f"stages.{name}.objective.guide")
    mechanics = read_ds_config(config.engine.ds_config)
    build_ds_config(mechanics, max_grad_norm=1.0, dtype=config.model.dtype)
    sources = [source for stage in config.stages.values() for source in stage.data.blend.values()]
    for path in sorted({s.path for s in [*sources, *config.evaluation.sets.values()]}):
        check_origin(check_dataset(resolve_path(path)), path)
    return 0


def _stage_name(config: RunConfig, name: str | None) -> str:
    if name is None:
        raise ValueError(f"say which --stage (have: {', '.join(config.stages)})")
    if name not in config.stages:
        raise ValueError(
            f"stage '{name}' is not in recipe {config.name} (have: {', '.join(config.stages)})"
        )
    return name


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cocoa_dist.train",
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", help="name of a recipe, or path of a .yaml file")
    parser.add_argument("overrides", nargs="*", metavar="a.b.c=value", help="change the recipe")
    parser.add_argument("--stage", help="which stage of the recipe")
    parser.add_argument("--run-dir", type=Path, help="run folder, made by the launcher")
    look = parser.add_mutually_exclusive_group()
    look.add_argument("--dump-config", action="store_true", help="print the resolved recipe")
    look.add_argument("--check-inputs", action="store_true", help="is all data and the model there")
    look.add_argument("--dry-run", action="store_true", help="build all parts and one batch")
    look.add_argument("--overfit-one-batch", action="store_true", help="drive one batch to zero")
    look.add_argument(
        "--check-attention",
        action="store_true",
        help="change pictures, hold the bridge: does a target notice",
    )
    parser.add_argument("--steps", type=int, default=300, help="steps of --overfit-one-batch")
    return parser


if __name__ == "__main__":
    sys.exit(main())
