#!/bin/bash
# Submit one stage by hand:
#
#   slurm/submit.sh STAGE CONFIG [KEY=VALUE]... [-- SBATCH-OPTION...]
#
#   slurm/submit.sh policy configs/llama2-7b-a100.yaml
#   slurm/submit.sh select configs/llama2-7b-a100.yaml -- --dependency=afterok:12345
#
# Makes the run directory, reads partition, time, memory, GPUs and the size of arrays from the
# configuration, and passes them on sbatch's command line. Prints the job's number.
set -euo pipefail
usage() { sed -n '2,10s/^# \{0,1\}//p' "$0" >&2; exit 2; }
[ $# -ge 2 ] || usage
stage=$1
shift
configuration=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  configuration+=("$1")
  shift
done
[ $# -eq 0 ] || shift

# Of an allocation or a job of ours that this may be called from.
for name in ${!SLURM_@} ${!SBATCH_@} ${!SQUEUE_@} ${!TEAMS_HPC_@} \
  RANK WORLD_SIZE LOCAL_RANK CUDA_VISIBLE_DEVICES; do
  [ "$name" = SLURM_CONF ] || unset "$name"
done

TEAMS_HPC_SHELL=$(cd "$(dirname "$0")" && pwd)  # sbatch runs a copy: scripts find the others by this
export TEAMS_HPC_SHELL
teams=${TEAMS_HPC:-$TEAMS_HPC_SHELL/../.venv/bin/teams-hpc}
[ -x "$teams" ] || teams="teams-hpc"  # on PATH

# NUL-separated, since a path may hold anything else: NAME=VALUE words, an empty one, sbatch options.
answer=$(mktemp)
trap 'rm -f "$answer"' EXIT
"$teams" job "$stage" "${configuration[@]}" > "$answer"
options=()
in_options=
while IFS= read -r -d '' word; do
  if [ -n "$in_options" ]; then options+=("$word")
  elif [ -z "$word" ]; then in_options=yes
  else export "${word?}"
  fi
done < "$answer"

script=$TEAMS_HPC_SHELL/$stage.sbatch
# The job's output goes to the folder it is submitted from.
job=$(cd "$TEAMS_HPC_RUN_DIR/slurm" && sbatch --parsable "${options[@]}" "$@" "$script")
"$teams" job --submitted "${job%%;*}" "$stage" "$TEAMS_HPC_RUN_DIR/config.yaml"
