"""How long the fine-tuning needs to write a checkpoint, measured or estimated, before it runs."""

from teams_hpc.config import Config
from teams_hpc.pipeline.room import disk_room
from teams_hpc.storage.atomic import read_json
from teams_hpc.storage.run_dir import RunDir

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
    size = disk_room(config).checkpoint
    seconds = size / (_NODE_BYTES_PER_S * nodes)
    return _MARGIN * seconds, f"a checkpoint of {size / 1e9:.1f} GB takes about {seconds:.0f} s"
