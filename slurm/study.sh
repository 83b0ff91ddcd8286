#!/bin/bash
# A study as an array of jobs:   sbatch --array=0-N [options of sbatch] slurm/study.sh PLAN [flags of megamask study]
#
# Array index i trains and evaluates run i of the plan, on one GPU. `megamask study PLAN --dry-run` prints the numbers
# and how many there are. A run whose teacher is a run of the study ends with code 1 if that is not finished: submit
# its index again later. Every task writes the results and the report of what has been computed so far.
# --array=0-N%8 runs at most eight at a time.
#
# After preemption or a failed node, Slurm requeues the task. After a time limit, submit the same command again. A run
# resumes from its newest checkpoint, and what is finished is not repeated.
# Environment: that of job.sh, and MEGAMASK_ROOT as in run.sh.
#
#SBATCH --job-name=megamask-study
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.out
set -uo pipefail

ROOT=${MEGAMASK_ROOT:-${SLURM_SUBMIT_DIR:-.}}
if ! cd "$ROOT" || ! . slurm/job.sh; then
    echo "No checkout in $ROOT: call sbatch in its root, or set MEGAMASK_ROOT." >&2
    exit 2
fi
[[ -n ${SLURM_ARRAY_TASK_ID:-} ]] || die "This is a batch script of Slurm for an array: sbatch --array=0-N $0"
OUT=$(option --output "$@")
[[ -n $OUT ]] || die "\`--output\` must name the folder of the study, the same for all tasks."
[[ $OUT == /* ]] || OUT=$ROOT/$OUT
mkdir -p "$OUT" || die "The folder of the study $OUT cannot be created."
set_environment
set_container "$OUT"
say "run $SLURM_ARRAY_TASK_ID of the study in $OUT"
exec srun "${STEP[@]}" "${INSIDE[@]}" python tools/study.py "$@" --only "$SLURM_ARRAY_TASK_ID" --jobs 1
