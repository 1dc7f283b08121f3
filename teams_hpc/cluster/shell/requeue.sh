# shellcheck shell=bash
# The epilogue of every batch script, on the node and outside the container. `submit` copies it into
# its scripts, those in slurm/ read it. It comes right after the step, whose exit code it takes.
#
# Launchers change exit codes, so they don't say that a stage stopped on request. Its marker does:
# it carries this job and this start. With it the job goes back to the queue; without it the code
# stands. A job that was cancelled is not brought back.
code=$?
if [ -n "${TEAMS_HPC_SCRATCH:-}" ]; then
  timeout 60 srun --overlap --ntasks="$SLURM_NNODES" --ntasks-per-node=1 \
    rm -rf -- "$TEAMS_HPC_SCRATCH/teams-hpc-$SLURM_JOB_ID"
fi
marker=$TEAMS_HPC_RUN_DIR/slurm/stopped/$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
for pause in 0 5 15; do  # a busy controller may answer the second time
  sleep "$pause"
  state=$(squeue --noheader --jobs="$TEAMS_HPC_JOB" --format=%T) && break
done
cancelled=$TEAMS_HPC_RUN_DIR/slurm/cancelled
if [ -e "$marker" ] && [ ! -e "$cancelled" ] && [ "$state" = RUNNING ]; then
  if scontrol requeue "$TEAMS_HPC_JOB"; then
    [ ! -e "$cancelled" ] || scancel "$TEAMS_HPC_JOB"  # in between
    echo "job $TEAMS_HPC_JOB stopped on request and goes back to the queue"
    sleep 600  # Slurm ends this script; it must not seem to have finished
  elif "$TEAMS_HPC_PYTHON" -m teams_hpc resubmit "$TEAMS_HPC_RUN_DIR" "$TEAMS_HPC_JOB"; then
    echo "job $TEAMS_HPC_JOB may not be requeued; another one goes on with its work"
    exit 0
  fi
fi
exit "$code"
