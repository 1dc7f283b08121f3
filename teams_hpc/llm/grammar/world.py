"""What an operation does to an instruction, and when it is fruitful.

An instruction has a kind, read off its words. For each kind three of the five operations other
than breadth are fruitful, each once: the openers of its additions tell what was applied already.
Breadth is fruitful once a text has two additions; it starts a new text, bare of additions, of the
same kind. Everything else is pointless: it gives a paraphrase without new information. So the best
policy solves a small Markov decision process over (kind, operations applied, steps left).
"""

import re
from functools import lru_cache

from teams_hpc.llm.grammar import phrases
from teams_hpc.llm.grammar.draws import Draws, fill, topics

FRUITFUL = {
    "explain": frozenset({"deepening", "concretizing", "increase_reasoning_steps"}),
    "code": frozenset({"add_constraints", "complicate_input", "increase_reasoning_steps"}),
    "mathematics": frozenset({"increase_reasoning_steps", "complicate_input", "concretizing"}),
    "list": frozenset({"add_constraints", "concretizing", "complicate_input"}),
    "writing": frozenset({"add_constraints", "deepening", "concretizing"}),
    "transform": frozenset({"add_constraints", "deepening", "complicate_input"}),
}
ADDITIONS_BEFORE_BREADTH = 2

_KIND_OF_WORD = {
    word: kind for kind, words in phrases.FIRST_WORDS.items() for word in words.split()
}
_SLOT = re.compile(r"\\\{\w+\\\}")
_OPENERS = {
    operation: re.compile(
        "|".join(_SLOT.sub(r"[^.\\n]+?", re.escape(opener)) for opener in openers)
    )
    for operation, openers in phrases.OPENERS.items()
}
_ANY_OPENER = re.compile("|".join(pattern.pattern for pattern in _OPENERS.values()))
_ARITHMETIC = re.compile(r"\d\s*[-+*/%×÷=]\s*\d|\bhow (?:many|much)\b|\bper ?cent\b|%")


def bare(text: str) -> str:
    """A text without the courtesies of a paraphrase."""
    for prefix in phrases.PREFIXES:
        text = text.removeprefix(prefix)
    for suffix in phrases.SUFFIXES[1:]:
        text = text.removesuffix(suffix)
    return text


def core(text: str) -> str:
    """A text without courtesies and additions: what it asked for at first."""
    text = bare(text)
    found = _ANY_OPENER.search(text)
    return text[: found.start()].rstrip() if found else text


@lru_cache(maxsize=4096)
def instruction_kind(text: str) -> str:
    """One of `phrases.KINDS`; additions and courtesies don't change it."""
    first = core(text)[:200].lower()
    words = re.findall(r"[a-z]+", first)
    if phrases.CODE_WORDS.intersection(words[:12]):
        return "code"
    if _ARITHMETIC.search(first):
        return "mathematics"
    return next((_KIND_OF_WORD[word] for word in words[:3] if word in _KIND_OF_WORD), "explain")


def applied(text: str) -> frozenset[str]:
    """Operations whose additions the text has."""
    return frozenset(name for name, pattern in _OPENERS.items() if pattern.search(text))


def is_fruitful(operation: str, text: str) -> bool:
    """Whether the operation gives something new on this text."""
    done = applied(text)
    if operation == "breadth":
        return len(done) >= ADDITIONS_BEFORE_BREADTH
    return operation in FRUITFUL[instruction_kind(text)] and operation not in done


def rewrite(operation: str, text: str, seed: int) -> str:
    """The rewrite of `text`, readable and never the same as `text`."""
    draws = Draws(seed, operation, text)
    if not is_fruitful(operation, text):
        return _paraphrase(text, draws)
    if operation == "breadth":
        return fill(draws.of(phrases.FRAMES[instruction_kind(text)]), draws, topics(core(text)))
    return f"{bare(text)} {_addition(operation, text, draws)}"


def _addition(operation: str, text: str, draws: Draws) -> str:
    opener = draws.of(phrases.OPENERS[operation])
    if operation == "complicate_input":
        phrase = opener + draws.of(phrases.DATA[opener])
        filled = fill(phrase, draws, topics(core(text)))
        return filled if filled.endswith(("|", "}")) else f"{filled}."
    joint = ", " if operation == "increase_reasoning_steps" else " "
    return (
        f"{fill(opener + joint + draws.of(phrases.TAILS[operation]), draws, topics(core(text)))}."
    )


def _paraphrase(text: str, draws: Draws) -> str:
    core = bare(text)
    options = [
        f"{prefix}{core}{suffix}"
        for prefix in phrases.PREFIXES
        for suffix in phrases.SUFFIXES
        if f"{prefix}{core}{suffix}" != text
    ]
    return draws.of(options)
