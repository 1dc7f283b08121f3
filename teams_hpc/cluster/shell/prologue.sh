# shellcheck shell=bash
# What every batch script does before its step. `submit` copies it into its scripts, those in slurm/
# read it; requeue.sh is its other half.
trap : TERM USR1 USR2  # warnings are for the step: this shell has to outlive them
if [ -n "${TEAMS_HPC_MODULES:-}" ]; then
  # shellcheck source=/dev/null
  command -v module >/dev/null || . /etc/profile
  # shellcheck disable=SC2086  # several words on purpose
  module load $TEAMS_HPC_MODULES
fi
# An array's task by its own name: the last one has the number of the whole array too.
TEAMS_HPC_JOB=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
TEAMS_HPC_JOB=${TEAMS_HPC_JOB:-$SLURM_JOB_ID}
# When Slurm will end this job, in Unix time: a stage that starts late reads it. Empty: not known.
# (Of no answer at all `date` would make this midnight.)
end=$(SLURM_TIME_FORMAT=standard squeue --noheader --jobs="$TEAMS_HPC_JOB" --format=%e)
TEAMS_HPC_DEADLINE=$(date -d "${end:-not known}" +%s 2>/dev/null) ||
  TEAMS_HPC_DEADLINE=${SLURM_JOB_END_TIME:-}
# Where the processes of a fine-tuning meet: here, since this script runs on the job's first node.
# Jobs that share a node get different ports.
MASTER_ADDR=${SLURMD_NODENAME:-$(hostname)}
MASTER_PORT=$((15000 + (SLURM_JOB_ID * 7 + ${SLURM_RESTART_COUNT:-0}) % 15000))
SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}  # since Slurm 22.05 srun doesn't take it from sbatch
export TEAMS_HPC_JOB TEAMS_HPC_DEADLINE MASTER_ADDR MASTER_PORT SRUN_CPUS_PER_TASK
