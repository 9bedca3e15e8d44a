"""
Put events before those who listen for them: waiting steps, and runs that an event cancels.

Emission only writes the event, unrouted. A cluster takes up such events in batches, oldest first, and in one
transaction wakes the runs that each concerns, puts it before their steps and marks it as routed. Die at any
statement, and all of it is done again. Each run decides for itself, in its next pass (see ``waiting``).
"""

from collections.abc import Iterator, Sequence
from uuid import UUID

from django.db import connections, router, transaction
from django.db.models import Subquery, TextField
from django.db.models.functions import Cast

from . import cancelling, matching, payloads, signals, wakeup
from .models import Event, Listener
from .models.listener import Call, digest
from .models.sql import adapt, placeholder
from .outage import outlast

#: Events of one transaction, and what they call out in one statement.
BATCH = 200


def route() -> int:
    """
    Route a batch of events and return how many there were.

    Three statements when nobody listens for any of these names, five when nobody listens for just these, and three
    to five more when somebody does, however many. One cluster routes at a time, so that events come in
    order; another one that tries meanwhile routes none.
    """
    using = router.db_for_write(Event)
    return outlast(using, lambda: _route(using))


def _route(using: str) -> int:
    with transaction.atomic(using=using):
        events = _unrouted(using)
        if events:
            _call_out(_heard(list(_calls(events, using)), using), events, using)
            # Index: the primary key.
            Event.objects.using(using).filter(pk__in=[event.pk for event in events]).update(unrouted=None)
    return len(events)


def _unrouted(using: str) -> Sequence[Event]:
    """
    Lock the next events and return them, without their data; none if an earlier one is in another's hands.

    Index: ``django_jobs_event_unrouted``.
    """
    waiting = Event.objects.using(using).filter(unrouted=True).order_by("id")
    events = waiting.annotate(oldest=Subquery(waiting.values("pk")[:1])).defer("data")
    found = list(events.select_for_update(skip_locked=True)[:BATCH])
    return found if found and found[0].pk == found[0].oldest else ()


def _calls(events: Sequence[Event], using: str) -> Iterator[Call]:
    """Say by which digests each event might be listened for: by the paths that anybody looks at."""
    listened = _paths(sorted({event.name for event in events}), using)
    data = _data([event.pk for event in events if event.name in listened], using)
    for event in events:
        if event.pk not in data:
            continue
        for paths in listened[event.name]:
            if (text := matching.values(paths, data[event.pk])) is not None:
                yield Call(digest(event.name, paths, text), event.pk, event.received_at)


def _data(ids: Sequence[UUID], using: str) -> dict[UUID, dict]:
    """Read what these events say. One that cannot be read concerns nobody, and must not hold up the others."""
    found: dict[UUID, dict] = {}
    events = Event.objects.using(using).filter(pk__in=ids)
    for pk, text in events.values_list("pk", Cast("data", TextField())) if ids else ():
        try:
            found[pk] = payloads.loads(text)
        except ValueError as error:
            signals.log_unreadable(pk, error)
    return found


_PATHS = """
WITH RECURSIVE pair(event_name, path) AS (
  SELECT names.name, (SELECT MIN(path) FROM {table} WHERE event_name = names.name) FROM ({names}) names
  UNION ALL
  SELECT pair.event_name, (SELECT MIN(path) FROM {table} next
                           WHERE next.event_name = pair.event_name AND next.path > pair.path)
  FROM pair WHERE pair.path IS NOT NULL)
SELECT event_name, path FROM pair WHERE path IS NOT NULL
"""


def _paths(names: Sequence[str], using: str) -> dict[str, list[str]]:
    """
    Return the paths that listeners of each event look at.

    One probe of ``django_jobs_listener_paths`` for each pair there is, however many listen (a loose index scan).
    """
    connection = connections[using]
    name = f"SELECT {placeholder(connection, Listener._meta.get_field('event_name'))} AS name"
    table = connection.ops.quote_name(Listener._meta.db_table)
    statement = _PATHS.format(table=table, names=" UNION ALL ".join([name] * len(names)))
    found: dict[str, list[str]] = {}
    with connection.cursor() as cursor:
        cursor.execute(statement, [adapt(connection, name) for name in names])
        for name, path in cursor.fetchall():
            found.setdefault(name, []).append(path)
    return found


def _heard(calls: Sequence[Call], using: str) -> list[Call]:
    """Leave out the calls that nobody listens for. Index: ``django_jobs_listener_digest``."""
    there: set[str] = set()
    for at in range(0, len(calls), 10 * BATCH):
        asked = {call.digest for call in calls[at : at + 10 * BATCH]}
        listeners = Listener.objects.using(using).filter(digest__in=asked)
        there.update(listeners.order_by().values_list("digest", flat=True).distinct())
    return [call for call in calls if call.digest in there]


def _call_out(calls: Sequence[Call], events: Sequence[Event], using: str) -> None:
    """
    Wake, cancel and deliver.

    The runs first, as a worker too locks the run it has before all that is the run's.
    """
    listeners = Listener.objects.using(using)
    batches = [calls[at : at + BATCH] for at in range(0, len(calls), BATCH)]
    if woken := sum(listeners.wake(batch) for batch in batches):
        wakeup.ring(using)
    cancelled = [pair for batch in batches for pair in listeners.cancelled_by(batch)]
    for event in events:
        if runs := [run for run, cancelled_by in cancelled if cancelled_by == event.pk]:
            cancelling.end(runs, cancelling.reason(event), using)
    for batch in batches if woken else ():
        listeners.deliver(batch)
