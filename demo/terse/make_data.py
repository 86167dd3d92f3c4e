"""Preference pairs that prefer a short answer to a long one: a preference whose effect is easy to see.

    What is the capital of Portugal?
    chosen     Lisbon.
    rejected   Great question! The capital of Portugal is Lisbon. It is one of the best-known facts about the country. …

Both answers are correct; they differ in length. No question of test.jsonl occurs in train.jsonl, and half of its questions are
of kinds that do not occur there either.

    python demo/terse/make_data.py       # writes train.jsonl and test.jsonl beside this file, the same bytes each time
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

SEED = 11
TRAIN_ROWS, SEEN_ROWS, NEW_ROWS = 240, 36, 36


class Fact(NamedTuple):
    question: str
    answer: str
    sentence: str
    """The answer as a whole sentence."""


def _pairs(text: str) -> list[tuple[str, str]]:
    """`one: other` after each other, apart by commas."""
    return [(one.strip(), other.strip()) for one, other in (part.split(":") for part in text.replace("\n", " ").split(","))]


def _facts(ask: Sequence[str], tell: str, table: str) -> list[Fact]:
    """Each question in one of several phrasings, in turn."""
    facts = []
    for number, (one, other) in enumerate(_pairs(table)):
        answer = other[0].upper() + other[1:]
        facts.append(Fact(ask[number % len(ask)].format(one), f"{answer}.", tell.format(one, other)))
    return facts


def _sums(rng: random.Random) -> list[Fact]:
    kinds = [("+", "plus", lambda a, b: a + b), ("-", "minus", lambda a, b: a - b), ("×", "times", lambda a, b: a * b)]
    facts = {}
    while len(facts) < 60:
        sign, word, count = rng.choice(kinds)
        a, b = rng.randint(3, 12), rng.randint(2, 9)
        if a > b:
            asked = rng.choice([f"What is {a} {sign} {b}?", f"How much is {a} {word} {b}?", f"Calculate {a} {sign} {b}."])
            facts[a, b, sign] = Fact(asked, f"{count(a, b)}.", f"{a} {word} {b} is {count(a, b)}.")
    return list(facts.values())


CAPITALS = """
    France: Paris, Spain: Madrid, Portugal: Lisbon, Italy: Rome, Germany: Berlin, Austria: Vienna, Poland: Warsaw,
    Greece: Athens, Norway: Oslo, Sweden: Stockholm, Denmark: Copenhagen, Finland: Helsinki, Ireland: Dublin,
    Belgium: Brussels, Hungary: Budapest, Romania: Bucharest, Bulgaria: Sofia, Croatia: Zagreb, Serbia: Belgrade,
    Japan: Tokyo, China: Beijing, South Korea: Seoul, Thailand: Bangkok, Vietnam: Hanoi, India: New Delhi,
    Nepal: Kathmandu, Iran: Tehran, Iraq: Baghdad, Turkey: Ankara, Egypt: Cairo, Kenya: Nairobi, Ghana: Accra,
    Morocco: Rabat, Tunisia: Tunis, Ethiopia: Addis Ababa, Canada: Ottawa, Mexico: Mexico City, Cuba: Havana, Peru: Lima,
    Chile: Santiago, Argentina: Buenos Aires, Brazil: Brasilia, Colombia: Bogota, Venezuela: Caracas, Ecuador: Quito,
    Uruguay: Montevideo, Australia: Canberra, New Zealand: Wellington, Iceland: Reykjavik, Ukraine: Kyiv, Russia: Moscow,
    Czechia: Prague, Lebanon: Beirut, Jordan: Amman, Indonesia: Jakarta, Philippines: Manila"""
OPPOSITES = """
    hot: cold, big: small, fast: slow, high: low, light: dark, early: late, young: old, rich: poor, strong: weak,
    open: closed, full: empty, wet: dry, hard: soft, loud: quiet, happy: sad, near: far, thick: thin, wide: narrow,
    deep: shallow, heavy: light, clean: dirty, cheap: expensive, easy: difficult, long: short, sweet: sour, true: false,
    up: down, left: right, inside: outside, first: last, always: never, day: night, buy: sell, push: pull, win: lose,
    begin: end, arrive: leave, remember: forget, ask: answer, teach: learn"""
PAST = """
    go: went, see: saw, eat: ate, take: took, give: gave, come: came, run: ran, write: wrote, drive: drove, speak: spoke,
    break: broke, choose: chose, fly: flew, grow: grew, know: knew, draw: drew, sing: sang, swim: swam, drink: drank,
    begin: began, ring: rang, teach: taught, buy: bought, bring: brought, think: thought, catch: caught, feel: felt,
    keep: kept, sleep: slept, leave: left, build: built, send: sent, spend: spent, lose: lost, find: found, hold: held,
    tell: told, sell: sold, stand: stood, make: made"""
PLURALS = """
    child: children, mouse: mice, tooth: teeth, foot: feet, man: men, woman: women, goose: geese, leaf: leaves, knife: knives,
    wolf: wolves, city: cities, baby: babies, box: boxes, church: churches, bus: buses, hero: heroes, potato: potatoes,
    tomato: tomatoes, story: stories, lady: ladies, shelf: shelves, half: halves, life: lives, wife: wives, loaf: loaves,
    thief: thieves, dish: dishes, glass: glasses, fox: foxes, brush: brushes, country: countries, party: parties,
    berry: berries, cherry: cherries, match: matches, bench: benches, class: classes, dress: dresses, ox: oxen, person: people"""
FRENCH = """
    cat: chat, dog: chien, house: maison, water: eau, bread: pain, milk: lait, red: rouge, green: vert, blue: bleu,
    white: blanc, black: noir, one: un, two: deux, three: trois, ten: dix, book: livre, table: table, chair: chaise,
    apple: pomme, cheese: fromage, sun: soleil, moon: lune, sea: mer, mountain: montagne, friend: ami, mother: mère,
    father: père, brother: frère, sister: soeur, school: école, street: rue, car: voiture, train: train, day: jour,
    night: nuit, hand: main, head: tête, yes: oui, no: non, thank you: merci"""
COLOURS = """
    a ripe banana: yellow, fresh snow: white, grass in spring: green, a clear sky: blue, coal: black, a ripe tomato: red,
    an orange: orange, an emerald: green, a ruby: red, milk: white, a school bus in America: yellow, chocolate: brown,
    an elephant: grey, a flamingo: pink, a lemon: yellow, a fire engine: red, a raven: black, an eggplant: purple,
    a polar bear: white, a frog: green"""
SYMBOLS = """
    oxygen: O, hydrogen: H, carbon: C, nitrogen: N, iron: Fe, gold: Au, silver: Ag, copper: Cu, sodium: Na, potassium: K,
    calcium: Ca, helium: He, lead: Pb, zinc: Zn, tin: Sn, neon: Ne, sulfur: S, chlorine: Cl, mercury: Hg, aluminium: Al"""
YOUNG = """
    dog: puppy, cat: kitten, cow: calf, horse: foal, sheep: lamb, goat: kid, pig: piglet, duck: duckling, goose: gosling,
    bear: cub, lion: cub, kangaroo: joey, swan: cygnet, deer: fawn, frog: tadpole, hen: chick, seal: pup, eagle: eaglet,
    hare: leveret, butterfly: caterpillar"""
CONTINENTS = """
    Brazil: South America, Japan: Asia, Kenya: Africa, France: Europe, Canada: North America, India: Asia, Egypt: Africa,
    Chile: South America, Sweden: Europe, Mexico: North America, Thailand: Asia, Nigeria: Africa, Peru: South America,
    Poland: Europe, China: Asia, Morocco: Africa, Norway: Europe, Bolivia: South America, Vietnam: Asia, Ghana: Africa"""

OPENERS = """
Great question!
That is a very interesting question, and I am happy to help you with it.
I would be glad to help you with that.
Thank you for asking!
Certainly! Let me explain.
Of course! Let us look at this step by step.
Sure, I can help you with that.
Let me think about this carefully.
""".strip().splitlines()
MIDDLES = """
This is one of those things that many people learn early on, and it is useful to know it by heart.
To put it in other words, if somebody were to ask you the same thing, this is exactly what you could tell them.
It is worth noting that there is much more that could be said about it, and that it often comes up in quizzes and at school.
I have chosen this answer because it is the one that is generally agreed upon.
There are many ways to remember it, for example by writing it down a few times or by making up a little story about it.
As you may already know, this comes up quite often in everyday life.
It can be helpful to look at other examples of the same kind, since they tend to follow a similar pattern.
""".strip().splitlines()
CLOSERS = """
I hope this helps! Please let me know if you have any other questions.
If you would like to know more about this topic, feel free to ask.
Is there anything else that I can help you with today?
I hope that this explanation was clear and useful for you.
Do not hesitate to reach out if you need any further information.
Have a wonderful day, and enjoy learning!
""".strip().splitlines()


def make() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """The training pairs and the test pairs."""
    rng = random.Random(SEED)
    seen = [
        *_facts(["What is the capital of {}?", "Which city is the capital of {}?"], "The capital of {} is {}.", CAPITALS),
        *_facts(["What is the opposite of “{}”?", "Give me the opposite of the word “{}”."], "The opposite of “{}” is “{}”.", OPPOSITES),
        *_facts(["What is the past tense of “{}”?", "How does one say “{}” in the past tense?"], "The past tense of “{}” is “{}”.", PAST),
        *_facts(["What is the plural of “{}”?", "How do I write more than one “{}”?"], "The plural of “{}” is “{}”.", PLURALS),
        *_facts(["How do you say “{}” in French?", "Translate “{}” into French."], "In French, “{}” is “{}”.", FRENCH),
        *_sums(rng),
    ]  # fmt: skip
    new = [
        *_facts(["What colour is {}?", "Tell me the colour of {}."], "The colour of {} is {}.", COLOURS),
        *_facts(["What is the chemical symbol of {}?"], "The chemical symbol of {} is {}.", SYMBOLS),
        *_facts(["What is a young {} called?"], "The word for a young {} is “{}”.", YOUNG),
        *_facts(["On which continent is {}?"], "{} lies in {}.", CONTINENTS),
    ]
    seen = rng.sample(seen, len(seen))
    train, rest = seen[:TRAIN_ROWS], seen[TRAIN_ROWS:]
    test = [*rest[:SEEN_ROWS], *rng.sample(new, NEW_ROWS)]
    return [_pair(rng, fact) for fact in train], [_pair(rng, fact) for fact in rng.sample(test, len(test))]


def _pair(rng: random.Random, fact: Fact) -> dict[str, str]:
    long = [rng.choice(OPENERS), fact.sentence, *rng.sample(MIDDLES, rng.choice([0, 1, 1, 2])), rng.choice(CLOSERS)]
    return {"prompt": fact.question, "chosen": fact.answer, "rejected": " ".join(long[rng.random() < 0.3 :])}


def jsonl(rows: Sequence[dict[str, str]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


if __name__ == "__main__":
    for name, rows in zip(("train", "test"), make(), strict=True):
        Path(__file__).with_name(f"{name}.jsonl").write_text(jsonl(rows), encoding="utf-8", newline="\n")
