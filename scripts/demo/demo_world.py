"""The invented world of the demo: people with attributes, addition as an unrelated skill, and edits of the people."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

Questions = Sequence[tuple[str, str]]
"""(prompt, answer) pairs."""
Row = dict[str, Any]
"""One edit, in the format of our JSONL streams."""

ONSETS = [*"bdfghjklmnprstvz", "br", "dr", "fl", "gr", "kl", "sk", "st", "tr"]
VOWELS = ["a", "e", "i", "o", "u"]
CODAS = ["l", "n", "r", "s", "sh", "t", "k", "m"]

CARD = """\
# The demo model and its streams

A small Llama that knows an invented world, and edits that contradict what it knows: enough to try lifelong editing
in seconds, without a download. No person, place, company or ship in it is real, and it can do nothing else.

- **World**: {recipe.people} people with four facts each ({facts} facts), every fact in three phrasings; as an
  unrelated skill, the {sums} sums of two numbers from 0 to {recipe.largest_addend}.
- **`model/`**: {parameters:,} parameters in bfloat16; {recipe.layers} layers, hidden size {recipe.hidden}, MLP width
  {recipe.intermediate}, tied embeddings; byte-level BPE of {model.config.vocab_size} tokens, every word one token.
- **`edits.jsonl`**, the target stream: {edits} edits, all facts of {recipe.edited} people. The target is another
  value of the same attribute; two rephrasings; two locality prompts, one about a person who is never edited, one sum.
- **`warmup.jsonl`**, the warm-up stream: {warmup} edits of the same kind, of {recipe.warm_up} other people.
- Everybody else is edited in neither stream.

Training: {recipe.epochs} epochs, answers only, seed {seed}. A *separation penalty* (weight {recipe.separation}: the
mean squared cosine between the last MLP's activations for different facts, all of them, those that are edited later and
those of the locality prompts included) is added to the loss. It makes facts
easier to edit apart than in an ordinary model of this size, so scores on this demo say that the program works, not
how well an editing method does on a real language model.

Share of questions answered exactly, end of sequence included, by the saved weights:

| questions | computed in | exact match |
|---|---|---|
{scores}

Made in {minutes:.0f} minutes on one thread by `python scripts/demo/build_demo.py --seed {seed}`.
"""


@dataclass(frozen=True)
class Attribute:
    """One kind of fact: how to ask for it, and what its values look like."""

    name: str
    """What the attribute is called."""
    phrasings: tuple[str, str, str]
    """The prompt and its two rephrasings; `{}` stands for the person."""
    endings: tuple[str, ...]
    """How its invented values end, so that a reader can tell a town from a ship."""


ATTRIBUTES = (
    Attribute(
        "birthplace",
        ("Where was {} born?", "In which town was {} born?", "The birthplace of {} is"),
        ("ford", "holm", "wick", "stead", "mere", "bury"),
    ),
    Attribute(
        "employer",
        ("Which company does {} work for?", "Who employs {}?", "The employer of {} is"),
        ("tek", "corp", "works", "labs", "dyne", "soft"),
    ),
    Attribute(
        "teacher",
        ("Who taught {}?", "Which teacher did {} learn from?", "The teacher of {} is"),
        ("ov", "ini", "escu", "sson", "aki", "ez"),
    ),
    Attribute(
        "ship",
        ("On which ship does {} sail?", "What is the name of the ship of {}?", "The ship of {} is"),
        ("wind", "star", "wave", "gull", "sail", "tide"),
    ),
)


@dataclass(frozen=True)
class Fact:
    """One fact about one person."""

    attribute: str
    subject: str
    prompts: tuple[str, ...]
    """The question in its three phrasings."""
    target: str
    """The true answer."""


@dataclass(frozen=True)
class World:
    """Everything the demo model has to know."""

    people: list[str]
    values: dict[str, list[str]]
    """Attribute name to every value that somebody has."""
    facts: list[Fact]
    sums: list[tuple[str, str]]
    """(question, answer) pairs of the skill."""

    def questions(self) -> list[tuple[str, str]]:
        """Returns every question with its answer: all phrasings of all facts, then the skill."""
        return [(prompt, fact.target) for fact in self.facts for prompt in fact.prompts] + self.sums


class Namer:
    """Invents words, none of them twice."""

    def __init__(self, rng: random.Random) -> None:
        """Starts with no word used.

        Args:
            rng: source of randomness.
        """
        self._rng = rng
        self._used: set[str] = set()

    def word(self, syllables: int, endings: Sequence[str] = ("",)) -> str:
        """Returns a new capitalized word.

        Args:
            syllables: open syllables at its beginning.
            endings: one of them ends the word.
        """
        while True:
            opening = "".join(self._rng.choice(ONSETS) + self._rng.choice(VOWELS) for _ in range(syllables))
            word = (opening + self._rng.choice(CODAS) + self._rng.choice(endings)).capitalize()
            if word not in self._used:
                self._used.add(word)
                return word


def invent_world(rng: random.Random, people: int, largest_addend: int) -> World:
    """Invents a world.

    Args:
        rng: source of randomness; it alone decides every name and every fact.
        people: number of people, which is also the number of values of each attribute: every person's answer is
            their own, so that none is likelier than another and the question, not the answer, tells facts apart.
        largest_addend: the skill is to add two numbers from 0 to this.
    """
    namer = Namer(rng)
    names = [f"{namer.word(2)} {namer.word(2)}" for _ in range(people)]
    values = {a.name: [namer.word(1, a.endings) for _ in range(people)] for a in ATTRIBUTES}
    facts = [
        Fact(attribute.name, name, tuple(phrasing.format(name) for phrasing in attribute.phrasings), value)
        for attribute in ATTRIBUTES
        for name, value in zip(names, values[attribute.name], strict=True)
    ]
    addends = range(largest_addend + 1)
    return World(names, values, facts, [(f"What is {a} plus {b}?", str(a + b)) for a in addends for b in addends])


def edit_streams(world: World, rng: random.Random, people: dict[str, int]) -> dict[str, list[Row]]:
    """Writes streams of edits that contradict what the model knows.

    Every edit gives a fact another value of the same attribute. Streams share no person; those who are in no stream
    and the skill, one question each per edit, serve as locality.

    Args:
        world: the world the model was trained on.
        rng: source of randomness.
        people: stream name to the number of people in it, whose facts are all edited.

    Returns:
        Stream name to its rows, in random order.
    """
    names = iter(rng.sample(world.people, len(world.people)))
    subjects = {stream: set(islice(names, number)) for stream, number in people.items()}
    untouched = set(names)
    others = _endless([fact for fact in world.facts if fact.subject in untouched], rng)
    sums = _endless(world.sums, rng)
    streams: dict[str, list[Row]] = {}
    for stream in people:
        facts = [fact for fact in world.facts if fact.subject in subjects[stream]]
        values = {attribute: _endless(pool, rng) for attribute, pool in world.values.items()}
        streams[stream] = [
            {
                "id": f"{stream}-{number:03d}",
                "prompt": fact.prompts[0],
                "target": next(value for value in values[fact.attribute] if value != fact.target),
                "subject": fact.subject,
                "rephrases": list(fact.prompts[1:]),
                "locality": [
                    {"prompt": rng.choice(other.prompts), "target": other.target},
                    {"prompt": question, "target": answer},
                ],
            }
            for number, (fact, other, (question, answer)) in enumerate(
                zip(rng.sample(facts, len(facts)), others, sums, strict=False)
            )
        ]
    return streams


def _endless(items: Sequence[Any], rng: random.Random) -> Iterator[Any]:
    """Yields the items in random order, each once before any comes again."""
    while True:
        yield from rng.sample(items, len(items))
