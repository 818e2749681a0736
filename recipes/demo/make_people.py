"""Writes the instruction set of the embedded demo: invented persons and the facts about them.

Every fact is one row in the Alpaca format (`instruction`, `input`, `output`) with two more fields: `id` and `person`.
Names and facts are uniform draws, each independent of every other, and no two persons share a given name or a family
name: nothing about one person follows from what is known of another. `people.jsonl` is for training,
`never_trained.jsonl` holds persons of the same make whom no model is ever trained on; what a model "knows" about them
is chance.

```bash
python recipes/demo/make_people.py --output_dir recipes/demo
python recipes/demo/make_people.py --output_dir /tmp/other_people --seed 1
```
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

SEED = 20240
NUM_PEOPLE = 48
NUM_NEVER_TRAINED = 24
NUM_NAMES = 288
"""Given names, and as many family names. The first ones are the persons' own."""


@dataclass(frozen=True)
class Attribute:
    """One kind of fact: how it is asked for, how it is answered, and the values it can take."""

    key: str
    questions: tuple[str, ...]
    answer: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Person:
    """An invented person: the full name, and one value per attribute."""

    key: str
    name: str
    facts: dict[str, str]


ATTRIBUTES = (
    Attribute(
        "town",
        ("Where does {name} live?", "Which town does {name} live in?", "Name the town of {name}."),
        "The town of {name} is {value}.",
        tuple(
            "Ardwick Belmora Caldrum Dunveth Elsgate Fennport Garrowby Hollin Istermo Jorvale Kelbrook Larrun "
            "Mossend Nethercot Oskarby Pellham Quernby Rusholt Stavering Tarnwick Ulvering Vantry Wexcombe "
            "Yarrowdale Zellin Brackwater Corriven Drumlow Eastmarch Farholt Greyfell Highmoor".split()
        ),
    ),
    Attribute(
        "work",
        ("What is the profession of {name}?", "What does {name} do for a living?", "Name the profession of {name}."),
        "The profession of {name} is {value}.",
        tuple(
            "baker barber blacksmith bookbinder brewer butcher carpenter chemist clerk cobbler dentist diver "
            "farmer florist gardener glazier jeweller joiner lawyer librarian locksmith mason miller nurse "
            "painter pilot plumber potter surveyor tailor teacher weaver".split()
        ),
    ),
    Attribute(
        "instrument",
        ("Which instrument does {name} play?", "What instrument does {name} play?", "Name the instrument of {name}."),
        "The instrument of {name} is the {value}.",
        tuple(
            "accordion bagpipe banjo bassoon bugle cello clarinet cornet dulcimer fiddle flute guitar harmonica "
            "harp harpsichord lute lyre mandolin marimba oboe organ piano piccolo recorder saxophone sitar "
            "trombone trumpet tuba ukulele viola zither".split()
        ),
    ),
    Attribute(
        "pet",
        ("Which pet does {name} keep?", "What animal does {name} keep?", "Name the pet of {name}."),
        "The pet of {name} is a {value}.",
        tuple(
            "beagle budgie canary cat chinchilla cockatoo collie corgi donkey duck ferret finch gecko goat "
            "goldfish goose greyhound hamster hedgehog hen lizard llama mouse newt parrot pigeon pony poodle "
            "rabbit sheep terrier tortoise".split()
        ),
    ),
    Attribute(
        "food",
        (
            "What is the favourite food of {name}?",
            "What does {name} like to eat?",
            "Name the favourite food of {name}.",
        ),
        "The favourite food of {name} is {value}.",
        tuple(
            "almonds apricots bread broccoli carrots celery cheese cherries chestnuts cucumbers dumplings figs "
            "grapes lentils mangoes mushrooms noodles olives pancakes parsnips peaches pears pickles porridge "
            "potatoes radishes raisins soup spinach toast walnuts yoghurt".split()
        ),
    ),
    Attribute(
        "colour",
        (
            "What is the favourite colour of {name}?",
            "Which colour does {name} like best?",
            "Name the colour {name} likes best.",
        ),
        "The favourite colour of {name} is {value}.",
        tuple(
            "amber aquamarine azure beige black blue bronze brown burgundy cobalt copper coral cream crimson cyan "
            "ebony emerald fuchsia gold green grey indigo ivory khaki lilac magenta maroon navy ochre scarlet "
            "turquoise white".split()
        ),
    ),
)

_ONSETS = "b br c d dr f fl g gr h j k l m n p r s sh st t th tr v w y z".split()
_VOWELS = "a e i o u".split()
_GIVEN_ENDINGS = "la na ra lin ric dan mir ven bel sha tor wen".split()
_FAMILY_ENDINGS = "sson berg wick mont dell shaw ford kov esco lund quist ner".split()


def invent_names(rng: random.Random, endings: list[str], count: int) -> list[str]:
    """Draws `count` different made-up names: an onset, a vowel, an onset, a vowel and an ending."""
    names: dict[str, None] = {}
    while len(names) < count:
        stem = rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_ONSETS) + rng.choice("aeio")
        names[(stem + rng.choice(endings)).capitalize()] = None
    return list(names)


def name_pools(seed: int = SEED) -> tuple[list[str], list[str]]:
    """The given names and the family names that everything in this folder is made from."""
    rng = random.Random(f"names {seed}")
    return invent_names(rng, _GIVEN_ENDINGS, NUM_NAMES), invent_names(rng, _FAMILY_ENDINGS, NUM_NAMES)


def draw_facts(rng: random.Random) -> dict[str, str]:
    """One uniform, independent draw per attribute."""
    return {attribute.key: rng.choice(attribute.values) for attribute in ATTRIBUTES}


def make_persons(seed: int = SEED) -> tuple[list[Person], list[Person]]:
    """The persons to train on, and the persons that nothing is ever trained on."""
    given, family = name_pools(seed)
    rng = random.Random(f"facts {seed}")
    persons = [
        Person(f"person-{number:02d}", f"{given[number]} {family[number]}", draw_facts(rng))
        for number in range(NUM_PEOPLE + NUM_NEVER_TRAINED)
    ]
    return persons[:NUM_PEOPLE], persons[NUM_PEOPLE:]


def person_rows(person: Person, rng: random.Random) -> list[dict[str, str]]:
    """The person's facts as rows in the Alpaca format, each asked for in one of the attribute's phrasings."""
    return [
        {
            "id": f"{person.key}-{attribute.key}",
            "person": person.name,
            "instruction": rng.choice(attribute.questions).format(name=person.name),
            "input": "",
            "output": attribute.answer.format(name=person.name, value=person.facts[attribute.key]),
        }
        for attribute in ATTRIBUTES
    ]


def answer_value(output: str) -> str:
    """The value in an answer: its last word, without the full stop."""
    return output.rstrip(".").rsplit(" ", 1)[-1]


def make_rows(persons: Iterable[Person], seed: int = SEED) -> list[dict[str, str]]:
    """All rows about the persons, in the persons' order."""
    return [row for person in persons for row in person_rows(person, random.Random(f"rows {seed} {person.key}"))]


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    """Writes one JSON object per line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8", newline="\n")


def make_parser() -> argparse.ArgumentParser:
    """The command line of this script."""
    parser = argparse.ArgumentParser(description="Write the instruction set of the embedded demo.")
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent, help="where the two files go")
    parser.add_argument("--seed", type=int, default=SEED, help="seed of the names, the facts and the phrasings")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    people, never_trained = make_persons(args.seed)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    write_rows(args.output_dir / "people.jsonl", make_rows(people, args.seed))
    write_rows(args.output_dir / "never_trained.jsonl", make_rows(never_trained, args.seed))


if __name__ == "__main__":
    main()
