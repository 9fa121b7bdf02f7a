#!/usr/bin/env bash
# The one list of what goes into the image; the Dockerfile calls its parts, and so can anybody on a
# bare Debian 12 or Ubuntu 24.04:
#   install.sh system build|run   packages of the distribution, for making the environment or using it
#   install.sh python             the environment /opt/venv, by tools/setup_env.sh: the versions of
#                                 constraints.txt; COCOA_EXTRAS and COCOA_TORCH_INDEX as there
#   install.sh user               cocoa (10001), who owns nothing but /runs
#   install.sh check [FOLDER]     does it work? Imports, a plan, two ranks of `debug` in FOLDER
# Not in here: the driver and its tools (the host's), fabrics with a stack of their own such as
# EFA (its libfabric and NCCL plugin go on top of this image, or are mounted), SLURM's commands.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
venv=/opt/venv
user_id=10001

# python3-venv makes the environment. No compiler: every pinned package is a wheel or pure Python.
build_packages=(ca-certificates python3 python3-venv)
# libibverbs and its providers: NCCL loads them for InfiniBand and RoCE, and falls back to sockets
# without a word where they are missing. gcc and headers: Triton compiles its launchers on a GPU.
run_packages=(ca-certificates gcc ibverbs-providers libc6-dev libibverbs1 python3 python3-dev tini)

say() { printf 'install: %s\n' "$*"; }

die() {
    printf 'install: %s\n' "$@" >&2
    exit 2
}

install_system() {
    local packages
    case ${1:-} in
        build) packages=("${build_packages[@]}") ;;
        run) packages=("${run_packages[@]}") ;;
        *) die "unknown part 'system ${1:-}' (have: system build, system run)" ;;
    esac
    command -v apt-get >/dev/null || die "no apt-get here: the base has to be Debian or Ubuntu"
    export DEBIAN_FRONTEND=noninteractive
    apt-get -qq update
    apt-get -qq install --yes --no-install-recommends "${packages[@]}" >/dev/null
    rm -rf /var/lib/apt/lists/* /var/cache/apt/archives/*.deb
    say "system $1: ${packages[*]}"
}

install_python() {
    COCOA_VENV=$venv COCOA_EXTRAS=${COCOA_EXTRAS:-fast} bash "$root/tools/setup_env.sh"
}

make_user() {
    getent passwd "$user_id" >/dev/null || {
        groupadd --gid "$user_id" cocoa
        useradd --uid "$user_id" --gid "$user_id" --no-create-home --shell /usr/sbin/nologin cocoa
    }
    install -d -o "$user_id" -g "$user_id" /runs
}

check_image() {
    local folder=${1:-/runs/check}
    [[ $(id -u) != 0 ]] || say "note: this is root; the image itself runs as $user_id"
    cd /
    python -c 'import cocoa_dist.train.build, launcher, torch; print("torch", torch.__version__)'
    python -m launcher plan cocoa_qwen2_vl_2b --gpus 8 --gpu h200 >/dev/null
    tini -s -- python -m launcher --help >/dev/null # what the image starts
    say "imports, launcher plan, tini: ok"
    python -m launcher run debug stages.joint_reconstruction.steps=3 \
        --until joint_reconstruction --nproc 2 --run-dir "$folder"
    [[ -s $folder/checkpoints/joint_reconstruction/step_00000003/manifest.json ]] ||
        die "no checkpoint at step 3 in $folder"
    COCOA_RUN_DIR=$folder "$root/docker/health.sh"
    say "two ranks, three steps, a checkpoint, a health check: ok"
}

case ${1:-} in
    system) install_system "${2:-}" ;;
    python) install_python ;;
    user) make_user ;;
    check) check_image "${2:-}" ;;
    *) die "unknown part '${1:-}' (have: system, python, user, check)" ;;
esac
