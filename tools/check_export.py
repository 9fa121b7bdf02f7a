#!/usr/bin/env python3
"""Load an exported folder in fresh environments of the tools people use, and run its self-test.

    python tools/check_export.py runs/quickstart/export/quickstart

Makes three virtual environments with pip, none of which knows this project: transformers alone,
sentence-transformers alone, and mteb, which runs a mock task of its own as well. To save minutes
all three see one installed torch (a .pth file); what else each has is its own. Versions are those
that pip chooses; `--with` asks for others, as in --with transformers==5.18. COCOA_TORCH_INDEX, as
in tools/setup_env.sh, names an index of CPU builds of torch. Exit 1: a check failed; 2: pip did.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import venv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TOOLS = Path(__file__).resolve().parent
sys.path.insert(0, str(TOOLS))

from command_line import work_folder  # noqa: E402

INSIDE = TOOLS / "check_export_inside.py"
KINDS: Mapping[str, tuple[str, ...]] = {  # besides torch
    "transformers": ("transformers", "pillow"),
    "sentence-transformers": ("sentence-transformers", "pillow"),
    "mteb": ("mteb", "sentence-transformers", "pillow"),
}
TOLERANCE, LEAST_COSINE = 1e-4, 0.9999
EXIT_FAILED, EXIT_NO_PIP = 1, 2


class PipError(Exception):
    """Pip could not install something."""


def check(
    folder: Path, kinds: Sequence[str], root: Path, *, wanted: Sequence[str], torch: str
) -> dict[str, dict[str, Any]]:
    """Make the environments below `root` and check the folder in each."""
    shared = root / "torch"
    venv.create(shared, with_pip=True)
    _pip(shared, [torch, "numpy"])
    return {kind: _check_in(kind, folder, root, shared, wanted=wanted) for kind in kinds}


def _check_in(
    kind: str, folder: Path, root: Path, shared: Path, *, wanted: Sequence[str]
) -> dict[str, Any]:
    began = time.monotonic()
    environment = root / kind
    venv.create(environment, with_pip=True)
    (_packages(environment) / "torch.pth").write_text(f"{_packages(shared)}\n")
    _pip(environment, [*KINDS[kind], *wanted])
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        [_python(environment), "-I", str(INSIDE), kind, str(folder.resolve())],
        capture_output=True,
        text=True,
        check=False,
        cwd=root,
        env={**clean, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    result: dict[str, Any] = {"seconds": time.monotonic() - began}
    if done.returncode:
        return {**result, "passed": False, "error": done.stderr[-2000:]}
    found = json.loads(done.stdout.splitlines()[-1])
    close = found["difference"] <= TOLERANCE
    if found["half_precision"]:
        close = found["cosine"] >= LEAST_COSINE
    return {**result, **found, "passed": close}


def _pip(environment: Path, packages: Sequence[str]) -> None:
    index = os.environ.get("COCOA_TORCH_INDEX")
    extra = ["--extra-index-url", index] if index else []
    command = [_python(environment), "-m", "pip", "install", "--quiet", "--no-compile", *extra]
    done = subprocess.run([*command, *packages], capture_output=True, text=True, check=False)
    if done.returncode:
        raise PipError(f"pip cannot install {' '.join(packages)}: {done.stderr[-800:]}")


def _python(environment: Path) -> str:
    return str(environment / "bin" / "python")


def _packages(environment: Path) -> Path:
    return next(environment.glob("lib/python*/site-packages"))


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the results as a table in Markdown."""
    lines = [
        "| environment | self-test | largest difference | least cosine | mock task | versions |",
        "| --- | --- | ---: | ---: | --- | --- |",
    ]
    for kind, result in results.items():
        if "error" in result:
            lines.append(f"| {kind} | **FAILED** | | | | |")
            continue
        state = f"{result['entries']} of {result['entries']}" if result["passed"] else "**FAILED**"
        tasks = ", ".join(f"{name} {score:.3f}" for name, score in result["task"].items())
        versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items() if v)
        lines.append(
            f"| {kind} | {state} | {result['difference']:.1e} | {result['cosine']:.7f} | "
            f"{tasks or 'none'} | {versions} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, print the table, return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="exported model")
    parser.add_argument("--only", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--with", nargs="+", dest="wanted", default=[], metavar="REQUIREMENT")
    parser.add_argument("--torch", default="torch", help="requirement of the torch they share")
    parser.add_argument("--environments", type=Path, help="keep them here; default: removed")
    parser.add_argument("--json", type=Path, help="write the results here as well")
    options = parser.parse_args(arguments)
    if not (options.folder / "selftest.json").is_file():
        print(f"error: {options.folder} has no selftest.json: no exported model", file=sys.stderr)
        return EXIT_NO_PIP
    with work_folder(options.environments) as root:
        try:
            results = check(
                options.folder, options.only, root, wanted=options.wanted, torch=options.torch
            )
        except PipError as error:
            print(f"error: {error}", file=sys.stderr)
            return EXIT_NO_PIP
    print(table(results))
    for kind, result in results.items():
        if "error" in result:
            print(f"\n{kind}:\n{result['error']}", file=sys.stderr)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0 if all(result["passed"] for result in results.values()) else EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
