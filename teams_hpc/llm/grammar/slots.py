"""Keyed choices, and the slots of phrases that they fill."""

import hashlib
from collections.abc import Sequence

_TRAITS = (
    "retired", "sceptical", "left-handed", "self-taught", "first-year", "part-time", "homesick",
    "patient", "young", "newly hired", "travelling", "forgetful", "cautious", "curious",
    "hard-of-hearing", "widowed", "restless", "practical",
)  # fmt: skip
_TRADES = (
    "nurse", "sailor", "baker", "violinist", "bus driver", "beekeeper", "museum guide",
    "tax adviser", "rescue pilot", "school librarian", "street musician", "rice farmer",
    "lighthouse keeper", "court interpreter", "bicycle courier", "carpenter", "midwife",
    "shoemaker", "radio host", "shepherd", "locksmith", "judo coach", "florist", "ferry captain",
    "tailor", "chess teacher", "night porter", "potter", "vet", "gardener",
)  # fmt: skip

WORDS: dict[str, tuple[str, ...]] = {
    "person": tuple(f"a {trait} {trade}" for trait in _TRAITS for trade in _TRADES),
    "place": (
        "Nairobi", "Valparaíso", "Hanoi", "Tromsø", "Winnipeg", "Marrakesh", "Ljubljana", "Cusco",
        "Busan", "Tbilisi", "Hobart", "Galway", "Montevideo", "Kyoto", "Accra", "Leipzig", "Oaxaca",
        "Zanzibar", "Reykjavik", "Naples", "Gdansk", "Pune", "Bergen", "Porto", "Tunis", "Quito",
        "Utrecht", "Aleppo", "Dakar", "Lhasa", "Trieste", "Halifax", "Penang", "Samarkand",
        "Bilbao", "Tartu", "Kigali", "Basel", "Dundee", "Manaus",
    ),
    "aspect": (
        "cost", "fairness", "safety", "climate", "trust", "scale", "speed", "tradition", "language",
        "health", "privacy", "maintenance", "geography", "education", "habit", "energy", "accuracy",
        "patience", "politics", "weather", "timing", "chance", "noise", "skill", "insurance",
        "prestige", "fatigue", "storage", "distance", "competition", "inheritance", "migration",
        "age", "taste", "ownership", "secrecy", "fashion", "teamwork", "temperature", "gravity",
    ),
    "occasion": (
        "during a power cut", "in the week before the monsoon", "after a hard winter",
        "in a year of drought", "on a crowded market day", "during a strike", "after a flood",
        "on the first warm day of spring", "in the middle of the night", "during exam week",
        "shortly before an election", "on a public holiday", "after a long journey",
        "in a week of heavy snow", "during the harvest", "in times of rising prices",
        "on a very small budget", "at the height of summer", "right after moving house",
        "during a heat wave",
    ),
    "few": ("two", "three", "four", "five", "six"),
    "hundred": ("eighty", "ninety", "one hundred", "two hundred", "three hundred"),
}  # fmt: skip
_NUMBERS = {"n1": (3, 40), "n2": (5, 60), "n3": (6, 30), "n4": (120, 900)}


class Draws:
    """A stream of choices that is a function of its key alone."""

    __slots__ = ("_left", "_state")

    def __init__(self, *key: str | int) -> None:
        text = "\0".join(map(str, key))
        self._state = text.encode("utf-8", "surrogatepass")
        self._left = 0

    def below(self, count: int) -> int:
        """A number from 0 to `count` - 1."""
        if self._left < 1 << 32:
            self._state = hashlib.blake2b(self._state).digest()
            self._left = int.from_bytes(self._state, "little")
        self._left, number = divmod(self._left, count)
        return number

    def of(self, options: Sequence[str]) -> str:
        """One of `options`."""
        return options[self.below(len(options))]

    def sample(self, options: Sequence[str], count: int) -> list[str]:
        """`count` of `options`, none twice, in the order drawn."""
        left = list(options)
        return [left.pop(self.below(len(left))) for _ in range(min(count, len(left)))]


class Slots(dict[str, str]):
    """What stands for each slot of one phrase, drawn when it is first used.

    Slots: `{t}` a topic and `{u}` another; `{rare}` and `{rare2}` subjects of a domain; `{k}` the
    topic as a key of data; `{n1}` to `{n4}` numbers; the names in `WORDS`, also with a 2 for a
    second one.
    """

    def __init__(
        self, draws: Draws, subject: tuple[str, ...] = (), rare: tuple[str, ...] = ()
    ) -> None:
        super().__init__()
        self._draws = draws
        self._subject = subject
        self._rare = rare

    def fill(self, phrase: str) -> str:
        """The phrase with its slots filled."""
        return phrase.format_map(self)

    def __missing__(self, name: str) -> str:
        value = self._draw(name)
        self[name] = value
        return value

    def _draw(self, name: str) -> str:
        if name == "t":
            return self._subject[self._draws.below(min(2, len(self._subject) - 1))]
        if name == "u":
            other = [topic for topic in self._subject if topic != self["t"]]
            return self._draws.of(other)
        if name == "k":
            return self["t"].removeprefix("the ").replace(" ", "_").replace("-", "_").lower()
        if name in _NUMBERS:
            low, high = _NUMBERS[name]
            return str(low + self._draws.below(high - low))
        options = self._rare if name.startswith("rare") else WORDS[name.removesuffix("2")]
        if not name.endswith("2"):
            return self._draws.of(options)
        first = self[name.removesuffix("2")]
        place = (options.index(first) + 1 + self._draws.below(len(options) - 1)) % len(options)
        return options[place]
