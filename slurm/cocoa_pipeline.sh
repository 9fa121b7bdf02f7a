#!/usr/bin/env bash
#SBATCH --job-name=cocoa
#SBATCH --nodes=1
#SBATCH --time=24:00:00
#SBATCH --output=cocoa-%j.out
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR2@180
# All stages of a recipe as one batch job, through preemption, time limits and lost nodes:
#
#   sbatch [options of sbatch] slurm/cocoa_pipeline.sh recipe=NAME run_dir=DIR [cluster=FILE] [key=value ...]
#   sbatch -N4 --gpus-per-node=8 slurm/cocoa_pipeline.sh recipe=cocoa_qwen2_vl_2b run_dir=/scratch/runs/first
#
# recipe: a name under cocoa_dist/recipes, or the path of a .yaml file. cluster: a .yaml file, or a
# name under slurm/clusters. until=STAGE ends the job after a stage. Other words change the recipe. The same command again goes on
# with a run that was stopped. One rank for each task asked for, else for each GPU.
# Environment: COCOA_VENV (default .venv of the checkout), COCOA_ROOT (the checkout, if SLURM does
# not say where this script came from).
#
# Exit codes: 0 done or stopped; 2 something to change in what was given; 93 given up; 75 to be
# queued again, where this job could not see to it itself; else how SLURM ended it. The rules of who
# queues the job again, and when, are in docs/operators.md.
set -uo pipefail

warned=0 ending=0 launcher='' requeued=0
# A trap runs as soon as `wait` lets it; until the launcher is there, it only leaves its mark.
trap 'warned=1; say "the time limit is near: the ranks save and leave"; tell USR2' USR2
trap on_term TERM

job=${SLURM_JOB_ID:-} restart=${SLURM_RESTART_COUNT:-0}

say() { printf '%(%F %T)T [%s.%s] %s\n' -1 "$job" "$restart" "$*"; }

die() {
    printf 'cocoa_pipeline: %s\n' "$@" >&2
    exit 2
}

tell() { [[ -z $launcher ]] || kill "-$1" "$launcher" 2>/dev/null; }

# SLURM ends this job: scancel, the limit itself, preemption. What follows is its decision; asking for
# a requeue now would bring a cancelled job back from the dead.
# shellcheck disable=SC2317  # called by its trap
on_term() {
    ending=1
    ((requeued)) || say "SLURM ends this job"
    tell TERM
}

job_field() {
    scontrol show job -o "$job" 2>/dev/null | sed -n "s/.* $1=\([^ ]*\).*/\1/p"
}

# SLURM runs a copy of this script: where it came from says the controller, or COCOA_ROOT.
find_checkout() {
    local script
    if [[ -z ${COCOA_ROOT:-} ]]; then
        script=$(job_field Command)
        [[ -z $script ]] || COCOA_ROOT=$(cd -- "$(dirname -- "$script")/.." 2>/dev/null && pwd)
    fi
    [[ -d ${COCOA_ROOT:-}/launcher ]] || COCOA_ROOT=${SLURM_SUBMIT_DIR:-$PWD}
    [[ -d $COCOA_ROOT/launcher ]] || die "cannot find the checkout: set COCOA_ROOT to its folder"
    export COCOA_ROOT
}

read_arguments() {
    local word
    recipe='' run_dir='' cluster='' until='' overrides=()
    for word in "$@"; do
        case $word in
            recipe=*) recipe=${word#*=} ;;
            run_dir=*) run_dir=${word#*=} ;;
            cluster=*) cluster=${word#*=} ;;
            until=*) until=${word#*=} ;;
            -*) die "unknown option '$word': options of sbatch stand before the script" ;;
            *=*) overrides+=("$word") ;;
            *) die "'$word' is not key=value" ;;
        esac
    done
    [[ -n $recipe ]] || die "recipe= is missing: recipe=NAME run_dir=DIR [cluster=FILE] [key=value ...]"
    [[ -n $run_dir ]] || die "run_dir= is missing: it holds all that the run writes"
    [[ $run_dir == /* ]] || run_dir=${SLURM_SUBMIT_DIR:-$PWD}/$run_dir
    [[ $cluster != *[/.]* && -n $cluster ]] && cluster=$COCOA_ROOT/slurm/clusters/$cluster.yaml
    [[ -z $cluster || $cluster == /* ]] || cluster=${SLURM_SUBMIT_DIR:-$PWD}/$cluster
}

# A job that was queued again runs what it ran before: code, recipe and cluster file as they were.
choose_code() {
    local kept=$run_dir/submit/$job venv=${COCOA_VENV:-}
    code=${COCOA_CODE:-$COCOA_ROOT}
    [[ ! -s $kept.code ]] || code=$(<"$kept.code")
    [[ ! -s $kept.cluster.yaml ]] || cluster=$kept.cluster.yaml
    if [[ -s $kept.code && -s $run_dir/resolved.yaml ]]; then
        recipe=$run_dir/resolved.yaml overrides=()
    fi
    if [[ -z $venv && -n $cluster && -r $cluster ]]; then
        venv=$(sed -n 's/^venv: *\([^ #]*\).*/\1/p' "$cluster")
    fi
    python=${venv:-$COCOA_ROOT/.venv}/bin/python
    [[ -x $python ]] || die "$python is not there: run tools/setup_env.sh, or set COCOA_VENV"
    export PYTHONPATH=$code PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 COCOA_BATCH_SCRIPT=$0
}

# With plain sbatch SLURM keeps this script alone; other code is copied when the job starts for the
# first time. What was edited while it waited in the queue is named.
name_edits() {
    local submitted edited
    [[ -z ${COCOA_CODE:-} && ! -s $run_dir/submit/$job.code ]] || return 0
    submitted=$(job_field SubmitTime)
    [[ -n $submitted ]] || return 0
    edited=$(cd -- "$COCOA_ROOT" && find slurm launcher cocoa_dist ds_configs \
        -name __pycache__ -prune -o -type f -newermt "$submitted 1 second" -print 2>/dev/null | head -n 3)
    [[ -z $edited ]] || say "changed since this job was submitted: ${edited//$'\n'/, } (this" \
        "script runs as it was, the rest as it is now)"
}

# Start the launcher and wait for it; a trapped signal ends `wait` as well.
run_launcher() {
    "$python" -m launcher run "$recipe" ${overrides[@]+"${overrides[@]}"} --run-dir "$run_dir" \
        --backend slurm ${cluster:+--cluster "$cluster"} ${until:+--until "$until"} &
    launcher=$!
    ((warned == 0)) || tell USR2
    while kill -0 "$launcher" 2>/dev/null; do wait "$launcher"; done
    wait "$launcher"
    status=$?
    launcher=''
}

# Run a command that SIGTERM does not end.
deaf() { (trap '' TERM && exec "$@"); }

# In an array the id must be ARRAY_TASK, or every task would be queued again.
requeue() {
    local id=$job state exclude tries=0
    [[ -z ${SLURM_ARRAY_JOB_ID:-} ]] || id=${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}
    if ! command -v scontrol >/dev/null; then
        say "no scontrol here: leaving with 75, for RequeueExit in slurm.conf"
        exit 75
    fi
    state=$(job_field JobState)
    if ((ending)) || [[ -n $state && $state != RUNNING ]]; then
        say "not queued again: SLURM ends this job (${state:-state unknown})"
        exit 143
    fi
    requeued=1
    # The requeue's own SIGTERM reaches every process of this job, and may be faster than its answer.
    if ! deaf scontrol requeue "$id" && ((ending == 0)); then
        say "SLURM refused to queue the job again"
        exit 75
    fi
    say "queued again"
    if [[ -s $run_dir/submit/$job.exclude ]]; then
        exclude=$(<"$run_dir/submit/$job.exclude")
        until deaf scontrol update "JobId=$id" "ExcNodeList=$exclude" || ((++tries > 20)); do sleep 0.2; done
        say "without $exclude"
    fi
    # Leaving before SLURM takes the job down would end it as COMPLETED: wait for its SIGTERM.
    while ((ending == 0)); do
        sleep 600 >/dev/null 2>&1 &
        wait $!
        kill $! 2>/dev/null
    done
    exit 0
}

[[ -n $job ]] || die "this is a batch script: sbatch ${BASH_SOURCE[0]} recipe=NAME run_dir=DIR"
find_checkout
read_arguments "$@"
choose_code
say "on ${SLURM_JOB_NODELIST:-?}, code $code"
name_edits
for attempt in 1 2 3; do
    ((warned == 0)) || requeue
    run_launcher
    case $status in
        0 | 2 | 93) exit "$status" ;;
        75) requeue ;;
        76) exit 0 ;;
    esac
    # Before its handlers stand, the launcher dies of the signal itself.
    ((status != 138 || warned == 0)) || requeue
    ((ending == 0)) || exit "$status"
    say "the launcher failed with $status ($attempt of 3)"
done
exit "$status"
