"""Generates grade-school word problems with worked solutions.

To print some as JSON lines::

    python -m moescope_service.bundled_model.problems --count 100 --seed 7
"""

from __future__ import annotations

import argparse
import json
import operator
import random
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from moescope_service.bundled_model.templates import TEMPLATES, Template
from moescope_service.bundled_model.words import NAMES, PRONOUNS, WORDS

_CHOICE = re.compile(r"\[([^\]]+)\]")
_SLOT = re.compile(r"\{([^}]+)\}")
_STEP = re.compile(r"(\w+) ([-+*/]) (\w+) = (\w)")
_ANSWER = re.compile(r"The answer is (-?\d+)\.")
_OPERATORS: Mapping[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.floordiv,
}
_TERMS = range(3, 61)
_FACTORS = range(2, 13)
_RESULTS = range(2, 201)


class Problem(NamedTuple):
    """A question and its worked solution, which ends in ``The answer is 42.``."""

    question: str
    answer: str


class _Step(NamedTuple):
    left: str
    sign: str
    right: str
    result: str


def generate(rng: random.Random) -> Problem:
    """Return a problem drawn from all templates."""
    template = rng.choice(TEMPLATES)
    steps = [_Step(*found) for found in _STEP.findall(template.solution)]
    numbers = _draw_numbers(steps, rng)
    slots = _draw_words(template, rng) | {name: str(value) for name, value in numbers.items()}
    for left, sign, right, result in steps:
        slots[f"{left} {sign} {right} = {result}"] = (
            f"{numbers[left]} {sign} {numbers[right]} = {numbers[result]}"
        )
    answer = f"{template.solution} The answer is {{{steps[-1].result}}}."
    return Problem(_fill(template.question, slots, rng), _fill(answer, slots, rng))


def final_answer(text: str) -> str | None:
    """Return the number that a worked solution ends in, if it does."""
    found = _ANSWER.findall(text)
    return found[-1] if found else None


def _draw_numbers(steps: list[_Step], rng: random.Random) -> dict[str, int]:
    """Draw numbers until every step's result is a whole number from 2 to 200."""
    ranges: dict[str, range] = {}
    for step in steps:
        ranges.setdefault(step.left, _FACTORS if step.sign == "*" else _TERMS)
        ranges.setdefault(step.right, _FACTORS if step.sign in "*/" else _TERMS)
        ranges[step.result] = range(0)
    ranges |= {name: range(int(name), int(name) + 1) for name in ranges if name.isdigit()}
    while True:
        numbers = {name: rng.choice(values) for name, values in ranges.items() if values}
        if all(_apply(step, numbers) for step in steps):
            return numbers


def _apply(step: _Step, numbers: dict[str, int]) -> bool:
    """Add the step's result to the numbers; return whether it is whole and from 2 to 200."""
    left, right = numbers[step.left], numbers[step.right]
    numbers[step.result] = _OPERATORS[step.sign](left, right)
    exact = step.sign != "/" or left % right == 0
    return exact and numbers[step.result] in _RESULTS


def _draw_words(template: Template, rng: random.Random) -> dict[str, str]:
    """Draw the words of a template's slots."""
    words = {
        name + suffix: word
        for name, pool in WORDS.items()
        if f"{{{name}" in template.question
        for suffix, word in zip(("", "2", "3"), rng.sample(pool, 3), strict=True)
    }
    gender = NAMES[words["name"]] if "name" in words else rng.choice(list(PRONOUNS))
    pronouns = dict(zip(("he", "his", "him"), PRONOUNS[gender], strict=True))
    capitals = {name.capitalize(): word.capitalize() for name, word in pronouns.items()}
    return words | pronouns | capitals


def _fill(text: str, slots: Mapping[str, str], rng: random.Random) -> str:
    """Make the text's choices and fill its slots."""
    text = _CHOICE.sub(lambda found: rng.choice(found[1].split("|")), text)
    return _SLOT.sub(lambda found: slots[found[1]], text)


def main() -> None:
    """Print problems as JSON lines, the answer's number repeated after ``####``."""
    parser = argparse.ArgumentParser(description="Print word problems as JSON lines.")
    parser.add_argument("--count", type=int, default=100, help="number of problems to print")
    parser.add_argument("--seed", type=int, default=7, help="seed of the random generator")
    options = parser.parse_args()
    rng = random.Random(options.seed)  # noqa: S311
    for _ in range(options.count):
        problem = generate(rng)
        number = final_answer(problem.answer)
        print(json.dumps(problem._asdict() | {"answer": f"{problem.answer}\n#### {number}"}))


if __name__ == "__main__":
    main()
