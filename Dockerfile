# The image for nodes with NVIDIA GPUs (A100, H100, H200):  make image
#
# Two stages: the first compiles (nvcc, g++), the second holds what that made. Of build tools the second
# has gcc and Python's headers, which Triton needs; DeepSpeed needs none. All software comes from
# containers/install.sh, as with apptainer.def. docs/operations.md says what of this was tried.
#
# Without GPUs: --build-arg BASE=debian:12 --build-arg RUNTIME_BASE=debian:12 --build-arg WITH_FLASH_ATTN=0
#   --build-arg WITH_DEEPSPEED_OPS= and a torch for CPUs in TORCH and PIP_INDEX_ARGS.
ARG BASE=nvidia/cuda:13.0.1-devel-ubuntu24.04
ARG RUNTIME_BASE=nvidia/cuda:13.0.1-base-ubuntu24.04

FROM ${BASE} AS build
COPY containers/install.sh /opt/teams-hpc/source/containers/
RUN /opt/teams-hpc/source/containers/install.sh runtime compilers

# What changes seldom comes first: each step is a layer, rebuilt only when what stands above it changes.
ARG TORCH=torch==2.13.0
ARG PIP_INDEX_ARGS="--extra-index-url https://download.pytorch.org/whl/cu130"
ARG CUDA_ARCHS="8.0 9.0"
ARG MAX_JOBS=4
COPY pyproject.toml constraints.txt /opt/teams-hpc/source/
RUN /opt/teams-hpc/source/containers/install.sh torch

ARG WITH_DEEPSPEED_OPS=fused_adam
RUN /opt/teams-hpc/source/containers/install.sh deepspeed

ARG WITH_FLASH_ATTN=1
RUN /opt/teams-hpc/source/containers/install.sh flash_attn

ARG EXTRAS="compute eval mpi liger tensorboard"
ARG MPI4PY_ARGS=--no-binary=mpi4py
RUN /opt/teams-hpc/source/containers/install.sh requirements

COPY . /opt/teams-hpc/source/
RUN /opt/teams-hpc/source/containers/install.sh project clean


FROM ${RUNTIME_BASE}
COPY containers/install.sh /opt/teams-hpc/source/containers/
RUN /opt/teams-hpc/source/containers/install.sh runtime clean \
  && useradd --uid 10001 --create-home --shell /bin/bash teams \
  && mkdir /work && chown teams:teams /work
COPY --from=build /opt/teams-hpc /opt/teams-hpc

# Neither ~/.local nor the current folder of whoever runs it decides what is imported. Open MPI 4 can't read another process's
# memory in a user namespace, and would say so at each start; between nodes only UCX lets its threads
# reach another process's memory, as generation does, and it isn't taken on plain Ethernet unless told.
ENV PATH=/opt/teams-hpc/venv/bin:${PATH} \
    PYTHONNOUSERSITE=1 \
    PYTHONSAFEPATH=1 \
    OMPI_MCA_btl_vader_single_copy_mechanism=none \
    OMPI_MCA_pml_ucx_tls=any \
    OMPI_MCA_pml_ucx_devices=any \
    OMPI_MCA_osc=ucx

ARG VERSION=unknown
ARG REVISION=unknown
ENV TEAMS_HPC_REVISION=${REVISION}
LABEL org.opencontainers.image.title="teams-hpc" \
      org.opencontainers.image.description="Instruction-tuning data made with reinforcement learning, on HPC clusters" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"

USER 10001:10001
WORKDIR /work
ENTRYPOINT ["teams-hpc"]
CMD ["--help"]
