"""
A process that asks and answers: ``python -m tests.lab.correspondent SEED FIRST LAST``.

For each number it starts a run that waits for an answer, and gives that answer: at once, which is before the wait
is written; a little later, which is about then; or when the run has long been asleep.
"""

import random
import sys
import time

import django

LATE = 2.0


def main(seed: int, first: int, last: int) -> None:
    from django_jobs import emit

    chance = random.Random(seed)
    numbers = list(range(first, last))
    chance.shuffle(numbers)
    later: list[tuple[float, int]] = []
    while numbers or later:
        if numbers:
            n = numbers.pop()
            emit("lab/asked", {"n": n, "pause": chance.choice([0, 0, 0.5])})
            later.append((time.monotonic() + chance.choice([0, chance.random(), LATE]), n))
        for due, n in [pair for pair in later if pair[0] <= time.monotonic()]:
            emit("lab/answered", {"n": n})
            later.remove((due, n))
        time.sleep(0.005)


if __name__ == "__main__":
    django.setup()
    main(*map(int, sys.argv[1:]))
