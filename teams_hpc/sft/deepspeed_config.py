"""What DeepSpeed is told, made from our configuration; needs neither torch nor DeepSpeed.

Its batch keys are generated: `sft.global_batch_rows` is what a result depends on, the micro batch
is as large as allowed, and gradient accumulation follows from the number of processes.
"""

from dataclasses import dataclass
from typing import Any, Literal

from teams_hpc.config import Config
from teams_hpc.config.schema import SftConfig
from teams_hpc.errors import UsageError

_NEVER = 2**31


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPlan:
    """How the packed rows of one optimizer step are divided.

    Attributes:
        world_size: Processes.
        micro_rows: Rows of one forward pass of one process.
        accumulation_steps: Forward passes of one process for each optimizer step.
    """

    world_size: int
    micro_rows: int
    accumulation_steps: int

    @property
    def rank_rows(self) -> int:
        """Rows of one process for each optimizer step."""
        return self.micro_rows * self.accumulation_steps


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def plan_batch(sft: SftConfig, world_size: int) -> BatchPlan:
    """Divide the global batch over processes and forward passes.

    Raises:
        UsageError: The processes can't have equal shares; names the numbers that can.
    """
    rows = sft.global_batch_rows
    if rows % world_size:
        fitting = ", ".join(map(str, _divisors(rows)))
        raise UsageError(
            f"sft.global_batch_rows: {rows} rows can't be shared equally by {world_size} "
            f"processes; set site.num_sft_ranks to one of {fitting}, "
            f"or sft.global_batch_rows to a multiple of {world_size}"
        )
    rank_rows = rows // world_size
    micro_rows = max(size for size in _divisors(rank_rows) if size <= sft.micro_batch_rows)
    return BatchPlan(
        world_size=world_size, micro_rows=micro_rows, accumulation_steps=rank_rows // micro_rows
    )


def deepspeed_config(
    config: Config,
    world_size: int,
    device: Literal["cpu", "cuda"],
    *,
    is_reshaped: bool = False,
) -> dict[str, Any]:
    """The dictionary for `deepspeed.initialize`.

    On a CPU nothing is offloaded: all is in host memory already, and DeepSpeed's offloading would
    only copy it within.

    Args:
        config: The run's configuration.
        world_size: Processes.
        device: What the processes compute on.
        is_reshaped: They go on from what another number of processes has written.

    Raises:
        UsageError: The batch can't be divided.
    """
    sft = config.sft
    batch = plan_batch(sft, world_size)
    zero: dict[str, Any] = {
        "stage": sft.zero_stage,
        "contiguous_gradients": True,
        "overlap_comm": device == "cuda",
    }
    if sft.zero_stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
        zero["sub_group_size"] = sft.sub_group_size
    if device == "cuda":
        zero |= _offload(sft)
    return {
        "train_batch_size": sft.global_batch_rows,
        "train_micro_batch_size_per_gpu": batch.micro_rows,
        "gradient_accumulation_steps": batch.accumulation_steps,
        "gradient_clipping": sft.grad_clip,
        "bf16": {"enabled": sft.dtype == "bfloat16"},
        # Summing many bfloat16 gradients in bfloat16 loses the small ones.
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": zero,
        "checkpoint": {"load_universal": is_reshaped},
        # Ours is torch's AdamW, on every device: DeepSpeed's own would be compiled at first use.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": _NEVER,
    }


def _offload(sft: SftConfig) -> dict[str, Any]:
    where = {"device": "cpu", "pin_memory": True}
    offload: dict[str, Any] = {}
    if sft.offload_optimizer:
        offload["offload_optimizer"] = where
    if sft.offload_parameters:
        offload["offload_param"] = where
    return offload
