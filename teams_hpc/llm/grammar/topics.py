"""What a text is about: its telling noun phrases and its domain, by cheap rules."""

import re
from functools import lru_cache
from itertools import pairwise

from teams_hpc.llm.grammar.subjects import DOMAIN_OF_WORD, SUBJECT_BY_END
from teams_hpc.llm.grammar.words import (
    ADJECTIVES,
    BREAKS,
    DETERMINERS,
    GENERIC_NOUNS,
    IMPERATIVES,
)

_TOKEN = re.compile(r"[A-Za-zÀ-ÿ][A-Za-zÀ-ÿ]*(?:['’-][A-Za-zÀ-ÿ]+)*|[^\sA-Za-zÀ-ÿ]+")
_LONGEST_READ = 400
_SHORTEST_WORD = 3
_NOT_A_HEAD = ("ous", "ful", "less", "able", "ible", "ed", "ier", "iest", "ic", "'s", "’s")
_LY_NOUNS = frozenset(("family", "supply", "assembly", "anomaly", "reply", "italy", "july", "fly"))
_FALLBACK = ("the subject", "the background")


@lru_cache(maxsize=4096)
def topics(text: str) -> tuple[str, ...]:
    """At least two noun phrases of up to three words, the most telling first.

    Rare subjects of the grammar's own prompts come first, and then at most one other.

    Args:
        text: An instruction without courtesies and additions.
    """
    tokens = _TOKEN.findall(text[:_LONGEST_READ])
    found: dict[str, int] = {}
    phrase: list[str] = []
    has_determiner, is_sentence_start = False, True
    for token in [*tokens, "."]:
        low = token.lower()
        if _is_break(low) or (is_sentence_start and low in IMPERATIVES):
            if phrase:
                _note(found, phrase, has_determiner)
                phrase = []
            has_determiner = low in DETERMINERS
        else:
            phrase.append(low if is_sentence_start else token)
        is_sentence_start = token[0] in ".?!:"
    ranked = sorted(found, key=lambda name: -found[name])
    if rare := _rare_subjects(tokens):
        others = [name for name in ranked if rare[0].split()[-1] not in name]
        return (*rare, *others, *_FALLBACK)[: len(rare) + 1]
    return (*ranked[:4], *_FALLBACK[len(ranked) :])


def _rare_subjects(tokens: list[str]) -> list[str]:
    """The subjects of the grammar's own prompts among the words of a text."""
    pairs = [f"{first} {second}" for first, second in pairwise(tokens)]
    ends = (end for end in (*pairs, *tokens) if end in SUBJECT_BY_END)
    return list(dict.fromkeys(SUBJECT_BY_END[end][0] for end in ends))


def _is_break(low: str) -> bool:
    return (
        not low[0].isalpha()
        or low in BREAKS
        or low in DETERMINERS
        or (low.endswith("ly") and low not in _LY_NOUNS)
    )


def _note(found: dict[str, int], phrase: list[str], has_determiner: bool) -> None:
    """Add a noun phrase with its rank, without words at its end that can't be its head."""
    while phrase and not _is_head(phrase[-1].lower()):
        phrase.pop()
    if not phrase or (phrase[-1].endswith("ing") and len(phrase) == 1 and not has_determiner):
        return
    words = phrase[-2:]
    if len(words) == 2 and (words[0].lower() in ADJECTIVES or len(words[0]) < _SHORTEST_WORD):
        words = words[1:]
    rank = min(12, len(words[-1])) + 4 * (len(words) - 1) + 3 * has_determiner
    if words[-1].lower() in GENERIC_NOUNS:
        rank -= 12
    name = " ".join(words)
    name = f"the {name}" if has_determiner else name
    found[name] = max(rank, found.get(name, 0))


def _is_head(low: str) -> bool:
    return len(low) >= _SHORTEST_WORD and low not in ADJECTIVES and not low.endswith(_NOT_A_HEAD)


def domain_of(text: str) -> str | None:
    """The domain that most words belong to, or None; a rare subject decides at once."""
    words = _TOKEN.findall(text[:_LONGEST_READ].lower())
    if rare := _rare_subjects(words):
        return SUBJECT_BY_END[" ".join(rare[0].split()[-2:])][1]
    votes: dict[str, int] = {}
    for word in words:
        if name := DOMAIN_OF_WORD.get(word):
            votes[name] = votes.get(name, 0) + 1
    return max(votes, key=lambda name: votes[name]) if votes else None
