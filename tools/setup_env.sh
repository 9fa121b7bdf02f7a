#!/usr/bin/env bash
# The environment that tools/test.sh and tools/quickstart.sh share: made when it is missing or
# out of date, left alone otherwise. Source it, from any folder, to get its Python first on PATH:
#   . tools/setup_env.sh
# It promises: versions of constraints.txt; a stamp that is written last, so that an installation
# that was interrupted is taken up again; nothing outside the environment's folder is changed.
#
#   COCOA_VENV         where it lies (default: .venv at the root of the repository)
#   COCOA_TORCH_INDEX  another package index for torch, for example one with CPU or CUDA builds
#   COCOA_EXTRAS       extras of pyproject.toml (default: dev,fast)
#   COCOA_PYTHON       the Python to make it with (default: the first of python3.11, 3.12, python3)
#
# Sourced, it starts itself as a program, so that `set -e` and `exit` never reach your shell.

cocoa_setup_env() {
    local root venv
    root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd) || return 1
    venv=${COCOA_VENV:-$root/.venv}
    [[ $venv == /* ]] || venv=$PWD/$venv
    COCOA_VENV=$venv bash "$root/tools/setup_env.sh" || return 1
    export VIRTUAL_ENV=$venv
    case ":$PATH:" in
        "$venv/bin:"*) ;;
        *) export PATH="$venv/bin:$PATH" ;;
    esac
}

if [[ ${BASH_SOURCE[0]} != "$0" ]]; then
    cocoa_setup_env
    return
fi

set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
venv=${COCOA_VENV:-$root/.venv}
[[ $venv == /* ]] || venv=$PWD/$venv
extras=${COCOA_EXTRAS:-dev,fast}
torch_index=${COCOA_TORCH_INDEX:-}
stamp=$venv/cocoa_setup.stamp
log=$venv/cocoa_setup.log
torch_origin=$venv/cocoa_torch_index
torch=$(sed -n 's/^torch==/&/p' "$root/constraints.txt")
heartbeat_pid=

say() { printf 'setup: %s\n' "$*"; }

die() {
    printf 'setup: %s\n' "$@" >&2
    exit 1
}

stop_heartbeat() {
    [[ -z $heartbeat_pid ]] || kill "$heartbeat_pid" 2>/dev/null || true
    heartbeat_pid=
}
trap stop_heartbeat EXIT

wanted_state() {
    cat "$root/pyproject.toml" "$root/constraints.txt" "${BASH_SOURCE[0]}" \
        <(printf '%s\n' "$root" "$extras" "$torch_index") | sha256sum | cut -d' ' -f1
}

is_current() {
    [[ -x $venv/bin/python && -f $stamp && $(<"$stamp") == "$(wanted_state)" ]]
}

is_supported() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null
}

describe_python() {
    if ! command -v "$1" >/dev/null; then
        printf 'no %s' "$1"
    else
        { "$1" --version 2>&1 || true; } | sed -n '/./{p;q}'
    fi
}

find_python() {
    local candidate candidates=(python3.11 python3.12 python3)
    [[ -z ${COCOA_PYTHON:-} ]] || candidates=("$COCOA_PYTHON")
    for candidate in "${candidates[@]}"; do
        if command -v "$candidate" >/dev/null && is_supported "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    die "Python 3.11 or 3.12 is needed, found: $(describe_python "${candidates[-1]}")" \
        "install one (Debian 12, Ubuntu 24.04: apt-get install python3 python3-venv)" \
        "or name one: COCOA_PYTHON=/path/to/python3.11"
}

make_venv() {
    local python version clear=()
    if [[ -f $venv/bin/activate ]] && "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        is_supported "$venv/bin/python" || die \
            "$venv has $("$venv/bin/python" --version), Python 3.11 or 3.12 is needed" \
            "remove that folder, or name another one with COCOA_VENV"
        return
    fi
    if [[ ! -f $venv/pyvenv.cfg && -n $(ls -A "$venv") ]]; then
        die "$venv exists and is not a Python environment" \
            "remove it, or name another folder with COCOA_VENV"
    fi
    python=$(find_python)
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    "$python" -c 'import ensurepip, venv' 2>/dev/null || die \
        "$python ($version) cannot make environments: its venv module is not installed" \
        "on Debian and Ubuntu: apt-get install python$version-venv"
    say "making $venv with Python $version"
    # Filled up, not emptied, unless its Python is gone: it may be somebody's own.
    [[ -x $venv/bin/python ]] || clear=(--clear)
    "$python" -m venv "${clear[@]}" "$venv"
}

# Files of a package that an interrupted pip left behind: without RECORD pip takes it as installed
# and can neither use nor remove it.
forget_half_installed() {
    local info
    for info in "$venv"/lib/python3*/site-packages/*.dist-info; do
        [[ ! -d $info || -e $info/RECORD ]] || rm -rf -- "$info"
    done
}

# Packages are built in the environment itself, with its setuptools: the pinned version, and no
# downloads of their own. Byte code comes later, see check_imports.
pip_install() {
    local what=$1
    shift
    say "$what"
    (while sleep 20 >/dev/null 2>&1; do say "... still at it, $SECONDS s since the start"; done) 9>&- &
    heartbeat_pid=$!
    if ! DS_BUILD_OPS=0 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore \
        "$venv/bin/python" -m pip install --no-input --prefer-binary --no-compile \
        --progress-bar off --constraint "$root/constraints.txt" "$@" >>"$log" 2>&1; then
        stop_heartbeat
        grep -v '^WARNING' "$log" | tail -n 15 >&2 || true
        die "pip failed (above; all of it in $log)" "run the same command again to go on"
    fi
    stop_heartbeat
}

# Imports everything heavy once: proves that it loads here, and leaves byte code for the third of
# all files that is in use (20 s; compiling all takes 46 CPU seconds). Without byte code, each
# process of each test would pay those seconds, so it is written even where the caller's shell
# says PYTHONDONTWRITEBYTECODE.
check_imports() {
    PYTHONDONTWRITEBYTECODE='' "$venv/bin/python" - <<'PYTHON' >>"$log" 2>&1
import importlib
import importlib.util

for name in (
    "torch._dynamo",
    "torch.distributed.nn.functional",
    "deepspeed",
    "deepspeed.runtime.engine",
    "transformers.models.qwen2_vl.modeling_qwen2_vl",
    "peft",
    "megatron.energon",
    "pyarrow.compute",
    "matplotlib.pyplot",
    "rich.progress",
    "pydantic",
):
    importlib.import_module(name)
for extra in ("sentence_transformers", "hypothesis", "pytest"):
    if importlib.util.find_spec(extra):
        importlib.import_module(extra)
PYTHON
}

install_all() {
    local started=$SECONDS more_index=()
    [[ -n $torch ]] || die "constraints.txt has no line torch==VERSION"
    : >"$log"
    forget_half_installed
    # The same version from another index is another build, which pip would not replace.
    if [[ -f $torch_origin && $(<"$torch_origin") != "$torch_index" ]]; then
        say "replacing torch: COCOA_TORCH_INDEX changed"
        "$venv/bin/python" -m pip uninstall --yes torch >>"$log" 2>&1
    fi
    if [[ -z $torch_index ]]; then
        pip_install "1/3 $torch (200 MB for CPU; builds for CUDA are several GB)" setuptools "$torch"
    else
        # Such an index has torch, but rarely the pinned versions of what torch needs.
        pip_install "1/3 $torch from $torch_index" --no-deps --index-url "$torch_index" "$torch"
        pip_install "    setuptools" setuptools
        more_index=(--extra-index-url "$torch_index")
    fi
    printf '%s\n' "$torch_index" >"$torch_origin"
    say "    $((SECONDS - started)) s"
    started=$SECONDS
    pip_install "2/3 cocoa_dist [$extras] and what it needs (about 100 packages)" \
        --no-build-isolation --use-pep517 "${more_index[@]}" --editable "${root}[$extras]"
    say "    $((SECONDS - started)) s"
    started=$SECONDS
    say "3/3 checking that it fits together and loads"
    "$venv/bin/python" -m pip check >>"$log" 2>&1 || {
        tail -n 5 "$log" >&2
        die "the installed packages do not fit together (above)"
    }
    check_imports || {
        tail -n 5 "$log" >&2
        die "a package is installed and cannot be imported (above)"
    }
    say "    $((SECONDS - started)) s"
}

if is_current; then
    exit 0
fi
mkdir -p "$venv"
# Two commands that start together must not install into one folder at the same time.
exec 9>"$venv.lock"
if command -v flock >/dev/null && ! flock -n 9; then
    say "waiting for another setup of $venv"
    flock 9
fi
if is_current; then
    exit 0
fi
if [[ -f $log && ! -f $stamp ]]; then
    say "the last installation did not finish: going on with it"
fi
rm -f "$stamp"
make_venv
install_all
wanted_state >"$stamp.part"
mv "$stamp.part" "$stamp"
say "done in $SECONDS s: $venv"
