"""
How fast, how often and how many at once: the flow control of a job, as values.

Each policy says its exact meaning here; ``gates`` and ``seats`` carry it out, in the cluster, when a run is
first due. All of them take a ``key``: a dotted path into the event's data, or a function of the event. The
policy then counts for each value by itself. Without a key, and for every event that lacks the path, there is
one value: None. A key function that raises, or returns what is not JSON, makes its run SKIPPED and says why.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from . import payloads
from .exceptions import InvalidJob, storable

Key = str | Callable[[Any], Any] | None

LONGEST = timedelta(days=366)
MOST = 1_000_000


@dataclass(frozen=True)
class Concurrency:
    """
    At most ``limit`` at once for each key.

    ``scope="run"``: so many runs from their first step to their end, also while they sleep or wait for their
    next attempt. ``scope="step"``: so many in the hands of a worker; a run that sleeps makes room. The others
    wait in line, highest priority first, then in the order they came. The limit is never exceeded, whatever
    dies: a place is a row that names who holds it, and is free once that run, or that lease, is over.
    """

    limit: int
    key: Key = None
    scope: str = "run"

    def __post_init__(self) -> None:
        _whole("Concurrency", "limit", self.limit, 1, 10_000)
        _key("Concurrency", self.key)
        if self.scope not in ("run", "step"):
            raise InvalidJob(f'Concurrency: scope is "run" or "step", not {self.scope!r}.')


@dataclass(frozen=True)
class Throttle:
    """
    Start at most ``limit`` runs in each ``period``, evenly spaced; the others start later, none is dropped.

    After a quiet time ``burst`` runs may start at once (1: always spaced by ``period / limit``). It does not
    come on top of the rate, only before it: n starts take at least ``(n - burst) * period / limit``. A run is
    given its instant once, in the order of admission, and costs nothing until then.

    GCRA, the generic cell rate algorithm of ITU-T I.371 (the explanation to read is Brandur Leach, "Rate
    Limiting, Cells, and GCRA"), with delay instead of refusal.
    """

    limit: int
    period: timedelta
    key: Key = None
    burst: int = 1

    def __post_init__(self) -> None:
        _whole("Throttle", "limit", self.limit, 1, MOST)
        _whole("Throttle", "burst", self.burst, 1, MOST)
        _span("Throttle", "period", self.period)
        _key("Throttle", self.key)

    @property
    def pace(self) -> "Pace":
        return Pace(self.limit, self.period, self.burst)


@dataclass(frozen=True)
class RateLimit:
    """
    Skip the runs beyond ``limit`` in ``period``.

    A bucket of ``limit``, filled anew at an even rate: after a quiet time ``limit`` runs go at once, and one
    more each ``period / limit`` from then on. It goes by when an event came in, not by when a worker got to
    it: a cluster that was down changes nothing about what is skipped. GCRA, as ``Throttle``.
    """

    limit: int
    period: timedelta
    key: Key = None

    def __post_init__(self) -> None:
        _whole("RateLimit", "limit", self.limit, 1, MOST)
        _span("RateLimit", "period", self.period)
        _key("RateLimit", self.key)

    @property
    def pace(self) -> "Pace":
        return Pace(self.limit, self.period, self.limit)


@dataclass(frozen=True)
class Debounce:
    """
    Run once things have been quiet for ``period``, with the last event (by its ``occurred_at``).

    Each new event begins the period anew; the runs before it are SKIPPED. ``max_wait`` after the first of
    them the last one runs even if they keep coming. Once it runs, the next event begins a new round.
    """

    period: timedelta
    key: Key = None
    max_wait: timedelta | None = None

    def __post_init__(self) -> None:
        _span("Debounce", "period", self.period)
        _key("Debounce", self.key)
        if self.max_wait is not None:
            _span("Debounce", "max_wait", self.max_wait)
            if self.max_wait < self.period:
                raise InvalidJob(
                    "Debounce: max_wait is at least the period, else nothing is ever waited for."
                )


@dataclass(frozen=True)
class Batch:
    """
    One run for many events: for ``size`` of them, or for what came in within ``timeout`` of the first.

    They are ``ctx.events``, in the order they occurred; ``ctx.event`` is the first. The run of the first one
    collected does the work, and the others are SKIPPED. To cancel it is to cancel the batch.
    """

    size: int
    timeout: timedelta
    key: Key = None

    def __post_init__(self) -> None:
        _whole("Batch", "size", self.size, 2, 10_000)
        _span("Batch", "timeout", self.timeout)
        _key("Batch", self.key)


@dataclass(frozen=True)
class Singleton:
    """
    One open run for each key, from its admission to its end.

    ``mode="skip"``: while one is open, later ones are SKIPPED. ``mode="cancel"``: a later one CANCELs it and
    runs. Strictly the latest wins: a run that is older than one that was let in is SKIPPED, whenever its turn
    comes. Later means by when the event came in.
    """

    key: Key = None
    mode: str = "skip"

    def __post_init__(self) -> None:
        _key("Singleton", self.key)
        if self.mode not in ("skip", "cancel"):
            raise InvalidJob(f'Singleton: mode is "skip" or "cancel", not {self.mode!r}.')


@dataclass(frozen=True)
class Idempotency:
    """
    Run once for each key: a later event with the same key within ``period`` of the first is SKIPPED.

    Whatever became of the first run; a failed one is retried by hand. An event without the key (None) has no
    double and always runs.
    """

    key: Key
    period: timedelta = timedelta(hours=24)

    def __post_init__(self) -> None:
        if self.key is None:
            raise InvalidJob("Idempotency: a key is needed, else the job would run once in all.")
        _key("Idempotency", self.key)
        _span("Idempotency", "period", self.period)


Policy = Concurrency | Throttle | RateLimit | Debounce | Batch | Singleton | Idempotency

#: The options of a job, in the order a run meets them. An event seen before must use up nothing; what is too
#: much must not postpone what is not; only what is left over from a burst competes for being the single one;
#: only what will run takes a place in time, and then a place among those at work.
OPTIONS: dict[str, type] = {
    "idempotency": Idempotency,
    "rate_limit": RateLimit,
    "debounce": Debounce,
    "batch": Batch,
    "singleton": Singleton,
    "throttle": Throttle,
    "concurrency": Concurrency,
}

#: A batch is made of all its events: what drops some of them, or the run they are collected in, contradicts it.
_NOT_WITH_BATCH = ("idempotency", "rate_limit", "debounce", "singleton")


def as_concurrency(given: Any) -> tuple[Any, ...]:
    """Return one limit, or several, as a tuple."""
    if given is None:
        return ()
    return tuple(given) if isinstance(given, list | tuple) else (given,)


def check(options: dict[str, Any]) -> None:
    """Raise ``InvalidJob`` for a policy of another kind than its option, and for two that contradict."""
    for name, kind in OPTIONS.items():
        for policy in as_concurrency(options[name]):
            if not isinstance(policy, kind):
                raise InvalidJob(f"{name} is a {kind.__name__}(...), not {policy!r}.")
    clash = [name for name in _NOT_WITH_BATCH if options["batch"] and options[name]]
    if clash:
        raise InvalidJob(f"batch does not go with {clash[0]}: the events of a batch belong together.")
    limits = [(limit.key, limit.scope) for limit in as_concurrency(options["concurrency"])]
    if len(set(limits)) < len(limits):
        raise InvalidJob(
            "concurrency has two limits for the same key and scope; only the lower one would count."
        )


def _whole(policy: str, name: str, value: Any, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise InvalidJob(f"{policy}: {name} is a whole number from {least} to {most}, not {value!r}.")


def _span(policy: str, name: str, value: Any) -> None:
    if not isinstance(value, timedelta) or not timedelta(0) < value <= LONGEST:
        raise InvalidJob(f"{policy}: {name} is a timedelta above 0 and up to 366 days, not {value!r}.")


def _key(policy: str, key: Any) -> None:
    if isinstance(key, str) and all(key.split(".")):
        return
    if key is not None and not callable(key):
        raise InvalidJob(
            f"{policy}: key is a dotted path into the event's data or a function of the event, not {key!r}."
        )


# Keys.


@dataclass(frozen=True)
class Place:
    """A policy as it applies to one run: the lane that the run shares with those of the same key."""

    policy: Any
    digest: str
    #: What the lane is called, for people.
    name: str
    #: " for user_id=7", or nothing when there is no key.
    words: str


def place(job_id: str, option: str, position: int, policy: Any, event: Any) -> Place | None:
    """Return where ``policy`` puts the run of ``event``; None if it does not concern it. A key may raise."""
    value = read_key(policy.key, event)
    if value is None and isinstance(policy, Idempotency):
        return None
    # By the path, so that another order of the limits in the code changes nobody's lane.
    name = policy.key if isinstance(policy.key, str) else f"{getattr(policy.key, '__name__', '')}#{position}"
    text = storable(payloads.dumps(value, where=f"the key of {option}"))
    parts = [job_id, option, getattr(policy, "scope", ""), name, text]
    words = ""
    if policy.key is not None:
        shown = text if len(text) <= 100 else f"{text[:99]}…"
        words = f" for {policy.key if isinstance(policy.key, str) else 'key'}={shown}"
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
    return Place(policy, digest, f"{job_id}: {option}{words}", words)


def read_key(key: Key, event: Any) -> Any:
    """Return the value of ``key`` for ``event``; None where a path leads nowhere."""
    if key is None:
        return None
    if callable(key):
        return key(event)
    value = event.data if event else None
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


# Pace.


class Meter(NamedTuple):
    """A theoretical arrival time: an instant and, since a step is seldom whole, ``rest / limit`` microseconds."""

    at: datetime | None = None
    rest: int = 0


class Pace(NamedTuple):
    """GCRA in whole numbers, of ``limit``-ths of a microsecond: nothing is rounded, so nothing adds up."""

    limit: int
    period: timedelta
    burst: int

    def next(self, meter: Meter, now: datetime) -> tuple[datetime, Meter]:
        """Return when the one that comes ``now`` may start, and the meter once it does."""
        step = self.period // timedelta(microseconds=1)
        lead = 0
        if meter.at and meter.at >= now:
            lead = (meter.at - now) // timedelta(microseconds=1) * self.limit + min(
                meter.rest, self.limit - 1
            )
        wait = max(0, lead - (self.burst - 1) * step)
        ahead, rest = divmod(lead + step, self.limit)
        start = now + timedelta(microseconds=-(-wait // self.limit))
        return start, Meter(now + timedelta(microseconds=ahead), rest)


def span(duration: timedelta) -> str:
    """Return a span as people say it: "90 s", "1 min", "2 h"."""
    units: Sequence[tuple[timedelta, str]] = (
        (timedelta(days=1), "d"),
        (timedelta(hours=1), "h"),
        (timedelta(minutes=1), "min"),
    )
    for unit, name in units:
        if duration % unit == timedelta(0):
            return f"{duration // unit} {name}"
    return f"{duration.total_seconds():g} s"
