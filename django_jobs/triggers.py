"""
What starts a job: ``on`` an event, or ``cron`` at a time of the clock on the wall.

Both are checked when they are written, so a bad one fails at import. The cron arithmetic is croniter's,
on naive wall-clock times; which instants those are is decided here, because croniter fires a daily job
twice in the autumn.
"""

import copy
import hashlib
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from difflib import get_close_matches
from functools import cache, cached_property
from inspect import iscoroutinefunction
from itertools import islice
from typing import Any
from zoneinfo import ZoneInfo, available_timezones

from croniter import CroniterBadDateError, croniter

from .exceptions import InvalidEvent, InvalidJob

MAX_NAME = 255
RESERVED = "django_jobs/"
CATCH_UP = ("skip", "latest", "all")
#: A slot found later than this counts as missed, which is where ``catch_up`` decides.
PUNCTUAL = timedelta(seconds=60)

_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_JOINT = re.compile(r"[/.](?=.)")
_ONE_VALUE_RANGE = re.compile(r"(?i)\b(\w+)-\1(?!\w)")
_MAX_KEY = 150
_SECOND = timedelta(seconds=1)
_MICROSECOND = timedelta(microseconds=1)


@dataclass(frozen=True)
class EventTrigger:
    """Start a job for each event of this name, or of a name that ``user/*`` or ``user/profile.*`` covers."""

    name: str
    when: Callable[[Any], bool] | None = None

    def __post_init__(self) -> None:
        if fault := _fault_of_pattern(self.name):
            raise InvalidJob(f"on({_short(self.name)}): {fault}")
        if self.when is not None and (not callable(self.when) or iscoroutinefunction(self.when)):
            raise InvalidJob(f"{self}: when is a plain function of the event, not {self.when!r}.")

    def __str__(self) -> str:
        if self.when is None:
            return f'on("{self.name}")'
        return f'on("{self.name}", when={getattr(self.when, "__name__", self.when)})'

    def matches(self, name: str) -> bool:
        """Say whether an event of this name is meant; ``when`` is not asked."""
        return self.name in candidates(name)


@dataclass(frozen=True)
class CronTrigger:
    """
    Start a job at the times that ``expr`` names, on the clocks of ``tz``.

    When the clocks change, a fixed time (no ``*`` in the minute or hour field) that is left out fires
    at the first instant after the gap, and one that comes twice fires once, the first time. An interval
    (a ``*`` there) goes by elapsed time: it fires whenever the clock shows a time it names.
    """

    expr: str
    tz: str = "UTC"
    catch_up: str = "latest"
    jitter: timedelta | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.expr, str):
            raise InvalidJob(f"cron({self.expr!r}): the expression is a str of five fields.")
        object.__setattr__(self, "expr", " ".join(self.expr.split()))
        fault = _fault_of_expr(self.expr) or _fault_of_zone(self.tz) or _fault_of_options(self)
        if fault:
            raise InvalidJob(f'cron("{self.expr}"): {fault}')

    def __str__(self) -> str:
        options = [f'"{self.expr}"']
        if self.tz != "UTC":
            options.append(f'tz="{self.tz}"')
        if self.catch_up != "latest":
            options.append(f'catch_up="{self.catch_up}"')
        if self.jitter is not None:
            options.append(f"jitter={_written(self.jitter)}")
        return f"cron({', '.join(options)})"

    @property
    def key(self) -> str:
        """Its identity in the database: the same as long as expression and zone are, whatever the options."""
        text = f"{self.expr} {self.tz}"
        if len(text) <= _MAX_KEY:
            return text
        digest = hashlib.sha256(text.encode()).hexdigest()[:32]
        return f"{text[: _MAX_KEY - 33]} {digest}"

    def next(self, after: datetime) -> datetime:
        """Return the first slot strictly after ``after``, in UTC."""
        after = _utc(after)
        repeated: list[datetime] = []
        for wall in _walls(self.expr, self._before(after)):
            instants = self._instants(wall)
            if instants and instants[0] > after:
                return min([instants[0], *repeated])
            repeated += [instant for instant in instants[1:] if instant > after]
        raise AssertionError("A checked expression has no last slot.")

    def start(self, job_id: str, slot: datetime) -> datetime:
        """Return when the run of ``job_id`` for a slot is due: then, or up to ``jitter`` later."""
        return slot + spread(self.jitter, f"{job_id} {slot.isoformat()}")

    def slots(self, start: datetime, end: datetime, limit: int | None = None) -> Iterator[datetime]:
        """Iterate over the slots after ``start`` up to and including ``end``, oldest first."""
        return islice(self._slots(start, end), limit)

    def latest(self, start: datetime, end: datetime) -> datetime | None:
        """Return the last slot after ``start`` up to and including ``end``, in few looks however many."""
        slot, end = self.next(start), _utc(end)
        if slot > end:
            return None
        while end - slot >= _SECOND:  # ``slot`` is one; none is between this ``end`` and the one asked for.
            middle = slot + (end - slot) / 2
            found = self.next(middle)
            if found <= end:
                slot = found
            else:
                end = middle
        return slot

    def _slots(self, start: datetime, end: datetime) -> Iterator[datetime]:
        slot, end = self.next(start), _utc(end)
        while slot <= end:
            yield slot
            slot = self.next(slot)

    @cached_property
    def _zone(self) -> ZoneInfo:
        return ZoneInfo(self.tz)

    @cached_property
    def _is_interval(self) -> bool:
        minute, hour, *_ = self.expr.split()
        return "*" in minute or "*" in hour

    def _before(self, after: datetime) -> datetime:
        """Return a wall time that every slot after ``after`` comes after."""
        local = after.astimezone(self._zone)
        first, second = _offsets(local)
        # Where clocks go back, a wall time that has passed once is still to come again.
        return local.replace(tzinfo=None) - max(first - second, timedelta(0))

    def _instants(self, wall: datetime) -> list[datetime]:
        """Return when the clock shows ``wall`` and this trigger fires: never, once or twice."""
        local = wall.replace(tzinfo=self._zone)
        first, second = _offsets(local)
        if first < second:
            return [] if self._is_interval else [_end_of_gap(local)]
        instants = [local.astimezone(UTC)]
        if first > second and self._is_interval:
            instants.append(local.replace(fold=1).astimezone(UTC))
        return instants


def on(name: str, when: Callable[[Any], bool] | None = None) -> EventTrigger:
    """Start the job for each event ``name`` (or ``user/*``) of which ``when(event)`` is true."""
    return EventTrigger(name, when)


def cron(
    expr: str, tz: str | ZoneInfo = "UTC", catch_up: str = "latest", jitter: timedelta | None = None
) -> CronTrigger:
    """
    Start the job at the times that ``expr`` (minute hour day month weekday) names in the zone ``tz``.

    ``catch_up`` says which of the slots that nobody was up for still run: none (``skip``), the last
    or all. ``jitter`` starts each run up to that much late, always by the same amount for one slot.
    """
    return CronTrigger(expr, tz.key if isinstance(tz, ZoneInfo) else tz, catch_up, jitter)


def candidates(name: str) -> list[str]:
    """List what a trigger on this event may be called: its name, then each wildcard, longest first."""
    ends = [joint.end() for joint in _JOINT.finditer(name)]
    return [name, *(f"{name[:end]}*" for end in reversed(ends))]


def check_event_name(name: Any) -> None:
    """Raise ``InvalidEvent`` if an event cannot be called this."""
    fault = _fault_of_name(name)
    if not fault and "*" in name:
        fault = "* is for triggers; an event has a name of its own."
    if fault:
        raise InvalidEvent(f"Event {_short(name)}: {fault}")


def check_awaited(name: Any) -> None:
    """Raise ``InvalidEvent`` if nobody can wait for an event of this name."""
    check_event_name(name)
    if name.startswith(RESERVED):
        raise InvalidEvent(f"Event {_short(name)}: names that start with {RESERVED} are the engine's own.")


def spread(jitter: timedelta | None, seed: str) -> timedelta:
    """Return a delay from zero up to, not including, ``jitter``: for one ``seed`` always the same."""
    fraction = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "big")
    return timedelta(microseconds=(jitter or timedelta(0)) // _MICROSECOND * fraction >> 64)


def _fault_of_name(name: Any) -> str | None:
    if not isinstance(name, str):
        return "an event name is a str."
    if not name:
        return "the name is empty; call it something like user/signed.up."
    if len(name) > MAX_NAME:
        return f"the name has {len(name)} characters, and at most {MAX_NAME} fit."
    if _UNPRINTABLE.search(name):
        return "the name contains a control character."
    return None


def _fault_of_pattern(name: Any) -> str | None:
    if fault := _fault_of_name(name):
        return fault
    if "*" in (name[:-1] if name.endswith(("/*", ".*")) else name):
        return "* stands for the rest of a name, at its end, after a / or a dot: user/* or user/profile.*."
    if name.startswith(RESERVED):
        return f"names that start with {RESERVED} are reserved for the engine."
    return None


def _fault_of_expr(expr: str) -> str | None:
    fields = expr.split()
    if expr.startswith("@"):
        return "write the five fields out: @daily is 0 0 * * *."
    if not expr.isascii():
        return "only ASCII characters mean something in it."
    if len(fields) != 5:
        return f"five fields are needed, minute hour day month weekday; it has {len(fields)}."
    for field in fields:
        if field[0] in "hHrR":
            return f"{field} is a time of croniter's choosing; write one, and use jitter= to spread runs."
        if same := _ONE_VALUE_RANGE.search(field):
            return f"croniter takes {same[0]} for the whole range; write {same[1]}."
    try:
        next(_walls(expr, datetime(2000, 1, 1)))
    except CroniterBadDateError:
        return "it never fires, because no year has such a date."
    except Exception as error:  # croniter lets some of its own slips through.
        return f"croniter cannot read it: {error}"
    return None


def _fault_of_zone(tz: Any) -> str | None:
    try:
        ZoneInfo(tz)
    except (LookupError, ValueError, OSError, TypeError, AttributeError):
        near = get_close_matches(str(tz), available_timezones(), n=1)
        return f"there is no time zone {tz!r}" + (f"; {near[0]!r}?" if near else " (Europe/Berlin is one).")
    return None


def _fault_of_options(trigger: CronTrigger) -> str | None:
    if trigger.catch_up not in CATCH_UP:
        return f"catch_up is one of {', '.join(CATCH_UP)}, not {trigger.catch_up!r}."
    jitter = trigger.jitter
    if jitter is not None and not (isinstance(jitter, timedelta) and jitter > timedelta(0)):
        return f"jitter is a timedelta above zero or None, not {jitter!r}."
    return None


def _walls(expr: str, after: datetime) -> Iterator[datetime]:
    """Iterate over the naive times that ``expr`` names after ``after``."""
    times = copy.copy(_parsed(expr))  # A croniter carries its place with it: one for each thread.
    times.set_current(after.replace(second=0, microsecond=0))
    while True:
        yield times.get_next(datetime)


@cache
def _parsed(expr: str) -> croniter:
    return croniter(expr, datetime(2000, 1, 1))


def _offsets(local: datetime) -> tuple[timedelta, timedelta]:
    """
    Return the offsets from UTC of the first and the second time the clock shows ``local``.

    They are equal but where the clocks change: smaller first in a gap, larger first in an overlap.
    """
    first, second = local.replace(fold=0).utcoffset(), local.replace(fold=1).utcoffset()
    assert first is not None  # A ZoneInfo has an offset for every datetime.
    assert second is not None
    return first, second


def _end_of_gap(local: datetime) -> datetime:
    """Return the instant the clocks jumped over ``local``."""
    first, second = _offsets(local)
    start = local.replace(tzinfo=UTC) - second

    def has_jumped(seconds: int) -> bool:
        return (start + seconds * _SECOND).astimezone(local.tzinfo).utcoffset() != first

    return start + bisect_left(range((second - first) // _SECOND), True, key=has_jumped) * _SECOND


def _utc(moment: datetime) -> datetime:
    if moment.tzinfo is None:
        raise ValueError(f"{moment!r} is naive; cron slots are asked for with aware datetimes.")
    return moment.astimezone(UTC)


def _written(span: timedelta) -> str:
    for unit in ("days", "hours", "minutes"):
        whole, rest = divmod(span, timedelta(**{unit: 1}))
        if not rest:
            return f"timedelta({unit}={whole})"
    return repr(span).removeprefix("datetime.")


def _short(value: Any) -> str:
    text = f'"{value}"' if isinstance(value, str) and value.isprintable() else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
