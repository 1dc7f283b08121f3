"""What chooses operations in generation: a policy, with the eyes it was trained with."""

from dataclasses import dataclass
from typing import Any, cast

from teams_hpc.config import Config, TransformersEngineConfig
from teams_hpc.config.digest import model_content_id
from teams_hpc.config.policy import ObservationKind
from teams_hpc.errors import InputChangedError
from teams_hpc.generation.outcome import describe_engine
from teams_hpc.llm.base import Engine
from teams_hpc.llm.load import as_embedding_engine, load_engine
from teams_hpc.rewriting.embedding import InstructionEmbedding
from teams_hpc.rewriting.observation import Observer
from teams_hpc.rewriting.operation_policy import (
    MlpPolicy,
    OperationPolicy,
    RoundRobinPolicy,
    UniformPolicy,
)
from teams_hpc.storage.run_dir import RunDir


@dataclass(slots=True, kw_only=True)
class Guide:
    """A policy and what it sees.

    Attributes:
        policy: Chooses operations.
        member: Number of its member, -1 for a baseline.
        observer: What it sees.
        eyes: The instructor, where the policy looks at its hidden states: the expert is another
            model, to which texts look otherwise.
    """

    policy: OperationPolicy
    member: int
    observer: Observer
    eyes: Engine | None = None

    @classmethod
    def load(cls, run_dir: RunDir, config: Config) -> "Guide":
        """The guide that `generate.policy` names.

        Raises:
            CorruptFileError: There is no whole policy.
            InputChangedError: It was trained with the eyes of another model.
            EngineError: That model can't be loaded.
        """
        length = config.policy.episode_length
        blind = Observer(kind="one_hot", episode_length=length)  # the baselines don't look
        if config.generate.policy == "uniform":
            return cls(policy=UniformPolicy(), member=-1, observer=blind)
        if config.generate.policy == "round_robin":
            return cls(policy=RoundRobinPolicy(), member=-1, observer=blind)
        policy = MlpPolicy.load(run_dir.selected_policy)
        eyes = _eyes(run_dir, config, policy) if policy.observation_kind == "embedding" else None
        embedding = None
        if eyes is not None:
            size = int(policy.metadata["embedding_size"])
            embedding = InstructionEmbedding(as_embedding_engine(eyes), size)
        return cls(
            policy=policy,
            member=int(policy.metadata["member"]),
            observer=Observer(
                kind=cast(ObservationKind, policy.observation_kind),
                episode_length=length,
                embedding=embedding,
            ),
            eyes=eyes,
        )

    def engines(self) -> dict[str, dict[str, Any]]:
        """`describe_engine` by role, for the eyes: what they see decides operations, hence rows."""
        return {} if self.eyes is None else {"instructor": describe_engine(self.eyes)}

    def close(self) -> None:
        """Free the instructor, if it was needed."""
        if self.eyes is not None:
            self.eyes.close()


def _eyes(run_dir: RunDir, config: Config, policy: MlpPolicy) -> Engine:
    """The instructor, for a look at its hidden states alone."""
    wanted = policy.metadata.get("embedding_model", "unknown")
    what = f"{run_dir.selected_policy} looks at instructions through the model {wanted[:12]}"
    if not isinstance(config.instructor, TransformersEngineConfig):
        raise InputChangedError(
            f"{what}, but instructor.kind is {config.instructor.kind}; set instructor.* to what "
            "the policy was trained with, or run again with --rerun-from policy"
        )
    found = model_content_id(config.instructor.model)
    if found != wanted:
        raise InputChangedError(
            f"{what}, but instructor.model {config.instructor.model} is {found[:12]}; set it to "
            "the model that the policy was trained with, or run again with --rerun-from policy"
        )
    return load_engine(config.instructor)
