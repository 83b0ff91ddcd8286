#!/bin/bash
# Everything that needs a GPU, in an hour:   sbatch [options of sbatch] slurm/gpu.sh [flags of megamask bench-gpu]
#
# Figures, report and log are in --output, by default runs/gpu. The most important parts are measured first; the
# same command again measures what is missing. Environment: that of job.sh, and MEGAMASK_ROOT as in run.sh.
#
#SBATCH --job-name=megamask-gpu
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=01:00:00
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -uo pipefail

ROOT=${MEGAMASK_ROOT:-${SLURM_SUBMIT_DIR:-.}}
if ! cd "$ROOT" || ! . slurm/job.sh; then
    echo "No checkout in $ROOT: call sbatch in its root, or set MEGAMASK_ROOT." >&2
    exit 2
fi
[[ -n ${SLURM_JOB_ID:-} ]] || die "This is a batch script of Slurm: sbatch $0"
[[ -n $(option --output "$@") ]] || set -- "$@" --output "$ROOT/runs/gpu"
OUT=$(option --output "$@")
[[ $OUT == /* ]] || OUT=$ROOT/$OUT
mkdir -p "$OUT" || die "The folder $OUT cannot be created."
set_environment
set_container "$OUT"
exec srun "${STEP[@]}" "${INSIDE[@]}" python -m megamask bench-gpu "$@"
