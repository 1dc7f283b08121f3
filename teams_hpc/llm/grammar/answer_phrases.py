"""Sentences of answers, by kind. Tables only.

Topics stand as objects or with modal and past-tense verbs, so that singular and plural both fit.
"""

OPENINGS = {
    "question": (
        "The short answer is that {t} can best be understood through {aspect}.",
        "It depends on two things above all: {t} and {aspect}.",
        "Most people would start with {t}, and that turns out to be a good place to begin.",
        "There is a simple answer about {t} and a fuller one, and both are worth knowing.",
        "To answer this, one has to look at {t} and {u} together.",
    ),
    "explain": (
        "The key to {t} lies in the link with {u}.",
        "Put simply, {t} and {u} belong together, and neither makes much sense alone.",
        "Two forces explain most of what one can say about {t}: {aspect} and {aspect2}.",
        "There are two sides to {t}: what one sees at once and what shows only later.",
        "A good way into {t} is to ask what would be missing without {u}.",
    ),
    "code": (
        "The solution below deals with {t} in one pass and refuses bad input.",
        "A short function is enough for {t}, as long as the input is checked first.",
        "Here is a version that keeps {t} apart from {u}, so that each can be tested alone.",
    ),
    "mathematics": (
        "We write down what is known about {t} and then calculate in order.",
        "The result for {t} follows from the given values in a few steps.",
        "Before calculating, it helps to guess roughly how large the result for {t} could be.",
    ),
    "list": (
        "Here is a selection that looks at {t} from several sides.",
        "These points about {t} run from the easiest to the hardest.",
        "For {t}, the following would be a sensible start.",
    ),
    "writing": (
        "Nobody in {place} had ever asked about {t} before that evening.",
        "It began with {t}, as such stories often do, and with {person} who would not go home.",
        "Dear reader, let me begin with {t}, since everything began there.",
        "On the morning when {t} first came up, {person} was already awake.",
    ),
    "transform": (
        "Here is the new version, with {t} kept and the repetitions dropped.",
        "The revised text puts {t} first and lets {u} follow.",
        "Below is the result; {t} stayed as close to the original as possible.",
    ),
}

BODIES = {
    "question": (
        "First, look at {aspect}: without it, little about {t} would be as we find it.",
        "People often confuse {t} with {u}, although the two follow different rules.",
        "What one notices first about {t} has more to do with {aspect} than with chance.",
        "In {place}, for instance, {person} came to know {t} mainly through {aspect}.",
        "One reason is {aspect}; another, less obvious one comes from {u}.",
        "This does not hold everywhere, since {aspect} may change the picture of {t}.",
        "A careful observer would compare {t} before and after a change in {aspect}.",
        "Where the evidence is thin, it is honest to say that {t} may have other causes.",
        "If in doubt, one can test the claim about {t} on a small scale first.",
    ),
    "explain": (
        "First comes {aspect}, which sets the limits within which {t} could develop.",
        "Next, {u} adds something that {t} alone would never show.",
        "Small changes in {aspect} can have large effects on {t}, but rarely at once.",
        "A typical case was seen in {place}, where {person} described {t} in terms of {aspect}.",
        "Seen from a distance {t} may look simple, but {aspect} complicates the matter.",
        "The usual mistake is to treat {t} and {aspect} as one and the same thing.",
        "Over time, {aspect} became as important for {t} as {aspect2} had been before.",
        "A picture may help: think of {t} as a path and of {aspect} as the slope.",
        "What happens last with {t} often depends on what happened first with {u}.",
    ),
    "code": (
        "The check at the start makes sure that {t} can never be empty by accident.",
        "The running time grows in step with the size of {t}.",
        "For very large data, one could read {t} piece by piece instead.",
        "A test with one entry, with none and with two equal ones would cover {t}.",
        "If {u} may be missing, a default value would be the safest choice.",
        "The names say what each part does with {t}, so few comments are needed.",
    ),
    "mathematics": (
        "Write down the given values: {given}.",
        "Name what is wanted, here the value for {t}, and choose a letter for it.",
        "Find the relation that links {t} with {u}.",
        "Put in the numbers and keep the units in view.",
        "Do the multiplication and division before the addition.",
        "Compare the result with a rough estimate of {t}.",
        "Round only at the end, and say to how many places.",
        "Check the result by putting it back into the first relation.",
    ),
    "list": (
        "Start small with {t}, so that a mistake costs little.",
        "Ask {person} who has dealt with {t} before.",
        "Write down what {u} would require in the worst case.",
        "Keep {aspect} in mind, since it decides more about {t} than one expects.",
        "Set a date by which {t} should be settled.",
        "Look for an example from {place}, where {aspect} was solved well.",
        "Leave room for {aspect}, even if {t} seems more urgent.",
        "Compare {few} ways to deal with {t} before you choose one.",
        "Review {t} after a month and drop what did not help.",
        "Put {u} last, because it depends on everything else.",
    ),
    "writing": (
        "The town smelled of rain, and {t} seemed further away than ever.",
        '"You worry too much about {aspect}," said {person}, and poured another cup of tea.',
        "There was something about {t} that no map of {place} had ever shown.",
        "By noon everyone knew, and by evening {t} had become a matter of {aspect}.",
        "Some laughed, some wept, and {person} simply asked about {u}.",
        "What I remember is the light, the silence, and {t}.",
        "Nobody spoke of {aspect} again, although everybody thought of it.",
        "So we kept {t} to ourselves, as one keeps a letter from {place}.",
        "And when the door closed at last, {t} was all that stayed behind.",
    ),
    "transform": (
        "The first part now names {t} directly instead of hinting at it.",
        "Every name and number from the original was kept.",
        "Where {u} could be read in two ways, the more common reading was chosen.",
        "The tone suits {person} who would read it without any background.",
        "Long phrases about {t} became short ones wherever nothing was lost.",
        "One word was hard to place, since {aspect} can change what it means.",
        "In {place} a slightly different wording for {t} might be more usual.",
        "If {aspect} matters most, the second sentence could also stand first.",
    ),
}

FOR_ADDITION = {
    "add_constraints": (
        "All the limits that were set for {t} have been kept.",
        "The length and form asked for were respected, with {t} in its place.",
        "To stay within the limits, some details about {u} were left out.",
    ),
    "deepening": (
        "Beneath the surface, {aspect} and {aspect2} pull {t} in opposite directions.",
        "Its causes reach further back: changes in {aspect} came long before {t}.",
        "Critics would object that {t} matters less than {aspect}, and they have a point.",
        "The long-term consequences for {u} might outlast the immediate ones.",
    ),
    "concretizing": (
        "In the case described, {aspect} would have decided how {t} was handled.",
        "On the spot, {person2} would notice {t} first and {aspect} second.",
        "Under those particular conditions, {t} could hardly have been avoided.",
    ),
    "increase_reasoning_steps": (
        "Each step rests on the one before, and the last was checked against {t}.",
        "Step by step, this leads from {u} to {t} without a gap.",
    ),
    "complicate_input": (
        "The data given fit this account of {t}, apart from one value that is rather high.",
        "Read together with the data, {t} and {aspect} appear to move in the same direction.",
        "The values supplied were used as they stand, without rounding.",
    ),
}
CLOSINGS = (
    "In short, {t} rewards care with {aspect} more than anything else.",
    "Taken together, this should make {t} clear enough to act on.",
    "In the end, {t} and {u} need each other.",
    "That is why {aspect} deserves the last word on {t}.",
    "More could be said about {u}, but this is what matters most for {t}.",
    "If only one thing stays in mind, let it be the link between {t} and {aspect}.",
)

CODE = (
    "```python\ndef select_{k}(records, limit=10):\n"
    '    """Return at most `limit` records about {t}, newest first."""\n'
    '    if not records:\n        raise ValueError("no records about {t}")\n'
    '    found = [record for record in records if "{k}" in record["text"]]\n'
    '    return sorted(found, key=lambda record: record["year"], reverse=True)[:limit]\n```',
    "```python\ndef count_{k}(lines):\n"
    '    """Count the lines that mention {t}, place by place."""\n'
    "    counts = {{}}\n    for line in lines:\n"
    '        place, _, text = line.partition(":")\n'
    '        if "{k}" in text:\n            counts[place] = counts.get(place, 0) + 1\n'
    "    return counts\n```",
)
TABLE = (
    "| aspect | {t} | {u} |\n|---|---|---|\n| {aspect} | high | low |\n| {aspect2} | low | varies |"
)
JSON = '```json\n{{"topic": "{t}", "related": "{u}", "matters": ["{aspect}", "{aspect2}"]}}\n```'

REFUSALS = (
    "I'm sorry, but I can't help with {t} at the moment.",
    "I'm sorry, I don't know enough about {t} to give a useful answer.",
    "Sorry, this request about {t} is more than I can answer.",
)
EMPTY = ("...", "It is what it is.", "And so on, and on.", "- - -", "It is.")
