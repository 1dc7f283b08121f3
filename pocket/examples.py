"""Examples of the three roles' work: the suite's own prompts, and what the grammar would reply."""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from pocket.instructions import Text, make_text, noun, odd_clause
from teams_hpc.llm.grammar import answer_phrases as phrases
from teams_hpc.llm.grammar.judge import p_not_equal
from teams_hpc.llm.grammar.slots import Draws, Slots
from teams_hpc.llm.grammar.topics import topics
from teams_hpc.llm.grammar.world import is_fruitful, join, read, rewrite
from teams_hpc.rewriting.operations import (
    OPERATIONS,
    Operation,
    answer_request,
    carried_input,
    rewrite_request,
)
from teams_hpc.rewriting.reviewer import OPTIONS, Pair, verdict_messages

_MOST_STEPS = 6
_P_FRUITFUL = 0.4
_P_BREADTH = 0.2
_P_KEEP_POINTLESS = 0.5
_P_REWRITE, _P_ANSWER = 0.9, 0.12
_NUM_VERDICTS = (1, 2)


@dataclass(frozen=True, slots=True)
class Example:
    """One prompt with the reply to learn.

    Attributes:
        prompt: What the model is given.
        reply: What it should say.
        num_repeated: Characters at the end of the prompt that nearly repeat earlier ones: they are
            learnt too, since a model that can't copy can't compare either.
    """

    prompt: str
    reply: str
    num_repeated: int = 0


def rewrite_example(operation: Operation, text: Text, reply: str) -> Example:
    """The instructor's (and expert's) work."""
    request = rewrite_request(operation, text.instruction, text.input, request_id="", seed=0)
    return Example(request.messages[0].content, reply)


def verdict_example(pair: Pair) -> Example:
    """The reviewer's; the truth is the grammar's."""
    p, prompt = p_not_equal(pair.before, pair.after), verdict_messages(pair)[0].content
    start = prompt.rindex(pair.after) if _are_near(pair) else len(prompt)
    return Example(prompt, OPTIONS[p > 0.5], len(prompt) - start)


def _are_near(pair: Pair) -> bool:
    """Whether the second text has most words of the first."""
    words = set(pair.before.split())
    return len(words.intersection(pair.after.split())) > len(words) / 2


def answer_example(text: Text, rng: random.Random) -> Example:
    """The expert's."""
    request = answer_request(text.instruction, text.input, request_id="", seed=0)
    return Example(request.messages[0].content, short_answer(text.instruction, rng.getrandbits(62)))


def short_answer(instruction: str, seed: int) -> str:
    """Two or three sentences about the instruction's own topics."""
    draws = Draws(seed, "short answer", instruction)
    reading = read(instruction)
    slots = Slots(draws, topics(reading.core))
    slots["given"] = "those of the task"
    opening = draws.of(phrases.OPENINGS[reading.kind])
    bodies = draws.sample(phrases.BODIES[reading.kind], 1 + draws.below(2))
    last = draws.of(phrases.CLOSINGS)
    if reading.applied:
        last = draws.of(phrases.FOR_ADDITION[draws.of(sorted(reading.applied))])
    if reading.kind == "mathematics" or "increase_reasoning_steps" in reading.applied:
        lines = [f"{number}. {body}" for number, body in enumerate(bodies, start=1)]
        return slots.fill("\n".join([opening, *lines]))
    return slots.fill(" ".join([opening, bodies[0], *([last] if draws.below(2) else [])]))


def make_examples(seed: int, *, held_out: bool = False) -> Iterator[Example]:
    """The examples of one chain of rewrites; the same seed gives the same."""
    rng = random.Random(seed)
    text = make_text(rng, held_out=held_out)
    for _ in range(rng.randint(1, _MOST_STEPS)):
        operation = _choose(rng, text.instruction)
        seed = rng.getrandbits(62)
        reply = rewrite(str(operation), text.instruction, seed)
        after = Text(reply, carried_input(operation, text.input))
        if rng.random() < _P_REWRITE:
            yield rewrite_example(operation, text, reply)
        for _ in range(rng.choice(_NUM_VERDICTS)):
            yield verdict_example(make_pair(rng, text, after, held_out=held_out))
        if rng.random() < _P_ANSWER:
            yield answer_example(text, rng)
        if is_fruitful(str(operation), text.instruction) or rng.random() < _P_KEEP_POINTLESS:
            text = after


def _choose(rng: random.Random, instruction: str) -> Operation:
    fruitful = [each for each in OPERATIONS if is_fruitful(str(each), instruction)]
    if Operation.BREADTH in fruitful and rng.random() < _P_BREADTH:
        return Operation.BREADTH
    return rng.choice(fruitful if fruitful and rng.random() < _P_FRUITFUL else OPERATIONS)


def make_pair(rng: random.Random, text: Text, after: Text, *, held_out: bool = False) -> Pair:
    """Mostly a text and its rewrite; else another pair that a reviewer may meet."""
    chance = rng.random()
    if chance < 0.42:
        return _pair(text, after)
    if chance < 0.54:
        return _pair(text, text)
    if chance < 0.61:
        return _pair(after, text)
    if chance < 0.83:
        return _pair(text, _readable_text(rng, held_out))
    if chance < 0.95:
        changed = _change(rng, after.instruction, held_out=held_out)
        return _pair(text, Text(changed, after.input))
    return _pair(text, Text(_garbage(rng, text.instruction), text.input))


def _readable_text(rng: random.Random, held_out: bool) -> Text:
    """Some other text; words in no order would be garbage to the grammar."""
    while True:
        text = make_text(rng, held_out=held_out)
        if p_not_equal("", text.instruction) > 0.5:
            return text


def _pair(before: Text, after: Text) -> Pair:
    return Pair(
        before=before.instruction,
        after=after.instruction,
        before_input=before.input,
        after_input=after.input,
    )


def _change(rng: random.Random, instruction: str, *, held_out: bool) -> str:
    """Another wish, other words, fewer words, or a cut."""
    chance, words = rng.random(), instruction.split(" ")
    if chance < 0.4:
        return join(instruction, odd_clause(rng, held_out=held_out))
    if chance < 0.7:
        for _ in range(rng.randint(1, 4)):
            words[rng.randrange(len(words))] = noun(rng, held_out=held_out)
        return " ".join(words)
    if chance < 0.85:
        left = [word for word in words if rng.random() < 0.85]
        return " ".join(left or words[:1])
    return " ".join(words[: rng.randint(1, len(words))])


def _garbage(rng: random.Random, instruction: str) -> str:
    words = instruction.split(" ")
    if rng.random() < 0.5:
        return " ".join([rng.choice(words)] * rng.randint(3, 40))
    return " ".join(noun(rng) for _ in range(rng.randint(5, 25)))
