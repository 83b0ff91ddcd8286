#!/bin/bash
# Prepare text on a CPU node:   sbatch [options of sbatch] slurm/prepare.sh [flags of megamask prepare]
#
# After a time limit, submit the same command again: it resumes. Download Hugging Face data sets first, where there is a
# network (docs/cluster.md). Environment: that of job.sh, and MEGAMASK_ROOT as in run.sh.
#
#SBATCH --job-name=megamask-prepare
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -uo pipefail

ROOT=${MEGAMASK_ROOT:-${SLURM_SUBMIT_DIR:-.}}
if ! cd "$ROOT" || ! . slurm/job.sh; then
    echo "No checkout in $ROOT: call sbatch in its root, or set MEGAMASK_ROOT." >&2
    exit 2
fi
[[ -n ${SLURM_JOB_ID:-} ]] || die "This is a batch script of Slurm: sbatch $0"
OUT=$(option --output "$@")
[[ -n $OUT ]] || die "\`--output\` must name the folder of the shards."
[[ $OUT == /* ]] || OUT=$ROOT/$OUT
[[ -n $(option --workers "$@") ]] || set -- "$@" --workers "${SLURM_CPUS_PER_TASK:-1}"
mkdir -p "$(dirname "$OUT")" || die "The parent folder of $OUT cannot be created."
set_environment
set_container "$(dirname "$OUT")"
exec srun "${STEP[@]}" "${INSIDE[@]}" python tools/prepare_data.py "$@"
