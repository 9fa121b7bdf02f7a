#!/usr/bin/env bash
# From a fresh clone to a trained, evaluated and exported embedding model, on a CPU:
#   tools/quickstart.sh
# Trains the three CoCoA stages on real pictures, then a contrastive-only control with the same
# compute from the same backbone, compares both on held-out pictures and writes a report.
# Run it again after an interruption and it goes on; run it again after the end and it shows the
# results. Runs lie in runs/ at the root of the repository; COCOA_RUNS names another folder.
set -euo pipefail

caller_dir=$PWD
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
runs=${COCOA_RUNS:-runs}
[[ -z ${COCOA_RUNS:-} || $runs == /* ]] || runs=$caller_dir/$runs
main_run=$runs/quickstart
control_run=$runs/quickstart_contrastive
page=$main_run/report/index.html
timings=()

heading() { printf '\n== %s\n' "$*"; }

finish_part() { timings+=("$(printf '%-28s %5d s' "$1" $((SECONDS - $2)))"); }

is_done() {
    local state
    state=$(python -m launcher status "$1" --json 2>/dev/null \
        | python -c 'import json, sys; print(json.load(sys.stdin)["state"])' 2>/dev/null) || return 1
    [[ $state == "done" ]]
}

# The launcher saves and leaves when it gets a signal. Ctrl-C reaches it by itself; a signal to
# this script alone is passed on. (Bash runs traps only between commands, hence the loop.)
launch() {
    local run_dir=$1 pid status
    shift
    python -m launcher run "$@" --run-dir "$run_dir" &
    pid=$!
    trap 'kill -TERM "$pid" 2>/dev/null || true' TERM HUP
    trap : INT
    while :; do
        status=0
        wait "$pid" || status=$?
        kill -0 "$pid" 2>/dev/null || break
    done
    trap - TERM HUP INT
    if ((status)); then
        printf '\n%s ended with code %d. Logs: %s/logs\n' "$run_dir" "$status" "$run_dir" >&2
        if ((status != 2)); then # 2: something to change first, said above
            printf 'The same command goes on where it stopped.\n' >&2
        fi
        exit "$status"
    fi
    if ! is_done "$run_dir"; then
        printf '\n%s is not finished; look at it with: python -m launcher status %s\n' \
            "$run_dir" "$run_dir" >&2
        exit 1
    fi
}

started=$SECONDS
# shellcheck source=tools/setup_env.sh
. tools/setup_env.sh
finish_part "environment" "$started"
mkdir -p "$runs"

if is_done "$main_run" && is_done "$control_run"; then
    heading "Both runs are done; to train anew, move $main_run and $control_run away"
else
    heading "1/3 CoCoA: reconstruction, bridged reconstruction, contrastive  ($main_run)"
    started=$SECONDS
    launch "$main_run" quickstart
    finish_part "training, three stages" "$started"

    heading "2/3 The control: contrastive only, same compute  ($control_run)"
    started=$SECONDS
    equal_steps=$(python tools/equal_compute.py "$main_run" quickstart_contrastive)
    launch "$control_run" quickstart_contrastive "$equal_steps"
    finish_part "training, control" "$started"
fi

heading "3/3 Evaluation, export, report"
started=$SECONDS
python -m cocoa_dist.report "$main_run" --control "$control_run"
finish_part "evaluation, export, report" "$started"

printf '\nThe page with pictures:  %s\n' "$page"
for model in "$main_run"/export/*/; do
    if [[ -d $model ]]; then
        printf 'The exported model:      %s  (its README.md says how to use it)\n' "$model"
    fi
done
printf 'How the run went:        python -m launcher status %s\n\n' "$main_run"
printf '%s\n' "${timings[@]}" "$(printf '%-28s %5d s' "in all" "$SECONDS")"
