"""How long the fine-tuning needs to write a checkpoint, measured or estimated, before it runs."""

from pathlib import Path

from teams_hpc.config import Config, ModelShape
from teams_hpc.storage.atomic import read_json
from teams_hpc.storage.run_dir import RunDir

_STATE_BYTES_PER_PARAMETER = 14
"""float32 master weights and two Adam moments, and the weights in 16 bits."""
_NODE_BYTES_PER_S = 0.5e9
"""What a node writes to a shared file system and reads once more for the checksum: a low guess."""
_MARGIN = 1.5


def needed_warning_s(config: Config, run_dir: RunDir) -> tuple[float, str]:
    """Seconds before its end that a fine-tuning job must be warned, and where that comes from."""
    measured = [
        float(read_json(path).get("save_s") or 0.0)
        for path in run_dir.checkpoints.glob("step-*/manifest.json")
    ]
    if any(measured):
        return _MARGIN * max(measured), f"the slowest checkpoint so far took {max(measured):.1f} s"
    site = config.site
    nodes = site.slurm.stages.sft.nodes or max(
        1, site.num_sft_ranks // max(1, site.gpus_per_node or site.num_sft_ranks)
    )
    size = _STATE_BYTES_PER_PARAMETER * num_parameters(config)
    seconds = size / (_NODE_BYTES_PER_S * nodes)
    return _MARGIN * seconds, f"a checkpoint of {size / 1e9:.1f} GB takes about {seconds:.0f} s"


def num_parameters(config: Config) -> int:
    """Parameters of the model to fine-tune; from the size of its files, if it is a folder."""
    model = config.sft.model
    if isinstance(model, ModelShape):
        return _shape_parameters(model)
    return _folder_bytes(model) // 2  # 16 bits each


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _shape_parameters(shape: ModelShape) -> int:
    hidden, heads = shape.hidden_size, shape.num_attention_heads
    keys = hidden * shape.num_key_value_heads // heads
    attention = 2 * hidden * hidden + 2 * hidden * keys
    layer = attention + 3 * hidden * shape.intermediate_size + 2 * hidden
    embeddings = shape.vocab_size * hidden * (1 if shape.tie_word_embeddings else 2)
    return shape.num_hidden_layers * layer + embeddings + hidden
