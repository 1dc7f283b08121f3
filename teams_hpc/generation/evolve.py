"""The state machine of one chain: what it wants next, what it does with the reply, its rows.

    choose an operation -> rewrite -> checks -> verdict -> [answer -> checks] -> next step

An eliminated or failed step leaves the parent as it was. Nothing in here does I/O or knows of other
chains: every choice and every sampler seed is keyed by the record's id, and what the policy sees is
a function of the chain's own text and history.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from teams_hpc.config.schema import GenerateConfig
from teams_hpc.generation.plan import ChainKey
from teams_hpc.llm.base import Completion, Request
from teams_hpc.rewriting.elimination import (
    REASONS,
    Reason,
    check_answer,
    check_rewrite,
    check_verdict,
)
from teams_hpc.rewriting.identity import keyed_seed, keyed_uniform, record_id
from teams_hpc.rewriting.observation import History, Observer
from teams_hpc.rewriting.operation_policy import OperationPolicy, choose
from teams_hpc.rewriting.operations import (
    OPERATIONS,
    answer_request,
    carried_input,
    clean_rewrite,
    count_words,
    num_added,
    prompt_hash,
    rewrite_request,
)
from teams_hpc.rewriting.reviewer import Pair, Verdict
from teams_hpc.rewriting.splits import SPLITS
from teams_hpc.storage.shards import Finish, Status

Row = dict[str, Any]
Want = Literal["rewrite", "verdict", "answer", "nothing"]

_SAME_REQUEST = ("record_id", "operation", "model", "prompt_hash", "sampler_seed")
_OF_ANSWER = ("response", "answer_finish", "status", "reason", "detail")
_FINISH = {"stop": Finish.STOP, "length": Finish.LENGTH, "error": Finish.ERROR}
_STATUS = dict.fromkeys(REASONS, Status.ELIMINATED) | {
    Reason.NONE: Status.KEPT,
    Reason.ENGINE_ERROR: Status.FAILED,
}


def call_key(record: str, purpose: str, attempt: int = 0) -> str:
    """Identity of one call: what it is for, in which step, and which try it is."""
    return f"{record}/{purpose}/{attempt}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Steering:
    """What all chains of a run share.

    Attributes:
        run_seed: Keys every random number.
        settings: `generate` of the configuration.
        policy: Chooses operations.
        member: Number of the policy member, -1 for a baseline.
        observer: What the policy sees.
        expert: Content id of the expert.
    """

    run_seed: int
    settings: GenerateConfig
    policy: OperationPolicy
    member: int
    observer: Observer
    expert: str


@dataclass(slots=True)
class Chain:
    """One chain in the making; `wants` says what it needs to go on.

    Args:
        key: Which chain.
        steering: What it shares with others.
        earlier: In a retry, the rows of the earlier attempt by step.
    """

    key: ChainKey
    steering: Steering
    earlier: Mapping[int, Row] = field(default_factory=dict)
    wants: Want = "nothing"
    rows: list[Row] = field(default_factory=list)
    _instruction: str = ""
    _input: str = ""
    _counted: dict[str, Counter[str]] = field(default_factory=dict)
    _parent_id: str = ""
    _history: History = field(default_factory=History.start)
    _blank: Row = field(default_factory=dict)
    _row: Row = field(default_factory=dict)
    _is_last_answer: bool = False
    _answers: dict[str, Row] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._instruction = self.key.seed.instruction
        self._input = self.key.seed.input
        self._blank = self._blank_row()
        self._begin_step()

    @property
    def record_id(self) -> str:
        """Id of the step in the making."""
        return str(self._row["record_id"])

    def request(self) -> Request:
        """The request it wants answered: a rewrite or an answer."""
        record = self.record_id
        seed, request_id = keyed_seed(record, self.wants), call_key(record, self.wants)
        if self.wants == "rewrite":
            request = rewrite_request(
                OPERATIONS[self._row["operation"]],
                self._instruction,
                self._input,
                request_id=request_id,
                seed=seed,
            )
            self._row |= {"prompt_hash": prompt_hash(request), "sampler_seed": seed}
            return request
        return answer_request(
            self._row["instruction"], self._row["input"], request_id=request_id, seed=seed
        )

    def pair(self) -> Pair:
        """The comparison it wants judged."""
        record = self.record_id
        return Pair(
            before=self._instruction,
            before_input=self._input,
            after=self._row["instruction"],
            after_input=self._row["input"],
            seed=keyed_seed(record, "verdict"),
            request_id=call_key(record, "verdict"),
        )

    def take_completion(self, completion: Completion) -> None:
        """Go on with the reply to `request`."""
        self._row["prompt_tokens"] += completion.prompt_tokens
        self._row["completion_tokens"] += completion.completion_tokens
        if completion.finish_reason == "error":
            self._row["detail"] = completion.error
        if self.wants == "rewrite":
            self._take_rewrite(completion)
        else:
            self._take_answer(completion)

    def take_verdict(self, verdict: Verdict) -> None:
        """Go on with the reviewer's verdict."""
        self._row["verdict_score"] = verdict.p_not_equal
        if not verdict.is_parsed:
            self._row["detail"] = "the reviewer's answer was neither option"
        reason = check_verdict(verdict.p_not_equal, self.steering.settings.equal_threshold)
        if reason is not Reason.NONE:
            self._end_step(reason)
        elif self.steering.settings.answer == "every":
            self.wants = "answer"
        else:
            self._end_step(Reason.NONE)

    def recall(self) -> None:
        """Go on as far as the earlier attempt answers what it wants, request for request.

        A step whose prompt is the same as then is taken over as it was; of one that failed, what
        had come back before it failed. The rest is asked anew.
        """
        while self.earlier and self.wants in ("rewrite", "answer") and self._recall_one():
            pass

    def fail(self, error: str) -> None:
        """End the step: the reviewer could not judge it."""
        self._row["detail"] = error
        self._end_step(Reason.ENGINE_ERROR)

    def _recall_one(self) -> bool:
        """Whether the earlier attempt had what it wants; then it has been taken."""
        if self.wants == "answer":
            answer = self._answers.get(self.record_id) if self._is_last_answer else None
            if answer is not None:
                self._row |= answer
                self.wants = "nothing"
            return answer is not None
        earlier = self.earlier.get(self._row["step"])
        if earlier is None or earlier["rewrite_finish"] in (Finish.NONE, Finish.ERROR):
            return False
        self.request()
        if any(self._row[name] != earlier[name] for name in _SAME_REQUEST):
            return False
        self._row = {**earlier, "parent_id": self._row["parent_id"]}
        if self.steering.settings.answer == "last" and earlier["answer_finish"] != Finish.NONE:
            self._put_answer_aside()
        if self._row["status"] != Status.FAILED:
            self._end_step(REASONS[self._row["reason"]])
            return True
        has_verdict = not math.isnan(self._row["verdict_score"])
        self._row |= {"detail": "", "answer_finish": Finish.NONE}
        self._row["reason"] = REASONS.index(Reason.NONE)
        self.wants = "answer" if has_verdict else "verdict"
        return False

    def _put_answer_aside(self) -> None:
        """With `answer: last`: make the row what it was before it was answered."""
        if self._row["answer_finish"] != Finish.ERROR:
            self._answers[self.record_id] = {name: self._row[name] for name in _OF_ANSWER}
        self._row |= {
            "response": "",
            "answer_finish": Finish.NONE,
            "status": Status.KEPT,
            "reason": REASONS.index(Reason.NONE),
            "detail": "",
        }

    def _blank_row(self) -> Row:
        """What all rows of the chain begin as."""
        return {
            "record_id": "",
            "seed_id": self.key.seed.id,
            "split": SPLITS.index(self.key.split),
            "trajectory": self.key.trajectory,
            "step": 0,
            "parent_id": "",
            "operation": 0,
            "instruction": "",
            "input": "",
            "response": "",
            "verdict_score": math.nan,
            "status": Status.FAILED,
            "reason": REASONS.index(Reason.NONE),
            "rewrite_finish": Finish.NONE,
            "answer_finish": Finish.NONE,
            "prompt_tokens": 0,
            "completion_tokens": 0,
            "model": self.steering.expert,
            "prompt_hash": "",
            "sampler_seed": 0,
            "policy_member": self.steering.member,
            "added_words": 0,
            "detail": "",
        }

    def _begin_step(self) -> None:
        steering, step = self.steering, self._history.step
        seed = self.key.seed
        record = record_id(
            steering.run_seed, seed.instruction, seed.input, self.key.trajectory, step
        )
        observation = steering.observer.observe(self._instruction, self._input, self._history)
        operation = choose(
            steering.policy.probabilities(observation, self._history),
            keyed_uniform(record, "operation"),
            steering.settings.action,
        )
        self._row = {
            **self._blank,
            "record_id": record,
            "step": step,
            "parent_id": self._parent_id,
            "operation": operation,
        }
        self.wants = "rewrite"

    def _take_rewrite(self, completion: Completion) -> None:
        operation = OPERATIONS[self._row["operation"]]
        settings = self.steering.settings
        text = clean_rewrite(completion.text)
        old = self._counted.get(self._instruction) or count_words(self._instruction)
        new = count_words(text)
        self._counted = {self._instruction: old, text: new}
        self._row |= {
            "instruction": text,
            "input": carried_input(operation, self._input),
            "rewrite_finish": _FINISH[completion.finish_reason],
            "added_words": num_added(old, new),
        }
        reason = check_rewrite(
            operation,
            self._instruction,
            text,
            completion,
            max_words=settings.max_words,
            enforce_added_words=settings.enforce_added_words,
        )
        if reason is Reason.NONE:
            self.wants = "verdict"
        else:
            self._end_step(reason)

    def _take_answer(self, completion: Completion) -> None:
        self._row["response"] = completion.text.strip()
        self._row["answer_finish"] = _FINISH[completion.finish_reason]
        self._end_step(check_answer(completion))

    def _end_step(self, reason: Reason) -> None:
        self._row["status"] = _STATUS[reason]
        self._row["reason"] = REASONS.index(reason)
        if self._is_last_answer:
            self.wants = "nothing"
            return
        self.rows.append(self._row)
        is_kept = reason is Reason.NONE
        if is_kept:
            self._instruction, self._input = self._row["instruction"], self._row["input"]
            self._parent_id = self._row["record_id"]
        self._history = self._history.after(self._row["operation"], is_kept=is_kept)
        if self._history.step < self.steering.settings.num_steps:
            self._begin_step()
        else:
            self._finish()

    def _finish(self) -> None:
        """With `answer: last`, the last kept instruction is answered now."""
        self.wants = "nothing"
        kept = [row for row in self.rows if row["status"] == Status.KEPT]
        if self.steering.settings.answer == "last" and kept:
            self._row = kept[-1]
            self._is_last_answer = True
            self.wants = "answer"
