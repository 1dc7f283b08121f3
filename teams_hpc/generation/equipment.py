"""What a worker of generation needs to run units: a guide, engines, and what comes with them."""

from dataclasses import dataclass

from teams_hpc.config import Config
from teams_hpc.config.schema import EngineConfig, TransformersEngineConfig
from teams_hpc.generation.calls import CallDigests
from teams_hpc.generation.engine_ahead import EngineAhead
from teams_hpc.generation.evolve import Steering
from teams_hpc.generation.guide import Guide
from teams_hpc.generation.outcome import describe_engine
from teams_hpc.generation.shared_engine import EnginePort, share_engine
from teams_hpc.llm.base import Engine
from teams_hpc.llm.ledger import Ledger
from teams_hpc.llm.load import load_engines
from teams_hpc.rewriting.reviewer import Reviewer
from teams_hpc.storage.run_dir import RunDir


def _slots_to_refill(config: EngineConfig) -> int | None:
    """Requests of a batch where it may be formed before all of the last one's followers are there.

    None where that would change batches that have to stay (`fixed`), and for engines that lose no
    time: served ones work on by themselves.
    """
    if isinstance(config, TransformersEngineConfig) and config.batching == "refill":
        return config.batch_size
    return None


@dataclass(slots=True)
class Equipment:
    """What a worker needs to run units; loaded only once there is one to run."""

    guide: Guide
    expert: Engine
    reviewer: Engine
    steering: Steering
    digests: CallDigests

    @classmethod
    def load(cls, run_dir: RunDir, config: Config) -> "Equipment":
        guide = Guide.load(run_dir, config)
        limited = None if config.budget.max_expert_calls is None else config.expert
        expert, reviewer = load_engines(config.expert, config.reviewer, limited=limited)
        if expert is reviewer and config.reviewer.verdict == "generated":
            expert, reviewer = share_engine(expert)
        elif expert is not reviewer and (slots := _slots_to_refill(config.expert)) is not None:
            expert = EngineAhead(expert, slots)
        steering = Steering(
            run_seed=config.seed,
            settings=config.generate,
            policy=guide.policy,
            member=guide.member,
            observer=guide.observer,
            expert=expert.content_id,
        )
        judge = Reviewer(reviewer, config.reviewer.verdict, Ledger())
        digests = CallDigests.make(expert, config.expert, judge, config.reviewer)
        return cls(guide, expert, reviewer, steering, digests)

    def close(self) -> None:
        """Close each engine once."""
        self.guide.close()
        self.expert.close()
        if self.reviewer is not self.expert and not isinstance(self.reviewer, EnginePort):
            self.reviewer.close()

    def engines(self) -> dict[str, dict[str, object]]:
        return {
            "expert": describe_engine(self.expert),
            "reviewer": describe_engine(self.reviewer),
        }
