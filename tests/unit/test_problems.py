"""The bundled data set is what our generator writes, and its sums are right."""

from __future__ import annotations

import random
import re

from moescope import datasets
from moescope_service.bundled_model import problems

SAMPLE_SEED = 7
EQUATION = re.compile(r"(\d+(?: [-+*/] \d+)+) = (\d+)")


def test_the_sample_is_what_the_generator_writes() -> None:
    rng = random.Random(SAMPLE_SEED)
    written = []
    while len(written) < 100:
        question, _ = problems.generate(rng)
        if question not in written:
            written.append(question)
    assert [item.question for item in datasets.sample()] == written


def test_every_equation_holds() -> None:
    rng = random.Random(0)
    for _ in range(300):
        _, answer = problems.generate(rng)
        equations = EQUATION.findall(answer)
        assert equations
        for expression, result in equations:
            assert eval(expression) == int(result), answer  # our own generator's text
        assert equations[-1][1] == problems.final_answer(answer)
