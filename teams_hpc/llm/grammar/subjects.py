"""Breadth: domains with the words that betray them, their rarer subjects, and frames of prompts.

Subjects are plural or mass nouns, and frames use them with past tense or modal verbs or as
objects, so that every pair is grammatical. Subjects hold no digits and no word of code.
"""

_DOMAINS = {
    "nature": (
        "plant plants animal animals biology photosynthesis wolves wolf bird birds insect insects "
        "tree trees garden gardening soil flower flowers leaves seeds bats bees fish forest "
        "ecology species genes cells evolution dog dogs cat lentils roses tomato cell tortoise",
        "slime moulds, pitcher plants, leafcutter ants, migrating eels, oak galls, mangrove roots, "
        "fig wasps, fungus gardens, dormant seeds, owl pellets, axolotls, ghost orchids, "
        "bower birds, cleaner shrimps, honeyguides, mistletoe",
    ),
    "earth and sky": (
        "moon sun planet planets earth star stars sky tide tides ocean sea weather rain desert "
        "rock rocks fossils geologists wind climate mountain river rivers atmosphere frost winter "
        "dusk continent volcano glacier sunlight beach lake",
        "tidal bores, ball lightning, ice cores, desert varnish, meteor showers, night clouds, "
        "singing dunes, hot springs, magnetic reversals, sea caves, fog bows, lunar eclipses, "
        "karst springs, black tides, sun dogs, rock glaciers",
    ),
    "physics and chemistry": (
        "physics chemistry energy force gravity light heat acid metal electricity nuclear atom "
        "atoms molecule molecules fission fusion steel rust soap magnet temperature pressure "
        "chemical experiment hammer feather stone boat floats lamp battery momentum quantum",
        "soap films, superfluid helium, glowing paint, acoustic levitation, liquid crystals, "
        "dry ice, chemical gardens, polarised light, freeze drying, static electricity, "
        "crystal growth, iron filings, smoke rings, coloured flames, vacuum flasks, sonic booms",
    ),
    "medicine": (
        "doctor nurse hospital medicine vaccine patient patients health body blood muscles brain "
        "disease symptoms pain eyesight eye sleep elbow anatomy burn burned drug therapy heart "
        "bystander organs psychology bias memory stress anxiety",
        "phantom limbs, herd immunity, bone grafts, colour blindness, altitude sickness, "
        "hearing aids, prosthetic hands, triage rules, jet lag, tooth enamel, snake antivenoms, "
        "night blindness, wound dressings, blood typing, sleepwalking, growing pains",
    ),
    "food": (
        "bread recipe cook cooking food kitchen oven dough coffee tea egg eggs rice milk butter "
        "dinner dinners vegetarian meal meals breakfast cheese vegetables restaurant ingredients "
        "ingredient dishes dish bake baker cake nutrition protein carrots café",
        "sourdough starters, miso paste, salt curing, cheese caves, wild yeasts, clay ovens, "
        "smoked teas, pickled lemons, bitter greens, dried mushrooms, seaweed broth, maple syrup, "
        "edible flowers, fish sauces, buckwheat noodles, communal ovens",
    ),
    "history": (
        "history war empire king revolution century ancient medieval roman wonders historians "
        "cathedrals gothic canal castle treaty athenian inventions invention archaeology museum "
        "lamplighter nineteenth colonial dynasty heritage genealogy",
        "salt roads, pigeon post, tally sticks, guild marks, quipu knots, plague villages, "
        "royal mints, ship logbooks, wax seals, caravan inns, town criers, pewter tokens, "
        "lost harbours, hill forts, silk letters, night watchmen",
    ),
    "law and politics": (
        "law legal court judge lessee tenant clause politics government election vote votes "
        "democracy council parliament parliamentary president police rights constitution crime "
        "criminal civil presumption innocence citizens candidate mediate policy ethics",
        "citizen juries, land registers, water rights, border treaties, recall elections, "
        "grazing commons, ballot papers, sunset clauses, parish councils, ferry licences, "
        "noise bylaws, public petitions, village charters, secret ballots, harbour dues, "
        "inheritance disputes",
    ),
    "money and trade": (
        "money price prices bank market economics finance euros interest savings budget tax shop "
        "customer customers sell sells sales company invoice client business loan stock trade "
        "cost costs economy inflation expenses income advertisement advertising retail",
        "barter fairs, village loans, crop insurance, flea markets, gift vouchers, "
        "freight auctions, honesty boxes, pawn tickets, tea brokers, loyalty cards, "
        "local currencies, repair cafés, grain reserves, fishing quotas, toll bridges, "
        "market stalls",
    ),
    "language and literature": (
        "language sentence translate translation poem poetry story novel letter french "
        "german spanish dutch italian english greek proverb dialect accent verb verbs grammar "
        "literature book books haiku riddle essay fable spelling vocabulary metaphor",
        "whistled speech, lost alphabets, epistolary novels, loanwords, sign languages, "
        "nonsense verse, palindromes, old place names, secret diaries, oral epics, "
        "mirror writing, forgotten footnotes, drum languages, love letters, kennings, "
        "counting rhymes",
    ),
    "art, music and stage": (
        "music song art painting painter painters film theatre concert choir orchestra orchestral "
        "piano pianist violin violinist instruments dance paint colour photograph photography "
        "aperture shutter impressionism expressionism dialogue actor drama sculpture trumpet",
        "shadow puppets, glass harmonicas, church frescoes, throat singing, linocut prints, "
        "church bells, wax cylinders, folk dances, silent films, street murals, stage thunder, "
        "music boxes, paper theatres, barrel organs, pinhole cameras, sand paintings",
    ),
    "software and data": (
        "software computer data database web website internet file files json yaml csv sql code "
        "python program function algorithm query git password server network encryption bug log "
        "phone app email e-mail spreadsheet robot binary search commands css html table loop",
        "merge conflicts, spam filters, sensor logs, time zones, broken links, screen readers, "
        "backup tapes, leap seconds, password managers, map tiles, search indexes, "
        "mailing lists, weather stations, library catalogues, ticket queues, tide gauges",
    ),
    "numbers and games": (
        "mathematics number numbers probability dice prime triangle equation equations integers "
        "geometry fraction fractions sequence sum percent percentage average area game games chess "
        "noughts crosses puzzle logic jug quadrilaterals algebra statistics zero",
        "magic squares, chess endgames, knot diagrams, loaded dice, tiling puzzles, "
        "card shuffles, tournament brackets, folded paper, slide rules, coin puzzles, "
        "logic grids, abacus beads, number spirals, domino chains, word squares, mazes",
    ),
    "travel and transport": (
        "travel trip train trains car cars plane flight aeroplane aeroplanes bus buses bicycle "
        "tram tourist traveller hotel city shipping containers van crates depot stops delivery "
        "journey airport border luggage passengers road crossing harbour country shelf warehouse",
        "night trains, rope ferries, mountain passes, cable cars, pilgrim routes, cargo bikes, "
        "harbour pilots, old timetables, border crossings, canal boats, snow roads, "
        "left luggage, mail coaches, railway inns, ice roads, ferry queues",
    ),
    "sport and outdoors": (
        "sport sports football tennis runner running race cycling swimming team teams league match "
        "hike hiking tent camping training exercise exercises athlete skater ski sprint mountain "
        "beginner riders goal coach marathon fitness stretching",
        "orienteering maps, bouldering walls, curling stones, tidal swimming, fencing footwork, "
        "relay handovers, archery targets, trail markers, ski wax, rowing crews, "
        "winter camping, fell races, kite festivals, stilt races, open-water swims, "
        "penalty shoot-outs",
    ),
    "home and crafts": (
        "home house household flat room rent heating repair shirt button sewing tap washing "
        "machine neighbours neighbour cleaning furniture family staircase bookbinding knitting "
        "wood wool fabric dripping stove padlock kettle candle pottery tools renovation",
        "hedge laying, felt tents, natural dyes, sharpened knives, rain barrels, quilt patterns, "
        "lime plaster, basket willow, beeswax polish, compost heaps, darned socks, "
        "wooden spoons, reed roofs, stained glass, clay tiles, folding screens",
    ),
    "school and work": (
        "school pupil pupils teacher student students lesson exam examination study university "
        "interview interviewer job colleague meeting office employee career essay class "
        "library volunteers archivist training project abstract education speech staff",
        "exam nerves, shift rosters, apprentice diaries, museum labels, complaint letters, "
        "school gardens, fire drills, staff canteens, homework clubs, village libraries, "
        "guest lectures, lost property, night schools, field notebooks, suggestion boxes, "
        "retirement speeches",
    ),
    "buildings and machines": (
        "building buildings bridge engineer engineering architecture tower wall machine machines "
        "engine buttresses manhole cylindrical tank wheel factory roof house lift construction "
        "electric turbine pump brick concrete tunnel lighthouse clock",
        "fog collectors, tidal mills, wind catchers, rope bridges, ice houses, lighthouse lenses, "
        "wooden gears, dry-stone walls, water towers, flood barriers, hand pumps, glass roofs, "
        "clock towers, ship lifts, stone arches, cable railways",
    ),
}

SUBJECTS = {
    name: tuple(subject.strip() for subject in rare.split(","))
    for name, (_, rare) in _DOMAINS.items()
}
DOMAINS = tuple(SUBJECTS)


SUBJECT_BY_END = {
    " ".join(subject.split()[-2:]): (subject, name)
    for name, subjects in SUBJECTS.items()
    for subject in subjects
}
"""Last two words of a subject -> the subject and its domain."""

DOMAIN_OF_WORD = {
    word: name for name, (words, _) in reversed(_DOMAINS.items()) for word in words.split()
}
"""A word belongs to the first domain that lists it."""

FRAMES = {
    "question": (
        "Why might {rare} puzzle even people who have studied {rare2} for years?",
        "What should a newcomer to {place} know about {rare} before the first visit?",
        "How could {rare} and {rare2} have influenced each other over the generations?",
        "Why did interest in {rare} fade around {place} and return much later?",
        "What would {person} notice first about {rare}, and why would that matter?",
        "Which doubts about {rare} can be settled by looking closely, and which need a test?",
        "How did people in {place} first come across {rare}, and what did they make of it all?",
        "What goes wrong with {rare} {occasion}, and who tends to notice it first?",
    ),
    "explain": (
        "Explain how {rare} came to matter so much to people in {place}.",
        "Describe what can happen to {rare} {occasion}, and how one might prevent it.",
        "Discuss why {person} would care more about {rare} than about {rare2}.",
        "Explain the link between {rare} and {aspect} to {person}.",
        "Outline what sets {rare} apart from {rare2}, with one example from {place}.",
        "Describe the part that {aspect} has played in the story of {rare}.",
        "Explain why {rare} can be so hard to predict {occasion}.",
        "Clarify what most visitors to {place} get wrong about {rare}.",
    ),
    "code": (
        "Write a Python function that sorts a collection of notes on {rare} by place and age.",
        "Write an SQL query that finds the places with more entries on {rare} than on {rare2}.",
        "Write a small script that warns {person} when a record of {rare} is out of date.",
        "Sketch an algorithm that plans a short tour of all sites near {place} known for {rare}.",
        "Write a regex that picks every mention of {rare} out of a long report.",
        "Design a Python class that stores observations of {rare} and refuses impossible ones.",
        "Write a Python program that merges two lists about {rare} and {rare2} without repeats.",
        "Create a bash script that archives the photographs of {rare} sent in from {place}.",
    ),
    "mathematics": (
        "A club in {place} spends {n1} euros a month on {rare} and {n2} on {rare2}. What does that "
        "come to over {n3} months?",
        "Calculate how long {n4} euros last if the upkeep of {rare} takes {n1} euros every week.",
        "Estimate how many visits {person} can make to {rare} in {n1} days at {n2} minutes each.",
        "Of {n4} visitors to {place}, {n1} came for {rare} and {n2} for {rare2}. What share came "
        "for neither?",
        "Solve this puzzle: {n4} cards show {rare} or {rare2}, and {n1} more show the first than "
        "the second.",
        "Compute the average of {n1}, {n2}, {n3} and {n4} reports of {rare}, and the spread.",
        "Prove that {n1} boxes for {n4} models of {rare} force two models to share a box.",
    ),
    "list": (
        "List {few} ways to introduce {rare} to children who have never left {place}.",
        "Suggest {few} names for a small museum in {place} that is devoted to {rare}.",
        "Plan a weekend around {rare} in {place} for a group with very little money.",
        "Compare {rare} with {rare2} with regard to {aspect} and {aspect2}.",
        "Name {few} questions that {person} should ask before relying on {rare}.",
        "Recommend {few} first steps for anybody who wants to study {rare} near {place}.",
        "Rank {few} reasons to protect {rare}, starting with the one most people overlook.",
        "Propose a timetable for a festival of {rare} that takes place {occasion}.",
    ),
    "writing": (
        "Write a short letter in which {person} defends {rare} against the town of {place}.",
        "Draft a radio advertisement for {rare} that would make {person} smile.",
        "Compose a fable in which {rare} teach a lesson about {aspect}.",
        "Write the opening of a mystery in which {rare} lead {person} to {place}.",
        "Invent a legend that explains where the {rare} of {place} came from.",
        "Create a dialogue about {rare} between {person} and {person2}.",
        "Draft a speech for the opening of an exhibition on {rare} in {place}.",
        "Imagine a diary page about {rare}, written {occasion} by {person}.",
    ),
    "transform": (
        "Rewrite this note for children: the study of {rare} might one day change what we know "
        "about {rare2}.",
        "Summarise in one line what a handbook of {aspect} would say about {rare}.",
        "Classify these three items by age, value and risk: {rare}, {rare2} and their imitations.",
        "Translate this line into French: nobody in {place} spoke about {rare} again.",
        "Shorten this headline to five words: old friends of {rare} gather in {place} once more.",
        "Simplify this warning for {person}: interference with {rare} may entail {aspect} issues.",
        "Turn this remark about {rare} into a polite question: nobody explained {aspect} to us.",
        "Correct the style of this sentence: {rare} and also {rare2} is what {place} got most of.",
    ),
}
"""Brand-new prompts of each kind; code words stand in those of kind code alone."""
