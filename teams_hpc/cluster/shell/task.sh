#!/bin/sh
# Start one process of a step, in the container if there is one:  task.sh COMMAND [ARGUMENT]...
#
if [ -n "${TEAMS_HPC_SCRATCH:-}" ]; then  # caches and temporary files on the node's own disk
  TMPDIR=$TEAMS_HPC_SCRATCH/teams-hpc-$SLURM_JOB_ID
  TRITON_CACHE_DIR=$TMPDIR/triton
  TORCH_EXTENSIONS_DIR=$TMPDIR/torch_extensions
  export TMPDIR TRITON_CACHE_DIR TORCH_EXTENSIONS_DIR
  (umask 077 && mkdir -p "$TMPDIR")
fi
# Python needs seconds before it can listen to a warning, and would die of one. So warnings are kept
# waiting (blocked signals stay pending over exec) until the stage asks for them.
if [ -n "${TEAMS_HPC_IMAGE:-}" ]; then
  set -- "${TEAMS_HPC_RUNTIME:-apptainer}" exec "$TEAMS_HPC_IMAGE" "$@"
fi
if env --block-signal=USR1 true 2>/dev/null; then
  exec env --block-signal=USR1,USR2,TERM "$@"
fi
trap '' USR1 USR2 TERM  # older coreutils: lost during the start, but not deadly
exec "$@"
