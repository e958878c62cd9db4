"""A seeded generator of small questions whose answers can be checked: sums, sorting, reversing, copying and more.

A seed goes in, tasks (prompt, answer) come out, the same ones on every machine. What a question is about, not how it
is phrased, decides whether it is a training or a held-out question: a hash of its content does, so that no amount of
training data can leak into an evaluation.

The questions are made for a model of a million parameters and a few minutes on a CPU. Letters are given one by one
("c-a-t"), because a tokenizer would hide them inside words. What is asked about stands last and in quotes where it is
copied, so that reply and question lie at a steady distance and begin with the same token; with the operands anywhere,
nothing was learned in the same time. Replies are bare, because one is right only if it matches exactly.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "heldout"]

HELDOUT_SHARE = 0.2
"""Share of each family's questions that is held out; small families need this much to have enough of them."""

WORDS = tuple(
    """
    ant apple arm baby ball bed bee bell bird boat bone book box boy bread bus cake car cat chair cloud coat cow cup
    day desk dog door duck ear egg eye farm fire fish fork fox frog game gate girl goat gold hand hat hen hill home
    horse house ice jam key king kite lake lamp leaf leg lion map milk moon mouse nest night nose nut pan park pear
    pen pie pig plane plum pond queen rain ring road rock rose salt sand sea seed sheep ship shoe shop snow soap sock
    song soup spoon star stone sun table tea tent tiger toy train tree van wall watch water wind wolf wood zoo
    """.split()  # noqa: SIM905, a list literal would be a hundred lines of quotes
)
COLOURS = ("red", "blue", "green", "black", "white", "brown", "pink", "gold", "grey", "yellow")
CONSONANTS, VOWELS = "bcdfghjklmnprstvwz", "aeiou"
ORDINALS = ("first", "second", "third", "last")
TIMES = {2: "two", 3: "three", 4: "four", 5: "five"}


@dataclass(frozen=True)
class Task:
    """One question with its one right answer."""

    family: str
    """Kind of question, a key of `FAMILIES`."""
    prompt: str
    """What the user says."""
    answer: str
    """What the assistant should say, to the letter."""


@dataclass(frozen=True)
class Question:
    """What a question is about, before it is put into words."""

    content: tuple[object, ...]
    """Its operands in a canonical order; questions of one family that share them share a split."""
    answer: str
    slots: dict[str, object]
    """What fills the braces of the phrasings."""


@dataclass(frozen=True)
class Family:
    """A kind of question and the ways to ask it."""

    draw: Callable[[random.Random], Question]
    phrasings: tuple[str, ...]


def _words(rng: random.Random, low: int, high: int) -> list[str]:
    return rng.sample(WORDS, rng.randint(low, high))


def _numbers(rng: random.Random, count: int, below: int = 100) -> list[int]:
    return rng.sample(range(below), count)


def _syllables(rng: random.Random, low: int, high: int) -> str:
    """Invent a word of alternating consonants and vowels."""
    start = rng.randrange(2)
    return "".join(rng.choice((CONSONANTS, VOWELS)[(start + i) % 2]) for i in range(rng.randint(low, high)))


def _spell(word: str) -> str:
    return "-".join(word)


def _join(items: list[str] | list[int]) -> str:
    return ", ".join(map(str, items))


def _add(rng: random.Random) -> Question:
    a, b = rng.randint(0, 20), rng.randint(0, 20)
    return Question((min(a, b), max(a, b)), str(a + b), {"a": a, "b": b})


def _subtract(rng: random.Random) -> Question:
    a = rng.randint(0, 20)
    b = rng.randint(0, a)
    return Question((a, b), str(a - b), {"a": a, "b": b})


def _compare(rng: random.Random) -> Question:
    a, b = _numbers(rng, 2)
    larger = rng.random() < 0.5
    adjective = rng.choice(("larger", "bigger", "greater") if larger else ("smaller", "lower"))
    answer = max(a, b) if larger else min(a, b)
    return Question((min(a, b), max(a, b)), str(answer), {"a": a, "b": b, "adjective": adjective})


def _extreme(rng: random.Random) -> Question:
    numbers = _numbers(rng, 3, below=50)
    largest = rng.random() < 0.5
    adjective = rng.choice(("largest", "biggest", "highest") if largest else ("smallest", "lowest"))
    answer = max(numbers) if largest else min(numbers)
    return Question(tuple(sorted(numbers)), str(answer), {"numbers": _join(numbers), "adjective": adjective})


def _parity(rng: random.Random) -> Question:
    number = rng.randrange(1000)
    return Question((number,), "odd" if number % 2 else "even", {"n": number})


def _next_number(rng: random.Random) -> Question:
    step, start = rng.choice((1, 2, 5, 10)), rng.randint(0, 50)
    numbers = [start + i * step for i in range(4)]
    return Question((start, step), str(start + 4 * step), {"numbers": _join(numbers)})


def _sort(rng: random.Random) -> Question:
    numbers = _numbers(rng, 3, below=10)
    return Question(tuple(sorted(numbers)), _join(sorted(numbers)), {"numbers": _join(numbers)})


def _reverse(rng: random.Random) -> Question:
    word = _syllables(rng, 3, 4)
    return Question((min(word, word[::-1]),), _spell(word[::-1]), {"word": _spell(word)})


def _count_letter(rng: random.Random) -> Question:
    letters = rng.sample(CONSONANTS[:8] + VOWELS, 3)
    word = "".join(rng.choice(letters) for _ in range(rng.randint(3, 5)))
    letter = rng.choice(letters)
    return Question((word, letter), str(word.count(letter)), {"word": _spell(word), "letter": letter})


def _uppercase(rng: random.Random) -> Question:
    word = _syllables(rng, 3, 4)
    return Question((word,), _spell(word.upper()), {"word": _spell(word)})


def _last_letter(rng: random.Random) -> Question:
    word = _syllables(rng, 3, 4)
    return Question((word,), word[-1], {"word": _spell(word)})


def _pick(rng: random.Random) -> Question:
    words = _words(rng, 3, 4)
    place = rng.randrange(4)
    answer = words[-1] if place == 3 else words[place]
    return Question(tuple(words), answer, {"words": _join(words), "place": ORDINALS[place]})


def _copy(rng: random.Random) -> Question:
    nouns = _words(rng, 1, 2)
    phrase = " and ".join(f"the {rng.choice(COLOURS)} {noun}" for noun in nouns)
    return Question((phrase,), phrase, {"phrase": phrase})


def _repeat(rng: random.Random) -> Question:
    word, count = rng.choice(WORDS), rng.choice(tuple(TIMES))
    shown = rng.choice((str(count), TIMES[count]))
    return Question((word, count), " ".join([word] * count), {"word": word, "times": f"{shown} times"})


def _contains(rng: random.Random) -> Question:
    *words, other = _words(rng, 4, 5)
    there = rng.random() < 0.5
    word = rng.choice(words) if there else other
    return Question((word, *sorted(words)), "yes" if there else "no", {"words": _join(words), "word": word})


FAMILIES: dict[str, Family] = {
    "add": Family(
        _add,
        (
            "What is {a} + {b}?",
            "{a} + {b} = ?",
            "What is {a} plus {b}?",
            "Add {a} and {b}.",
            "How much is {a} and {b} together?",
            "Please compute {a} + {b}.",
            "What is the sum of {a} and {b}?",
        ),
    ),
    "subtract": Family(
        _subtract,
        (
            "What is {a} - {b}?",
            "{a} - {b} = ?",
            "What is {a} minus {b}?",
            "Subtract {b} from {a}.",
            "Take {b} away from {a}.",
            "Please compute {a} - {b}.",
            "I have {a} and give away {b}. How many are left?",
        ),
    ),
    "compare": Family(
        _compare,
        (
            "Which number is {adjective}, {a} or {b}?",
            "Which is {adjective}: {a} or {b}?",
            "Tell me which is {adjective}, {a} or {b}.",
            "What is {adjective}, {a} or {b}?",
            "Tell me the {adjective} number: {a} or {b}.",
            "Choose the {adjective} one, {a} or {b}.",
        ),
    ),
    "extreme": Family(
        _extreme,
        (
            "What is the {adjective} of {numbers}?",
            "Find the {adjective} number: {numbers}",
            "Which of these is the {adjective}? {numbers}",
            "Here are three numbers. Which is the {adjective}? {numbers}",
            "Give me the {adjective} number among {numbers}.",
            "Name the {adjective} one: {numbers}",
        ),
    ),
    "parity": Family(
        _parity,
        (
            "Is {n} even or odd?",
            "Even or odd: {n}?",
            "Is the number {n} odd or even?",
            "Tell me whether {n} is even or odd.",
            "Odd or even? {n}",
            "Even or odd? The number is {n}.",
        ),
    ),
    "next_number": Family(
        _next_number,
        (
            "What comes next: {numbers}?",
            "Continue: {numbers}",
            "Which number follows {numbers}?",
            "What is the next number in {numbers}?",
            "What is next in this sequence? {numbers}",
            "Give the next number after {numbers}.",
        ),
    ),
    "sort": Family(
        _sort,
        (
            "Sort these numbers: {numbers}",
            "Put in order: {numbers}",
            "Sort from small to large: {numbers}",
            "Arrange from smallest to largest: {numbers}",
            "Please order the numbers {numbers}.",
            "Write in ascending order: {numbers}",
        ),
    ),
    "reverse": Family(
        _reverse,
        (
            'Reverse "{word}".',
            'Spell backwards: "{word}"',
            'Write in reverse: "{word}"',
            'What is the reverse of "{word}"?',
            'Turn around "{word}".',
            'Please reverse the letters: "{word}"',
        ),
    ),
    "count_letter": Family(
        _count_letter,
        (
            'How many {letter} are in "{word}"?',
            'Count the letter {letter} in "{word}".',
            'How often does {letter} appear in "{word}"?',
            'How many times do you see {letter} in "{word}"?',
            'How many times is the letter {letter} in "{word}"?',
            'Count every {letter}: "{word}"',
        ),
    ),
    "uppercase": Family(
        _uppercase,
        (
            'Write in capital letters: "{word}"',
            'Make uppercase: "{word}"',
            'Uppercase "{word}".',
            'Change to capitals: "{word}"',
            'What is the upper case of "{word}"?',
            'Please capitalise every letter of "{word}".',
        ),
    ),
    "pick": Family(
        _pick,
        (
            "What is the {place} word: {words}?",
            "Name the {place} item of this list: {words}",
            "Which word is {place} in {words}?",
            "Here is a list. What is the {place} word? {words}",
            "Give me the {place} of {words}.",
            "Pick the {place} word from {words}.",
        ),
    ),
    "copy": Family(
        _copy,
        (
            'Say: "{phrase}"',
            'Repeat after me: "{phrase}"',
            'Copy this text: "{phrase}"',
            'Write exactly: "{phrase}"',
            'Please say "{phrase}".',
            'Echo the words "{phrase}".',
        ),
    ),
    "repeat": Family(
        _repeat,
        (
            "Say {times}: {word}",
            "Write this word {times}: {word}",
            "Repeat {times}: {word}",
            "Can you say this {times}? {word}",
            "I want to read this {times}: {word}",
            "{times}, please: {word}",
        ),
    ),
    "contains": Family(
        _contains,
        (
            "Is {word} in this list: {words}?",
            "Do you see {word} in {words}?",
            "Look for {word}. Is it there? {words}",
            "Is {word} one of these words? {words}",
            "Can you find {word} in {words}?",
            "Yes or no: is {word} among {words}?",
        ),
    ),
}
"""All kinds of question, by name."""

NEW_FAMILIES: dict[str, Family] = {
    "last_letter": Family(
        _last_letter,
        (
            'What is the last letter of "{word}"?',
            'Which letter ends "{word}"?',
            'Give me the final letter: "{word}"',
            'How does "{word}" end?',
        ),
    ),
}
"""Kinds that no conversation of the SFT data asks about: something new for a model that is trained further."""


def split_of(family: str, content: tuple[object, ...]) -> Split:
    """Tell which split a question belongs to, from a hash of what it is about."""
    digest = hashlib.blake2b(repr((family, *content)).encode(), digest_size=8).digest()
    return "heldout" if int.from_bytes(digest, "big") < HELDOUT_SHARE * 2**64 else "train"


def draw_task(family: str, split: Split, rng: random.Random) -> Task:
    """Draw one task of a family, in a random phrasing."""
    kind = (FAMILIES | NEW_FAMILIES)[family]
    question = kind.draw(rng)
    while split_of(family, question.content) != split:
        question = kind.draw(rng)
    return Task(family, rng.choice(kind.phrasings).format(**question.slots), question.answer)


def iter_tasks(seed: int, split: Split, families: Mapping[str, Family] | None = None) -> Iterator[Task]:
    """Yield tasks without end: every family (of all, or of those given) once, in random order, then all again."""
    families = FAMILIES if families is None else families
    rng = random.Random(f"tasks {seed} {split}")
    while True:
        for family in rng.sample(list(families), len(families)):
            yield draw_task(family, split, rng)
