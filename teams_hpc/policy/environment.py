"""The world a policy acts in: texts, one operation each a step, and what the reviewer makes of it.

Many episodes step together: one batch of rewrites to the instructor, one batch of pairs to the
reviewer. Training and selection share this module, and it moves on as generation does: a rewrite
becomes the next parent if rules 1 and 4 would keep it, else the next step starts from the same
parent, so that the policy is trained on the texts it will meet. The one difference is that
rules 2 and 3, on answers, have no part here: the expert is never asked.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from teams_hpc.config.policy import PolicyConfig
from teams_hpc.errors import EngineError
from teams_hpc.llm.base import Completion, Engine, complete_all
from teams_hpc.llm.ledger import Ledger
from teams_hpc.rewriting.identity import keyed_seed
from teams_hpc.rewriting.observation import History, Observer
from teams_hpc.rewriting.operations import (
    OPERATIONS,
    carried_input,
    clean_rewrite,
    rewrite_request,
)
from teams_hpc.rewriting.reviewer import (
    Pair,
    Reviewer,
    Verdict,
    ZeroReason,
    refuse_if_all_failed,
    reward,
    zero_reason,
)
from teams_hpc.rewriting.seeds import Seed

EQUAL_BELOW = 0.5
"""A rewrite whose P(Not Equal) to its parent is below this does not become the next parent."""

ENGINE_ERROR = "engine_error"
"""Beside the values of `ZeroReason`: instructor or reviewer gave up on this step."""

Key = tuple[str | int, ...]


@dataclass(slots=True, kw_only=True)
class Episode:
    """One chain of rewrites, from a seed.

    Attributes:
        key: What its random numbers are keyed by.
        texts: The seed and every accepted rewrite, with their inputs; the last is the parent.
        history: Operations tried so far, in vain or not.
    """

    key: Key
    texts: list[tuple[str, str]]
    history: History = field(default_factory=History.start)

    @classmethod
    def begin(cls, key: Key, seed: Seed) -> "Episode":
        return cls(key=key, texts=[(seed.instruction, seed.input)])


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one operation on one text came to.

    Attributes:
        reward: In [0, 1].
        zero: Why it earned nothing: a `ZeroReason`, or `ENGINE_ERROR`; "none" if it was judged.
        p_not_equal: The verdict against the parent; None if none was asked for.
        is_accepted: Whether the rewrite is the next parent.
    """

    reward: float
    zero: str
    p_not_equal: float | None
    is_accepted: bool


@dataclass(frozen=True, slots=True)
class _Draft:
    text: str
    input: str
    zero: str

    @property
    def is_usable(self) -> bool:
        """A repeated text earns nothing, but its verdict says what the next parent is."""
        return self.zero in (ZeroReason.NONE, ZeroReason.REPEATS_EARLIER)


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """Instructor and reviewer with the rules of reward; holds no state between steps.

    Args:
        settings: `policy` of the configuration.
        instructor: Rewrites.
        reviewer: Judges; it counts its calls in its own ledger.
        ledger: Where the instructor's calls are counted.
        observer: What the policy sees of an episode; looking costs no calls.
    """

    settings: PolicyConfig
    instructor: Engine
    reviewer: Reviewer
    ledger: Ledger
    observer: Observer

    def observation(self, episode: Episode) -> NDArray[np.float32]:
        """What the policy sees now, (n,)."""
        return self.observer.observe(*episode.texts[-1], episode.history)

    def step(self, episodes: Sequence[Episode], operations: Sequence[int]) -> list[Outcome]:
        """Apply one operation to each episode, in one batch; the episodes move on.

        Raises:
            EngineError: The instructor gave up on every request of the batch, or the reviewer on
                every pair, or an engine failed.
        """
        drafts = self._drafts(episodes, operations)
        verdicts = self._judge(episodes, drafts)
        outcomes = []
        for episode, operation, draft, judged in zip(
            episodes, operations, drafts, verdicts, strict=True
        ):
            outcome = self._outcome(draft, judged)
            if outcome.is_accepted:
                episode.texts.append((draft.text, draft.input))
            episode.history = episode.history.after(int(operation), is_kept=outcome.is_accepted)
            outcomes.append(outcome)
        return outcomes

    def _drafts(self, episodes: Sequence[Episode], operations: Sequence[int]) -> list[_Draft]:
        requests = [
            rewrite_request(
                OPERATIONS[operation],
                *episode.texts[-1],
                request_id=f"{number}/{episode.history.step}",
                seed=keyed_seed(*episode.key, episode.history.step, "rewrite"),
            )
            for number, (episode, operation) in enumerate(zip(episodes, operations, strict=True))
        ]
        completions = complete_all(self.instructor, requests)
        self.ledger.of("instructor", self.instructor.content_id).count(completions)
        if all(completion.finish_reason == "error" for completion in completions):
            raise EngineError(
                f"the instructor failed on all {len(completions)} requests of a step: "
                f"{completions[0].error}; nothing can be learnt from that, see instructor.*"
            )
        return [
            self._draft(episode, operation, completion)
            for episode, operation, completion in zip(
                episodes, operations, completions, strict=True
            )
        ]

    def _draft(self, episode: Episode, operation: int, completion: Completion) -> _Draft:
        text = clean_rewrite(completion.text)
        zero: str = zero_reason(
            text,
            [instruction for instruction, _ in episode.texts],
            is_cut_off=completion.finish_reason == "length",
            max_words=self.settings.max_words,
        )
        if completion.finish_reason == "error":
            zero = ENGINE_ERROR
        return _Draft(text, carried_input(OPERATIONS[operation], episode.texts[-1][1]), zero)

    def _judge(self, episodes: Sequence[Episode], drafts: Sequence[_Draft]) -> list[list[Verdict]]:
        """Verdicts of each draft, against the parent last; none for an unusable draft."""
        pairs: list[Pair] = []
        counts = []
        for number, (episode, draft) in enumerate(zip(episodes, drafts, strict=True)):
            compared = episode.texts if self._compares_all else episode.texts[-1:]
            compared = compared if draft.is_usable else []
            counts.append(len(compared))
            pairs += [
                Pair(
                    before=before,
                    before_input=before_input,
                    after=draft.text,
                    after_input=draft.input,
                    seed=keyed_seed(*episode.key, episode.history.step, "judge", place),
                    request_id=f"{number}/{episode.history.step}/{place}",
                )
                for place, (before, before_input) in enumerate(compared)
            ]
        verdicts = self.reviewer.judge(pairs)
        refuse_if_all_failed(verdicts)
        left = iter(verdicts)
        return [[next(left) for _ in range(count)] for count in counts]

    @property
    def _compares_all(self) -> bool:
        return self.settings.compare_with == "every_earlier"

    def _outcome(self, draft: _Draft, verdicts: Sequence[Verdict]) -> Outcome:
        if not verdicts:
            return Outcome(reward=0.0, zero=draft.zero, p_not_equal=None, is_accepted=False)
        if any(verdict.error for verdict in verdicts):
            return Outcome(reward=0.0, zero=ENGINE_ERROR, p_not_equal=None, is_accepted=False)
        p_not_equal = verdicts[-1].p_not_equal
        return Outcome(
            reward=reward(verdicts, ZeroReason(draft.zero), self.settings.reward),
            zero=draft.zero,
            p_not_equal=p_not_equal,
            is_accepted=p_not_equal >= EQUAL_BELOW,
        )

    def most_calls(self, num_episodes: int) -> Ledger:
        """Upper bound of the calls of whole episodes, each sent once, as calls in doubt."""
        length = self.settings.episode_length
        num_pairs = length * (length + 1) // 2 if self._compares_all else length
        bound = Ledger()
        bound.of("instructor", self.instructor.content_id).in_doubt += num_episodes * length
        bound.of("reviewer", self.reviewer.engine.content_id).in_doubt += num_episodes * num_pairs
        return bound
