"""
How long to wait before trying again.

``Backoff`` is the rule a job has unless it says otherwise; ``as_backoff`` takes the other forms that
``backoff=`` may have. All of them answer ``delay(attempt)``.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from inspect import iscoroutinefunction
from typing import Any

from .exceptions import InvalidJob

_LONGEST = timedelta(days=3650)


@dataclass(frozen=True)
class Backoff:
    """
    Wait ``first``, then ``factor`` times longer after each failure, never longer than ``max``.

    Each wait is stretched or cut at random by up to ``jitter`` of itself, so that runs which failed
    together do not come back together; at ``max`` it is only cut.
    """

    first: timedelta = timedelta(seconds=2)
    factor: float = 4
    max: timedelta = timedelta(hours=2)
    jitter: float = 0.25

    def __post_init__(self) -> None:
        if not _is_delay(self.first):
            raise InvalidJob(f"Backoff: first is a timedelta from zero to ten years, not {self.first!r}.")
        if not _is_delay(self.max) or self.max < self.first:
            raise InvalidJob(f"Backoff: max is a timedelta from first to ten years, not {self.max!r}.")
        if not _is_number(self.factor) or self.factor < 1:
            raise InvalidJob(f"Backoff: factor is a number of 1 or more, not {self.factor!r}.")
        if not _is_number(self.jitter) or not 0 <= self.jitter <= 1:
            raise InvalidJob(f"Backoff: jitter is a fraction from 0 to 1, not {self.jitter!r}.")

    def delay(self, attempt: int) -> timedelta:
        """Return how long to wait after failure number ``attempt``, the first being 1."""
        limit = self.max.total_seconds()
        wait = min(self._unlimited(attempt), limit)
        shortest, longest = wait * (1 - self.jitter), min(wait * (1 + self.jitter), limit)
        return timedelta(seconds=random.uniform(shortest, longest))

    def _unlimited(self, attempt: int) -> float:
        _check_attempt(attempt)
        if not self.first:
            return 0.0
        try:
            return self.first.total_seconds() * float(self.factor) ** (attempt - 1)
        except OverflowError:
            return math.inf


@dataclass(frozen=True)
class FixedDelays:
    """Wait these delays one after the other, then the last of them again and again."""

    delays: tuple[timedelta, ...]

    def __post_init__(self) -> None:
        if not self.delays:
            raise InvalidJob("backoff=[] says nothing: list at least one timedelta.")
        for delay in self.delays:
            if not _is_delay(delay):
                raise InvalidJob(f"backoff lists timedeltas from zero to ten years, not {delay!r}.")

    def delay(self, attempt: int) -> timedelta:
        """Return how long to wait after failure number ``attempt``, the first being 1."""
        _check_attempt(attempt)
        return self.delays[min(attempt, len(self.delays)) - 1]


@dataclass(frozen=True)
class ComputedDelay:
    """Wait what a function of the attempt's number says."""

    function: Callable[[int], timedelta]

    def delay(self, attempt: int) -> timedelta:
        """Return how long to wait after failure number ``attempt``, the first being 1."""
        _check_attempt(attempt)
        delay = self.function(attempt)
        if not _is_delay(delay):
            name = getattr(self.function, "__name__", repr(self.function))
            raise InvalidJob(f"backoff={name} returns a timedelta from zero to ten years, not {delay!r}.")
        return delay


AnyBackoff = Backoff | FixedDelays | ComputedDelay


def as_backoff(value: Any) -> AnyBackoff:
    """Return what ``backoff=`` was given as something that has ``delay``, or raise ``InvalidJob``."""
    if isinstance(value, Backoff | FixedDelays | ComputedDelay):
        return value
    if isinstance(value, timedelta):
        return FixedDelays((value,))
    if isinstance(value, list | tuple):
        return FixedDelays(tuple(value))
    if callable(value) and not isinstance(value, type) and not iscoroutinefunction(value):
        return ComputedDelay(value)
    raise InvalidJob(
        "backoff is a Backoff(...), a timedelta, a list of timedeltas or a function of the attempt's number "
        f"that returns one, not {value!r}."
    )


def _is_delay(value: Any) -> bool:
    return isinstance(value, timedelta) and timedelta(0) <= value <= _LONGEST


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value < math.inf


def _check_attempt(attempt: int) -> None:
    if attempt < 1:
        raise ValueError(f"Attempts count from 1, not {attempt}.")
