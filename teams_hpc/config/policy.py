"""The part `policy` of the configuration, and how its variants make members."""

from collections import Counter
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, model_validator

from teams_hpc.config.section import Count, NotNegative, Positive, Probability, Section

ObservationKind = Literal["features", "one_hot", "embedding"]


class PolicyVariant(Section):
    """Another way to train: what it sets takes the place of `policy`'s own; null: as there."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,39}$")]
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = Field(
        None, description="takes the place of the run's seed for its members"
    )
    observation: ObservationKind | None = None
    embedding_size: Count | None = None
    target_kl: Positive | None = None
    critic_learning_rate: Positive | None = None
    critic_updates: Count | None = None
    gamma: Probability | None = None
    gae_lambda: Probability | None = None
    cg_damping: NotNegative | None = None
    hidden_size: Count | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberPlan:
    """One array member.

    Attributes:
        variant: Its variant's name; empty without variants.
        number: Which of the variant's members; with the seed it keys all random numbers, so that
            variants are compared under the same luck.
        seed: The variant's own seed; None: the run's.
        settings: `policy` with the variant's values, and without variants.
    """

    variant: str
    number: int
    seed: int | None
    settings: "PolicyConfig"


class PolicyConfig(Section):
    """Policy training: TRPO over six operations. Constants as published unless said."""

    num_members: Count = Field(
        4, description="independently seeded policies (of each variant); the best is chosen"
    )
    variants: tuple[PolicyVariant, ...] = Field(
        (), description="named settings, each trained with num_members seeds; empty: one way"
    )
    iterations: Count = Field(100, description="rollout and update cycles of each member")
    num_envs: Count = Field(32, description="episodes side by side, one batch of LLM calls a step")
    episode_length: Count = Field(6, description="operations in an episode")
    observation: ObservationKind = Field(
        "features",
        description="one_hot: the last operation alone, as published; embedding: history and the "
        "instruction in the instructor's hidden states",
    )
    embedding_size: Count = Field(32, description="numbers that an embedding is projected to")
    reward: Literal["probability", "binary"] = Field(
        "probability", description="P(Not Equal), or (as published) 1 if above a half, else 0"
    )
    compare_with: Literal["parent", "every_earlier"] = "parent"
    max_words: Count = Field(400, description="a longer rewrite earns nothing")
    gamma: Probability = 0.995
    gae_lambda: Probability = 0.97
    target_kl: Positive = 0.01
    cg_damping: NotNegative = 0.1
    cg_max_steps: Count = 10
    line_search_max_iter: Count = 10
    critic_learning_rate: Positive = 1e-3
    critic_updates: Count = Field(10, description="passes over a rollout for the value function")
    hidden_size: Count = Field(64, description="width of both hidden layers")
    num_eval_episodes: Count = Field(
        2, description="episodes for each seed when members are chosen and reported"
    )
    num_bootstrap: Annotated[int, Field(ge=100)] = 2000

    @model_validator(mode="after")
    def _has_advantages_to_compare(self) -> "PolicyConfig":
        if self.num_envs * self.episode_length < 2:
            raise ValueError(
                "num_envs 1 and episode_length 1 give one step a rollout, of which nothing can be "
                "learnt; raise num_envs"
            )
        return self

    @model_validator(mode="after")
    def _variants_have_names_of_their_own(self) -> "PolicyConfig":
        counts = Counter(variant.name for variant in self.variants)
        repeated = [name for name, count in counts.items() if count > 1]
        if repeated:
            raise ValueError(f"two variants are called {repeated[0]!r}; each needs its own name")
        return self

    @property
    def num_tasks(self) -> int:
        """Members of all variants: the size of the array."""
        return self.num_members * max(1, len(self.variants))

    def member(self, index: int) -> MemberPlan:
        """Member `index` of the array: all members of the first variant come first."""
        which, number = divmod(index, self.num_members)
        if not self.variants:
            return MemberPlan(variant="", number=index, seed=None, settings=self)
        variant = self.variants[which]
        own = variant.model_dump(exclude={"name", "seed"}, exclude_none=True)
        return MemberPlan(
            variant=variant.name,
            number=number,
            seed=variant.seed,
            settings=self.model_copy(update={**own, "variants": ()}),
        )

    @property
    def uses_embedding(self) -> bool:
        """Whether a member looks at embeddings."""
        members = (self.member(index) for index in range(0, self.num_tasks, self.num_members))
        return any(member.settings.observation == "embedding" for member in members)
