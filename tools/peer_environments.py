"""Environments of their own for the projects that a bench compares us with.

One sees the packages of the environment it was made from (torch above all); its own come first. A
package that cannot be had is told with its reason, and the others go on.
"""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

SECONDS = 600.0


class CannotError(ValueError):
    """Something cannot be had on this machine; the message says why."""


def run(command: list[str], *, seconds: float = SECONDS, **environment: str) -> str:
    """Run a command and return what it printed. Raises CannotError with its last line."""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment},
        )
    except subprocess.TimeoutExpired as error:
        raise CannotError(f"took more than {seconds:.0f} s") from error
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or [f"exit {done.returncode}"]
        raise CannotError(said[-1][:200])
    return done.stdout


def peer_python(
    home: Path,
    pins: Mapping[str, Sequence[str]],
    *,
    customise: str = "",
    seconds: float = SECONDS,
) -> tuple[Path, dict[str, str]]:
    """Make the environment `home`; return its Python and why some peers are not in it.

    `pins`: what each peer needs, as `package==version`. `customise`: Python that runs at the start
    of every interpreter there. What is there already is kept.
    """
    python = home / "bin" / "python"
    if not python.exists():
        run([sys.executable, "-m", "venv", str(home)])
    (own,) = home.glob("lib/python*/site-packages")
    seen = [path for path in sys.path if path.endswith("site-packages")]
    (own / "project.pth").write_text("\n".join(seen) + "\n")
    if customise:
        (own / "sitecustomize.py").write_text(customise)
    stay, why = [f"torch=={version('torch').partition('+')[0]}"], {}
    for name, wanted in pins.items():
        missing = [pin for pin in wanted if not _is_there(own, pin)]
        if not missing:
            continue
        try:
            install = [str(python), "-m", "pip", "install", "-q", "--no-compile"]
            run([*install, *missing, *stay], seconds=seconds)
        except CannotError as error:
            why[name] = f"cannot be installed: {error}"
    return python, why


def _is_there(packages: Path, pin: str) -> bool:
    name, _, wanted = pin.partition("==")
    return any(packages.glob(f"{name.replace('-', '_')}-{wanted}.dist-info"))
