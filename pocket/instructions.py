"""Instructions over the large topic space, many with an input: functions of a random generator."""

import random
from dataclasses import dataclass

from pocket import frames
from pocket.words import (
    ADJECTIVE_LIST,
    LANGUAGES,
    NAMES,
    NOUNS,
    OPENERS,
    PLAIN_WORDS,
    STOCK_WORDS,
    UNITS,
    invented,
)
from teams_hpc.llm.grammar.slots import WORDS, Draws, Slots
from teams_hpc.llm.grammar.subjects import DOMAINS, FRAMES, SUBJECTS

_P_INPUT = 0.22
_P_OWN_FRAME = 0.12
_P_WILD = 0.4
_P_INVENTED = 0.22


@dataclass(frozen=True, slots=True)
class Text:
    """An instruction and its input, which may be empty."""

    instruction: str
    input: str = ""


class _Filler(dict[str, str]):
    """What stands for each slot, drawn at its first use; later uses repeat it."""

    def __init__(self, rng: random.Random, held_out: bool) -> None:
        super().__init__()
        self._rng = rng
        self._held_out = held_out

    def __missing__(self, name: str) -> str:
        self[name] = value = self._draw(name.rstrip("0123456789"))
        return value

    def _draw(self, slot: str) -> str:
        rng = self._rng
        drawn = {
            "n": self._phrase,
            "N": lambda: f"{rng.choice(frames.DETERMINERS)} {self._phrase()}",
            "w": self._noun,
            "inv": lambda: invented(rng, self._held_out),
            "adj": lambda: rng.choice(ADJECTIVE_LIST),
            "name": self._name,
            "num": lambda: _number(rng),
            "unit": lambda: rng.choice(UNITS),
            "lang": lambda: rng.choice(LANGUAGES),
            "aux": lambda: rng.choice(frames.AUXILIARIES),
            "verb": lambda: rng.choice(frames.VERBS),
            "verb3": lambda: rng.choice(frames.THIRD_PERSON),
            "prep": lambda: rng.choice(frames.PREPOSITIONS),
        }.get(slot)
        if drawn is not None:
            return drawn()
        value = rng.choice(WORDS[slot])
        if slot == "place" and rng.random() < 0.4:
            return invented(rng, self._held_out).title()
        return value

    def _name(self) -> str:
        if self._rng.random() < 0.3:
            return invented(self._rng, self._held_out).title()
        return self._rng.choice(NAMES)

    def _noun(self) -> str:
        rng = self._rng
        if rng.random() < _P_INVENTED:
            return invented(rng, self._held_out)
        noun = rng.choice(NOUNS[self._held_out])
        return f"{noun}s" if rng.random() < 0.3 and not noun.endswith("s") else noun

    def _phrase(self) -> str:
        """One to six words."""
        rng, shape = self._rng, self._rng.random()
        if shape < 0.35:
            return self._noun()
        if shape < 0.6:
            return f"{rng.choice(ADJECTIVE_LIST)} {self._noun()}"
        if shape < 0.75:
            return f"{self._noun()} {self._noun()}"
        if shape < 0.8:
            return f"{self._noun()}-{self._noun()}"
        if shape < 0.85:
            return f"{self._name()}'s {self._noun()}"
        joint = rng.choice((" of the ", " of ", " in the ", " and ", " for "))
        return f"{self._noun()}{joint}{self._noun()}"


def _number(rng: random.Random) -> str:
    shape = rng.random()
    if shape < 0.5:
        return str(rng.randrange(2, 100))
    if shape < 0.8:
        return str(rng.randrange(100, 5000))
    if shape < 0.9:
        return f"{rng.randrange(1, 90)}.{rng.randrange(1, 100)}"
    return f"{rng.randrange(1, 90)},{rng.randrange(100, 999)}"


def make_text(rng: random.Random, *, held_out: bool = False) -> Text:
    """A bare instruction; its topics are held-out words alone if so asked."""
    if not held_out and rng.random() < _P_OWN_FRAME:
        return Text(_of_the_grammar(rng))
    filler = _Filler(rng, held_out)
    if rng.random() < _P_WILD:
        return Text(_wild(rng, filler), _input(rng, filler))
    kind = rng.choice(tuple(frames.INSTRUCTIONS))
    text = rng.choice(frames.INSTRUCTIONS[kind])
    if rng.random() < 0.4:
        text = _with_clause(text, rng.choice(frames.CLAUSES))
    if rng.random() < 0.25:
        text = rng.choice(frames.BEFORE) + text
    if rng.random() < 0.25:
        text += rng.choice(frames.AFTER)
    text = text.format_map(filler)
    text = text[:1].upper() + text[1:]
    if rng.random() < 0.04:
        text = text.rstrip(".")
    return Text(text, _input(rng, filler))


def _input(rng: random.Random, filler: _Filler) -> str:
    """Seldom any."""
    if rng.random() >= _P_INPUT:
        return ""
    if rng.random() < 0.3:
        return _wild(rng, filler)
    return rng.choice(frames.INPUTS).format_map(filler)


def _wild(rng: random.Random, filler: _Filler) -> str:
    """Words in no order that means anything, with the marks of real texts.

    What comes next can't be guessed here, so that a model must learn to copy; and a kind shows in
    single words alone.
    """
    words = []
    for _ in range(rng.choice((4, 6, 8, 10, 12, 15, 18, 22, 30))):
        words.append(_wild_word(rng, filler))
        if rng.random() < 0.07:
            words[-1] += rng.choice((",", ",", ":", ".", "?", ";", " -", "!"))
    if rng.random() < 0.6:
        words[min(len(words) - 1, rng.choice((0, 0, 0, 1, 2, 4, 6)))] = rng.choice(OPENERS)
    if rng.random() < 0.15:
        place = rng.randrange(len(words))
        quote = rng.choice(("''", '""', "()", "``"))
        words[place:] = [quote[0] + " ".join(words[place:]) + quote[1]]
    text = " ".join(words)
    return text[:1].upper() + text[1:] + rng.choice((".", ".", ".", "?", "?", ""))


def _wild_word(rng: random.Random, filler: _Filler) -> str:
    chance = rng.random()
    if chance < 0.3:
        return rng.choice(PLAIN_WORDS)
    if chance < 0.55:
        return rng.choice(STOCK_WORDS)
    slot = rng.choices(("w", "inv", "adj", "name", "num", "n"), (10, 6, 6, 2, 3, 2))[0]
    filler.pop(slot, None)  # each time another
    return filler[slot]


def odd_clause(rng: random.Random, *, held_out: bool = False) -> str:
    """A further wish that isn't the grammar's own."""
    return rng.choice(frames.ODD_CLAUSES).format_map(_Filler(rng, held_out))


def noun(rng: random.Random, *, held_out: bool = False) -> str:
    """One noun."""
    return _Filler(rng, held_out)["w"]


def _with_clause(text: str, clause: str) -> str:
    """Put a clause before the last mark of the text."""
    return f"{text[:-1]}{_renumbered(clause)}{text[-1]}" if text[-1] in ".?" else text + clause


def _renumbered(clause: str) -> str:
    """The same slots, but other words than those of the frame."""
    return clause.replace("}", "9}")


def _of_the_grammar(rng: random.Random) -> str:
    """A prompt as the grammar's breadth makes them, for what comes after it."""
    draws = Draws(rng.getrandbits(62))
    kind, domain = rng.choice(tuple(FRAMES)), rng.choice(DOMAINS)
    return Slots(draws, (), SUBJECTS[domain]).fill(draws.of(FRAMES[kind]))
