"""tools/docker_check.sh: what it sees without building, and what it does where it cannot build."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]
FILES = ("Dockerfile", "install.sh", "health.sh")
COPIED = ("LICENSE", "README.md", "constraints.txt", "pyproject.toml", "tools/setup_env.sh")
COPIED += tuple(f"{folder}/__init__.py" for folder in ("cocoa_dist", "launcher", "ds_configs"))


@pytest.fixture
def checkout(tmp_path) -> Path:
    """As much of a checkout as the image is made of, to be spoilt."""
    root = tmp_path / "checkout"
    for name in COPIED:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    (root / "slurm").mkdir()
    (root / "docker").mkdir()
    for name in FILES:
        shutil.copy2(CHECKOUT / "docker" / name, root / "docker" / name)
    shutil.copy2(CHECKOUT / ".dockerignore", root / ".dockerignore")
    shutil.copy2(CHECKOUT / "tools/docker_check.sh", root / "tools/docker_check.sh")
    return root


@pytest.fixture
def tools(tmp_path) -> Path:
    """A folder that comes first on PATH; linters say nothing, and there is no docker engine."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("shellcheck", "hadolint"):
        put(folder / name, "exit 0")
    put(folder / "docker", "exit 1")
    return folder


def put(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


def check(checkout: Path, tools: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        ["bash", str(checkout / "tools/docker_check.sh"), *words],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"},
        check=False,
    )


def test_what_ships_passes(checkout, tools):
    done = check(checkout, tools, "--static")
    assert (done.returncode, "static checks: ok" in done.stdout) == (0, True), done.stdout
    assert "not tried: building and running: --static" in done.stdout
    assert "hadolint" not in done.stdout


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (":13.0.1-base-ubuntu24.04", "", "expected a name with a version or a digest"),
        (":13.0.1-base-ubuntu24.04", ":latest", "expected a name with a version or a digest"),
        ("FROM ${BASE} AS build", "FROM debian:12 AS build", "a stage is not built FROM"),
        ("USER 10001:10001", "USER root", "the last USER is 'root'"),
        ("USER 10001:10001", "USER 0:0", "the last USER is '0:0'"),
        ("HEALTHCHECK ", "# HEALTHCHECK ", "the Dockerfile has no HEALTHCHECK"),
        ("WORKDIR /runs", "ADD thing.tar /", "fetches something that no checksum stands for"),
        ("WORKDIR /runs", "RUN curl example/x | sh", "fetches something that no checksum"),
        ("WORKDIR /runs", "ENV API_TOKEN=x", "a secret as ARG or ENV stays in the image"),
        ("COPY slurm /opt", "COPY slurmy /opt", "COPY slurmy: it is not in the checkout"),
        ("COPY slurm /opt", "COPY tools /opt", "COPY tools: .dockerignore leaves it out"),
    ],
)
def test_a_spoilt_dockerfile_is_named(checkout, tools, old, new, words):
    path = checkout / "docker/Dockerfile"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    done = check(checkout, tools, "--static")
    assert done.returncode == 1
    assert f"FAILED: {words}" in done.stdout or words in done.stdout
    assert "something failed" in done.stderr


def test_a_digest_pins_the_base_too(checkout, tools):
    path = checkout / "docker/Dockerfile"
    digest = "@sha256:" + "0" * 64
    path.write_text(path.read_text().replace(":13.0.1-base-ubuntu24.04", digest))
    assert check(checkout, tools, "--static").returncode == 0


def test_faults_of_linters_and_scripts_count(checkout, tools):
    put(tools / "hadolint", "echo DL9999; exit 1")
    (checkout / "docker/health.sh").chmod(0o644)
    done = check(checkout, tools, "--static")
    assert done.returncode == 1
    assert "hadolint has something to say" in done.stdout
    assert "docker/health.sh is not executable" in done.stdout


def test_where_nothing_can_build_it_says_what_is_needed(checkout, tools):
    put(tools / "id", "echo 1000")
    done = check(checkout, tools)
    assert done.returncode == 3
    assert "apt-get install --no-install-recommends buildah debootstrap" in done.stderr


def test_an_engine_builds_with_pip_settings_as_secrets_and_checks(checkout, tools, tmp_path):
    calls = tmp_path / "calls"
    put(tools / "docker", f'echo "$@" >> {calls}')
    assert check(checkout, tools, "--work", str(tmp_path / "work")).returncode == 0
    info, build, run, remove = calls.read_text().splitlines()
    assert info == "info"
    assert build.startswith("build --file docker/Dockerfile")
    assert "--secret=id=pip.conf,src=" in build
    assert "PIP" not in build.replace("pip.conf", "")
    assert run.endswith("/opt/cocoa/docker/install.sh check")
    assert remove.startswith("image rm")
    settings = tmp_path / "work/pip.conf"
    assert settings.stat().st_mode & 0o077 == 0


def test_a_build_that_fails_is_a_failure(checkout, tools):
    put(tools / "docker", '[[ $1 == info ]] || { echo "no space" >&2; exit 17; }')
    assert check(checkout, tools).returncode == 17


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--nosuch"], "unknown argument '--nosuch'"),
        (["--work"], "--work needs a folder"),
        (["--keep"], "--keep needs --work DIR"),
    ],
)
def test_wrong_words_leave_with_2(checkout, tools, words, said):
    done = check(checkout, tools, *words)
    assert (done.returncode, said in done.stderr) == (2, True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "unknown part ''"),
        (["nosuch"], "nosuch"),
        (["system"], "have: system build, system run"),
    ],
)
def test_install_knows_its_parts(words, said):
    done = subprocess.run(
        ["bash", str(CHECKOUT / "docker/install.sh"), *words],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, said in done.stderr) == (2, True)
