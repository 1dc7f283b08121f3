#!/bin/sh
# Install what the image holds, one step a word:  install.sh STEP...
#
# Both recipes call this, Dockerfile (a layer for each step) and apptainer.def (all in a row), so that
# an image has the same software whichever of them made it. Their arguments come as variables:
#   TORCH              what to give pip for torch
#   PIP_INDEX_ARGS     further arguments of each pip call, such as another index
#   EXTRAS             the project's extras, by pyproject.toml (no commas: Apptainer divides at them)
#   WITH_FLASH_ATTN    1: compile flash-attn against that very torch (needs nvcc)
#   WITH_DEEPSPEED_OPS DeepSpeed's operators to compile now, by its names; empty: none
#   MPI4PY_ARGS        how pip gets mpi4py: compiled against this image's MPI, or (empty) as a wheel
#   CUDA_ARCHS         compute capabilities to compile for
# Debian 12 and Ubuntu 24.04; POSIX sh, since RUN gives no other.
set -eu

home=/opt/teams-hpc
source=$home/source  # pyproject.toml, constraints.txt and the package, while the image is made
venv=$home/venv
cuda_archs=${CUDA_ARCHS:-8.0 9.0}

# apt: one call, no recommendations, no lists left behind.
packages() {
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends "$@" >/dev/null
  apt-get clean
  rm -rf /var/lib/apt/lists/*
}

pip() {
  # shellcheck disable=SC2086  # several words on purpose
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-cache-dir \
    --constraint "$source/constraints.txt" ${PIP_INDEX_ARGS:-} "$@"
}

# What pyproject.toml asks for: `requirements EXTRA...`, a line each; `requirements -- NAME`, the one
# requirement of that name, wherever it stands.
requirements() {
  "$venv/bin/python" - "$source/pyproject.toml" "$@" <<'PYTHON'
import re, sys, tomllib
path, *words = sys.argv[1:]
with open(path, "rb") as file:
    project = tomllib.load(file)["project"]
extras = project["optional-dependencies"]
if words[0] == "--":
    lines = [line for group in extras.values() for line in group
             if re.match(r"[A-Za-z0-9._-]+", line)[0] == words[1]]
    lines = [lines[0].split(";")[0].strip()]
else:
    unknown = sorted(set(words) - set(extras))
    if unknown:
        sys.exit(f"EXTRAS: pyproject.toml has no {', '.join(unknown)}; it has {', '.join(extras)}")
    lines = project["dependencies"] + [line for word in words for line in extras[word]]
print(*lines, sep="\n")
PYTHON
}

# Python, MPI, and what fast networks need. Open MPI brings PMIx (it is what `srun --mpi=pmix` speaks)
# and UCX; ibverbs-providers are the InfiniBand drivers that UCX and NCCL load.
# gcc and Python's headers stay in the final image: Triton compiles its launchers (Liger's kernels) on
# the first use of each. Nothing else does; DeepSpeed needs no compiler, since its optimizer isn't used.
step_runtime() {
  packages ca-certificates gcc libc6-dev python3 python3-dev openmpi-bin \
    libucx0 ibverbs-providers libnuma1
}

# What compiling mpi4py, DeepSpeed's operators and flash-attn needs, in the first stage alone.
step_compilers() {
  packages g++ make libopenmpi-dev python3-venv
}

step_torch() {
  test -x "$venv/bin/python" || python3 -m venv "$venv"
  pip --upgrade pip
  pip setuptools wheel packaging ninja psutil py-cpuinfo
  # shellcheck disable=SC2086
  pip ${TORCH:-torch==2.13.0}
}

# Operators are compiled here, so that no compute node ever does. cpu_adam isn't for this list: it is
# compiled for the processor it is compiled on (-march=native) and may die on another one.
step_deepspeed() {
  if [ -z "${WITH_DEEPSPEED_OPS:-}" ]; then
    pip "$(requirements -- deepspeed)"
    return
  fi
  # Without a GPU DeepSpeed would take the CPU for its accelerator, and build for that.
  DS_ACCELERATOR=$("$venv/bin/python" -c \
    'import torch; print("cuda" if torch.version.cuda else "cpu")')
  TORCH_CUDA_ARCH_LIST=$(echo "$cuda_archs" | tr ' ' ';')
  DS_ENABLE_NINJA=1  # several files at a time; MAX_JOBS says how many
  export DS_ACCELERATOR TORCH_CUDA_ARCH_LIST DS_ENABLE_NINJA
  for operator in $WITH_DEEPSPEED_OPS; do
    export "DS_BUILD_$(echo "$operator" | tr '[:lower:]' '[:upper:]')=1"
  done
  pip --no-build-isolation --no-binary=deepspeed "$(requirements -- deepspeed)"
  # A name that DeepSpeed doesn't know, or can't build here, would be passed over in silence.
  "$venv/bin/python" - "$WITH_DEEPSPEED_OPS" <<'PYTHON'
import sys
from deepspeed.git_version_info import installed_ops
lacking = [name for name in sys.argv[1].split() if not installed_ops.get(name)]
if lacking:
    sys.exit(f"WITH_DEEPSPEED_OPS: not built: {', '.join(lacking)}; known: {', '.join(installed_ops)}")
PYTHON
}

step_flash_attn() {
  if [ "${WITH_FLASH_ATTN:-0}" != 1 ]; then
    echo "flash-attn is left out (WITH_FLASH_ATTN=${WITH_FLASH_ATTN:-0})"
    return
  fi
  FLASH_ATTENTION_FORCE_BUILD=TRUE  # never a wheel that was compiled against another torch
  FLASH_ATTN_CUDA_ARCHS=$(echo "$cuda_archs" | tr -d . | tr ' ' ';')
  MAX_JOBS=${MAX_JOBS:-4}  # each takes some 5 GB of memory
  export FLASH_ATTENTION_FORCE_BUILD FLASH_ATTN_CUDA_ARCHS MAX_JOBS
  pip einops
  pip --no-build-isolation --no-binary=flash-attn "$(requirements -- flash-attn)"
}

step_requirements() {
  # shellcheck disable=SC2086
  requirements ${EXTRAS:-compute} > "$home/requirements.txt"
  # shellcheck disable=SC2086
  pip ${MPI4PY_ARGS:-} --requirement "$home/requirements.txt"
  rm "$home/requirements.txt"
}

step_project() {
  pip --no-deps --no-build-isolation "$source"
  cp -r "$source/configs" "$source/containers/selftest.py" "$home/"
}

# What an image needs to be made and not to be used.
step_clean() {
  rm -rf "$source" /root/.cache
}

[ $# -gt 0 ] || { sed -n '2,14s/^# \{0,1\}//p' "$0" >&2; exit 2; }
for step in "$@"; do
  echo "== $step"
  case $step in
    runtime | compilers | torch | deepspeed | flash_attn | requirements | project | clean)
      "step_$step" ;;
    *)
      echo "install.sh: no step $step" >&2
      exit 2 ;;
  esac
done
