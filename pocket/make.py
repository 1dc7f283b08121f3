"""`make pocket-model`: examples, tokenizer, fine-tuning, and the folder that the package ships."""

import logging
import sys
from pathlib import Path

from pocket.data import build_data
from teams_hpc.config import load_config
from teams_hpc.pipeline.graph import Stage, find_stage
from teams_hpc.pipeline.local import run_stage
from teams_hpc.pipeline.start import prepared_run
from teams_hpc.runtime.preemption import StopFlag

_CONFIG = Path(__file__).parent / "model.yaml"


class _Quiet:
    """Nobody is told; `teams-hpc status RUN_DIR` shows how far it is."""

    def stage_skipped(self, stage: Stage) -> None: ...

    def stage_started(self, stage: Stage) -> None: ...

    def tick(self) -> None: ...

    def stage_finished(self, stage: Stage, seconds: float, num_restarts: int) -> None: ...


def main(overrides: list[str]) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    config = load_config(_CONFIG, overrides)
    stop = StopFlag()
    stop.install()
    with prepared_run(config, stop=stop) as run_dir:
        build_data(run_dir, config)
        run_stage(run_dir, config, find_stage(config, "sft"), _Quiet(), stop)


if __name__ == "__main__":
    main(sys.argv[1:])
