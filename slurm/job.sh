# shellcheck shell=bash
# Functions that the scripts of this folder share. They source this file.
#
# Environment, all optional:
#   MEGAMASK_SETUP      shell file to source first: module load, conda activate, variables of the cluster
#   MEGAMASK_CONTAINER  pyxis:IMAGE or apptainer:IMAGE
#   MEGAMASK_MOUNTS     SOURCE:TARGET[,SOURCE:TARGET...] to mount in the container beside the checkout and the output

say() { printf '%(%FT%T)T %s\n' -1 "$*"; }

die() {
    say "error: $*" >&2
    exit 2
}

# A name becomes part of paths, so it must not contain characters that are special in a shell or path.
check_name() {
    [[ $1 =~ ^[A-Za-z0-9._-]{1,64}$ ]] || die "\`--job-name\` must be 1 to 64 letters, digits, dots, dashes and" \
        "underscores, but is $(printf %q "$1"). Choose another."
}

# The environment of a rank. Variables that the user has set take precedence; NCCL_SOCKET_IFNAME and the like depend on
# the cluster.
set_environment() {
    [[ -x $ROOT/.venv/bin/python ]] && export PATH=$ROOT/.venv/bin:$PATH
    export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1
    if [[ -n ${MEGAMASK_SETUP:-} ]]; then
        set +u # scripts of modules and conda may read unset variables
        # shellcheck source=/dev/null
        . "$MEGAMASK_SETUP" || die "\`MEGAMASK_SETUP\` ($MEGAMASK_SETUP) failed."
        set -u
    fi
    export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} HF_DATASETS_OFFLINE=${HF_DATASETS_OFFLINE:-1}
    export TRANSFORMERS_OFFLINE=${TRANSFORMERS_OFFLINE:-1} TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}
    export NCCL_DEBUG=${NCCL_DEBUG:-WARN} OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
    # since Slurm 22.05 srun does not inherit it
    [[ -z ${SLURM_CPUS_PER_TASK:-} ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
}

# Sets STEP, options of srun, and INSIDE, words before a command. $1 is the output folder.
# shellcheck disable=SC2034 # the other scripts read them
set_container() {
    local mounts=${MEGAMASK_MOUNTS:+,$MEGAMASK_MOUNTS} image=${MEGAMASK_CONTAINER:-}
    STEP=() INSIDE=()
    case $image in
        '') ;;
        pyxis:?*)
            STEP=(--container-image="${image#pyxis:}" --container-workdir="$ROOT"
                --container-mounts="$ROOT:$ROOT,$1:$1$mounts")
            ;;
        apptainer:?*)
            INSIDE=(apptainer exec --nv --pwd "$ROOT" --bind "$ROOT:$ROOT,$1:$1$mounts" "${image#apptainer:}")
            ;;
        *) die "\`MEGAMASK_CONTAINER\` must be pyxis:IMAGE or apptainer:IMAGE, but is $(printf %q "$image")." ;;
    esac
}

# Prints the value of the option $1 (such as --output) among the other arguments, or nothing.
option() {
    local name=$1 value=''
    shift
    while (($#)); do
        case $1 in
            "$name") value=${2:-} ;;
            "$name="*) value=${1#*=} ;;
        esac
        shift
    done
    printf %s "$value"
}
