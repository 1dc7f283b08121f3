"""The DeepSpeed configuration of a run, generated: users never write its batch keys.

Imports neither torch nor DeepSpeed, so that a login node can print it.
"""

from dataclasses import dataclass
from typing import Any, Literal

from teams_hpc.config import Config
from teams_hpc.errors import UsageError

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchShape:
    """How one optimizer step is split: world x accumulation x micro = `sft.global_batch_rows`."""

    world_size: int
    micro_batch_rows: int
    accumulation: int


def batch_shape(config: Config, world_size: int) -> BatchShape:
    """Split the global batch over ranks; the micro batch is the largest that fits and divides.

    Raises:
        UsageError: The world size doesn't divide the global batch; names those that do.
    """
    total = config.sft.global_batch_rows
    if total % world_size:
        sizes = [str(size) for size in range(1, total + 1) if total % size == 0]
        raise UsageError(
            f"sft.global_batch_rows={total} can't be split over {world_size} ranks; "
            f"set site.num_sft_ranks to one of {', '.join(sizes)}"
        )
    rows = total // world_size
    micro = max(n for n in range(1, config.sft.micro_batch_rows + 1) if rows % n == 0)
    return BatchShape(world_size=world_size, micro_batch_rows=micro, accumulation=rows // micro)


def deepspeed_config(config: Config, world_size: int, device: Device) -> dict[str, Any]:
    """What is passed to `deepspeed.initialize`.

    The loss handed to DeepSpeed is scaled so that its mean over ranks and micro batches is the
    mean over all response tokens of the step; hence no `prescale_gradients` or the like here.
    """
    settings = config.sft
    shape = batch_shape(config, world_size)
    zero: dict[str, Any] = {"stage": settings.zero_stage}
    if settings.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": device == "cuda"}
    if settings.zero_stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
        if settings.offload_parameters:
            zero["offload_param"] = {"device": "cpu", "pin_memory": device == "cuda"}
    return {
        "train_batch_size": settings.global_batch_rows,
        "train_micro_batch_size_per_gpu": shape.micro_batch_rows,
        "gradient_accumulation_steps": shape.accumulation,
        "gradient_clipping": settings.grad_clip,
        "bf16": {"enabled": settings.dtype == "bfloat16"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
