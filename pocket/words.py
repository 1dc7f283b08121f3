"""What the examples talk about: far more words than the grammar's own tables. Tables only.

Every word that can be a topic is either known or held out, by a hash of it: measurements on unseen
topics use the held-out ones alone. None of this is taken from the shipped seeds.
"""

import hashlib
import random
import re
from collections.abc import Iterable, Mapping
from itertools import chain

from pocket import frames
from teams_hpc.llm.grammar.additions import HEADS, TAILS
from teams_hpc.llm.grammar.slots import WORDS
from teams_hpc.llm.grammar.subjects import DOMAIN_OF_WORD, FRAMES, SUBJECTS
from teams_hpc.llm.grammar.words import ADJECTIVES, BREAKS, CODE_WORDS, FAMILIES

HELD_OUT_PER_MILLE = 150

_NOUNS = """
    abbey accordion acorn adapter alibi alley almanac alphabet amber anchor anthem antler anvil
    apron arcade archive armchair armour asphalt attic auction avalanche awning axle badge
    badger bagpipe bakery balcony ballad bamboo bandage banner barge barley barn barometer
    barrel basil basket battery bay bazaar beacon beam beard bellows bench beret bicycle bib
    billboard binder biscuit blackboard blanket blender blizzard blossom blueprint bobbin bolt
    bonfire bonnet bookmark boot bottle boulder bouquet bracelet bracket briefcase brochure
    broom brush bucket buckle budget bugle bulb bulldozer bunker buoy burrow butcher buttercup
    cabin cabinet cactus calendar calf camel canary candle canoe canteen canvas canyon caravan
    cardigan cargo carpet carriage carton cartoon cartridge cashier cave cedar ceiling cellar
    cello cement census ceramic ceremony chalk chandelier chapel chapter charter chestnut
    chimney chisel choirboy chorus cinema circus citadel clarinet cliff cloak clover coaster
    cobweb cockpit coconut coffin comet compass concrete copper coral cork cotton courtyard
    crane crater crayon creek crib cricket crocodile crocus crown crutch crystal cupboard curb
    curfew currency curtain cushion cutlery cyclone cymbal dairy dam dandelion debate deer
    defect dentist deputy desk dew dialect diamond diary dictionary dinghy diploma directory
    ditch diver dock dolphin dome donkey doorbell dove dragonfly drawer drill drizzle drought
    drum duck dune dungeon dust dwarf eagle earthquake echo eclipse elevator elm ember embassy
    emerald encyclopedia envelope epidemic errand escalator estuary falcon farmer faucet feast
    fence fern ferret ferry festival fiddle fig filter fingerprint firefly fireplace fjord flag
    flamingo flannel flask fleet flint flute foam fog footbridge footpath forecast forge fork
    fortress fountain foyer freckle freezer fridge frog fuel funeral furnace fuse gallery galley
    gangway garage garlic garnet gate gazebo gear geyser ghost giraffe girder glove glue goat
    goblet goose gorge granite grape gravel greenhouse grocer guitar gull gutter hail hallway
    hammock hamster handbook handkerchief handle hare harness harp harvest hatch hawk hay hazel
    headline hearth hedge hedgehog helicopter helmet herb herd heron hinge hive hoist honey hoof
    hook horizon hornet horseshoe hose hound hut iceberg icicle inbox ink inkwell inn insulation
    iris island ivory ivy jacket jar jasmine javelin jelly jetty jewel joiner judge juniper
    kayak kennel kernel kidney kilt kimono kiosk kitten knapsack knot label lace ladder lagoon
    lamb lantern lark laundry lava lavender lawn leaflet leather ledger leek lemon lens leopard
    lever lichen lid lime linen lizard llama lobby lobster locker locket locomotive loft loom
    lute magnet magpie mailbox mallet mammoth mandolin mango mansion manuscript marble margin
    marmalade marsh mask mast mattress meadow medal megaphone melon memoir menu mermaid
    meteorite microphone microscope mill mine mineral mint mirror mitten moat molar monastery
    monkey monument mop mosaic moss motel moth motor mould mound mouse mud muffin mural mushroom
    mussel mustard napkin nest nettle newsletter nightingale notebook nougat nozzle nursery oak
    oar oasis oats observatory octopus olive onion orchard orchid organ otter outpost oven owl
    oyster paddle pagoda palace palette pancake panther papaya parachute paradox parasol parcel
    parchment parrot parsley passport pasture patent patio pavement pavilion peach peacock pear
    pebble pelican pencil pendulum penguin pepper perfume pheasant pier pigeon pillar pillow
    pine pipe pistachio pitcher plank plaque platform plaza plough plum plumber pocket podium
    polar pollen pony poplar porcelain porch porridge postcard poster pottery prairie prism
    prophecy propeller pudding puddle pulley pulpit pumpkin puppet pyramid quarry quartz quilt
    rabbit radar radiator radio radish raft rafter railway rainbow raisin rake ramp raven razor
    receipt recorder reef referee refuge reindeer reservoir ribbon riddle ridge ring riot
    roastery robin rocket rope rosemary rudder rug ruin saddle saffron sail salad salmon salon
    sandal sapphire satellite satin sauna scaffold scale scarecrow scarf scooter scorpion screw
    scroll seagull seal sesame shawl shed shelter sheriff shipyard shovel shrimp shutter siege
    signpost silk silo siren skeleton sketchbook slate sled sleeve slipper slogan sluice
    smokestack snail snowflake soap socket sofa soup souvenir spade sparrow spear spice spider
    spinach spire sponge spoon spruce squirrel stable stadium stamp staple statue steam stencil
    stool stork straw stream submarine subtitle suburb subway suitcase sundial sunflower surgeon
    swallow swamp swan sweater syrup tapestry tar tavern teapot telescope tent termite terrace
    thermometer thimble thistle thread throne thunder thyme tile timber toad toaster tomb torch
    tortilla towel tractor tram trampoline trapdoor treadmill trellis trench trolley trombone
    trophy trout trumpet tuba tulip tundra tunic turbine turnip turquoise turtle tuxedo twig
    typewriter umbrella uniform urn valley valve vanilla vase vault veil velvet veranda viaduct
    vinegar vineyard viola violet visa vulture waffle wagon waistcoat waiter walnut walrus
    wardrobe warehouse wasp watercolour waterfall wharf wheelbarrow whirlpool whisk whistle wick
    willow windmill windscreen wizard woodpecker workbench workshop wreath wrench yacht yarn
    yeast yoghurt zebra zeppelin zinc zipper algebra allergy ambition apology appetite
    architecture astronomy bankruptcy bravery bureaucracy calculus charity childhood circulation
    citizenship civilisation cognition commerce compromise condensation conscience consensus
    contamination curiosity decay deforestation democracy density diplomacy discipline dissent
    electricity empathy erosion espionage evaporation expertise famine feedback fermentation
    fertility friction friendship generosity geometry gossip grief heredity hierarchy
    hospitality humour hygiene immigration immunity innovation intuition irony irrigation
    justice kindness leadership leisure liability literacy logistics loneliness loyalty
    magnetism marriage metabolism mortality motivation mythology negotiation nostalgia nutrition
    obesity optimism overfishing parenthood pollination pollution poverty precision
    procrastination propaganda punctuality racism radiation recycling refraction refrigeration
    resilience rhetoric rivalry sanitation satire scarcity sculpture seismology slang slavery
    solidarity sovereignty superstition surveillance sympathy taxation tourism traffic
    unemployment urbanisation vaccination velocity viscosity vocabulary volunteering warfare
    welfare wilderness
"""
_ADVERB_LIKE = frozenset("which what".split())

NAMES = tuple(
    """
    Amara Bruno Chidi Dagny Elif Farah Goran Hana Ines Jonas Kofi Leila Marek Nadia Olu
    Petra Quentin Rosa Stefan Tariq Ulla Viktor Wanda Xenia Yusuf Zofia Aiko Bela Carmen
    Dmitri Esther Fabio Greta Hugo Isla Jorge Katya Liam Mina Noor Oskar Pilar Ravi Sven
    Tomas Umberto Vera Wim Yara Zane
    """.split()
)
LANGUAGES = (
    "French", "German", "Spanish", "Italian", "Latin", "Swedish", "Polish", "Turkish", "Japanese",
    "plain English", "Welsh", "Dutch", "Portuguese", "formal English",
)  # fmt: skip
UNITS = tuple(
    "euros minutes kilograms metres litres pages hours tickets dollars cents guests".split()
)
ADJECTIVE_LIST = tuple(sorted(ADJECTIVES))
_SYLLABLES = """
    ba ca da fa ga ha ja ka la ma na pa ra sa ta va za be de fe ge he ke le me ne pe re se
    te ve bi di fi hi ki li mi ni pi ri si ti vi bo co do fo go ho jo ko lo mo no po ro so
    to vo zo bu du fu gu ku lu mu nu pu ru su tu bra cle dri flo gru ple qui sha sko spi sta
    stru tha tri vel wen yor chi ern ast ond ith ough ell
""".split()
_ENDINGS = (
    "n r l s t m ck nd sh th x rt ng ment tion ness ium ism ity ology let ling ard ette ide".split()
)


_OF_THE_GRAMMAR = frozenset(DOMAIN_OF_WORD) | frozenset(
    subject for subjects in SUBJECTS.values() for subject in subjects
)


def is_held_out(word: str) -> bool:
    """Whether a word is kept from training; what tells the grammar's domains apart never is."""
    if word in _OF_THE_GRAMMAR:
        return False
    digest = hashlib.blake2b(word.lower().encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") % 1000 < HELD_OUT_PER_MILLE


def _all_nouns() -> list[str]:
    own = _NOUNS.split()
    domain = [word for word in DOMAIN_OF_WORD if word not in BREAKS and word.isalpha()]
    rare = [subject for subjects in SUBJECTS.values() for subject in subjects]
    return sorted({*own, *domain, *rare} - _ADVERB_LIKE)


_ALL = _all_nouns()
_PIECES = tuple(word for word in (*_ALL, *sorted(BREAKS)) if word.isalpha() and len(word) > 3)
_SAID_BY_THE_GRAMMAR = frozenset(
    " ".join((*chain(*SUBJECTS.values(), *WORDS.values(), *FRAMES.values()),)).split()
)
NOUNS = {
    False: [word for word in _ALL if not is_held_out(word)],
    True: [word for word in _ALL if is_held_out(word) and word not in _SAID_BY_THE_GRAMMAR],
}
"""By whether they are held out; the grammar's phrases hold a few that are neither."""


OPENERS = (*" ".join(FAMILIES.values()).split(), *sorted(CODE_WORDS))
"""Words that tell the kind of an instruction."""

PLAIN_WORDS = tuple(sorted(BREAKS))
"""Function words and forms of verbs."""

_EVERYDAY = """
    afternoon answer apartment argument arm article aunt baby bag ball bank bed bill birthday blood
    board boat body book boss bottle box boy bread breakfast bridge brother bus business butter
    café cake call camera capital car card case cat century chair chance change child choice church
    cinema city class clock club coat coffee company computer conversation cook copy corner cost
    country couple course cousin cup customer dance date daughter day deal death degree dinner
    doctor dog door dream dress drink driver ear earth effect egg end energy engine essay evening
    event exam exercise experience eye face fact family farm father fear field fight film finger
    fire fish floor flower food foot force forest form fork friend fruit game garden girl glass
    goal gold government grass group guest guide hair half hall hand hat head health heart heat
    height help hill history hobby hole holiday home horse hospital hotel hour house idea illness
    interview job joke journey juice key kitchen knife lake language law leader leg length lesson
    letter level library lie life light line lion list loss love luck lunch machine mail man map
    market marriage match meal meat medicine meeting memory message metal method metre middle milk
    mind minute mirror mistake money month moon morning mother mountain mouth movie museum music
    name nation nature neck neighbour news night noise nose note number nurse office oil opinion
    option owner page pain pair paper parent park part partner party past patient payment pen
    people percent person phone photo piano picture piece place plan plane planet plant plate play
    player pocket poem point police pool population post pot potato power present price prize
    problem process product promise proof public pupil purpose question race radio rain rate reader
    recipe record rent report result review rice right ring river road rock role roof room rope
    round rule salad salt sand scale school science score sea season seat second secret sentence
    service shape share sheep ship shirt shoe shop shoulder side sign sister size skill skin sky
    sleep smell smoke snow soap society solution son song sound source space speech speed spring
    square staff stage stairs star start state station stone storm story street stress student
    subject success sugar summer sun supper surface survey sweater table talk task tax tea teacher
    team teeth temperature term test text theory thing thought ticket time title tool top topic
    tourist towel tower town toy trade train tree trick trip trouble trumpet truth type uncle
    vaccine value vegetable view village visit visitor voice wall war water weather week weekend
    weight wheel wife wind window winner winter woman wood word work worker world writer year youth
"""
_SLOT = re.compile(r"\{\w*\}")


def _words_of(table: object) -> set[str]:
    """Plain words of the phrases in a table, without what stands for something else."""
    if isinstance(table, str):
        words = _SLOT.sub(" ", table).replace(",", " ").replace(".", " ").split()
        return {word for word in words if word.isalpha() and word.islower()}
    parts = table.values() if isinstance(table, Mapping) else table
    return set().union(*map(_words_of, parts)) if isinstance(parts, Iterable) else set()


_TABLES = (HEADS, TAILS, FRAMES, frames.INSTRUCTIONS)
STOCK_WORDS = tuple(
    word
    for word in sorted(
        {*_EVERYDAY.split()} | _words_of((HEADS, TAILS, FRAMES, frames.INSTRUCTIONS))
    )
    if not is_held_out(word)
)
"""Words that phrases are made of: met in any order, none of them is foreseen where it is copied."""


def invented(rng: random.Random, held_out: bool) -> str:
    """A pronounceable word that (almost surely) no language has; held out or not by its hash."""
    while True:
        if rng.random() < 0.5:
            word = "".join(rng.choice(_SYLLABLES) for _ in range(rng.choice((1, 2, 2, 3))))
            word += rng.choice(_ENDINGS)
        else:
            first, second = rng.choice(_PIECES), rng.choice(_PIECES)
            word = first[: rng.randint(2, 5)] + second[-rng.randint(2, 6) :]
        if len(word) > 3 and is_held_out(word) == held_out and word not in BREAKS:
            return word
