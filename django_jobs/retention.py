"""
How long history is kept, and its pruning: finished runs with all that is theirs, and old events.

``services.prune`` and the housekeeping job go through ``prune_in_batches``; nothing else deletes rows.
"""

from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timedelta
from typing import Any, NamedTuple
from uuid import UUID

from django.db import router, transaction
from django.db.models import Exists, OuterRef, Q, QuerySet

from . import clock, registry, routing
from .conf import conf
from .models import OPEN, Attempt, Delivery, Event, Job, Lane, Listener, Log, Run, Step
from .outage import outlast

#: Rows of one transaction, so that none holds its locks for long: about 30 ms for runs of three steps. From
#: 200 on MariaDB no longer looks up how many rows there are of each id, but guesses, and reads the whole table.
BATCH = 100

#: The last row looked at: its time and its id.
Row = tuple[datetime, UUID]

#: How far pruning has come: past this row among the runs of a job or, the job being None, among the events.
Place = tuple[str | None, Row | None]

START: Place = ("", None)


class Batch(NamedTuple):
    """What one short transaction deleted, and from where to go on."""

    runs: int
    events: int
    place: Place


def prune_in_batches(before: datetime | None = None, place: Place = START) -> Iterator[Batch]:
    """
    Delete, batch by batch, the finished runs and the events that are past their retention.

    A run goes by the retention of its job, an event by that of all (``RETENTION_DAYS``), and with
    ``before`` both by that instead. Never deleted: an open run, one whose parent is open and may yet
    ask for its result, an event that a run refers to, and one whose key still keeps others out.

    May be stopped anywhere and begun again at a ``place``. Walks the jobs that have runs, each of them
    in the order its runs ended (index ``django_jobs_run_age``), then the events in the order they came
    (``django_jobs_event_age``), and looks at no row twice: what has to stay is not in the way.
    """
    while routing.route():
        pass  # What an open run waits for is put before it, and so kept.
    using = router.db_for_write(Run)
    limit = _limits(before)
    job_id, after = place
    while job_id is not None:
        if until := limit(job_id):
            runs = Run.objects.using(using).filter(job_id=job_id)
            for ids, row in _walk(runs, "finished_at", until, after):
                yield Batch(_delete(_delete_runs, ids, using), 0, (job_id, row))
        job_id, after = _next_job(job_id, using), None
    Lane.objects.using(using).prune(BATCH)
    if until := limit(None):
        for ids, row in _walk(Event.objects.using(using), "received_at", until, after):
            yield Batch(0, _delete(_delete_events, ids, using), (None, row))


# How long.


def _limits(before: datetime | None) -> Callable[[str | None], datetime | None]:
    """Return what says before when a run of a job must have ended to go, and, asked for None, an event have come."""
    if before:
        return lambda job_id: before
    everywhere = conf.RETENTION_DAYS
    own = _own_retentions()
    return lambda job_id: _ago(own.get(job_id) or everywhere)


def _own_retentions() -> dict[str | None, timedelta | None]:
    """
    Return the retention of each job, None where it is that of all.

    Of a job that this process does not know, what was last written down: another release, or another
    service on the same database, may have promised to keep its runs for longer than we would.
    """
    written = Job.objects.using(router.db_for_write(Job)).values_list("pk", "retention")
    return {**dict(written), **{job.id: job.retention for job in registry.known(own=True)}}


def _ago(span: timedelta | float | None) -> datetime | None:
    """Return the instant a span, or so many days, ago; None if that is before all time."""
    if span is None:
        return None
    try:
        return clock.now() - (span if isinstance(span, timedelta) else timedelta(days=span))
    except OverflowError:
        return None


# What.


def _next_job(job_id: str, using: str) -> str | None:
    """Return the id after this one among those that have runs: one probe of an index that begins with it."""
    runs = Run.objects.using(using).filter(job_id__gt=job_id).order_by("job_id")
    return runs.values_list("job_id", flat=True).first()


def _walk(
    rows: QuerySet[Any], column: str, until: datetime, after: Row | None
) -> Iterator[tuple[list[UUID], Row]]:
    """Iterate over the ids of the rows before ``until``, oldest first, in batches, each with its last row."""
    rows = rows.filter(**{f"{column}__lt": until}).order_by(column, "pk").values_list(column, "pk")
    while batch := list(_beyond(rows, column, after)[:BATCH]):
        after = batch[-1]
        yield [pk for _, pk in batch], after
        if len(batch) < BATCH:
            return


def _beyond(rows: QuerySet[Any], column: str, after: Row | None) -> QuerySet[Any]:
    if after is None:
        return rows
    at, pk = after
    # The first condition alone tells the database where in the index to begin.
    return rows.filter(Q(**{f"{column}__gte": at}), Q(**{f"{column}__gt": at}) | Q(pk__gt=pk))


# Away with it. Each in a transaction of its own, repeated if it fell victim to a deadlock. Rows that
# somebody else has locked (a person who retries a run, another pruner) are left to the next time.


def _delete(delete: Callable[[Sequence[UUID], str], int], ids: Sequence[UUID], using: str) -> int:
    return outlast(using, lambda: delete(ids, using), patient=False)


def _delete_runs(ids: Sequence[UUID], using: str) -> int:
    """
    Delete those of these runs that are still over, with all that is theirs; return how many.

    No worker adds to them: a checkpoint is inserted only beside a run whose lease the worker shows, and
    a run that is over has none. One that comes while the lease is ending waits for the run's row.
    """
    runs = Run.objects.using(using)
    with transaction.atomic(using=using):
        over = runs.filter(pk__in=ids, finished_at__isnull=False).order_by("pk")
        # An open parent may yet ask for the result of a run, and an open batch for its event.
        rows = over.select_for_update(skip_locked=True).values_list("pk", "parent", "yielded_to")
        over_for = {pk: others for pk, *others in rows}
        needed = {other for others in over_for.values() for other in others if other}
        still_open = set(runs.filter(pk__in=needed, status__in=OPEN).values_list("pk", flat=True))
        ids = [pk for pk, others in over_for.items() if not still_open.intersection(others)]
        if not ids:
            return 0
        runs.filter(parent__in=ids).update(parent=None)
        runs.filter(replay_of__in=ids).update(replay_of=None)
        steps = Step.objects.using(using).filter(run__in=ids)
        Delivery.objects.using(using).filter(step__in=steps.values("pk"))._raw_delete(using)
        for theirs in (Listener, Attempt, Log, Step):  # Listeners and attempts refer to their steps.
            theirs.objects.using(using).filter(run__in=ids)._raw_delete(using)
        return runs.filter(pk__in=ids)._raw_delete(using)


def _delete_events(ids: Sequence[UUID], using: str) -> int:
    """
    Delete those of these events that nothing needs any more; return how many.

    Who makes a run of an old event (a replay) needs its row, locked here before the second look: the
    run is there by then and the event stays, or it comes too late and is refused by its foreign key.
    """
    events, runs = Event.objects.using(using), Run.objects.using(using)
    key_is_free = Q(digest__isnull=True)
    if last := _ago(timedelta(hours=conf.EVENT_KEY_HOURS)):
        key_is_free |= Q(received_at__lte=last)
    told = Delivery.objects.using(using)
    is_unused = ~Exists(runs.filter(event=OuterRef("pk"))) & ~Exists(told.filter(event=OuterRef("pk")))
    with transaction.atomic(using=using):
        over = events.filter(key_is_free, is_unused, pk__in=ids).order_by("pk")
        found = set(over.select_for_update(skip_locked=True).values_list("pk", flat=True))
        found -= set(runs.filter(event__in=found).values_list("event", flat=True))
        return events.filter(pk__in=found)._raw_delete(using) if found else 0
