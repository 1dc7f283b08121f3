"""What one job is: the stage it works on, and what it asks Slurm for."""

from dataclasses import dataclass

from teams_hpc.config import Config
from teams_hpc.errors import ConfigError

_GPU_STAGES = ("policy", "select", "generate", "sft", "evaluate")


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSpec:
    """One job, or one array of equal jobs, before it is submitted.

    Attributes:
        stage: What it works on.
        indices: One task of the array for each: which policy member, or which worker.
        tasks_per_node: Processes on each node; all nodes have as many.
        ranks_hang_together: One process's end ends the others (a torch.distributed world, or
            processes that MPI joins: they part at a barrier, so the rest would wait for ever).
    """

    stage: str
    indices: tuple[int, ...]
    nodes: int
    tasks_per_node: int
    cpus_per_task: int
    gpus_per_node: int
    mem_gb: float | None
    time_min: int
    partition: str | None
    qos: str | None
    ranks_hang_together: bool

    @property
    def world_size(self) -> int:
        """Processes of one task of the array."""
        return self.nodes * self.tasks_per_node


def job_spec(config: Config, stage: str, indices: tuple[int, ...]) -> JobSpec:
    """What the jobs of `stage` ask for, from the site's values and the stage's own.

    Raises:
        ConfigError: The processes can't be spread evenly over the nodes.
    """
    slurm, site = config.site.slurm, config.site
    shape = getattr(slurm.stages, stage)
    ranks = {"generate": site.ranks_per_worker, "sft": site.num_sft_ranks}.get(stage, 1)
    uses_gpus = stage in _GPU_STAGES and site.gpus_per_node > 0
    gpus_of_rank = config.gpus_of_process(stage)
    nodes = shape.nodes or (-(-ranks * gpus_of_rank // site.gpus_per_node) if uses_gpus else 1)
    if ranks % nodes:
        key = "ranks_per_worker" if stage == "generate" else "num_sft_ranks"
        raise ConfigError(
            f"site.{key}: {ranks} processes can't be spread evenly over {nodes} nodes; set "
            f"site.slurm.stages.{stage}.nodes to a divisor of {ranks}"
        )
    tasks_per_node = ranks // nodes
    needed = tasks_per_node * gpus_of_rank if uses_gpus else 0
    return JobSpec(
        stage=stage,
        indices=indices,
        nodes=nodes,
        tasks_per_node=tasks_per_node,
        cpus_per_task=shape.cpus_per_task or slurm.cpus_per_task,
        gpus_per_node=needed if shape.gpus_per_node is None else shape.gpus_per_node,
        mem_gb=shape.mem_gb or slurm.mem_gb,
        time_min=shape.time_min or slurm.time_min,
        partition=shape.partition or slurm.partition,
        qos=shape.qos or slurm.qos,
        ranks_hang_together=stage == "sft" or (stage == "generate" and slurm.mpi is not None),
    )
