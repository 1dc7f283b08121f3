"""What a fruitful operation appends: a head that marks the operation, and a tail for the kind.

The first three words of a head are free of slots and belong to one operation alone, so that the
operations already applied can be read off a text. A head with a tail adds 10 to 20 words. Numbers
are spelled out and no word of code is used, so that additions don't blur an instruction's kind.
"""

HEADS = {
    "add_constraints": (
        "Keep the answer under {hundred} words",
        "Use no more than {few} paragraphs",
        "Answer in exactly {few} sentences",
        "Limit yourself to {few} main points",
        "Avoid all technical terms throughout",
        "Put the main point first",
        "End with a one-line summary",
        "Mention no brand or company",
        "Address the reader directly throughout",
        "Rely on no outside sources",
    ),
    "deepening": (
        "Go beyond the surface",
        "Look at the deeper causes",
        "Weigh the long-term consequences",
        "Bring in opposing views",
        "Look at what lies behind it",
        "Examine the hidden assumptions",
        "Take several perspectives in turn",
        "Consider what usually goes unsaid",
        "Follow the matter further back",
        "Set out both sides",
    ),
    "concretizing": (
        "Take the case of {person} in {place}",
        "Make it specific to {place}",
        "Set it in {place}",
        "Pin it down to one street in {place}",
        "Assume that it concerns {person} from {place}",
        "Picture a real day in {place}",
        "Think of somebody like {person} near {place}",
        "Let it happen in {place}",
        "Choose one real place such as {place}",
    ),
    "increase_reasoning_steps": (
        "Reason step by step",
        "Work through it in {few} numbered steps",
        "Show each intermediate step",
        "Think it through in {few} stages",
        "Number every step of your reasoning",
        "Break the task into {few} numbered steps",
        "Lay out your reasoning as numbered steps",
        "Proceed slowly in {few} explicit steps",
    ),
}

TAILS = {
    ("add_constraints", "explain"): (
        ", and name at least {few} factors that limit {t}",
        ", and rule out one common misunderstanding about {t}",
        ", and mark every claim about {t} that cannot be checked",
        ", and do not mention {aspect} or {aspect2} at any point",
        ", and give one exception to each rule about {t}",
        ", and say how certain each statement about {t} can be",
        ", and use a single comparison from everyday life for {t}",
    ),
    ("add_constraints", "code"): (
        ", and handle empty input for {t} without raising an error",
        ", and use nothing beyond the standard library for {t}",
        ", and keep the running time linear in the size of {t}",
        ", and explain in a comment how {t} could fail",
        ", and refuse invalid values of {t} with a clear message",
        ", and add {few} small tests that cover {t}",
        ", and never change the original data behind {t}",
    ),
    ("add_constraints", "list"): (
        ", and give a reason for each item in {few} words",
        ", and leave out whatever {person} could not afford",
        ", and order all items by {aspect}, the best one first",
        ", and include at least one item on {t} that surprises",
        ", and let no two items rely on {aspect}",
        ", and mark the items on {t} that work {occasion}",
        ", and make sure that {aspect} plays no part at all",
    ),
    ("add_constraints", "writing"): (
        ", and let {t} appear only in the last sentence",
        ", and never use the words {aspect}, {aspect2} or very",
        ", and work in one smell, one sound and {t}",
        ", and address {person} who has never heard of {t}",
        ", and let every sentence be shorter than the one before",
        ", and close with a question about {t} that stays open",
        ", and hide a hint at {aspect} in the first line",
    ),
    ("add_constraints", "transform"): (
        ", and keep every name and number in {t} as it stands",
        ", and list {few} changes you made to {t} at the end",
        ", and choose a tone that {person} would find natural",
        ", and mark each place in {t} where you were unsure",
        ", and use no word of more than three syllables for {t}",
        ", and offer a second version that stresses {aspect}",
        ", and drop whatever says nothing new about {t}",
    ),
    ("deepening", "question"): (
        " and discuss how {t} might interact with {aspect} and with {aspect2}",
        " and ask why experts on {t} could disagree about {aspect}",
        " and show which effects of {t} appear only after many years",
        " and explain what would change for {t} without {aspect}",
        " and compare how {person} and a lawyer would see {t}",
        " and separate what caused {t} from what merely came along",
        " and say what {t} can reveal about {u} and {aspect}",
    ),
    ("deepening", "explain"): (
        " and trace how ideas about {t} changed and what drove the change",
        " and show how {aspect} and {aspect2} pull {t} in different directions",
        " and discuss what remains unknown about {t} and why it matters",
        " and relate {t} to {u}, to {aspect} and to {aspect2}",
        " and describe who gains and who loses through {t}, and why",
        " and explain where the usual account of {t} breaks down",
        " and consider how {t} could look to {person} a century ago",
    ),
    ("deepening", "writing"): (
        " and let the text show why {t} matters to {person}",
        " and let {aspect} and {aspect2} clash in the middle of the text",
        " and give {t} a past that explains the present mood",
        " and reveal what is at stake for {person} beyond {t}",
        " and let a second voice doubt what is said about {t}",
        " and hint at what {t} will mean many years later",
        " and tie {t} to a regret that nobody speaks about",
    ),
    ("deepening", "transform"): (
        " and explain what is lost and what is gained for {t}",
        " and justify each choice about {t} against one real alternative",
        " and say how {aspect} could lead to another reading of {t}",
        " and discuss what the choice of words about {t} reveals",
        " and show how {person} would have treated {t}, and why",
        " and point out which assumptions about {u} shape the result",
        " and describe how the effect of {t} on readers will differ",
    ),
    ("concretizing", "question"): (
        " {occasion}, with {t} as the main worry",
        " {occasion}, and name the exact spot where {t} matters",
        ", and give a named example of {t}",
        ", with {few} helpers, hardly any money, and {t} to deal with",
        ", and describe {t} as an eyewitness would see it {occasion}",
        ", and say what {person2} there would measure about {t}",
        ", where {t} had to be sorted out {occasion}",
    ),
    ("concretizing", "mathematics"): (
        " {occasion}, and give each quantity a realistic local unit",
        ", and let {t} mean something people count",
        " {occasion}, and say who needs the result for {t}",
        ", and replace {t} by objects that one could buy there",
        ", and round {t} as {person2} there would do in practice",
        " {occasion}, with {t} read off an old kitchen scale",
        ", and say what {t} would look like on the ground",
    ),
    ("concretizing", "list"): (
        " {occasion}, and name a real supplier or address for each item",
        ", and replace each general item by a particular make or model",
        " {occasion}, with {few} hours to spare and {t} in mind",
        ", and give the size, colour and price of everything for {t}",
        ", and suit each item to {person2} who has never dealt with {t}",
        " {occasion}, and say on which shelf or corner one finds it",
        ", and name a real maker for each item",
    ),
    ("concretizing", "writing"): (
        " {occasion}, and name the street, the hour and the weather",
        ", and give every character a name, an age and a trade",
        " {occasion}, and let {t} be something one can touch",
        ", and replace each general word about {t} by a brand-new image",
        " {occasion}, with {t} described down to the colour",
        ", and let {person2} there speak about {t} in direct speech",
        ", and mention {few} objects beside {t}",
    ),
    ("increase_reasoning_steps", "question"): (
        ", justify each one by what came before, and check the last",
        ", start from what is known about {t}, and end with what follows",
        ", compare {few} possible answers about {t}, and discard them one by one",
        ", and after each say how sure you are about {t}",
        ", first split {t} into smaller questions, then combine what you found",
        ", name the evidence for {t} each time, and then draw a conclusion",
        ", test every claim about {t} against {aspect}, and only then decide",
    ),
    ("increase_reasoning_steps", "code"): (
        ", from the raw input to {t}, and trace one small example",
        ", state what holds for {t} before and after each of them",
        ", first design the data for {t}, then the logic, then the tests",
        ", compare {few} ways to build {t}, and only then choose one",
        ", and show after each what {t} contains at that moment",
        ", list the special cases of {t} first, then treat them in turn",
        ", derive the cost of {t} along the way, and check it",
    ),
    ("increase_reasoning_steps", "mathematics"): (
        ", state which rule you use for {t}, and verify the result",
        ", write down what is given about {t}, then what is wanted",
        ", estimate {t} first, then calculate, then compare both values",
        ", and solve for {t} in a second way as a check",
        ", keep the units of {t} in view, and round only at the end",
        ", name the unknown in {t}, set up a relation, then solve it",
        ", and explain after each why the value of {t} is plausible",
    ),
    ("increase_reasoning_steps", "transform"): (
        ", first mark what matters in {t}, then rework it, then compare both",
        ", give a literal version of {t} first, then a natural one",
        ", say which rule decides about {t} each time, and check the whole",
        ", list the difficult spots in {t}, settle each, then put it together",
        ", start with the structure of {t}, then choose words, then polish",
        ", weigh {few} options for {t} each time, and keep the best one",
        ", and after each compare {t} with the original once more",
    ),
}
"""By operation and kind; a tail begins with its own comma or blank."""

DATA = (
    "Work from this table of {t}:\n| place | {k} | {aspect} |\n|---|---|---|\n"
    "| {place} | {n1} | {n2} |\n| {place2} | {n2} | {n3} |",
    "Work from this table, where {u} is still missing:\n| no. | {k} | seen in |\n|---|---|---|\n"
    "| 1 | {n1} | {place} |\n| 2 | {n3} | {place2} |",
    "Use this JSON record as part of the input:\n"
    '{{"about": "{t}", "place": "{place}", "{aspect}": {n1}, "{aspect2}": [{n2}, {n3}]}}',
    "Use this JSON record and name any field that contradicts {u}:\n"
    '{{"{k}": {{"first": {n1}, "second": {n2}}}, "noted_by": "{person}", "{aspect}": false}}',
    "Apply this formula to {t} and say what each term stands for: "
    "`value = {n1} * {aspect} - {n2} / ({n3} + {aspect2})`.",
    "Apply this formula, which someone in {place} proposed for {t}, and judge whether it fits: "
    "`score = ({aspect} + {n1}) ** 2 / {n3}`.",
    "Take these measurements into account: {n1}, {n2}, {n3} and {n4}, taken for {t} in {place} "
    "{occasion}.",
    "Take these measurements of {t} with care, since one may be wrong: {n1} in {place}, {n2} in "
    "{place2}, {n4} at home.",
    "Start from these CSV lines about {t}:\nplace,{k},{aspect}\n{place},{n1},{n3}\n"
    "{place2},{n2},{n1}",
    "Include this Python list in your considerations of {t}:\n"
    '```python\n{k} = [("{place}", {n1}), ("{place2}", {n2})]\n```',
    "Include this Python list, whose values stand for {aspect}, and relate it to {t}:\n"
    "```python\n{aspect} = [{n1}, {n3}, {n2}, {n4}]\n```",
    "Read this log excerpt first, since it mentions {t}:\n```\n08:{n1:0>2} {place}: {aspect} low\n"
    "09:{n1:0>2} {place2}: {aspect} restored after {n3} min\n```",
)
"""Additions of complicate_input, for every kind."""

MARKERS = {
    " ".join(head.split()[:3]): operation
    for operation, heads in (*HEADS.items(), ("complicate_input", DATA))
    for head in heads
}
"""First three words of each head -> its operation."""
