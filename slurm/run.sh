#!/bin/bash
# Pretraining as an unattended Slurm job:   sbatch [options of sbatch] slurm/run.sh [flags of megamask pretrain]
#
# srun starts one process per GPU. Near the time limit, at preemption and at `scancel --batch --signal=USR1` the run is
# saved and the job requeued. If a node fails, Slurm requeues the job; if a rank fails, this script does. A job
# continues as long as it makes progress, and ends after MEGAMASK_RETRIES launches in a row without a new checkpoint.
#
# The run folder is --output, or runs/<name>-<job>, and stays the same over restarts. In flags, %a is the index of the
# array task and %j the number of the job. docs/cluster.md explains the rest.
#
#SBATCH --job-name=megamask
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8     # as many as there are GPUs
#SBATCH --gpus-per-node=8       # not --gpus-per-task, which hides the other GPUs of a node from a rank
#SBATCH --cpus-per-task=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300     # to this shell, seconds before the limit; Slurm may be a minute early
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out      # without a folder: if it were missing, the job would fail silently
#
# Environment, all optional, beside that of job.sh:
#   MEGAMASK_ROOT     the checkout, if sbatch runs elsewhere
#   MEGAMASK_SPARES   how many nodes of the job are spares for nodes that fail the check (0)
#   MEGAMASK_CHECK    shell command that each node must pass before ranks start; "none": no check
#   MEGAMASK_DOCTOR   1: before the first launch, `megamask doctor` checks the run; if it finds an error, no rank starts
#   MEGAMASK_RETRIES  launches in a row without a new checkpoint until the job gives up (5)
# shellcheck disable=SC2317 # traps call functions
set -uo pipefail

# Set the traps first: preemption may send a signal in the first second, which would end this shell.
CAUGHT='' SIGNALLED='' SRUN='' REMINDER=''
on_usr1() {
    CAUGHT=1 SIGNALLED=USR1
    say "got USR1: asking the ranks to save and stop"
    remind
}
on_term() { CAUGHT=1 SIGNALLED=TERM; } # Slurm signals the ranks; a TERM to srun would kill them before they save
trap on_usr1 USR1
trap on_term TERM

# Sends USR1 to every rank through srun, repeatedly, because a rank that still imports torch ignores it.
remind() {
    [[ -n $SRUN && -z $REMINDER ]] || return 0
    (while kill -USR1 "$SRUN" 2>/dev/null; do sleep 2; done) &
    REMINDER=$!
}

# Prints the step of the newest checkpoint, or -1.
newest() {
    local step newest=-1
    for step in "$OUT"/checkpoints/step-*; do
        step=${step##*/step-}
        [[ $step =~ ^[0-9]+$ ]] && ((step > newest)) && newest=$step
    done
    echo "$newest"
}

commas() {
    local IFS=,
    echo "$*"
}

# Sets GOOD, the nodes to train on. A spare node replaces a node that fails the check; without spares the job moves.
choose_nodes() {
    local hosts bad=() node
    mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    WANT=$((${#hosts[@]} - ${MEGAMASK_SPARES:-0}))
    ((WANT > 0)) || die "\`MEGAMASK_SPARES\` must be below the number of nodes (${#hosts[@]}), but is $MEGAMASK_SPARES."
    GOOD=("${hosts[@]}")
    if [[ $CHECK != none ]]; then
        check_nodes "${#hosts[@]}" >"$LOGS/check.log"
        GOOD=()
        for node in "${hosts[@]}"; do
            if grep -qx "$node passed" "$LOGS/check.log"; then GOOD+=("$node"); else bad+=("$node"); fi
        done
        ((${#bad[@]} == 0)) || say "failed the check: ${bad[*]} ($LOGS/check.log)"
    fi
    ((${#GOOD[@]} >= WANT)) || go_without "${bad[@]}"
    GOOD=("${GOOD[@]:0:WANT}")
}

# Checks what ranks need: the shared folders, a folder for temporary files, GPUs that respond.
# shellcheck disable=SC2016 # the node expands it
CHECK=${MEGAMASK_CHECK:-'test -r megamask/pretrain.py && test -w "$OUT" && df -P "${TMPDIR:-/tmp}" &&
    { ! command -v nvidia-smi || nvidia-smi -L; }'}
check_nodes() {
    # two time limits, since a process that hangs in a driver cannot be killed. srun returns the result: a file that one
    # node writes may appear on another much later
    # shellcheck disable=SC2016
    OUT=$OUT timeout 300 srun --nodes="$1" --ntasks="$1" --ntasks-per-node=1 --kill-on-bad-exit=0 --wait=0 bash -c \
        'timeout 120 bash -c "$0" 2>&1 && echo "$SLURMD_NODENAME passed" || echo "$SLURMD_NODENAME failed"' "$CHECK"
}

# Requeues the job without the nodes $@. They can be excluded only while the job waits, hence the hold.
go_without() {
    local without
    without=$(scontrol -o show job "$JOB" | sed -n 's/.* ExcNodeList=\([^( ][^ ]*\).*/\1/p')
    without=$(commas "$@" ${without:+"$without"})
    count_failure || die "Too few nodes passed the check. Submit again with --exclude=$without."
    say "requeueing job $JOB without $without"
    trap '' TERM # a requeue ends this script
    scontrol requeuehold "$JOB" || die "The job cannot be requeued. Submit it again with --exclude=$without."
    scontrol update "JobId=$JOB" "ExcNodeList=$without"
    scontrol release "$JOB"
    exit 0
}

# The address of rank 0. The name of a node need not resolve, and each restart uses another port.
set_master() {
    MASTER_ADDR=${GOOD[0]}
    getent hosts "$MASTER_ADDR" >/dev/null ||
        MASTER_ADDR=$(scontrol -o show node "${GOOD[0]}" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
    MASTER_PORT=${MASTER_PORT:-$((12000 + (SLURM_JOB_ID + 1009 * RESTART) % 20000))}
    export MASTER_ADDR MASTER_PORT
}

# Predicts memory and time of the run, and ends the job if the doctor finds an error.
examine() {
    local ranks=$((WANT * ${SLURM_NTASKS_PER_NODE:-1})) gpus=()
    [[ -z ${SLURM_GPUS_ON_NODE:-} ]] || gpus=(--gpus "$ranks" --nodes "$WANT")
    # the doctor is a single process that plans for all ranks, and asks the nodes of the run, not the spare ones
    srun --nodes=1 --ntasks=1 --nodelist="${GOOD[0]}" "${STEP[@]}" "${INSIDE[@]}" \
        env RANK=0 WORLD_SIZE="$ranks" SLURM_JOB_NODELIST="$(commas "${GOOD[@]}")" SLURM_JOB_NUM_NODES="$WANT" \
        python -m megamask doctor "$@" "${gpus[@]}" >"$LOGS/doctor.log" 2>&1
    CODE=$?
    cat "$LOGS/doctor.log"
    ((CODE != 2)) || exit 2
}

# Runs the ranks until they exit, and sets CODE to the exit code of the run.
train() {
    local tasks=${SLURM_NTASKS_PER_NODE:-1}
    ((${SLURM_GPUS_ON_NODE:-$tasks} >= tasks)) ||
        die "\`--ntasks-per-node\` must be the number of GPUs of a node ($SLURM_GPUS_ON_NODE), but is $tasks."
    # Python starts with USR1 ignored: before it sets its handler, the signal would kill it
    # shellcheck disable=SC2016
    srun --nodes="$WANT" --ntasks=$((WANT * tasks)) --ntasks-per-node="$tasks" \
        --nodelist="$(commas "${GOOD[@]}")" --kill-on-bad-exit=1 --wait=60 --output="$LOGS/%N-rank%t.log" "${STEP[@]}" \
        "${INSIDE[@]}" bash -c 'trap "" USR1; exec "$@"' rank python megamask/pretrain.py "$@" 2>"$LOGS/srun.log" &
    SRUN=$!
    [[ $SIGNALLED != USR1 ]] || remind
    # wait also returns at a signal
    while
        CAUGHT=''
        wait "$SRUN"
        CODE=$?
        [[ -n $CAUGHT ]]
    do :; done
    [[ -z $REMINDER ]] || kill "$REMINDER" 2>/dev/null
    cat "$LOGS/srun.log"
    # srun returns the largest code. It kills all ranks after the first failure, whose code is the cause
    CODE=$(sed -n 's/.*xited with exit code \([0-9]*\)$/\1/p' "$LOGS/srun.log" | head -n 1 | grep . || echo "$CODE")
}

# Counts a launch without progress; succeeds if another one is allowed.
count_failure() {
    local failures
    failures=$(($(cat "$OUT/failures" 2>/dev/null || echo 0) + 1))
    echo "$failures" >"$OUT/failures"
    say "launch $failures in a row without a new checkpoint, of ${MEGAMASK_RETRIES:-5}"
    ((failures < ${MEGAMASK_RETRIES:-5}))
}

# Ends this script: the run is finished or given up, or Slurm or this script requeues the job. $1 is the first step.
go_on() {
    local before=$1 after
    after=$(newest)
    say "ranks ended with $CODE${SIGNALLED:+ after $SIGNALLED}, newest checkpoint $after"
    if [[ $CODE == 0 ]]; then
        touch "$OUT/finished"
        say "finished: $OUT"
        exit 0
    fi
    [[ $SIGNALLED != TERM ]] || exit "$CODE" # scancel, or Slurm requeues the job itself
    if [[ $CODE != 75 ]]; then
        say "last lines of the ranks:"
        tail -q -n 3 "$LOGS"/*-rank*.log 2>/dev/null
        # before the first checkpoint a user must fix a wrong flag or missing data; later a node has lost its disks
        if ((after < 0 && (CODE == 2 || CODE == 3))); then exit "$CODE"; fi
    fi
    if ((after > before)); then rm -f "$OUT/failures"; else count_failure || exit "$CODE"; fi
    say "requeueing job $JOB"
    trap '' TERM # a requeue ends this script
    scontrol requeue "$JOB" || die "The job cannot be requeued. Submit it again with --output $OUT: the run resumes."
    exit 0
}

# ---- the job, top to bottom

ROOT=${MEGAMASK_ROOT:-${SLURM_SUBMIT_DIR:-.}} # $0 is a copy in the node's spool
if ! cd "$ROOT" || ! . slurm/job.sh; then
    echo "No checkout in $ROOT: call sbatch in its root, or set MEGAMASK_ROOT." >&2
    exit 2
fi
[[ -n ${SLURM_JOB_ID:-} ]] || die "This is a batch script of Slurm: sbatch $0"
check_name "$SLURM_JOB_NAME"
RESTART=${SLURM_RESTART_COUNT:-0}
# for scontrol, the plain number of the first array task means all tasks
JOB=$SLURM_JOB_ID
[[ -z ${SLURM_ARRAY_JOB_ID:-} ]] || JOB=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
set -- "${@//%a/${SLURM_ARRAY_TASK_ID:-%a}}"
set -- "${@//%j/$JOB}"
OUT=$(option --output "$@")
if [[ -z $OUT ]]; then
    OUT=$ROOT/runs/$SLURM_JOB_NAME-$JOB
    set -- "$@" --output "$OUT"
fi
[[ $OUT == /* ]] || OUT=$ROOT/$OUT
LOGS=$OUT/logs/$JOB.$RESTART
mkdir -p "$LOGS" || die "The run folder $OUT cannot be created."
if [[ -e $OUT/finished ]]; then
    say "nothing to do: the run is finished; to continue anyway, delete $OUT/finished"
    exit 0
fi
set_environment
set_container "$OUT"
choose_nodes
set_master
env | grep -E '^(SLURM|SRUN|NCCL|GLOO|CUDA|MASTER|OMP|MEGAMASK|LD_LIBRARY_PATH|PATH)' | sort >"$LOGS/environment.txt"
say "job $JOB, restart $RESTART, on ${GOOD[*]}, $MASTER_ADDR:$MASTER_PORT; logs in $LOGS"
BEFORE=$(newest) CODE=75 # the code of a run that was stopped and can resume
[[ ${MEGAMASK_DOCTOR:-0} != 1 || $BEFORE -ge 0 || -n $SIGNALLED ]] || examine "$@"
[[ -n $SIGNALLED ]] || train "$@"
go_on "$BEFORE"
