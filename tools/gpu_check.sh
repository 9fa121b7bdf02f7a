#!/usr/bin/env bash
# The GPU tests, the attention bench and the bench of steps, in one command within ten minutes:
#   tools/gpu_check.sh [--wheels DIR] [--out DIR] [--seconds N]
#   tools/gpu_check.sh --prepare [--with-flash-attn-4] [--wheels DIR]
#
# For a machine with a CUDA build of torch (2.10 or newer) and no network. Makes an environment on
# top of the Python that holds torch, adds to it what is missing out of the wheels, runs
# `pytest -m gpu tests/gpu` and tools/bench_attention.py, and writes gpu_CARD.md and gpu_CARD.json.
# Where that Python has all that trains (deepspeed, transformers, megatron-energon and the rest of
# the package's needs) tools/bench_step.py follows: a 2B model with random weights, packs of 8k and
# 16k tokens, into gpu_CARD_step.md and .json. That part has never been run: no GPU was at hand.
# Without a CUDA device it says what it found, measures nothing and exits with 0: SKIPPED.
#
#   --prepare            with a network: download the wheels to carry there, and print their sizes
#   --with-flash-attn-4  also those of flash-attn-4 for CUDA 13: about 100 MiB more
#   --wheels DIR         where wheels lie (default dist/wheels)
#   --out DIR            where the report goes (default benchmarks)
#   --seconds N          all of it ends after so long (default 570)
#
#   COCOA_GPU_PYTHON     the Python that holds torch (default: python3)
#   COCOA_WHEEL_PYTHON   version of Python that --prepare downloads for (default: 3.12)
set -euo pipefail

caller_dir=$PWD
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
wheels=dist/wheels
out=benchmarks
seconds=570
mode=check
with_flash=0
scratch=

say() { printf 'gpu_check: %s\n' "$*"; }

die() {
    printf 'gpu_check: %s\n' "$@" >&2
    exit 2
}

absolute() { if [[ $1 == /* ]]; then printf '%s' "$1"; else printf '%s/%s' "$caller_dir" "$1"; fi; }

clean_up() { [[ -z $scratch ]] || rm -rf -- "$scratch"; }
trap clean_up EXIT

read_arguments() {
    while (($#)); do
        case $1 in
            --prepare) mode=prepare ;;
            --with-flash-attn-4) with_flash=1 ;;
            --wheels | --out | --seconds)
                (($# > 1)) || die "$1 needs a value (see --help)"
                case $1 in
                    --wheels) wheels=$(absolute "$2") ;;
                    --out) out=$(absolute "$2") ;;
                    --seconds) seconds=$2 ;;
                esac
                shift
                ;;
            -h | --help)
                sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
                exit 0
                ;;
            *) die "unknown argument '$1' (see --help)" ;;
        esac
        shift
    done
    if [[ ! $seconds =~ ^[0-9]+$ ]] || ((seconds < 60)); then
        die "--seconds $seconds: expected a whole number of at least 60"
    fi
}

# --- with a network: what has to be carried ---------------------------------------------------

download() {
    "$python" -m pip download --quiet --disable-pip-version-check --only-binary=:all: \
        --python-version "${COCOA_WHEEL_PYTHON:-3.12}" --implementation cp \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
        --platform manylinux2014_x86_64 --dest "$wheels" "$@" >"$scratch/pip.log" 2>&1 \
        || die "pip could not download $*:" "$(tail -n 5 "$scratch/pip.log")"
}

prepare() {
    python=.venv/bin/python
    [[ -x $python ]] || python=python3
    scratch=$(mktemp -d)
    mkdir -p -- "$wheels"
    say "downloading wheels for Python ${COCOA_WHEEL_PYTHON:-3.12} into $wheels"
    download pytest hypothesis rich
    if ((with_flash)); then
        download --no-deps --pre flash-attn-4 nvidia-cutlass-dsl nvidia-cutlass-dsl-libs-base \
            nvidia-cutlass-dsl-libs-core nvidia-cutlass-dsl-libs-cu13 quack-kernels \
            apache-tvm-ffi torch-c-dlpack-ext
    fi
    du -h --apparent-size -- "$wheels"/*.whl | sort -rh | sed "s|$wheels/|  |"
    say "$(du -ch --apparent-size -- "$wheels"/*.whl | sed -n '$s/\t.*//p') in all, to carry to" \
        "the machine with the GPU together with the checkout"
}

# --- on the machine with the GPU ------------------------------------------------------------------

# Prints `NAME|torch and CUDA versions`; NAME is empty where torch sees no device.
probe_torch() {
    "$python" - 2>/dev/null <<'PYTHON'
import torch

name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
print(f"{name}|torch {torch.__version__}, built for {built}")
PYTHON
}

skip() {
    local driver='no nvidia-smi'
    if command -v nvidia-smi >/dev/null; then
        driver="nvidia-smi: $(nvidia-smi -L 2>&1 | sed -n '1p' || true)"
    fi
    say "looked for a CUDA device with torch of $python, and with nvidia-smi"
    say "found $1; $driver"
    say "nothing was tested and nothing was measured; no file was written"
    say "SKIPPED (no CUDA device)"
    exit 0
}

# An environment of its own, so that nothing of the machine is changed. The Python that holds torch
# may itself be a virtual environment, whose packages --system-site-packages does not reach.
make_environment() {
    "$python" -m venv --without-pip --system-site-packages "$scratch/env"
    "$python" -c 'import site; print("\n".join(site.getsitepackages()))' \
        >"$("$scratch/env/bin/python" -c 'import site; print(site.getsitepackages()[0])')/base.pth"
    local missing=() name
    for name in pytest hypothesis rich; do
        "$scratch/env/bin/python" -c "import $name" 2>/dev/null || missing+=("$name")
    done
    if ((${#missing[@]})); then
        [[ -d $wheels ]] || die "$python has no ${missing[*]}, and there is no folder $wheels:" \
            "run tools/gpu_check.sh --prepare where there is a network, and carry it here"
        install --find-links "$wheels" "${missing[@]}"
    fi
    local flash=() part wheel
    for part in flash_attn_4 nvidia_cutlass_dsl quack_kernels apache_tvm_ffi torch_c_dlpack_ext; do
        for wheel in "$wheels/$part"*.whl; do
            [[ ! -f $wheel ]] || flash+=("$wheel")
        done
    done
    ((!${#flash[@]})) || install --no-deps "${flash[@]}"
    python=$scratch/env/bin/python
}

install() {
    "$scratch/env/bin/python" -m pip install --quiet --disable-pip-version-check --no-index "$@" \
        >"$scratch/pip.log" 2>&1 \
        || die "pip could not install ${*##*/} from $wheels:" "$(tail -n 5 "$scratch/pip.log")"
}

# What the bench of steps imports, beyond what the tests and the other bench need.
can_train() {
    "$python" -c 'import deepspeed, transformers, peft, pyarrow, pydantic, megatron.energon' \
        2>"$scratch/trains.log"
}

# A third of the time is kept for it where it can run.
bench_steps() {
    if ! can_train; then
        printf 'SKIPPED (%s)\n' "$(tail -n 1 "$scratch/trains.log")"
    elif timeout "$(left)" "$python" tools/bench_step.py --device cuda --steps 5 --repeats 1 \
        --out "$1" >"$scratch/steps.log" 2>&1; then
        printf '%s.md\n' "$1"
    else
        printf 'FAILED: %s\n' "$(tail -n 1 "$scratch/steps.log")"
    fi
}

# At least 10: `timeout 0` would be no limit at all.
left() { printf '%d' $((seconds - SECONDS > 10 ? seconds - SECONDS : 10)); }

check() {
    local found card name tests=0 bench=0 summary spare=60 steps
    python=${COCOA_GPU_PYTHON:-python3}
    command -v "$python" >/dev/null || skip "no $python"
    found=$(probe_torch) || skip "no torch in $python"
    name=${found%%|*}
    [[ -n $name ]] || skip "${found#*|}"
    say "$name, ${found#*|}"
    mkdir -p -- "$out"
    scratch=$(mktemp -d)
    make_environment

    # This torch is not the one that the project pins: what it warns of is no fault of ours.
    timeout $(($(left) * 2 / 5)) "$python" -m pytest -m gpu tests/gpu -q -W default \
        -p no:cacheprovider -p no:benchmark 2>&1 | tee "$scratch/tests.log" || tests=$?
    summary=$(tail -n 1 "$scratch/tests.log" | tr -d '=')
    ((tests != 124)) || summary="stopped after $((seconds * 2 / 5)) s: $summary"

    card=$(tr '[:upper:]' '[:lower:]' <<<"${name#NVIDIA }" | tr -cs 'a-z0-9\n' '_')
    ! can_train || spare=$((seconds / 3))
    timeout "$(left)" "$python" tools/bench_attention.py --device cuda --repeats 5 \
        --seconds $(($(left) > 2 * spare ? $(left) - spare : $(left) / 2)) --out "$out/gpu_${card%_}" \
        --note "pytest -m gpu tests/gpu: $summary" >"$scratch/bench.log" || bench=$?
    grep -E '^(PASS|FAIL|FAULT|NOT MEASURED)' "$scratch/bench.log" || true

    steps=$(bench_steps "$out/gpu_${card%_}_step")

    local report=$out/gpu_${card%_}.md
    [[ -f $report ]] || report="none: the bench ended with exit code $bench"
    printf '\n'
    printf '%-8s %s\n' card "$name" torch "${found#*|}" tests "$summary" \
        claims "$(sed -n 's/^Claims: //p' "$scratch/bench.log")" report "$report" \
        steps "$steps" took "$SECONDS s"
    [[ $steps != FAILED* ]] || bench=1
    ((tests == 0 && bench == 0)) || exit 1
}

read_arguments "$@"
"$mode"
