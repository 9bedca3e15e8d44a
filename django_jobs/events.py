"""
Record events and start what they trigger.

Emission writes only new rows, in the caller's transaction: the Event, and one Run for each matching
job, in two statements however many. It takes no lock that a worker holds. Rolled back, it never was.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from asgiref.sync import sync_to_async
from django.db import OperationalError, connections, router, transaction

from . import clock, payloads, registry, signals, wakeup
from .conf import conf
from .exceptions import InvalidEvent, storable, words
from .models import Event, Run, RunStatus
from .models.event import digest
from .models.fields import uuid7
from .models.sql import adapt
from .outage import TRIES, outlast
from .triggers import EventTrigger, check_event_name

#: The event behind a run that was started by hand; names under ``django_jobs/`` are the engine's own.
OWN = "django_jobs/"
STARTED = f"{OWN}job.started"

#: Rows of one INSERT; databases limit the parameters of a statement.
BATCH = 1000


@dataclass(frozen=True)
class EventSpec:
    """An event yet to be emitted; see ``emit`` for the fields."""

    name: str
    data: dict | None = None
    key: str | None = None
    at: datetime | None = None


def emit(name: str, data: dict | None = None, *, key: str | None = None, at: datetime | None = None) -> Event:
    """
    Record an event and start the jobs it triggers; return it.

    In the caller's transaction: event, runs and the change that caused them commit together or not
    at all. With a ``key`` already seen under this name (within ``EVENT_KEY_HOURS``) nothing is
    written and the first event comes back. ``at`` in the future holds the runs until then. Raises
    ``InvalidEvent`` for a name, key or time that will not do, and ``TypeError`` naming the path for
    data that is not JSON.
    """
    return emit_many([EventSpec(name, data, key, at)])[0]


def emit_many(specs: Iterable[EventSpec]) -> list[Event]:
    """Emit several events as ``emit`` does, in the same two statements; return them in order."""
    now = clock.now()
    using = router.db_for_write(Event)
    drafts = [_draft(spec, now) for spec in specs]
    if not drafts:
        return []
    tried = False

    def write() -> list[Event]:
        nonlocal tried
        if tried and _is_committed(drafts, using):
            return _first_ones(drafts, _holders(drafts, using))
        tried = True
        return _emit(drafts, using, now)

    return outlast(using, write, patient=False)


def check(spec: EventSpec) -> None:
    """Raise what ``emit`` would raise if the event cannot be recorded; write nothing."""
    _draft(spec, clock.now())


def _is_committed(drafts: Sequence[tuple[Event, str]], using: str) -> bool:
    """Tell whether an earlier try that broke at its COMMIT lost no more than the answer."""
    return Event.objects.using(using).filter(pk__in=[event.pk for event, _ in drafts]).exists()


def _emit(drafts: Sequence[tuple[Event, str]], using: str, now: datetime) -> list[Event]:
    for event, _ in drafts:
        event._state.adding = True  # An earlier try may have left its mark.
    with _transaction(using):
        events = _insert(drafts, using)
        fresh = list({event.pk: event for event in events if event._state.adding}.values())
        runs = [run for event in fresh for run in _runs(event, now)]
        _finish(using, fresh, runs)
    return events


def trigger(job_id: str, data: dict | None = None) -> Run:
    """Start a registered job by its id, whatever its triggers ("run now"); raise ``JobNotFound``."""
    return start(registry.get(job_id), data)


def start(job: registry.Job, data: dict | None = None, *, parent: Run | None = None) -> Run:
    """Start ``job`` once with ``data``, as a child of ``parent``; see ``Job.start``."""
    registry.get(job.id)
    now = clock.now()
    using = router.db_for_write(Run)
    event, encoded = _draft(EventSpec(STARTED, data), now, starts=f'job "{job.id}"')
    with _transaction(using):
        _insert([(event, encoded)], using)
        run = _run(job, event, now)
        run.parent_id = parent.pk if parent else None
        _finish(using, [event], [run])
    return run


def start_again(job: registry.Job, old: Run, data: dict | None, using: str) -> Run:
    """
    Start ``job`` once more for what ``old`` was for; with ``data``, as if its event had said that instead.

    The run then has an event of its own, by the same name, for the job to read. It is recorded, not
    emitted. A cron's run keeps its slot, but does not stand for it: the old one does.
    """
    now = clock.now()
    with _transaction(using):
        event = old.event if data is None else _edited(old.event, data, now, using)
        run = _run(job, event, now)
        run.replay_of, run.scheduled_for = old, old.scheduled_for
        _finish(using, [], [run])
    return run


def _edited(event: Event | None, data: dict, now: datetime, using: str) -> Event:
    edited, _ = _draft(EventSpec(event.name if event else STARTED, data), now, starts="the replay")
    edited.unrouted = None  # It never happened.
    if event:
        edited.key, edited.occurred_at, edited.edited_from = event.key, event.occurred_at, event.pk
    edited.save(using=using, force_insert=True)
    return edited


def _transaction(using: str) -> transaction.Atomic:
    # Without a savepoint: it would cost the caller's transaction two statements and protect nothing.
    return transaction.atomic(using=using, savepoint=False)


def _finish(using: str, events: Sequence[Event], runs: Sequence[Run]) -> None:
    """Write the runs, then tell the world once all is committed."""
    if runs:
        Run.objects.using(using).bulk_create(runs, batch_size=BATCH)
    if runs or events:
        wakeup.ring(using)  # Somebody may wait for the event.
    for event in events:
        event._state.adding = False
        event._state.db = using
        if signals.event_received.has_listeners(Event):
            signals.announce(signals.event_received, Event, using=using, event=event)
    for run in runs:
        if signals.run_queued.has_listeners(Run):
            signals.announce(signals.run_queued, Run, using=using, run=run)


# Drafting: everything that can be wrong is found before anything is written.


def _draft(spec: EventSpec, now: datetime, *, starts: str = "") -> tuple[Event, str]:
    if not starts:
        check_event_name(spec.name)
        if spec.name.startswith(OWN):
            raise InvalidEvent(
                f'Event names under "{OWN}" are the engine\'s own; choose another for "{spec.name}".'
            )
    where = starts or f'event "{spec.name}"'
    data = {} if spec.data is None else spec.data
    if not isinstance(data, dict):
        raise InvalidEvent(f"The data of {where} must be a dict, not {type(data).__name__}.")
    if spec.key is not None and not _is_key(spec.key):
        raise InvalidEvent(
            f"The key of {where} must be a string of 1 to 255 characters, none of them NUL, not {spec.key!r}."
        )
    if spec.at is not None and (not isinstance(spec.at, datetime) or spec.at.tzinfo is None):
        raise InvalidEvent(f"The time (at) of {where} must be an aware datetime, not {spec.at!r}.")
    encoded = payloads.dumps(data, where=where)
    payloads.check_size(encoded, conf.MAX_EVENT_BYTES, where=where, setting="MAX_EVENT_BYTES")
    event = Event(name=spec.name, data=data, key=spec.key, occurred_at=spec.at or now, received_at=now)
    event.unrouted = None if spec.name == STARTED else True  # Nobody can wait for the engine's own.
    event.digest = digest(spec.name, spec.key) if spec.key else None
    return event, encoded


def _is_key(key: Any) -> bool:
    return isinstance(key, str) and 1 <= len(key) <= 255 and storable(key) == key


# Events.


def _insert(drafts: Sequence[tuple[Event, str]], using: str) -> list[Event]:
    """
    Insert the drafts; return them, with the first event of its key in place of one that came too late.

    The unique digest decides: of two emitters at once one inserts and the other finds the row.
    """
    drafts, doubles = _first_of_each_key(drafts)
    events: list[Event] = []
    for start in range(0, len(drafts), BATCH):
        batch = drafts[start : start + BATCH]
        all_new = _insert_batch(batch, using) == len(batch)
        events += [event for event, _ in batch] if all_new else _resolve(batch, using)
    return [events[place] for place in doubles]


def _first_of_each_key(drafts: Sequence[tuple[Event, str]]) -> tuple[list[tuple[Event, str]], list[int]]:
    """Drop drafts whose key came earlier in the same call; return the rest and, for each draft, its place there."""
    kept: list[tuple[Event, str]] = []
    places: dict[str, int] = {}
    order = []
    for event, encoded in drafts:
        place = places.setdefault(event.digest or str(event.pk), len(kept))
        if place == len(kept):
            kept.append((event, encoded))
        order.append(place)
    return kept, order


_COLUMNS = ("id", "name", "data", "key", "digest", "occurred_at", "received_at", "unrouted")


def _insert_batch(drafts: Sequence[tuple[Event, str]], using: str) -> int:
    connection = connections[using]
    quote = connection.ops.quote_name
    row = f"({', '.join(['%s'] * len(_COLUMNS))})"
    into = f"INTO {quote(Event._meta.db_table)} ({', '.join(map(quote, _COLUMNS))}) VALUES "
    rows = ", ".join([row] * len(drafts))
    if connection.vendor == "mysql":
        statement = f"INSERT IGNORE {into}{rows}"
    else:
        statement = f"INSERT {into}{rows} ON CONFLICT (digest) DO NOTHING"
    parameters: list[Any] = []
    for event, encoded in drafts:
        values = (
            event.pk,
            event.name,
            encoded,
            event.key,
            event.digest,
            event.occurred_at,
            event.received_at,
            event.unrouted,
        )
        parameters += [adapt(connection, value) for value in values]
    with connection.cursor() as cursor:
        cursor.execute(statement, parameters)
        return cursor.rowcount


def _resolve(drafts: Sequence[tuple[Event, str]], using: str) -> list[Event]:
    """
    Return the events that have the keys of ``drafts``: who was first, or the draft once that one's period is over.

    The draft then takes the key from the first event and is inserted like any other. Of emitters at once
    the UPDATE lets one through: the others wait until it has committed, take nothing, are refused by the
    unique digest and return that one's event. If it is rolled back, the key is where it was.

    Whom this holds up: PostgreSQL locks the old event as if to delete it, because a foreign key could refer
    to its digest. Until the commit nobody inserts a run of the old event (a replay), and an emitter waits for
    one who is doing so. A worker goes on: it locks no event, and no UPDATE of a run looks at the run's event.
    On MariaDB each refused INSERT has left a shared lock on the old digest, so of emitters at once all but
    one are victims of a deadlock, which ``emit`` repeats; in a caller's transaction the caller has to.
    """
    holders = _holders(drafts, using)
    for _ in range(TRIES):
        free = [draft for draft in drafts if _is_free(draft[0], holders)]
        if not free:
            return _first_ones(drafts, holders)
        _release([holders[event.digest] for event, _ in free if event.digest in holders], using)
        if _insert_batch(free, using) == len(free):
            holders |= {event.digest: event for event, _ in free}
        else:
            holders |= _holders(free, using)
    # Somebody's event has the key and yet is not there: this transaction sees an older state (REPEATABLE READ).
    raise OperationalError(f'The event with the key "{free[0][0].key}" cannot be seen yet; begin again.')


def _holders(drafts: Sequence[tuple[Event, str]], using: str) -> dict[str | None, Event]:
    """Read the events that have the keys of ``drafts``, by digest. Unique index."""
    digests = [event.digest for event, _ in drafts if event.digest]
    return {event.digest: event for event in Event.objects.using(using).filter(digest__in=digests)}


def _is_free(event: Event, holders: dict[str | None, Event]) -> bool:
    """Tell whether ``event`` may have the key it wants: nobody has it, or its holder's period is over."""
    if event.digest is None:
        return False
    holder = holders.get(event.digest)
    if holder is None:  # It was pruned just now.
        return True
    period = timedelta(hours=conf.EVENT_KEY_HOURS)
    return holder.pk != event.pk and event.received_at - holder.received_at >= period


def _release(holders: Sequence[Event], using: str) -> int:
    """Take their keys from these events, unless somebody else has done so."""
    digests = [event.digest for event in holders]
    late = Event.objects.using(using).filter(pk__in=[event.pk for event in holders], digest__in=digests)
    return late.update(digest=None)


def _first_ones(drafts: Sequence[tuple[Event, str]], holders: dict[str | None, Event]) -> list[Event]:
    first = [holders.get(event.digest, event) for event, _ in drafts]
    return [event if event.pk == there.pk else there for (event, _), there in zip(drafts, first, strict=True)]


# Runs.


def _runs(event: Event, now: datetime) -> list[Run]:
    runs = []
    for job in registry.listening(event.name):
        try:
            if _wanted(job, event):
                runs.append(_run(job, event, now))
        except Exception as error:
            # A predicate with a bug must lose neither the event nor the other jobs' runs.
            runs.append(
                _skipped(job, event, now, f"{type(error).__name__} in its when or priority: {words(error)}")
            )
    return runs


def _wanted(job: registry.Job, event: Event) -> bool:
    mine = [t for t in job.triggers if isinstance(t, EventTrigger) and t.matches(event.name)]
    return any(trigger.when is None or trigger.when(event) for trigger in mine)


def _run(job: registry.Job, event: Event | None, now: datetime) -> Run:
    return Run(
        id=uuid7(),
        job_id=job.id,
        version=job.version,
        queue=job.queue,
        priority=_priority(job, event),
        event=event,
        wake_at=max(event.occurred_at, now) if event else now,
        queued_at=now,
    )


def _priority(job: registry.Job, event: Event | None) -> int:
    if not callable(job.priority):
        return job.priority
    if event is None:
        return 0
    priority = job.priority(event)
    if not registry.is_priority(priority):
        raise TypeError(f"a priority is a whole number of at most 32 bits, not {priority!r}")
    return priority


def _skipped(job: registry.Job, event: Event, now: datetime, reason: str) -> Run:
    plain = replace(job, priority=0)
    run = _run(plain, event, now)
    run.status, run.reason, run.finished_at, run.wake_at = RunStatus.SKIPPED, reason[:500], now, None
    return run


async def aemit(
    name: str, data: dict | None = None, *, key: str | None = None, at: datetime | None = None
) -> Event:
    """Await ``emit``."""
    return await sync_to_async(emit)(name, data, key=key, at=at)


async def aemit_many(specs: Iterable[EventSpec]) -> list[Event]:
    """Await ``emit_many``."""
    return await sync_to_async(emit_many)(list(specs))


def _emit_signalled(sender: Any, *, name: str, data: dict | None = None, **options: Any) -> Event:
    return emit(name, data, key=options.get("key"), at=options.get("at"))


registry.start_with(start)
signals.event.connect(_emit_signalled, dispatch_uid="django_jobs.emit")
