"""The world of the policy: batches, what earns nothing, and how an episode moves on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest

from teams_hpc.config.policy import PolicyConfig
from teams_hpc.config.schema import TemplateEngineConfig
from teams_hpc.errors import EngineError
from teams_hpc.llm.base import Completion, FinishReason, Request, Score, ScoreRequest
from teams_hpc.llm.ledger import Ledger
from teams_hpc.llm.template_engine import TemplateEngine
from teams_hpc.policy.environment import EQUAL_BELOW, Episode, World
from teams_hpc.policy.tally import ZERO_REASONS, Tally, saturated_share
from teams_hpc.rewriting.observation import Observer
from teams_hpc.rewriting.operations import OPERATIONS, Operation
from teams_hpc.rewriting.reviewer import Reviewer
from teams_hpc.rewriting.seeds import Seed, read_seeds

SEEDS = read_seeds(None, None).seeds
SONG = Seed("Sing a song about the sea.", input="four verses")
NEAR = (-0.05, -3.0)
FAR = (-3.0, -0.05)


@dataclass
class Scripted:
    """An engine that rewrites by a function, and judges by another; it counts its batches."""

    text: Callable[[Request], str] = lambda request: f"A new text, number {request.seed}."
    finish: FinishReason = "stop"
    lost: int = 0
    judge: Callable[[str, str], tuple[float, float]] = lambda before, after: FAR
    batches: list[int] = field(default_factory=list)
    scored: list[int] = field(default_factory=list)
    pending: list[Request] = field(default_factory=list)

    content_id = "scripted"
    exactness = "exact"
    is_model = False

    @property
    def num_pending(self) -> int:
        return len(self.pending)

    def add(self, request: Request) -> None:
        self.pending.append(request)

    def step(self) -> list[Completion]:
        pending, self.pending = self.pending, []
        self.batches.append(len(pending))
        return [
            Completion(
                id=request.id,
                text="" if self.finish == "error" else self.text(request),
                finish_reason=self.finish,
                prompt_tokens=3,
                completion_tokens=2,
                error="no route" if self.finish == "error" else "",
                lost=self.lost,
            )
            for request in pending
        ]

    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        self.scored.append(len(requests))
        return [
            Score(
                log_probabilities=self.judge(request.task.instruction, request.task.other),
                prompt_tokens=4,
            )
            for request in requests
        ]

    def close(self) -> None:
        """Nothing to free."""


def world_of(engine: Scripted | TemplateEngine, settings: PolicyConfig | None = None) -> World:
    ledger = Ledger()
    return World(
        settings=settings or PolicyConfig(),
        instructor=engine,  # type: ignore[arg-type]
        reviewer=Reviewer(engine, "likelihood", ledger),  # type: ignore[arg-type]
        ledger=ledger,
        observer=Observer(kind="features", episode_length=6),
    )


def episodes_of(seeds: Sequence[Seed]) -> list[Episode]:
    return [Episode.begin((7, "test", number), seed) for number, seed in enumerate(seeds)]


def test_a_step_is_one_batch_to_each_engine_and_every_call_is_counted() -> None:
    engine = Scripted()
    world = world_of(engine)
    episodes = episodes_of(SEEDS[:20])
    for _ in range(3):
        world.step(episodes, [number % 6 for number in range(20)])
    assert (engine.batches, engine.scored) == ([20] * 3, [20] * 3)
    instructor, reviewer = world.ledger.total("instructor"), world.ledger.total("reviewer")
    assert (instructor.calls, instructor.prompt_tokens, instructor.completion_tokens) == (
        60,
        180,
        120,
    )
    assert (reviewer.calls, reviewer.prompt_tokens) == (60, 240)


def test_lost_tries_of_the_instructor_are_in_doubt() -> None:
    world = world_of(Scripted(lost=2))
    world.step(episodes_of(SEEDS[:5]), [0] * 5)
    instructor = world.ledger.total("instructor")
    assert (instructor.calls, instructor.in_doubt) == (5, 10)
    assert world.ledger.total("reviewer").in_doubt == 0


def test_outcomes_do_not_depend_on_the_batch() -> None:
    world = world_of(TemplateEngine(TemplateEngineConfig()))
    together, apart = episodes_of(SEEDS[:12]), episodes_of(SEEDS[:12])
    for step in range(4):
        operations = [(number + step) % 6 for number in range(12)]
        first = world.step(together, operations)
        second = [world.step([apart[i]], [operations[i]])[0] for i in reversed(range(12))]
        assert first == second[::-1]
    assert together == apart
    assert len({text for episode in together for text, _ in episode.texts}) > 30


@pytest.mark.parametrize(
    ("text", "finish", "zero"),
    [
        ("", "stop", "unusable"),
        ("sing a song about the sea!", "stop", "unusable"),
        ("Sing a song about the sea and then", "length", "unusable"),
        ("word " * 500, "stop", "unusable"),
        ("Here is the rewritten prompt: sing of tides.", "stop", "copied_prompt"),
    ],
)
def test_garbage_earns_nothing_and_the_parent_stays(
    text: str, finish: FinishReason, zero: str
) -> None:
    engine = Scripted(text=lambda request: text, finish=finish)
    (episode,) = episodes_of([SONG])
    (outcome,) = world_of(engine).step([episode], [0])
    assert (outcome.reward, outcome.zero, outcome.p_not_equal) == (0.0, zero, None)
    assert episode.texts == [(SONG.instruction, SONG.input)]
    assert episode.history.counts[0] == 1
    assert sum(engine.scored) == 0


def test_going_back_and_forth_between_two_texts_earns_the_new_one_once() -> None:
    other = "Describe how the tides shape a harbour town in winter."

    def swing(request: Request) -> str:
        return other if request.task.instruction == SONG.instruction else SONG.instruction

    (episode,) = episodes_of([SONG])
    world = world_of(Scripted(text=swing))
    outcomes = [world.step([episode], [1])[0] for _ in range(6)]
    assert outcomes[0].reward > 0.9
    assert [outcome.reward for outcome in outcomes[1:]] == [0.0] * 5
    assert {outcome.zero for outcome in outcomes[1:]} == {"repeats_earlier"}
    # It moves all the same, because generation, which has no such rule, would.
    assert len(episode.texts) == 7


def test_an_equal_rewrite_is_paid_its_probability_but_is_no_parent() -> None:
    (episode,) = episodes_of([SONG])
    (outcome,) = world_of(Scripted(judge=lambda before, after: NEAR)).step([episode], [2])
    assert 0.0 < outcome.reward == outcome.p_not_equal < EQUAL_BELOW
    assert not outcome.is_accepted
    assert episode.texts == [(SONG.instruction, SONG.input)]


def test_breadth_leaves_the_input_behind_and_others_carry_it() -> None:
    for operation, expected in ((Operation.DEEPENING, "four verses"), (Operation.BREADTH, "")):
        (episode,) = episodes_of([SONG])
        world_of(Scripted()).step([episode], [OPERATIONS.index(operation)])
        assert episode.texts[-1][1] == expected


def test_against_every_earlier_text_the_smallest_counts() -> None:
    """The third text is far from its parent but equal to the seed, says the reviewer."""
    engine = Scripted(
        judge=lambda before, after: (
            NEAR if before == SONG.instruction and "second" in after else FAR
        )
    )
    texts = iter(["The first rewrite of it.", "Then comes a second one."])
    engine.text = lambda request: next(texts)
    settings = PolicyConfig(compare_with="every_earlier", reward="binary")
    (episode,) = episodes_of([SONG])
    world = world_of(engine, settings)
    outcomes = [world.step([episode], [0])[0] for _ in range(2)]
    assert [outcome.reward for outcome in outcomes] == [1.0, 0.0]
    assert outcomes[1].is_accepted
    assert engine.scored == [1, 2]


def test_the_bound_on_calls_is_reached_and_never_passed() -> None:
    for compared in ("parent", "every_earlier"):
        settings = PolicyConfig(compare_with=compared, episode_length=4)  # type: ignore[arg-type]
        world = world_of(Scripted(), settings)
        episodes = episodes_of(SEEDS[:5])
        for _ in range(settings.episode_length):
            world.step(episodes, [3] * 5)
        bound = world.most_calls(5)
        for role in ("instructor", "reviewer"):
            assert bound.total(role).in_doubt == world.ledger.total(role).calls
            assert bound.total(role).calls == 0


def test_an_instructor_that_always_fails_is_an_error_and_not_a_lesson() -> None:
    world = world_of(Scripted(finish="error"))
    with pytest.raises(EngineError, match="no route"):
        world.step(episodes_of(SEEDS[:2]), [0, 0])


def test_a_tally_counts_what_happened() -> None:
    world = world_of(TemplateEngine(TemplateEngineConfig()))
    episodes = episodes_of(SEEDS)
    tally = Tally()
    for step in range(3):
        operations = [step] * len(episodes)
        tally.add(operations, world.step(episodes, operations))
    for step, counts in enumerate(tally.operations_by_step):
        assert counts[step] == sum(counts) == len(SEEDS)
    judged = len(tally.verdicts)
    assert tuple(tally.zero_reasons) == ZERO_REASONS
    assert judged + sum(tally.zero_reasons.values()) == 3 * len(SEEDS)
    assert sum(map(sum, tally.rewards)) == pytest.approx(sum(tally.verdicts))
    accepted = sum(len(episode.texts) - 1 for episode in episodes)
    assert tally.accepted_share == accepted / (3 * len(SEEDS))
    assert saturated_share([0.01, 0.5, 0.99, 0.98]) == 0.5
