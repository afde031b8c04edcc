"""Prompts whose continuation a language model may be sure of: facts after examples of the same kind, and ordered lists.

They are plain text, made by code from word lists; which of them the model is sure of is measured (`select.py`). A word list
has `subject answer` pairs; `_` stands for a space.
"""

from __future__ import annotations

from typing import NamedTuple

# sentences in front of a question, and items of a list in front of the next
EXAMPLES, ITEMS = 7, 9


class Fact(NamedTuple):
    """A prompt and its true continuation, without the space between."""

    relation: str
    prompt: str
    answer: str


# relation -> sentence up to the answer, with {} for the subject
SENTENCES = {
    "capital": "The capital of {} is",
    "continent": "{} is a country in",
    "plural": "The plural of {} is",
    "past": "The past tense of {} is",
    "comparative": "The comparative of {} is",
    "opposite": "The opposite of {} is",
    "symbol": "The chemical symbol of {} is",
    "language": "The language of {} is",
}
_LISTS = {
    "capital": """France Paris Germany Berlin Italy Rome Spain Madrid Japan Tokyo China Beijing Russia Moscow Egypt Cairo
        Greece Athens Portugal Lisbon Austria Vienna Poland Warsaw Hungary Budapest Sweden Stockholm Norway Oslo Finland
        Helsinki Denmark Copenhagen Ireland Dublin England London Scotland Edinburgh Canada Ottawa Australia Canberra India
        New_Delhi Thailand Bangkok Vietnam Hanoi Cuba Havana Peru Lima Chile Santiago Kenya Nairobi Iran Tehran Iraq
        Baghdad Syria Damascus Lebanon Beirut Turkey Ankara Ukraine Kyiv Romania Bucharest Bulgaria Sofia Serbia Belgrade
        Croatia Zagreb Belgium Brussels Argentina Buenos_Aires Venezuela Caracas Colombia Bogotá Indonesia Jakarta
        Nepal Kathmandu Afghanistan Kabul Iceland Reykjavik Cambodia Phnom_Penh Malaysia Kuala_Lumpur Ethiopia Addis_Ababa
        Ghana Accra Senegal Dakar Tunisia Tunis Algeria Algiers Libya Tripoli Jordan Amman Taiwan Taipei Mongolia
        Ulaanbaatar Ecuador Quito Uruguay Montevideo Jamaica Kingston Latvia Riga Lithuania Vilnius Estonia Tallinn""",
    "continent": """France Europe Germany Europe Italy Europe Spain Europe Portugal Europe Austria Europe Poland Europe
        Norway Europe Sweden Europe Belgium Europe Hungary Europe Ireland Europe Romania Europe Finland Europe Greece Europe
        China Asia Japan Asia India Asia Vietnam Asia Thailand Asia Nepal Asia Mongolia Asia Cambodia Asia Laos Asia
        Pakistan Asia Bangladesh Asia Malaysia Asia Iran Asia Iraq Asia Nigeria Africa Kenya Africa Ghana Africa Ethiopia
        Africa Uganda Africa Tanzania Africa Zambia Africa Senegal Africa Mali Africa Angola Africa Algeria Africa Morocco
        Africa Sudan Africa Rwanda Africa Brazil South_America Peru South_America Chile South_America Bolivia South_America
        Argentina South_America Colombia South_America Ecuador South_America Canada North_America Mexico North_America""",
    "plural": """child children man men woman women mouse mice foot feet tooth teeth goose geese person people leaf leaves
        knife knives wife wives wolf wolves life lives half halves city cities baby babies story stories country countries
        party parties lady ladies box boxes bus buses class classes dish dishes church churches watch watches cat cats
        dog dogs house houses book books car cars tree trees bird birds horse horses table tables chair chairs river rivers
        star stars boy boys girl girls day days key keys potato potatoes tomato tomatoes hero heroes apple apples
        king kings queen queens road roads hand hands eye eyes cloud clouds flower flowers window windows door doors
        ship ships teacher teachers doctor doctors student students friend friends letter letters""",
    "past": """go went eat ate see saw come came take took give gave run ran write wrote drink drank sing sang begin began
        swim swam know knew grow grew fly flew draw drew break broke speak spoke choose chose drive drove ride rode rise
        rose fall fell feel felt keep kept sleep slept leave left meet met find found stand stood think thought buy bought
        bring brought teach taught catch caught sell sold hear heard make made lose lost win won send sent build built
        spend spent walk walked talk talked play played work worked look looked call called ask asked help helped open
        opened close closed live lived love loved jump jumped wait waited clean cleaned cook cooked stop stopped carry
        carried study studied try tried cry cried""",
    "comparative": """big bigger small smaller tall taller short shorter fast faster slow slower old older young younger
        hot hotter cold colder warm warmer cool cooler long longer strong stronger weak weaker high higher low lower deep
        deeper wide wider thick thicker thin thinner rich richer poor poorer hard harder soft softer dark darker light
        lighter bright brighter loud louder quiet quieter clean cleaner cheap cheaper easy easier happy happier heavy
        heavier early earlier pretty prettier busy busier funny funnier near nearer late later great greater new newer
        safe safer nice nicer large larger sweet sweeter smart smarter kind kinder good better bad worse""",
    "opposite": """hot cold big small up down left right open closed day night black white good bad high low fast slow
        old new young old happy sad rich poor hard soft light dark long short near far full empty wet dry clean dirty
        strong weak early late true false win lose buy sell push pull start end begin end love hate life death war peace
        north south east west in out on off over under above below before after first last inside outside friend enemy
        success failure increase decrease positive negative male female true false question answer top bottom front back
        always never everything nothing more less same different easy difficult expensive cheap loud quiet""",
    "symbol": """gold Au silver Ag iron Fe copper Cu lead Pb tin Sn mercury Hg sodium Na potassium K hydrogen H oxygen O
        carbon C nitrogen N helium He neon Ne argon Ar calcium Ca magnesium Mg aluminum Al silicon Si phosphorus P sulfur S
        chlorine Cl zinc Zn nickel Ni lithium Li uranium U iodine I boron B fluorine F titanium Ti chromium Cr manganese Mn
        cobalt Co platinum Pt barium Ba radium Ra tungsten W bromine Br krypton Kr""",
    "language": """France French Germany German Italy Italian Spain Spanish Portugal Portuguese Brazil Portuguese Mexico
        Spanish Japan Japanese China Chinese Russia Russian Greece Greek Poland Polish Sweden Swedish Norway Norwegian
        Denmark Danish Finland Finnish Hungary Hungarian Turkey Turkish Vietnam Vietnamese Thailand Thai Korea Korean
        England English Australia English Argentina Spanish Chile Spanish Cuba Spanish Austria German Iceland Icelandic
        Ukraine Ukrainian Romania Romanian Bulgaria Bulgarian Peru Spanish Colombia Spanish Ireland English""",
}
_ONES = "one two three four five six seven eight nine"
_TEENS = "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
_MONTHS = "January February March April May June July August September October November December"
_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday"


def candidates() -> list[Fact]:
    """All candidates, by relation; each prompt once."""
    found: dict[str, Fact] = {}
    for fact in (*_sentences(), *_series()):
        found.setdefault(fact.prompt, fact)
    return list(found.values())


def _sentences() -> list[Fact]:
    found = []
    for relation, form in SENTENCES.items():
        words = [word.replace("_", " ") for word in _LISTS[relation].split()]
        pairs = list(zip(words[::2], words[1::2], strict=True))
        shown = " ".join(f"{form.format(subject)} {answer}." for subject, answer in pairs[:EXAMPLES])
        found += [Fact(relation, f"{shown} {form.format(subject)}", answer) for subject, answer in pairs[EXAMPLES:]]
    return found


def _series() -> list[Fact]:
    """Lists of consecutive items, and the item that comes next."""
    found = []
    for relation, items in _orders().items():
        for start in range(len(items) - ITEMS):
            *shown, last = items[start : start + ITEMS + 1]
            found.append(Fact(relation, f"{', '.join(shown)},", last))
    return found


def _orders() -> dict[str, list[str]]:
    ones, teens, months, days = (text.split() for text in (_ONES, _TEENS, _MONTHS, _DAYS))
    words = [
        *ones,
        *teens,
        *(f"{tens}{one}" for tens in ("twenty", "thirty") for one in ("", *(f"-{o}" for o in ones))),
    ]
    return {
        "counting": [str(n) for n in range(21, 90)],
        "large numbers": [str(n) for n in range(341, 392)],
        "years": [str(n) for n in range(1921, 1990)],
        "tens": [str(n) for n in range(30, 590, 10)],
        "hundreds": [str(n) for n in range(1100, 3500, 100)],
        "number words": words,
        "letters": [chr(n) for n in range(ord("A"), ord("Z") + 1)],
        "small letters": [chr(n) for n in range(ord("a"), ord("z") + 1)],
        "months": months + months[:ITEMS],
        "days": days + days,
        "countdown": [str(n) for n in range(90, 20, -1)],
    }
