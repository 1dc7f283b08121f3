"""What an operation does to an instruction, and when it is fruitful.

An instruction has a kind, read off its words. For each kind three of the five operations other
than breadth are fruitful, each once: the markers of its additions tell what was applied already.
Breadth is fruitful once a text has two additions; it starts a new text of the same domain, bare of
additions, half of the time of another kind. Everything else is pointless: it gives a paraphrase
without new information. So the best policy solves a small Markov decision process over (kind,
operations applied, steps left).
"""

import re
from functools import lru_cache
from typing import NamedTuple

from teams_hpc.llm.grammar.additions import DATA, HEADS, MARKERS, TAILS
from teams_hpc.llm.grammar.courtesies import PREFIXES, SUFFIXES
from teams_hpc.llm.grammar.slots import Draws, Slots
from teams_hpc.llm.grammar.subjects import DOMAINS, FRAMES, SUBJECTS
from teams_hpc.llm.grammar.topics import domain_of, topics
from teams_hpc.llm.grammar.words import CODE_WORDS, FAMILIES, IMPERATIVES, QUESTION_WORDS

FRUITFUL = {
    "question": frozenset({"deepening", "concretizing", "increase_reasoning_steps"}),
    "explain": frozenset({"add_constraints", "deepening", "complicate_input"}),
    "code": frozenset({"add_constraints", "increase_reasoning_steps", "complicate_input"}),
    "mathematics": frozenset({"concretizing", "increase_reasoning_steps", "complicate_input"}),
    "list": frozenset({"add_constraints", "concretizing", "complicate_input"}),
    "writing": frozenset({"add_constraints", "deepening", "concretizing"}),
    "transform": frozenset({"add_constraints", "deepening", "increase_reasoning_steps"}),
}
KINDS = tuple(FRUITFUL)
ADDITIONS_BEFORE_BREADTH = 2
P_SAME_KIND = 0.5
"""Chance that breadth keeps the kind; else it becomes one of the other kinds, equally likely."""

_FAMILY_OF_WORD = {word: name for name, words in FAMILIES.items() for word in words.split()}
_TAILS_TRIED, _MOST_WORDS = 7, 20
_WORDS_READ, _CHARACTERS_READ = 8, 80
_LETTERS = re.compile(r"[a-z']+")
_DIGIT = re.compile(r"\d")
_THREE_WORDS = re.compile(r"(?<=\s)[A-Z][\w'-]* [\w'-]+ [\w'-]+")
_COURTESY = re.compile("|".join(re.escape(prefix) for some in PREFIXES.values() for prefix in some))
_ENDS_A_SENTENCE = tuple(".?!…:\"'”’)")
_ENDS_DATA = tuple("|}`;]>")


class Reading(NamedTuple):
    """What the grammar sees in a text.

    Attributes:
        bare: The text without courtesies.
        core: The same without additions: what was asked for at first.
        kind: One of `KINDS`; courtesies and additions don't change it.
        applied: Operations whose additions the text has.
    """

    bare: str
    core: str
    kind: str
    applied: frozenset[str]


@lru_cache(maxsize=4096)
def read(text: str) -> Reading:
    """Take a text apart."""
    bare = _without_courtesies(text)
    core_ends, applied = len(bare), set()
    for match in _THREE_WORDS.finditer(bare):
        operation = MARKERS.get(match.group())
        if operation:
            core_ends = min(core_ends, match.start())
            applied.add(operation)
    core = bare[:core_ends].rstrip()
    return Reading(bare, core, _kind(core), frozenset(applied))


def _without_courtesies(text: str) -> str:
    opening = _COURTESY.match(text)
    if opening:
        rest = text[opening.end() :]
        text = rest[:1].upper() + rest[1:]
    for suffix in SUFFIXES:
        if text.endswith(suffix[1:]):
            return text.removesuffix(suffix[1:]).rstrip()
    return text


def _kind(core: str) -> str:
    """By code words; the first telling word; digits; and a question mark."""
    low = core.lower()
    words = _LETTERS.findall(low)
    if not CODE_WORDS.isdisjoint(words):
        return "code"
    first_words = _LETTERS.findall(low[:_CHARACTERS_READ])[:_WORDS_READ]
    family = next((_FAMILY_OF_WORD[word] for word in first_words if word in _FAMILY_OF_WORD), "")
    if family in ("", "question"):
        if _DIGIT.search(core):
            return "mathematics"
        return "question" if "?" in core else "explain"
    return family


def instruction_kind(text: str) -> str:
    """One of `KINDS`; additions and courtesies don't change it."""
    return read(text).kind


def applied(text: str) -> frozenset[str]:
    """Operations whose additions the text has."""
    return read(text).applied


def is_fruitful(operation: str, instruction: str) -> bool:
    """Whether the operation gives something new on this text."""
    reading = read(instruction)
    if operation == "breadth":
        return len(reading.applied) >= ADDITIONS_BEFORE_BREADTH
    return operation in FRUITFUL[reading.kind] and operation not in reading.applied


def rewrite(operation: str, text: str, seed: int) -> str:
    """The rewrite of `text`, readable and never the same as `text`."""
    draws = Draws(seed, operation, text)
    if not is_fruitful(operation, text):
        return _paraphrase(text, draws)
    reading = read(text)
    if operation == "breadth":
        return _new_prompt(reading, draws)
    return join(reading.bare, _addition(operation, reading, draws))


def _addition(operation: str, reading: Reading, draws: Draws) -> str:
    """One sentence of 10 to 20 words, or for complicate_input one with data."""
    slots = Slots(draws, topics(reading.core))
    if operation == "complicate_input":
        return slots.fill(draws.of(DATA))
    head = slots.fill(draws.of(HEADS[operation]))
    tails = draws.sample(TAILS[operation, reading.kind], _TAILS_TRIED)
    sentences = (f"{head}{slots.fill(tail)}." for tail in tails)
    return next((text for text in sentences if text.count(" ") < _MOST_WORDS), f"{head}.")


def join(text: str, addition: str) -> str:
    """Append a sentence; below data at the end of a text it starts a new line."""
    text = text.rstrip()
    if text.endswith(_ENDS_A_SENTENCE):
        return f"{text} {addition}"
    if text.endswith(_ENDS_DATA) or "\n" in text:
        return f"{text}\n{addition}"
    return f"{text}. {addition}"


def _new_prompt(reading: Reading, draws: Draws) -> str:
    """A prompt of the same domain about a rarer subject."""
    domain = domain_of(reading.core) or DOMAINS[Draws(reading.core).below(len(DOMAINS))]
    kind = reading.kind
    if draws.below(1000) >= 1000 * P_SAME_KIND:
        kind = draws.of([other for other in KINDS if other != kind])
    return Slots(draws, topics(reading.core), SUBJECTS[domain]).fill(draws.of(FRAMES[kind]))


def _paraphrase(text: str, draws: Draws) -> str:
    """The same wish with other courtesies; earlier ones go, so that they don't pile up."""
    bare = read(text).bare
    first = bare.partition(" ")[0].lower().rstrip(",")
    if first in IMPERATIVES:
        style = "imperative"
    else:
        style = "question" if first in QUESTION_WORDS else "other"
    lowered = bare if style == "other" else bare[:1].lower() + bare[1:]
    prefixes, suffixes = ("", *PREFIXES[style]), ("", *SUFFIXES)
    start, count = draws.below(len(prefixes) * len(suffixes)), len(prefixes) * len(suffixes)
    for number in range(start, start + count):
        which, ending = divmod(number % count, len(suffixes))
        body = f"{prefixes[which]}{lowered}" if which else bare
        candidate = join(body, suffixes[ending][1:]) if ending else body
        if candidate not in (text, bare):
            return candidate
    raise AssertionError("two courtesies at least differ from any text")
