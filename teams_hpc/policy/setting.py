"""What both stages of the policy start from: seeds by split, engines, and the world over them."""

from collections.abc import Iterator
from contextlib import contextmanager

from teams_hpc.config import Config
from teams_hpc.config.policy import PolicyConfig
from teams_hpc.llm.base import Engine
from teams_hpc.llm.ledger import Ledger
from teams_hpc.llm.load import as_embedding_engine, load_engines
from teams_hpc.policy.environment import World
from teams_hpc.rewriting.embedding import InstructionEmbedding
from teams_hpc.rewriting.observation import Observer
from teams_hpc.rewriting.reviewer import Reviewer
from teams_hpc.rewriting.seeds import Seed, read_seeds
from teams_hpc.rewriting.splits import SPLITS, split_seeds


def seeds_by_split(config: Config) -> dict[str, list[Seed]]:
    """The seeds of each split, in file order; a split may be empty.

    Raises:
        SeedError: The seed file is wrong.
    """
    seeds = read_seeds(config.seeds.path, config.seeds.limit).seeds
    split_of = split_seeds(seeds, config.seeds, config.seed)
    return {split: [seed for seed in seeds if split_of[seed.id] == split] for split in SPLITS}


@contextmanager
def loaded_engines(config: Config) -> Iterator[tuple[Engine, Engine]]:
    """Instructor and reviewer, closed at the end; one engine if their settings are equal.

    Raises:
        EngineError: A model can't be loaded.
    """
    instructor, reviewer = load_engines(config.instructor, config.reviewer)
    try:
        yield instructor, reviewer
    finally:
        instructor.close()
        if reviewer is not instructor:
            reviewer.close()


def make_observer(settings: PolicyConfig, instructor: Engine) -> Observer:
    """What members with these settings see.

    Raises:
        EngineError: The instructor has no hidden states to show, or useless ones.
    """
    embedding = None
    if settings.observation == "embedding":
        embedding = InstructionEmbedding(as_embedding_engine(instructor), settings.embedding_size)
    return Observer(
        kind=settings.observation, episode_length=settings.episode_length, embedding=embedding
    )


def build_world(
    config: Config, engines: tuple[Engine, Engine], ledger: Ledger, observer: Observer | None = None
) -> World:
    """A world whose calls are counted in `ledger`; without observer, for policies that don't look.

    Rules of reward and episodes are the same for all members; what else variants set is no concern
    of the world.
    """
    instructor, reviewer = engines
    blind = Observer(kind="one_hot", episode_length=config.policy.episode_length)
    return World(
        settings=config.policy,
        observer=observer or blind,
        instructor=instructor,
        reviewer=Reviewer(reviewer, config.reviewer.verdict, ledger),
        ledger=ledger,
    )
