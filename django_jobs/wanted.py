"""
What a run listens for: which events, what must be true of them, and the look back at those that have come.

The listeners are committed before the look back. So an event is either seen by that look, or it came later, and
a router, which sees all that come, finds the listeners.
"""

import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from inspect import iscoroutinefunction
from typing import Any
from uuid import UUID

from django.db.models import Q
from django.db.models.fields.json import KeyTransform

from . import matching
from .models import Event, Listener, Run, Step
from .models.listener import digest
from .outage import outlast
from .triggers import check_awaited

#: Events read at a time while looking back.
PAGE = 100

#: Keys that every database takes for a key, and numbers that none of them rounds.
_PLAIN_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)
_EXACT = 2**53


def came_before(event: UUID, received_at: datetime, run: Run) -> bool:
    """
    Tell whether an event received in the very instant in which ``run`` was queued came before what started it.

    Clocks of tests stand still, and what is emitted together has one time; ids go on.
    """
    return received_at == run.queued_at and event < (run.event_id or run.pk)


def check_wait(names: Any, match: Any, where: Any, since: Any) -> None:
    """Raise ``InvalidEvent`` or ``ValueError`` if nobody can wait for this."""
    if isinstance(names, str) or not isinstance(names, Collection) or not names:
        raise ValueError(f"events is a list of event names, not {names!r}.")
    for name in names:
        check_awaited(name)
    matching.check(match)
    if where is not None and (not callable(where) or iscoroutinefunction(where)):
        raise ValueError(f"where is a plain function of the event, not {where!r}.")
    if since is not None and (not isinstance(since, datetime) or since.tzinfo is None):
        raise ValueError(f"since is an aware datetime, not {since!r}.")


@dataclass(frozen=True)
class Wanted:
    """The events that a run waits for, one of them or one of each, and what must be true of them."""

    names: tuple[str, ...]
    #: What their data must hold, by path (``matching.sought``).
    values: dict[str, Any]
    run: Run
    #: Events received before do not count; None is before the run was queued.
    since: datetime | None = None
    where: Callable[[Event], bool] | None = None
    each: bool = False
    path: str = field(init=False)
    text: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", matching.paths(self.values))
        object.__setattr__(self, "text", matching.text(list(self.values.values())))

    @property
    def start(self) -> datetime:
        return self.since or self.run.queued_at

    def listeners(self, step: Step | None, until: datetime | None) -> list[Listener]:
        return [
            Listener(
                run_id=self.run.pk,
                step=step,
                event_name=name,
                path=self.path,
                digest=digest(name, self.path, self.text),
                since=self.start,
                until=until,
            )
            for name in self.names
        ]

    def fits(self, event: Event, until: datetime | None) -> bool:
        if event.name not in self.names or event.received_at < self.start:
            return False
        if self.since is None and came_before(event.pk, event.received_at, self.run):
            return False
        if until and event.received_at > until:
            return False
        if matching.values(self.path, event.data) != self.text:
            return False
        return self.where is None or bool(self.where(event))

    def look_back(self, using: str, until: datetime | None) -> Iterator[Event]:
        """
        Iterate over the events that may be wanted, oldest first: those received up to ``until``, or all.

        Page by page, so that however many there are, only those it takes to find one are in memory. Index:
        ``django_jobs_event_name``.
        """
        events = self._narrowed(Event.objects.using(using).filter(name__in=self.names, edited_from=None))
        if until:
            events = events.filter(received_at__lte=until)
        page = events.filter(received_at__gte=self.start).order_by("received_at", "id")
        while found := outlast(using, lambda: list(page[:PAGE])):  # noqa: B023 (called at once)
            yield from found
            last = found[-1]
            after = Q(received_at__gt=last.received_at) | Q(id__gt=last.pk)
            page = events.filter(after, received_at__gte=last.received_at).order_by("received_at", "id")
            if len(found) < PAGE:
                return

    def _narrowed(self, events: Any) -> Any:
        """
        Spare the transport of most that do not fit; whether one does is decided in Python.

        Only where no database leaves out one that does: they differ in odd keys, in other types and in large numbers.
        """
        for number, (path, value) in enumerate(self.values.items()):
            is_text = type(value) is str and value.isascii()
            is_number = type(value) is int and abs(value) < _EXACT
            if not (_PLAIN_PATH.fullmatch(path) and (is_text or is_number)):
                continue
            name, at = f"value_{number}", "data"
            for part in path.split("."):
                at = KeyTransform(part, at)  # type: ignore[assignment]
            same = Q(**{name: value}) | Q(**{name: float(value)}) if is_number else Q(**{name: value})
            events = events.alias(**{name: at}).filter(same)
        return events
