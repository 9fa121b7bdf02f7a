"""What code a run was started with: commit, state and difference, without anything secret."""

import os
import re
import subprocess
from pathlib import Path

from cocoa_dist.config import PACKAGE_DIR

_MAX_DIFF_CHARS = 1_000_000
_GIT_SECONDS = 20
_SECRET_FILES = (
    "*.env",
    "*.env.*",
    "*.pem",
    "*.key",
    "*.p12",
    "*id_rsa*",
    "*.netrc",
    "*credential*",
)
_HIDDEN = "[hidden]"
# Values that are secrets by their form, wherever they stand.
_SECRET_VALUES = re.compile(
    r"hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}"
    r"|sk-[\w-]{16,}|AKIA[0-9A-Z]{16}|xox[abprs]-[\w-]{10,}|AIza[\w-]{30,}"
    r"|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*"
)
# Values that are secrets by the name in front of them. `token` alone is a word of this project
# (tokens, tokenizer): it counts only before a long value without spaces.
_SECRET_NAMES = re.compile(
    r"(?i)((?:passw(?:or)?d|secret\w*|api[_-]?key|access[_-]?key\w*|private[_-]?key|credentials?"
    r"|authorization)[\"']?\s*[:=]\s*)\S.*"
    r"|((?:\b|_)token[\"']?\s*[:=]\s*[\"']?)[\w./+-]{20,}"
)
_URL_LOGIN = re.compile(r"(\w+://)[^/\s:@]+:[^/\s@]+@")
_KEY_BLOCK = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [^\n]*|\Z)", re.DOTALL)


def describe_code(root: Path = PACKAGE_DIR.parent) -> str:
    """Return commit, `git status --short` and difference of the checkout at `root`.

    Anything that looks like a secret is replaced, and the difference is cut after 1 MB. Outside a
    checkout the text says so; never raises because of git.
    """
    top = _git(root, "rev-parse", "--show-toplevel")
    if top is None or Path(top.strip()).resolve() != root.resolve():
        return "not a git checkout\n"
    commit = _git(root, "rev-parse", "--verify", "--quiet", "HEAD")
    status = _git(root, "status", "--short") or ""
    excluded = [f":(exclude,icase){pattern}" for pattern in _SECRET_FILES]
    diff = None
    if commit is not None:
        diff = _git(root, "diff", "--no-ext-diff", "--no-textconv", "HEAD", "--", ".", *excluded)
    text = hide_secrets(f"{status}{diff or ''}")
    if len(text) > _MAX_DIFF_CHARS:
        text = f"{text[:_MAX_DIFF_CHARS]}\n[cut: {len(text)} characters in all]\n"
    return f"commit {(commit or 'none yet').strip()}\n{text}"


def hide_secrets(text: str) -> str:
    """Replace what looks like a password, key or access token."""
    text = _KEY_BLOCK.sub(_HIDDEN, text)
    text = _URL_LOGIN.sub(rf"\1{_HIDDEN}@", text)
    text = _SECRET_VALUES.sub(_HIDDEN, text)
    return _SECRET_NAMES.sub(lambda found: f"{found[1] or found[2]}{_HIDDEN}", text)


def _git(root: Path, *arguments: str) -> str | None:
    """Run git read-only; None if it is not there, fails, or takes too long."""
    command = ["git", "-c", "core.fsmonitor=false", "-C", str(root), *arguments]
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"}
    try:
        done = subprocess.run(
            command, capture_output=True, env=environment, timeout=_GIT_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode(errors="replace") if done.returncode == 0 else None
