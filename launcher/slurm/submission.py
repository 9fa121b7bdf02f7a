"""What a job leaves in the run folder about itself: environment, nodes, batch script, code."""

import os
import re
import shutil
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from cocoa_dist.manifest import write_atomic
from launcher.codestate import hide_secrets
from launcher.runfolder import timestamp
from launcher.slurm.allocation import Allocation
from launcher.slurm.jobs import SUBMIT_DIR

# Names whose values nobody should find in a run folder; KEY alone is in KEYBOARD, too.
_SECRET_NAME = re.compile(
    r"(?i)passw|secret|token|credential|cookie|auth|(?:^|_)(?:api_?)?key(?:$|_|s$|id$)|private|cert"
    r"|session|_pat$|webhook|dsn$"
)
_HARMLESS_NAMES = ("TOKENIZERS_PARALLELISM", "SSL_CERT_DIR", "SSL_CERT_FILE")


def record_submission(
    run_dir: Path, allocation: Allocation, *, environment: Mapping[str, str] = os.environ
) -> None:
    """Write `submit/JOB.RESTART.txt` and, once, the script that SLURM has kept for the job."""
    folder = run_dir / SUBMIT_DIR
    folder.mkdir(exist_ok=True)
    lines = [
        f"job {allocation.name} at {timestamp(time.time())} on {socket.gethostname()}",
        f"nodes {','.join(allocation.nodes)}, {allocation.tasks_per_node} ranks each",
        "",
        *(f"{name}={value}" for name, value in sorted(harmless(environment).items())),
    ]
    write_atomic(folder / f"{allocation.name}.txt", ("\n".join(lines) + "\n").encode())
    script, kept = environment.get("COCOA_BATCH_SCRIPT"), folder / f"{allocation.job}.sh"
    if script and not kept.exists() and Path(script).is_file():
        shutil.copyfile(script, kept)


def harmless(environment: Mapping[str, str]) -> dict[str, str]:
    """Leave out every variable that looks like a secret, by name or by value."""
    kept: dict[str, str] = {}
    for name, value in environment.items():
        if name.startswith("BASH_FUNC_") or "\n" in value:
            continue  # functions and multi-line values: nothing a reader of a run folder needs
        if name not in _HARMLESS_NAMES and _SECRET_NAME.search(name):
            continue
        text = f"{name}={value}"
        if hide_secrets(text) == text:
            kept[name] = value
    return kept
