"""What kind of thing an instruction asks for, read off its words."""

import re

FAMILIES = {
    "question": "what why how who when where which is are do does did can could should would",
    "explain": "explain describe discuss outline define clarify tell state illustrate",
    "write": "write compose draft create invent imagine",
    "list": "list name give suggest recommend plan design organise organize propose arrange",
    "transform": "translate rewrite convert change correct edit paraphrase shorten simplify turn",
    "classify": "classify identify label sort categorise categorize rate extract find decide",
    "compute": "calculate compute solve estimate prove determine evaluate simplify",
    "compare": "compare contrast rank weigh choose",
    "summarise": "summarise summarize condense abstract",
}
"""First words by family; an instruction's first few words tell what kind it is."""

CODE_WORDS = frozenset("function python code sql program script regex bash algorithm class".split())
KINDS = (*FAMILIES, "code", "other")

_FAMILY_OF_WORD = {word: name for name, words in FAMILIES.items() for word in words.split()}
_CHARACTERS_READ, _WORDS_READ = 80, 8
_WORDS = re.compile(r"[a-z']+")


def first_family(instruction: str) -> str:
    """The family whose word stands first among the first eight words; empty if none does."""
    words = _WORDS.findall(instruction[:_CHARACTERS_READ].lower())[:_WORDS_READ]
    return next((_FAMILY_OF_WORD[word] for word in words if word in _FAMILY_OF_WORD), "")


def instruction_kind(instruction: str) -> str:
    """One of `KINDS`: about code, else by its first telling word, else by a question mark."""
    if not CODE_WORDS.isdisjoint(_WORDS.findall(instruction.lower())):
        return "code"
    return first_family(instruction) or ("question" if "?" in instruction else "other")
