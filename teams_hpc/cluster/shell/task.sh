#!/bin/sh
# Start one process of a step, in the container if there is one:  task.sh COMMAND [ARGUMENT]...
#
if [ -n "${TEAMS_HPC_SCRATCH:-}" ]; then  # caches and temporary files on the node's own disk
  TMPDIR=$TEAMS_HPC_SCRATCH/teams-hpc-${SLURM_JOB_ID:-$(id -u)}
  TRITON_CACHE_DIR=$TMPDIR/triton
  TORCH_EXTENSIONS_DIR=$TMPDIR/torch_extensions
  export TMPDIR TRITON_CACHE_DIR TORCH_EXTENSIONS_DIR
  (umask 077 && mkdir -p "$TMPDIR")
  # Programs are loaded from there: in a folder for everybody somebody else may have been first.
  case $(stat -c '%u %a' "$TMPDIR") in
    "$(id -u) "*700) ;;
    *)
      echo "error: $TMPDIR is not a private folder of yours; set site.slurm.scratch" >&2
      exit 1 ;;
  esac
fi
# Sets NAME inside the container; it gets in whatever else is kept out.
inside() {
  case $TEAMS_HPC_CONTAINER in
    singularity) export "SINGULARITYENV_$1=$2" ;;
    *) export "APPTAINERENV_$1=$2" ;;
  esac
}
if [ -n "${TEAMS_HPC_IMAGE:-}" ]; then
  TEAMS_HPC_CONTAINER=${TEAMS_HPC_CONTAINER:-apptainer}
  for name in APPTAINER_CLEANENV APPTAINER_CONTAINALL SINGULARITY_CLEANENV SINGULARITY_CONTAINALL; do
    if printenv "$name" >/dev/null; then
      echo "error: unset $name: without the launcher's variables each process of a step would take" \
        "itself for the only one, and do the work of all" >&2
      exit 2
    fi
  done
  # The image's Python is another one, and the home of its caches isn't there.
  unset PYTHONPATH PYTHONHOME VIRTUAL_ENV
  if [ -n "${TMPDIR:-}" ]; then
    HF_HOME=$TMPDIR/huggingface
    XDG_CACHE_HOME=$TMPDIR/cache
    MPLCONFIGDIR=$TMPDIR/matplotlib
    CUDA_CACHE_PATH=$TMPDIR/cuda
    export HF_HOME XDG_CACHE_HOME MPLCONFIGDIR CUDA_CACHE_PATH
  fi
  # A stage compares it with what it finds, since an alias or a site's settings may drop variables.
  size=${OMPI_COMM_WORLD_SIZE:-${SLURM_STEP_NUM_TASKS:-${PMI_SIZE:-}}}
  [ -z "$size" ] || inside TEAMS_HPC_STEP_SIZE "$size"
  pmix=${PMIX_SERVER_TMPDIR:-}  # where `srun --mpi=pmix` and the processes meet
  if [ -d "$pmix" ]; then
    case $TEAMS_HPC_CONTAINER in
      singularity) export SINGULARITY_BIND="${SINGULARITY_BIND:+$SINGULARITY_BIND,}$pmix" ;;
      *) export APPTAINER_BIND="${APPTAINER_BIND:+$APPTAINER_BIND,}$pmix" ;;
    esac
  fi
  set -- "$TEAMS_HPC_CONTAINER" exec "$TEAMS_HPC_IMAGE" "$@"
fi
# Python needs seconds before it can listen to a warning, and would die of one. So warnings are kept
# waiting (blocked signals stay pending over exec) until the stage asks for them.
if env --block-signal=USR1 true 2>/dev/null; then
  exec env --block-signal=USR1,USR2,TERM "$@"
fi
trap '' USR1 USR2 TERM  # older coreutils: lost during the start, but not deadly
exec "$@"
