"""Data and model on disk while a run goes on: a folder that was there and is gone is waited for."""

import time
from collections.abc import Callable
from pathlib import Path

from cocoa_dist.config import RunConfig, is_remote, resolve_path
from launcher.backend import Ending
from launcher.history import Verdict, read_incarnations
from launcher.signals import Interrupts

_POLL_SECONDS = 1.0
_SAY_SECONDS = 60.0


def input_paths(config: RunConfig) -> list[Path]:
    """Return what a recipe names on disk: data sets, model, tokenizer, guides.

    Those in an object store are left to the loaders.
    """
    sources = [source for stage in config.stages.values() for source in stage.data.blend.values()]
    names = {source.path for source in [*sources, *config.evaluation.sets.values()]}
    guides = [stage.guide_folder for stage in config.stages.values()]
    models = (config.model.path, config.model.tokenizer, *guides)
    names |= {name for name in models if name is not None}
    return [resolve_path(name) for name in sorted(names) if not is_remote(name)]


def gone_inputs(config: RunConfig) -> list[Path]:
    """Return those that are not there now."""
    return [path for path in input_paths(config) if not path.exists()]


def names_an_input(config: RunConfig, ending: Ending) -> bool:
    """Whether what a rank said is about one of them."""
    return any(str(path) in ending.reason for path in input_paths(config))


def wait_for_inputs(
    config: RunConfig,
    *,
    run_dir: Path,
    seconds: float,
    interrupts: Interrupts,
    say: Callable[[str], None],
) -> Ending | None:
    """Wait until all inputs are there; an Ending if they are not.

    Only what was there once is waited for: on a first start a missing folder is a mistake.
    """
    gone = gone_inputs(config)
    if not gone:
        return None
    if not any(item.step for item in read_incarnations(run_dir)):
        return Ending(Verdict.BAD_INPUT, f"{gone[0]} does not exist")
    began = said = time.monotonic()
    say(f"waiting for {gone[0]}, which is gone")
    while gone and not interrupts.count:
        now = time.monotonic()
        if now - began > seconds:
            return Ending(Verdict.CRASH, f"{gone[0]} is gone, and did not come back in {seconds} s")
        if now - said > _SAY_SECONDS:
            said = now
            say(f"still waiting for {gone[0]} ({now - began:.0f} s)")
        time.sleep(_POLL_SECONDS)
        gone = gone_inputs(config)
    if gone:
        return None  # interrupted: the caller looks at that first
    say(f"it is back after {time.monotonic() - began:.0f} s")
    return None
