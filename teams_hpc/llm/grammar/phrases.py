"""The words of the grammar. Tables only; what they mean stands in the modules that use them."""

KINDS = ("explain", "code", "mathematics", "list", "writing", "transform")

FIRST_WORDS = {
    "list": "list name give suggest recommend plan design organise organize propose arrange",
    "writing": "write compose draft create invent imagine",
    "transform": "translate rewrite convert change correct edit paraphrase shorten simplify turn "
    "classify identify label sort categorise categorize rate extract summarise summarize condense",
    "mathematics": "calculate compute solve estimate prove",
}
CODE_WORDS = frozenset(
    "function python code sql program script regex bash algorithm javascript class loop".split()
)

# Additions: what a fruitful operation appends. Each opener belongs to one operation alone, so that
# the operations already applied can be read off a text.
OPENERS = {
    "add_constraints": (
        "Stay under {hundred} words",
        "Use exactly {few} short paragraphs",
        "Leave out every technical term",
        "End with a single sentence",
    ),
    "deepening": (
        "Go beyond the basics",
        "Look at the deeper causes",
        "Weigh the long-term consequences",
        "Bring in opposing views",
    ),
    "concretizing": (
        "Take the case of {person}",
        "Make it specific to {place}",
        "Assume that {person} asks",
        "Set it in {place}",
    ),
    "increase_reasoning_steps": (
        "Reason in {few} numbered steps",
        "Work through it one step at a time",
        "Show each intermediate step",
        "Think it through in stages",
    ),
    "complicate_input": (
        "Work from this table",
        "Start from this JSON record",
        "Take these measurements into account",
        "Apply this formula",
    ),
}
TAILS = {
    "add_constraints": (
        "and mention {topic} at least {few} times without repeating a sentence",
        "and name {few} sources a sceptical reader could check about {topic}",
        "and put the most surprising point about {topic} in the first line",
        "and rank everything you say about {topic} by how certain it is",
        "and warn about {few} common mistakes that beginners make with {topic}",
    ),
    "deepening": (
        "and discuss how {topic} interacts with {aspect} and with {aspect2} over time",
        "and ask why experts on {topic} disagree about {aspect} and about {aspect2}",
        "and trace where {topic} came from, what shaped it, and how {aspect} matters",
        "and explain what {topic} would look like if {aspect} changed tomorrow",
        "and say what {topic} reveals about {aspect}, and what it hides about {aspect2}",
    ),
    "concretizing": (
        "in {year}, with {topic} as the main worry and only {hundred} euros to spend",
        "during {season}, where {topic} has to fit into {few} hours every week",
        "and replace every general word about {topic} by a named example from {year}",
        "with {few} colleagues, no experience of {topic}, and a deadline in {season}",
        "where {topic} means one particular thing: what {person2} dealt with in {year}",
    ),
    "increase_reasoning_steps": (
        "about {topic}, justify each one by the one before, and check the last",
        "state what you know about {topic}, what follows from it, and what stays open",
        "compare {few} possible routes through {topic} before you decide on one of them",
        "and after each of them say how sure you are about {topic}, and why",
        "first split {topic} into {few} smaller questions, then combine what you found",
    ),
}
DATA = {
    "Work from this table": (
        ":\n| {topic} | {season} | {year} |\n|---|---|---|\n| first | {n1} | {n2} |\n"
        "| second | {n3} | {n4} |",
    ),
    "Start from this JSON record": (
        ': {{"{topic}": {{"{aspect}": {n1}, "{aspect2}": [{n2}, {n3}], "year": {year}}}}}',
    ),
    "Take these measurements into account": (
        " for {topic}: {n1}, {n2}, {n3} and {n4}, taken in {place} in {year}",
    ),
    "Apply this formula": (" where {topic} matters: score = {n1} * {aspect} - {n2} / (1 + {n3})",),
}
ASPECTS = (
    "cost",
    "fairness",
    "safety",
    "climate",
    "memory",
    "trust",
    "scale",
    "speed",
    "tradition",
    "language",
    "health",
    "privacy",
    "maintenance",
    "geography",
    "education",
    "habit",
    "energy",
    "accuracy",
    "patience",
    "politics",
)
PEOPLE = (
    "a night-shift nurse",
    "a retired sailor",
    "a first-year student",
    "a village baker",
    "a deaf violinist",
    "a bus driver",
    "a young beekeeper",
    "a museum guide",
    "a tax adviser",
    "a mountain rescuer",
    "a school librarian",
    "a street musician",
    "a rice farmer",
    "a lighthouse keeper",
    "a court interpreter",
    "a bicycle courier",
)
PLACES = (
    "Nairobi",
    "Valparaíso",
    "Hanoi",
    "Tromsø",
    "Winnipeg",
    "Marrakesh",
    "Ljubljana",
    "Cusco",
    "Busan",
    "Tbilisi",
    "Hobart",
    "Galway",
    "Montevideo",
    "Kyoto",
    "Accra",
    "Leipzig",
)
SEASONS = ("January", "a dry summer", "harvest time", "the monsoon", "exam week", "a long winter")
FEW = ("two", "three", "four", "five", "six")

# Paraphrases: what a pointless operation does. They add no information.
PREFIXES = (
    "Here is a request: ",
    "One request: ",
    "Kindly take this on: ",
    "My request to you: ",
    "Please take care of this: ",
)
SUFFIXES = ("", " Thank you.", " Thanks in advance.", " Many thanks.")

# Breadth: brand-new prompts of each kind.
FRAMES = {
    "explain": (
        "Explain how {rare} came to matter so much for {domain}.",
        "Why does {rare} puzzle people who know {domain} well?",
        "Describe what happens to {rare} when {domain} changes quickly.",
        "What should a newcomer to {domain} know about {rare}?",
    ),
    "code": (
        "Write a Python function that keeps a record of {rare} for a {domain} archive.",
        "Write a SQL query that finds the oldest entry about {rare} in a {domain} catalogue.",
        "Write a small script that warns a {domain} club when {rare} is running out.",
    ),
    "mathematics": (
        "Calculate how many days {n1} units of {rare} last a {domain} workshop using {n2} a day.",
        "Estimate the yearly cost of {rare} for {n2} {domain} groups that pay {n1} euros a month.",
        "Solve this: {n1} pieces of {rare} shared by {n2} {domain} teams, how many are left over?",
    ),
    "list": (
        "List ways to introduce {rare} to people who only know {domain} from books.",
        "Suggest names for a small museum of {domain} that is devoted to {rare}.",
        "Plan a weekend about {rare} for a {domain} club with very little money.",
    ),
    "writing": (
        "Write a short letter in which {person} defends {rare} against {domain} experts.",
        "Draft a radio advertisement for {rare} aimed at lovers of {domain}.",
        "Compose a fable in which {rare} teaches a lesson about {domain}.",
    ),
    "transform": (
        "Rewrite this note on {domain} for children: {rare} is older than it looks.",
        "Summarise what a {domain} handbook would say about {rare} in one line.",
        "Classify these three notes on {domain}: {rare}, its rivals, and its imitations.",
    ),
}
RARE = (
    "tidal mills",
    "quipu knots",
    "lichen dyes",
    "fog harvesting",
    "shadow puppets",
    "salt roads",
    "clockwork organs",
    "bone china",
    "whistled speech",
    "ice houses",
    "moss gardens",
    "stick charts",
    "peat cutting",
    "river ferries",
    "wax cylinders",
    "stilt farming",
    "rope bridges",
    "seed vaults",
    "sand painting",
    "glass floats",
    "wind catchers",
    "cheese caves",
    "hedge laying",
    "star compasses",
    "barter fairs",
    "pigeon post",
    "felt tents",
    "mirror writing",
    "terrace walls",
    "coral clocks",
    "reed boats",
    "drum codes",
)
DOMAINS = (
    "history",
    "biology",
    "cooking",
    "music",
    "sailing",
    "architecture",
    "farming",
    "astronomy",
    "economics",
    "theatre",
    "geography",
    "medicine",
    "sport",
    "linguistics",
    "chemistry",
    "crafts",
)

# Answers, by kind: an opening, sentences for the body, a closing.
OPENINGS = {
    "explain": (
        "In short, {topic} is best understood through {aspect}.",
        "The key to {topic} is how it relates to {topic2}.",
        "Most of what matters about {topic} follows from one idea: {aspect}.",
    ),
    "code": (
        "The function below handles {topic} and fails early on bad input.",
        "A short solution for {topic} is enough, as long as {topic2} is checked first.",
    ),
    "mathematics": (
        "Write down what is known about {topic} before calculating anything.",
        "The result for {topic} follows from one multiplication and one check.",
    ),
    "list": (
        "Here is a selection that covers {topic} from several sides.",
        "These ideas for {topic} are ordered from the easiest to the hardest.",
    ),
    "writing": (
        "Nobody in {place} had ever asked about {topic} before that evening.",
        "Dear reader, let me begin with {topic}, since everything began there.",
    ),
    "transform": (
        "In plain words: {topic} comes first, and {topic2} follows from it.",
        "The revised version keeps {topic} and drops what repeats it.",
    ),
}
BODY = (
    "First, {topic} depends on {aspect}, which is often overlooked.",
    "Where {aspect} is weak, {topic} suffers sooner than {topic2} does.",
    "A good example is {person} in {place}, for whom {topic} changed everything in {year}.",
    "People who know {topic2} well tend to judge {topic} by its {aspect}.",
    "It helps to separate {topic} from {topic2} and to look at each on its own.",
    "About {n1} in {n2} cases of {topic} can be traced back to {aspect}.",
    "In {place}, {topic} is handled differently because {aspect} counts for more there.",
    "The usual mistake is to treat {topic} and {aspect} as the same thing.",
    "Over time, {aspect} has become as important for {topic} as {aspect2} used to be.",
    "Whoever starts with {topic2} will find {topic} easier to follow.",
    "One should not forget {aspect2}, since it limits what {topic} can achieve.",
    "By {year} most of the doubts about {topic} had been settled by {person}.",
)
CLOSINGS = (
    "So {topic} rewards care with {aspect} more than anything else.",
    "Taken together, this makes {topic} clear enough to act on.",
    "In the end {topic} and {topic2} need each other.",
    "That is why {aspect} deserves the last word on {topic}.",
)
REFUSAL = "I'm sorry, but I can't help with {topic} at the moment."
EMPTY_ANSWERS = ("...", "It is what it is.", "And so on, and on.", "- - -")
COPIED = "Here is the rewritten prompt: {text}"
