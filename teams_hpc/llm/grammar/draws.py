"""Keyed choices, and filling the slots of a phrase."""

import hashlib
import re
from collections.abc import Sequence
from functools import lru_cache

from teams_hpc.llm.grammar import phrases

_WORD = re.compile(r"[A-Za-zÀ-ÿ][A-Za-zÀ-ÿ'-]+")
_PLAIN_WORDS = frozenset(
    """about above across after again against also although among another answer because before
    being below between both could describe does doing during each either every explain first
    following from give given have having here into itself least less like list make many might
    more most much must name need never only other others over please question same sentence short
    should since some such than that their them then there these they thing things this those
    through under until very want what when where whether which while whose will with within without
    words would write your yourself using used use one two three four five six how why who and the
    are for not you can was were has had its it's from per any all but out off own too she him her
    his our process everything everyone someone briefly rather arrange rewrite calculate summarise
    translate suggest compare describe identify classify happens justify design imagine including
    around sentences letter reason steps example""".split()
)


_SHORTEST_TOPIC = 5


class Draws:
    """A stream of choices that is a function of its key alone."""

    __slots__ = ("_left", "_state")

    def __init__(self, *key: str | int) -> None:
        text = "\0".join(map(str, key))
        self._state = hashlib.blake2b(
            text.encode("utf-8", "surrogatepass"), digest_size=64
        ).digest()
        self._left = int.from_bytes(self._state, "little")

    def below(self, count: int) -> int:
        """A number from 0 to `count` - 1."""
        if self._left < 1 << 32:
            self._state = hashlib.blake2b(self._state, digest_size=64).digest()
            self._left = int.from_bytes(self._state, "little")
        self._left, number = divmod(self._left, count)
        return number

    def of(self, options: Sequence[str]) -> str:
        """One of `options`."""
        return options[self.below(len(options))]


@lru_cache(maxsize=4096)
def topics(text: str) -> tuple[str, ...]:
    """The telling words of a text: up to four of its longest, in the order they stand."""
    found = dict.fromkeys(
        word.lower()
        for word in _WORD.findall(text[:400])
        if len(word) >= _SHORTEST_TOPIC and word.lower() not in _PLAIN_WORDS
    )
    longest = set(sorted(found, key=lambda word: (-len(word), word))[:4])
    return tuple(word for word in found if word in longest) or ("the matter",)


def fill(phrase: str, draws: Draws, subject: tuple[str, ...]) -> str:
    """Fill the slots of a phrase; the same draws give the same text."""
    first = draws.below(len(subject))
    aspect = draws.below(len(phrases.ASPECTS))
    person = draws.below(len(phrases.PEOPLE))
    return phrase.format(
        topic=subject[first],
        topic2=subject[(first + 1) % len(subject)],
        aspect=phrases.ASPECTS[aspect],
        aspect2=phrases.ASPECTS[(aspect + 7) % len(phrases.ASPECTS)],
        person=phrases.PEOPLE[person],
        person2=phrases.PEOPLE[(person + 5) % len(phrases.PEOPLE)],
        place=draws.of(phrases.PLACES),
        season=draws.of(phrases.SEASONS),
        few=draws.of(phrases.FEW),
        hundred=60 + 20 * draws.below(15),
        year=1950 + draws.below(75),
        n1=2 + draws.below(40),
        n2=3 + draws.below(50),
        n3=5 + draws.below(60),
        n4=7 + draws.below(90),
        rare=draws.of(phrases.RARE),
        domain=draws.of(phrases.DOMAINS),
    )
