"""Room that the fine-tuning needs: on each GPU, in a node's memory and on disk. Needs no torch.

The formula is written out in docs/design.md, with the arithmetic for Llama-2-7B. Where DeepSpeed
allocates something, the numbers are those of version 0.19.8.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from teams_hpc.cluster.jobs import job_spec
from teams_hpc.config import Config, ModelShape
from teams_hpc.config.schema import SftConfig
from teams_hpc.errors import CorruptFileError
from teams_hpc.sft.deepspeed_config import deepspeed_config, plan_batch
from teams_hpc.storage.atomic import read_json

_CONVERSION_BYTES = 24
"""While a checkpoint is made universal: its float32 state in pieces, and once more joined."""
_STATE_BYTES = 12
"""The optimizer's: a float32 weight and two moments."""
_GRADIENT_BYTES = 4
_TYPE_BYTES = {"float32": 4, "bfloat16": 2}
_RESERVE = 2e9
"""CUDA's context, NCCL, workspaces of cuBLAS, fragments."""
_PROCESS_BYTES = 4e9
"""Memory of the host that a process with CUDA takes for itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuRoom:
    """Bytes on one GPU, and on its host.

    Attributes:
        parameters: This process's part of the weights (ZeRO-3), or all of them.
        optimizer: Its part of the float32 weights and the moments.
        gradients: Its part of the accumulated gradients, float32.
        buffers: Weights gathered for the layers at work, and buckets of gradients on their way.
        update: Its gradients once more, while the optimizer works; no activations are left then.
        activations: Kept for the backward pass: everything, or each layer's input.
        layer: More while a layer is passed backwards.
        loss: More while the loss is.
        reserve: What isn't tensors.
        host: What is offloaded, in the node's memory.
    """

    parameters: float
    optimizer: float
    gradients: float
    buffers: float
    update: float
    activations: float
    layer: float
    loss: float
    reserve: float
    host: float

    @property
    def states(self) -> float:
        """What stays from step to step."""
        return self.parameters + self.optimizer + self.gradients

    @property
    def work(self) -> float:
        """The most that comes and goes within a step, the buffers left out."""
        return max(self.update, self.activations + max(self.layer, self.loss))

    @property
    def total(self) -> float:
        return self.states + self.buffers + self.work + self.reserve


def gpu_room(config: Config, shape: ModelShape, world_size: int) -> GpuRoom:
    """What one of `world_size` processes needs on its GPU.

    Raises:
        UsageError: The processes can't share the batch.
    """
    sft = config.sft
    zero = deepspeed_config(config, world_size, "cuda")["zero_optimization"]
    bucket = zero.get("reduce_bucket_size", 5e8)
    number, size = shape_parameters(shape), _TYPE_BYTES[sft.dtype]
    part = number / world_size
    is_divided = sft.zero_stage == 3
    live = min(number, zero.get("stage3_max_live_parameters", 1e9)) if is_divided else 0.0
    at_once = min(part, zero.get("sub_group_size", 1e9)) if is_divided else part
    weights = size * (part if is_divided else number)
    # DeepSpeed's stage 3 trains float32 weights in place; stage 2 keeps a second copy.
    shared = 4.0 if is_divided and sft.dtype == "float32" and not sft.offload_optimizer else 0.0
    states, gradients = (_STATE_BYTES - shared) * part, _GRADIENT_BYTES * part
    update = _GRADIENT_BYTES * at_once
    here = 0.0 if sft.offload_optimizer else 1.0
    kept = 0.0 if sft.offload_parameters else 1.0
    tokens = plan_batch(sft, world_size).micro_rows * sft.sequence_length
    return GpuRoom(
        parameters=kept * weights,
        optimizer=here * states,
        gradients=here * gradients,
        buffers=size * (live + 2 * bucket),
        update=here * update,
        activations=tokens * _kept_bytes(sft, shape),
        layer=tokens * _layer_work_bytes(sft, shape),
        loss=tokens * _loss_bytes(sft) * shape.vocab_size,
        reserve=_RESERVE,
        # The gradients of all sub-groups exist twice there.
        host=(1 - here) * (states + 2 * gradients) + (1 - kept) * weights,
    )


def _kept_bytes(sft: SftConfig, shape: ModelShape) -> float:
    """Kept of a token from the forward to the backward pass, over all layers."""
    size, layers = _TYPE_BYTES[sft.dtype], shape.num_hidden_layers
    last_norm = _norm_bytes(sft) * shape.hidden_size
    mask = 0 if sft.attention == "flash_attention_2" else sft.sequence_length
    each = size * shape.hidden_size if sft.activation_checkpointing else layer_bytes(sft, shape)
    return layers * each + last_norm + mask


def _layer_work_bytes(sft: SftConfig, shape: ModelShape) -> float:
    """More of a token, while one layer is passed backwards: recomputed, and its gradients."""
    size = _TYPE_BYTES[sft.dtype]
    gradients = size * (2 * shape.intermediate_size + shape.hidden_size)
    return gradients + (layer_bytes(sft, shape) if sft.activation_checkpointing else 0)


def _loss_bytes(sft: SftConfig) -> int:
    """For each logit, while the loss is passed backwards.

    Three float32 numbers: log-probability, and two gradients on its way back. With Liger one, the
    gradient in the place of the logit, and another that is rounded.
    """
    size = _TYPE_BYTES[sft.dtype]
    if sft.liger:
        return 4 + (size if size != 4 else 0)
    return 12


def _norm_bytes(sft: SftConfig) -> int:
    """What a norm keeps of each number: it, and scaled; without Liger in float32, and normed."""
    size = _TYPE_BYTES[sft.dtype]
    return 2 * size if sft.liger else 4 + 2 * size


def layer_bytes(sft: SftConfig, shape: ModelShape) -> float:
    """What one layer of a Llama keeps of a token for its backward pass.

    Two norms. Attention: queries, keys, values and the result; sdpa repeats keys and values for
    each head where it has a mask, and makes numbers of the mask. MLP: gate, its activation (Liger
    computes it again), up, and their product.
    """
    size, hidden = _TYPE_BYTES[sft.dtype], shape.hidden_size
    keys = hidden * shape.num_key_value_heads // shape.num_attention_heads
    norms = 2 * _norm_bytes(sft) * hidden
    mlp = (3 if sft.liger else 4) * size * shape.intermediate_size
    if sft.attention == "flash_attention_2":
        return norms + size * (2 * hidden + 2 * keys) + mlp
    return norms + size * (4 * hidden + sft.sequence_length) + mlp


def num_parameters(config: Config) -> int:
    """Parameters of the model to fine-tune; by the size of its files if it isn't a Llama."""
    shape = model_shape(config)
    if shape is not None:
        return shape_parameters(shape)
    assert isinstance(config.sft.model, Path)
    return _folder_bytes(config.sft.model) // 2  # 16 bits each


def model_shape(config: Config) -> ModelShape | None:
    """Shape of the model to fine-tune; None if its folder doesn't tell, or it is no Llama."""
    if isinstance(config.sft.model, ModelShape):
        return config.sft.model
    try:
        found = read_json(config.sft.model / "config.json")
    except (OSError, CorruptFileError):
        return None
    if not isinstance(found, dict):
        return None
    # What old folders leave out.
    values = {
        "num_key_value_heads": found.get("num_attention_heads"),
        "tie_word_embeddings": False,
    } | {name: found[name] for name in ModelShape.model_fields if found.get(name) is not None}
    if found.get("model_type") != "llama" or values.keys() < ModelShape.model_fields.keys():
        return None
    try:
        return ModelShape.model_validate(values)
    except ValidationError:  # a Llama that we would not build, for instance of few tokens
        return None


def shape_parameters(shape: ModelShape) -> int:
    """Parameters of a Llama."""
    hidden, heads = shape.hidden_size, shape.num_attention_heads
    keys = hidden * shape.num_key_value_heads // heads
    attention = 2 * hidden * hidden + 2 * hidden * keys
    layer = attention + 3 * hidden * shape.intermediate_size + 2 * hidden
    embeddings = shape.vocab_size * hidden * (1 if shape.tie_word_embeddings else 2)
    return shape.num_hidden_layers * layer + embeddings + hidden


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskRoom:
    """Bytes where the run directory is.

    Attributes:
        checkpoint: One checkpoint.
        checkpoints: Those that are kept, and the one that is being written.
        conversion: Of one of them for another number of processes.
        model: The result.
    """

    checkpoint: float
    checkpoints: float
    conversion: float
    model: float

    @property
    def total(self) -> float:
        return self.checkpoints + self.conversion + self.model


def disk_room(config: Config) -> DiskRoom:
    """What the fine-tuning writes."""
    number, size = num_parameters(config), _TYPE_BYTES[config.sft.dtype]
    # Stage 2 saves the weights too, stage 3 only what they are made from.
    checkpoint = number * (_STATE_BYTES + (size if config.sft.zero_stage == 2 else 0))
    return DiskRoom(
        checkpoint=checkpoint,
        checkpoints=checkpoint * (config.sft.keep_checkpoints + 1),
        conversion=number * _CONVERSION_BYTES,
        model=number * size,
    )


def room_lines(config: Config) -> list[str]:
    """The estimate for people.

    Raises:
        UsageError: The processes can't share the batch.
        ConfigError: They can't be spread over the nodes.
    """
    number = num_parameters(config)
    if not number:
        return [f"room for the fine-tuning: not known, there is no model in {config.sft.model}"]
    ranks = config.site.num_sft_ranks
    lines = [f"room for the fine-tuning of {number / 1e9:.3g} B parameters, estimated:"]
    shape = model_shape(config)
    if config.site.gpus_per_node and shape is not None:
        gpu, limit = gpu_room(config, shape, ranks), config.site.gpu_memory_gb
        of = f" of {limit:g} GB" if limit else ""
        lines.append(f"  each of {ranks} GPUs: {gpu.total / 1e9:.1f} GB{of}: {gpu_parts(gpu)}")
        if gpu.host:
            lines.append(f"  each node's memory: {_node_bytes(config, gpu) / 1e9:.0f} GB")
    disk = disk_room(config)
    lines.append(
        f"  disk: {disk.total / 1e9:.3g} GB: {config.sft.keep_checkpoints + 1} checkpoints "
        f"{disk.checkpoints / 1e9:.3g}, conversion to another number of processes "
        f"{disk.conversion / 1e9:.3g}, model {disk.model / 1e9:.3g}"
    )
    return lines


def gpu_parts(room: GpuRoom) -> str:
    """The summands, in GB, in words."""
    if room.update > room.activations + max(room.layer, room.loss):
        work = f"update {room.update / 1e9:.1f}"
    else:
        name, most = max(("layer", room.layer), ("loss", room.loss), key=lambda pair: pair[1])
        work = f"activations {room.activations / 1e9:.1f}, {name} {most / 1e9:.1f}"
    return (
        f"weights {room.parameters / 1e9:.1f}, optimizer {room.optimizer / 1e9:.1f}, gradients "
        f"{room.gradients / 1e9:.1f}, buffers {room.buffers / 1e9:.1f}, {work}, reserve "
        f"{room.reserve / 1e9:.1f}"
    )


def _node_bytes(config: Config, room: GpuRoom) -> float:
    """Memory of a node that the fine-tuning's processes on it take."""
    on_node = job_spec(config, "sft", (0,)).tasks_per_node
    return on_node * (room.host + _PROCESS_BYTES)


def room_faults(config: Config) -> list[str]:
    """Why the fine-tuning can't fit on the GPUs or into the nodes' memory, one line each.

    Raises:
        UsageError: The processes can't share the batch.
        ConfigError: They can't be spread over the nodes.
    """
    plan_batch(config.sft, config.site.num_sft_ranks)
    shape = model_shape(config)
    if shape is None or not config.site.gpus_per_node:
        return []
    room = gpu_room(config, shape, config.site.num_sft_ranks)
    return [*_gpu_faults(config, room), *_host_faults(config, room)]


def _gpu_faults(config: Config, room: GpuRoom) -> Iterator[str]:
    limit = config.site.gpu_memory_gb
    if limit is not None and room.total > limit * 1e9:
        yield (
            f"site.gpu_memory_gb: a GPU has {limit:g} GB, but the fine-tuning needs about "
            f"{room.total / 1e9:.1f} ({gpu_parts(room)}); {_gpu_remedies(config)}"
        )


def _gpu_remedies(config: Config) -> str:
    """The keys that can still be changed for less memory on a GPU, gentlest first."""
    sft, ranks = config.sft, config.site.num_sft_ranks
    micro_rows = plan_batch(sft, ranks).micro_rows
    changes = {
        f"lower sft.micro_batch_rows from {micro_rows}": micro_rows > 1,
        "set sft.activation_checkpointing=true": not sft.activation_checkpointing,
        "set sft.liger=true": not sft.liger,
        "set sft.zero_stage=3": sft.zero_stage == 2,
        f"raise site.num_sft_ranks from {ranks}": ranks < sft.global_batch_rows,
        "set sft.offload_optimizer=true": not sft.offload_optimizer,
        "set sft.offload_parameters=true": sft.zero_stage == 3 and not sft.offload_parameters,
    }
    return ", or ".join(
        [*(words for words, is_open in changes.items() if is_open), "lower sft.sequence_length"]
    )


def _host_faults(config: Config, room: GpuRoom) -> Iterator[str]:
    limit = job_spec(config, "sft", (0,)).mem_gb
    if config.site.executor != "slurm" or limit is None or not room.host:
        return
    needed = _node_bytes(config, room) / 2**30  # Slurm's units
    if needed > limit:
        yield (
            f"site.slurm.stages.sft.mem_gb: a job of the fine-tuning gets {limit:g} GB on each "
            f"node, but what is offloaded needs about {needed:.0f}; ask for more, raise "
            "site.num_sft_ranks over more nodes, or set sft.offload_optimizer=false"
        )
