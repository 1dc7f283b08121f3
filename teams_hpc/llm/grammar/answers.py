"""Answers: grounded in the words of the instruction, shaped by its kind and its additions."""

from teams_hpc.llm.grammar import phrases
from teams_hpc.llm.grammar.draws import Draws, fill, topics
from teams_hpc.llm.grammar.world import applied, core, instruction_kind

_CODE = (
    "```python\ndef {name}(records):\n"
    '    """Return the records about {topic}, newest first."""\n'
    '    found = [record for record in records if "{topic}" in record["text"]]\n'
    '    return sorted(found, key=lambda record: record["year"], reverse=True)\n```'
)


def answer(text: str, input_text: str, seed: int) -> str:
    """An answer of some 40 to 150 words; for lists and numbered steps with line breaks."""
    draws = Draws(seed, "answer", text)
    subject = topics(f"{core(text)} {input_text}")
    kind, done = instruction_kind(text), applied(text)
    count = 3 + draws.below(4)
    start = draws.below(len(phrases.BODY))
    body = [
        fill(phrases.BODY[(start + 5 * number) % len(phrases.BODY)], draws, subject)
        for number in range(count)
    ]
    opening = fill(draws.of(phrases.OPENINGS[kind]), draws, subject)
    closing = fill(draws.of(phrases.CLOSINGS), draws, subject)
    if "increase_reasoning_steps" in done or kind == "mathematics":
        body = [f"{number}. {sentence}" for number, sentence in enumerate(body, start=1)]
    elif kind == "list":
        body = [f"- {sentence}" for sentence in body]
    is_lined = body[0][:2] in ("1.", "- ")
    if kind == "code":
        name = "_".join(word for word in subject[:2] if word.isidentifier()) or "select"
        body.insert(0, "\n" + _CODE.format(name=name, topic=subject[0]) + "\n")
        is_lined = True
    separator = "\n" if is_lined else " "
    return separator.join([opening, *body, closing])
