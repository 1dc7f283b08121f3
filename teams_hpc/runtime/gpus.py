"""Which GPUs of a node a process takes, when several of one stage are there."""

import os
from collections.abc import Mapping

GPUS_VARIABLE = "CUDA_VISIBLE_DEVICES"
_SLURM_VARIABLE = "SLURM_GPUS_ON_NODE"


def own_gpus(
    place: int, count: int, num_gpus: int, environment: Mapping[str, str] = os.environ
) -> str | None:
    """What `CUDA_VISIBLE_DEVICES` should be for one of several processes on this node.

    They take shares of `count` of the GPUs that are visible, in turn; where there are more
    processes than shares, several have the same. Nobody takes a GPU that it didn't see: so where a
    launcher has bound each process to GPUs of its own (`--gpus-per-task`, say), it stays there, and
    no two meet.

    Args:
        place: Number of the process on this node.
        count: GPUs that it uses.
        num_gpus: GPUs of a node that work here, `site.gpus_per_node`; 0: those visible, if any.
        environment: Where the variable is looked for. Empty, it means no GPU. Where it isn't set
            (as by `srun --gpu-bind=none`), `num_gpus` are visible, or as many as Slurm has given
            the job on this node: it hides the others, and CUDA counts what it sees from 0.

    Returns:
        The variable's value; None if there is nothing to set.
    """
    visible = environment.get(GPUS_VARIABLE)
    if visible is None and not num_gpus:
        return None
    if visible is None:
        given = int(environment.get(_SLURM_VARIABLE, num_gpus))
        devices = [str(number) for number in range(min(num_gpus, given))]
    else:
        devices = visible.split(",")[: num_gpus or None]
    first = place % max(1, len(devices) // count) * count
    return ",".join(devices[first : first + count])
