#!/usr/bin/env bash
# All checks and tests, on a fresh clone or a warm one:
#   tools/test.sh [--fast] [pytest arguments]
#   tools/test.sh                      everything: what CI runs
#   tools/test.sh --fast               the checks and the quick unit tests
#   tools/test.sh --fast -k attention  ... those of one subject
# What needs SLURM, Prometheus, shellcheck, or a browser and the extra `examples`, is skipped, with
# the reason, where these are not installed. COCOA_TEST_PACKAGES=1 installs them first, as root on
# Debian; CI does.
# Every check runs even when an earlier one failed; the exit code is 0 only if all passed. The
# failed checks are listed before the tests, so that the closing lines of pytest come last.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

fast=0
if [[ ${1:-} == --fast ]]; then
    shift
    fast=1
elif [[ ${1:-} == -h || ${1:-} == --help ]]; then
    sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
    exit 0
fi

if [[ ${COCOA_TEST_PACKAGES:-0} == 1 && $fast -eq 0 ]]; then
    export COCOA_EXTRAS=${COCOA_EXTRAS:-dev,fast,examples}
fi
# shellcheck source=tools/setup_env.sh
. tools/setup_env.sh

# What the tests of tests/slurm, Prometheus and web pages start; a failure leaves them skipped.
install_packages() {
    local log packages=(
        slurmctld slurmd slurm-client munge iproute2 util-linux
        prometheus prometheus-alertmanager shellcheck chromium
    )
    if ((EUID)) || ! command -v apt-get >/dev/null; then
        printf 'skipped %-14s needs root and apt-get\n' packages
        return
    fi
    log=$(mktemp)
    if { timeout 300 apt-get -qq update && DEBIAN_FRONTEND=noninteractive timeout 600 \
        apt-get -qq install --no-install-recommends "${packages[@]}"; } >"$log" 2>&1 </dev/null; then
        printf 'ok      %-14s %s\n' packages "${packages[*]}"
    else
        printf 'skipped %-14s apt-get failed: %s\n' packages "$(tail -n 1 "$log")"
    fi
    rm -f -- "$log"
}

if [[ ${COCOA_TEST_PACKAGES:-0} == 1 && $fast -eq 0 ]]; then
    install_packages
fi

failed=()

check() {
    local name=$1 started=$SECONDS output
    shift
    if output=$("$@" 2>&1); then
        printf 'ok      %-14s %3d s\n' "$name" $((SECONDS - started))
    else
        printf '%s\nFAILED  %-14s %3d s   (%s)\n' "$output" "$name" $((SECONDS - started)) "$*"
        failed+=("$name")
    fi
}

check_shell() {
    local scripts=()
    if ! command -v shellcheck >/dev/null; then
        printf 'skipped %-14s not installed (apt-get install shellcheck)\n' shellcheck
        return
    fi
    mapfile -t scripts < <(
        find .ci/run tools slurm docker ops -type f \( -name '*.sh' -o -name run \) 2>/dev/null | sort
    )
    check shellcheck shellcheck --external-sources "${scripts[@]}"
}

# Debian's packages; CI installs them. tests/unit/test_alert_rules.py runs the same.
check_prometheus() {
    local folder=ops/prometheus
    if command -v promtool >/dev/null; then
        check "alert config" promtool check config "$folder/prometheus.yml"
        check "alert rules" promtool check rules "$folder/rules.yml"
        check "alert tests" promtool test rules "$folder"/rules*_test.yml
    else
        printf 'skipped %-14s not installed (apt-get install prometheus)\n' promtool
    fi
    if command -v amtool >/dev/null; then
        check amtool amtool check-config "$folder/alertmanager.yml"
    else
        printf 'skipped %-14s not installed (apt-get install prometheus-alertmanager)\n' amtool
    fi
}

check "ruff format" python -m ruff format --check .
check "ruff" python -m ruff check .
check "mypy" python -m mypy
check "import-linter" lint-imports
check_shell
check_prometheus

if ((${#failed[@]})); then
    printf '\n%d checks FAILED: %s. The tests follow.\n\n' "${#failed[@]}" "${failed[*]}"
fi

# 5, no tests, counts only if all runs say so: the pattern of somebody may be of the other half.
status=5
run_tests() {
    local code=0
    python -m pytest "$@" || code=$?
    if ((status == 5 || (status == 0 && code != 5))); then
        status=$code
    fi
}

# Files of tests side by side, as many as there are cores; then SLURM, whose tests keep time.
side_by_side=(--numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder)
if ((fast)); then
    run_tests "${side_by_side[@]}" tests/unit -m "not slow and not gpu" "$@"
elif [[ $# -gt 0 && -e ${1%%::*} ]]; then # files or folders of choice
    run_tests "$@"
else
    run_tests "${side_by_side[@]}" tests --ignore=tests/slurm "$@"
    run_tests tests/slurm "$@"
fi
if ((status == 0 && ${#failed[@]})); then
    status=1
fi
exit "$status"
