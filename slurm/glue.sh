#!/bin/bash
# Every task with every seed, for one model:   sbatch [options of sbatch] slurm/glue.sh [flags of megamask evaluate]
#
# Array index i runs task i / seeds of MEGAMASK_TASKS with seed i % seeds of MEGAMASK_SEEDS, on one GPU, with the same
# flags. --array=0-44%8 runs at most eight at a time, --array=7,12 repeats only these two. All write into one output
# folder, and a result that is there is not computed again. The same flags with all tasks and --seeds 5 print the table.
# Environment: that of job.sh, MEGAMASK_ROOT as in run.sh, and
#   MEGAMASK_TASKS  cola sst2 mrpc stsb qqp mnli qnli rte wnli
#   MEGAMASK_SEEDS  1 2 3 4 5
#
#SBATCH --job-name=megamask-glue
#SBATCH --array=0-44
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.out
set -uo pipefail

ROOT=${MEGAMASK_ROOT:-${SLURM_SUBMIT_DIR:-.}}
if ! cd "$ROOT" || ! . slurm/job.sh; then
    echo "No checkout in $ROOT: call sbatch in its root, or set MEGAMASK_ROOT." >&2
    exit 2
fi
[[ -n ${SLURM_ARRAY_TASK_ID:-} ]] || die "This is a batch script of Slurm for an array: sbatch $0"
read -ra TASKS <<<"${MEGAMASK_TASKS:-cola sst2 mrpc stsb qqp mnli qnli rte wnli}"
read -ra SEEDS <<<"${MEGAMASK_SEEDS:-1 2 3 4 5}"
COUNT=$((${#TASKS[@]} * ${#SEEDS[@]}))
((SLURM_ARRAY_TASK_ID < COUNT)) || die "\`--array\` must lie in 0-$((COUNT - 1)), ${#TASKS[@]} tasks with" \
    "${#SEEDS[@]} seeds, but is $SLURM_ARRAY_TASK_ID."
TASK=${TASKS[SLURM_ARRAY_TASK_ID / ${#SEEDS[@]}]} SEED=${SEEDS[SLURM_ARRAY_TASK_ID % ${#SEEDS[@]}]}
OUT=$(option --output "$@")
OUT=${OUT:-$ROOT}
[[ $OUT == /* ]] || OUT=$ROOT/$OUT
set_environment
set_container "$OUT"
say "$TASK with seed $SEED"
exec srun "${STEP[@]}" "${INSIDE[@]}" python tools/evaluate.py --tasks "$TASK" --first-seed "$SEED" "$@"
