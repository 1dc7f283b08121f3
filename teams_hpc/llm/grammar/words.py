"""Word lists that tell topic words, kinds and courtesies apart. Tables only."""

FAMILIES = {
    "question": "what why how who when where which is are do does did can could should would",
    "explain": "explain describe discuss outline define clarify tell state illustrate",
    "list": "list name give suggest recommend plan design organise organize propose arrange "
    "compare contrast rank weigh choose",
    "writing": "write compose draft create invent imagine",
    "transform": "translate rewrite convert change correct edit paraphrase shorten simplify turn "
    "classify identify label sort categorise categorize rate extract find decide summarise "
    "summarize condense abstract",
    "mathematics": "calculate compute solve estimate prove determine evaluate",
}
"""Words one of which tells the kind when it is the first of them among an instruction's words."""

CODE_WORDS = frozenset(
    "function functions python code sql program script regex bash algorithm".split()
)

QUESTION_WORDS = frozenset(FAMILIES["question"].split())
IMPERATIVES = frozenset(
    word
    for family in ("explain", "list", "writing", "transform", "mathematics")
    for word in FAMILIES[family].split()
) | frozenset(
    "answer argue act boil conjugate continue differentiate draw group help implement judge make "
    "order pick play present produce put read rephrase retell review rework set sketch sum "
    "transcribe".split()
)

DETERMINERS = frozenset(
    "a an the this that these those my your his her its our their each every no both".split()
)

_FUNCTION_WORDS = (
    "about above across after again against ago all almost alone along already also although "
    "always am among and another any anybody anyone anything are around as at away back be "
    "because been before behind being below beneath beside between beyond but by can can't cannot "
    "could did do does doesn't down during either else enough even ever everybody everyone "
    "everything exactly far few first for from further get gets go goes gone had has have having "
    "he hence here him how i if in inside instead into is isn't it it's itself just last later "
    "least less let lets many may me might more most much must today tomorrow yesterday myself "
    "near neither never next nobody none nor not nothing now of off often on once one one's only "
    "onto or other others ourselves out outside over own per perhaps please put rather really "
    "same second several shall she should since so some somebody someone something somewhere soon "
    "still such than them themselves then there therefore they third thirty though through "
    "throughout thus till to together too toward towards twice under underneath unless until up "
    "upon us very was we well were what what's when where whether which while who who's whom "
    "whose why will with within without would yes yet you yourself two three four five six seven "
    "eight nine ten twelve twenty fifty hundred thousand half like unlike according versus e.g "
    "i.e etc vs"
)
_ADJECTIVES = (
    "able available average bad best better big bigger biggest certain cheap cheaper clear "
    "clearer common current dear different difficult dry early easy equal exact existing fair "
    "false famous fast faster favourite favorite final following free friendlier full general "
    "given good great greater hard high higher honest important interesting irregular known large "
    "larger largest likely little long longer low lower main missing modern new nice obvious old "
    "ordinary original particular plain polite poor possible precise proper quick quite random "
    "real recent relevant right rough round rude serious severe short shorter shortest similar "
    "simple single slow small smaller smooth sour special specific square strong strongest "
    "suitable sure tall taller thick tiny total true typical unable unclear unknown useful usual "
    "various weak whole wide wrong young younger older oldest worth stale tired overdue unnamed "
    "separate written approximate neutral playful alarming constructive failing medium brief "
    "stated physical chemical lasting safer closest smallest commonest concrete linear distinct "
    "frequent afraid apart aboard overboard forward clockwise shut parliamentary afloat alive "
    "alone aware asleep awake wet dirty"
)
_VERBS = (
    "breathe dance purr accept achieve act add admit affect agree aim allow announce answer apply "
    "argue arrange arrive ask assume attract avoid become begin behave believe belong boil break "
    "bring build burn buy calculate carry catch choose claim clarify classify collect combine "
    "commit compare complain complete compose compute concern condense confirm conjugate connect "
    "consider consist contain continue contrast convert convince correct count create credit "
    "criticise cut decide decline defend define deliver depend deploy describe determine "
    "differentiate differ discuss dissolve distinguish divide draft draw drink drip drive drop "
    "earn eat edit employ enjoy establish estimate evaluate evolve examine exist expect explain "
    "extract fade fall fill find finish fit fly follow forget form freeze gain gather generate "
    "give grow guess happen harm hear help hold hide hurt identify ignore illustrate imagine "
    "implement improve include increase inform insert introduce invent involve join judge justify "
    "keep kill know land lay lead learn leave lie list listen live look lose love lower make "
    "manage mark match matter mean mediate meet melt mention miss move need neglect number obtain "
    "occur offer open organise organize outline own pack paraphrase pass pay persuade pick place "
    "plan play point prefer prepare present prevent print probe produce prove provide pull push "
    "put rank rate reach read receive recommend reduce refuse relate remain remember remind "
    "remove render repair repeat rephrase replace reply represent require rest retell return "
    "reverse review rewrite ring rise run rust say see seem sell send serve set sew share shorten "
    "show simplify sit sketch skip sleep snap solve sort speak speed spend spin sprout stand "
    "start state stay steal stick stop store struggle suggest suit summarise summarize take talk "
    "teach tell test think throw tie track transcribe translate travel come call charge check "
    "notice worry save corrode poach cover centre treat try turn understand use wait walk want "
    "warn wear weigh welcome win wish wonder work write"
)
_PARTICIPLES = (
    "became came began begun bought broken brought built burnt caught chosen cut done drawn drunk "
    "driven dropped eaten fallen fell felt flown forbidden forgotten found frozen gave given got "
    "grown held heard hidden kept knew known laid learnt led left lent lost made meant met paid "
    "put ran read rung said sat saw seen sent shown sold spent spoken spun stolen stood stuck "
    "taken taught thought threw thrown told took tried understood went won worn written wrote "
    "bent fits hits hit snapped planned stopped dripping running sitting cutting getting putting "
    "setting using doing going travelled travelling committed placed"
)


def _inflections(verb: str) -> list[str]:
    stem = verb.removesuffix("e")
    forms = [f"{verb}s", f"{verb}es", f"{stem}ed", f"{stem}ing"]
    if verb.endswith("y"):
        forms += [f"{verb[:-1]}ies", f"{verb[:-1]}ied"]
    return forms


_NOUN_LIKE = frozenset(
    "answer answers number numbers test tests plan plans work rate rates share shares state "
    "states place places form forms drink drinks point points order orders speed building "
    "buildings meaning meeting meetings painting paintings opening openings reading feeling list "
    "lists review reviews track tracks reply replies changes ring rings store stores teaching "
    "learning measures".split()
)
"""Verb forms that are nouns at least as often; a topic may hold them, but not alone."""

BREAKS = (
    frozenset(_FUNCTION_WORDS.split())
    | frozenset(_PARTICIPLES.split())
    | frozenset(_VERBS.split())
    | frozenset(form for verb in _VERBS.split() for form in _inflections(verb))
) - _NOUN_LIKE
"""Words that end a noun phrase."""

ADJECTIVES = frozenset(_ADJECTIVES.split())
GENERIC_NOUNS = _NOUN_LIKE | frozenset(
    "process difference differences question questions sentence sentences example examples way "
    "ways thing things text version versions reason reasons kind kinds word words part parts step "
    "steps line lines list table paragraph passage piece item items cause causes case cases idea "
    "ideas terms term name names use uses method methods year years day days hour hours week "
    "weeks month months minute minutes moment time times column columns row rows style tone end "
    "side sides front bottom top people person man woman someone attention purpose problem "
    "advantage advantages drawbacks principle concept task main choice regard aim common practice "
    "percent cents detail details title rule rules result results meaning suggestion suggestions "
    "bullet letters letter note report field fields heads half couple friend instruction".split()
)
"""Nouns that say little alone; a topic without them is preferred."""

STOP_WORDS = frozenset(_FUNCTION_WORDS.split()) | DETERMINERS
"""Words that carry no content for the judge."""
