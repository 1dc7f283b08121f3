"""Answers: grounded in the words of the instruction, shaped by its kind and its additions."""

import re

from teams_hpc.llm.grammar import answer_phrases as phrases
from teams_hpc.llm.grammar.slots import Draws, Slots
from teams_hpc.llm.grammar.topics import topics
from teams_hpc.llm.grammar.world import Reading, read

_NUMBER = re.compile(r"\d+(?:[.,:/]\d+)*")
_MOST_NUMBERS, _MOST_EXTRA_SENTENCES = 4, 2
_TABLE = re.compile(r"\btable\b", re.IGNORECASE)
_JSON = re.compile(r"\bjson\b", re.IGNORECASE)


def answer(text: str, input_text: str, seed: int) -> str:
    """An answer of some 40 to 150 words; lists, steps and data stand on lines of their own."""
    draws = Draws(seed, "answer", text)
    reading = read(text)
    subject = topics(reading.core)

    def fill(phrase: str) -> str:
        slots = Slots(draws, subject)
        if "{given}" in phrase:
            slots["given"] = _given(f"{reading.core} {input_text}")
        return slots.fill(phrase)

    body = [fill(phrase) for phrase in _body(reading, draws)]
    additions = draws.sample(sorted(reading.applied), _MOST_EXTRA_SENTENCES)
    extra = [fill(draws.of(phrases.FOR_ADDITION[operation])) for operation in additions]
    opening = fill(draws.of(phrases.OPENINGS[reading.kind]))
    closing = fill(draws.of(phrases.CLOSINGS))
    blocks = [fill(block) for block in _data(reading, draws)]
    if reading.kind == "mathematics" or "increase_reasoning_steps" in reading.applied:
        lines = [f"{number}. {sentence}" for number, sentence in enumerate(body, start=1)]
    elif reading.kind == "list":
        lines = [f"- {sentence}" for sentence in body]
    else:
        lines = [" ".join(body)]
    return "\n".join([opening, *blocks, *lines, " ".join([*extra, closing])])


def _body(reading: Reading, draws: Draws) -> list[str]:
    """Three or four sentences; those of a calculation in the order they stand."""
    pool = phrases.BODIES[reading.kind]
    chosen = draws.sample(pool, 3 + draws.below(2))
    return sorted(chosen, key=pool.index) if reading.kind == "mathematics" else chosen


def _data(reading: Reading, draws: Draws) -> list[str]:
    """Code, a table or JSON where the instruction asks for it."""
    blocks = [draws.of(phrases.CODE)] if reading.kind == "code" else []
    if _TABLE.search(reading.core):
        blocks.append(phrases.TABLE)
    if _JSON.search(reading.core):
        blocks.append(phrases.JSON)
    return blocks


def _given(text: str) -> str:
    numbers = list(dict.fromkeys(_NUMBER.findall(text)))[:_MOST_NUMBERS]
    return ", ".join(numbers) if numbers else "none are numbers, so we use letters"
