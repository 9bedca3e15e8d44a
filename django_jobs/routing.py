"""
Put events before those who listen for them: waiting steps, and runs that an event cancels.

Emission only writes the event, unrouted. A cluster takes up such events in batches, oldest first, and in one
transaction notes whom each concerns, wakes those runs and marks the events as routed. Die at any statement, and all
of it is done again; twice does no harm. Each run decides for itself, in its next pass (see ``waiting``).
"""

from collections.abc import Sequence
from uuid import UUID

from django.db import connections, router, transaction
from django.db.models import Q

from . import cancelling, endings, wakeup
from .models import Delivery, Event, Listener, Run
from .models.listener import digest
from .models.sql import adapt
from .outage import outlast

#: Events of one transaction.
BATCH = 200


def route() -> int:
    """
    Route a batch of events and return how many there were.

    Five statements when nobody listens for any of them or fewer; else three more for each event that is heard,
    however many runs wait. Two clusters never take the same event: rows that another has locked are passed over.
    """
    using = router.db_for_write(Event)
    count, cancelled = outlast(using, lambda: _route(using))
    cancelling.cascade(cancelled, using)
    return count


def _route(using: str) -> tuple[int, list[UUID]]:
    cancelled: list[UUID] = []
    with transaction.atomic(using=using):
        events = _unrouted(using)
        if not events:
            return 0, cancelled
        for event, digests in _heard(_digests(events, using), using):
            _deliver(event, digests, using)
            cancelled += _cancel(event, digests, using)
        # Index: the primary key.
        Event.objects.using(using).filter(pk__in=[event.pk for event in events]).update(unrouted=None)
    return len(events), cancelled


def _unrouted(using: str) -> list[Event]:
    """Index: ``django_jobs_event_unrouted``."""
    waiting = Event.objects.using(using).filter(unrouted=True).order_by("id")
    return list(waiting.select_for_update(skip_locked=True)[:BATCH])


def _digests(events: Sequence[Event], using: str) -> list[tuple[Event, list[str]]]:
    """Return each event with the digests of those who might listen for it, by the paths that any do look at."""
    listened = _paths({event.name for event in events}, using)
    found = []
    for event in events:
        texts = ((path, endings.values(path, event.data)) for path in listened.get(event.name, ()))
        if digests := [digest(event.name, path, text) for path, text in texts if text is not None]:
            found.append((event, digests))
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


def _paths(names: set[str], using: str) -> dict[str, list[str]]:
    """
    Return the paths that listeners of each event look at.

    One probe of ``django_jobs_listener_paths`` for each pair there is, however many listen (a loose index scan).
    """
    connection = connections[using]
    ask = " UNION ALL ".join([f"SELECT {_text(connection)} AS name"] * len(names))
    table = connection.ops.quote_name(Listener._meta.db_table)
    found: dict[str, list[str]] = {}
    with connection.cursor() as cursor:
        cursor.execute(_PATHS.format(table=table, names=ask), [adapt(connection, name) for name in names])
        for name, path in cursor.fetchall():
            found.setdefault(name, []).append(path)
    return found


def _text(connection: object) -> str:
    kinds = {"mysql": "CAST(%s AS CHAR(255)) COLLATE utf8mb4_nopad_bin"}
    return kinds.get(connection.vendor, "CAST(%s AS varchar(255))")  # type: ignore[attr-defined]


def _heard(asked: Sequence[tuple[Event, list[str]]], using: str) -> list[tuple[Event, list[str]]]:
    """Leave out the events that nobody listens for. Index: ``django_jobs_listener_digest``."""
    wanted = {one for _, digests in asked for one in digests}
    if not wanted:
        return []
    listeners = Listener.objects.using(using).filter(digest__in=wanted)
    there = set(listeners.order_by().values_list("digest", flat=True).distinct())
    return [(event, digests) for event, digests in asked if there.intersection(digests)]


def _deliver(event: Event, digests: Sequence[str], using: str) -> None:
    """Put ``event`` before the steps that wait for it and wake their runs; an INSERT and an UPDATE for all."""
    connection = connections[using]
    q = connection.ops.quote_name
    delivery, listener = q(Delivery._meta.db_table), q(Listener._meta.db_table)
    ignore, conflict = ("IGNORE ", "") if connection.vendor == "mysql" else ("", " ON CONFLICT DO NOTHING")
    mine = (
        f"FROM {listener} WHERE digest IN ({', '.join(['%s'] * len(digests))})"
        " AND step_id IS NOT NULL AND since <= %s AND (until IS NULL OR until >= %s)"
    )
    parameters = [*digests, *[adapt(connection, event.received_at)] * 2]
    with connection.cursor() as cursor:
        cursor.execute(
            f"INSERT {ignore}INTO {delivery} (listener_id, event_id)"
            f" SELECT id, CAST(%s AS {_uuid(connection)}) {mine}{conflict}",
            [adapt(connection, event.pk), *parameters],
        )
        if not cursor.rowcount:
            return
    waiting = Listener.objects.using(using).filter(deliveries__event=event.pk)
    if Run.objects.using(using).filter(pk__in=waiting.values("run")).nudge():
        wakeup.ring(using)


def _uuid(connection: object) -> str:
    native = connection.features.has_native_uuid_field  # type: ignore[attr-defined]
    return "uuid" if native else "char(32)"


def _cancel(event: Event, digests: Sequence[str], using: str) -> list[UUID]:
    """Cancel the runs that ``event`` cancels; return them."""
    listening = Listener.objects.using(using).filter(
        Q(until=None) | Q(until__gte=event.received_at),
        digest__in=digests,
        step=None,
        since__lte=event.received_at,
        run__finished_at=None,
        run__error__isnull=True,  # What is done about a failure is no longer cancelled by an event.
    )
    # The event that started a run does not cancel it.
    ids = list(listening.exclude(run__event=event.pk).values_list("run", flat=True))
    cancelling.end(ids, cancelling.reason(event), using)
    return ids
