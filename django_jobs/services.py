"""
The verbs of people: what the command line, the admin and host code do to runs and jobs.

They go by what the database says happened, not by what an instance in memory looks like: an
impossible verb raises ``InvalidVerb`` saying why, and changes nothing.
"""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from django.db import connections, router, transaction
from django.db.models import Exists, OuterRef
from django.db.models.query import QuerySet

from . import clock, flags, registry, signals, wakeup
from .conf import conf
from .exceptions import InvalidVerb
from .models import Attempt, Delivery, Event, Job, Listener, Run, Step

#: Rows of one DELETE while pruning, so that no statement holds its locks for long.
BATCH = 500


def find_run(run: Run | UUID | str, using: str | None = None) -> Run:
    """Return the run as its row is now; raise ``InvalidVerb`` if there is none."""
    key = run.pk if isinstance(run, Run) else run
    try:
        return Run.objects.using(using or router.db_for_write(Run)).get(pk=UUID(str(key)))
    except (Run.DoesNotExist, ValueError):
        raise InvalidVerb(f"There is no run {key}.") from None


def cancel(run: Run | UUID | str, reason: str = "") -> Run:
    """
    Cancel an open run. It takes effect before the run's next step.

    A step in hand is not interrupted; what it returns is discarded, because the lease is gone.
    """
    run = find_run(run)
    using = router.db_for_write(Run)
    if not Run.objects.using(using).filter(pk=run.pk).cancel(reason[:500]):
        raise InvalidVerb(f"Run {run.pk} is {find_run(run).status}; only an open run can be cancelled.")
    run = find_run(run)
    signals.announce(signals.run_finished, Run, using=using, run=run)
    return run


def retry(run: Run | UUID | str) -> Run:
    """
    Let a failed run go on from its checkpoints, with a full set of retries.

    The step whose failure ended the run works again; a failed step that the job had caught stays as
    it is. The job must be known: a run of a removed one would wait for ever.
    """
    run = find_run(run)
    using = router.db_for_write(Run)
    registry.get(run.job_id)
    with transaction.atomic(using=using):
        if not Run.objects.using(using).filter(pk=run.pk).requeue():
            raise InvalidVerb(f"Run {run.pk} is {find_run(run).status}; only a failed run can be retried.")
        if (run.error or {}).get("type") == "StepError":
            Step.objects.using(using).filter(run=run).reopen_last()
        wakeup.ring(using)
    return find_run(run)


def sync(using: str | None = None) -> None:
    """Write what the registry knows into the Job table, for people to see; safe to repeat."""
    using = using or router.db_for_write(Job)
    if not router.allow_migrate_model(using, Job):
        return
    rows = described()
    changing = [
        "group",
        "triggers",
        "gate",
        "closed_by",
        "doc",
        "version",
        "retries",
        "queue",
        "declared",
        "synced_at",
    ]
    with transaction.atomic(using=using):
        jobs = Job.objects.using(using)
        jobs.bulk_create(rows, update_conflicts=True, update_fields=changing, **_unique(using))
        jobs.exclude(pk__in=[row.pk for row in rows]).update(declared=False)


def described() -> list[Job]:
    """Return what the registry knows as rows of the Job table, not saved."""
    now = clock.now()
    return [_row(job, closed_by, now) for job, closed_by in registry.declared()]


def _unique(using: str) -> dict[str, Any]:
    if connections[using].features.supports_update_conflicts_with_target:
        return {"unique_fields": ["id"]}
    return {}


def _row(job: registry.Job, closed_by: str | None, now: datetime) -> Job:
    return Job(
        id=job.id,
        group=job.group,
        triggers=[str(trigger) for trigger in job.triggers],
        gate=flags.name(job.gate),
        closed_by=closed_by or "",
        doc=job.doc,
        version=job.version,
        retries=job.retries,
        queue=job.queue,
        synced_at=now,
    )


def check_clock(using: str) -> float | None:
    """
    Say so when this host's clock and the database's differ by more than a second; return the difference.

    Deadlines are compared on the clocks of the hosts that run jobs, so they had better agree.
    """
    statement = {
        "postgresql": "SELECT EXTRACT(EPOCH FROM clock_timestamp())",
        "mysql": "SELECT UNIX_TIMESTAMP(SYSDATE(6))",
    }.get(connections[using].vendor)
    if statement is None:
        return None  # SQLite has no clock of its own.
    with connections[using].cursor() as cursor:
        cursor.execute(statement)
        difference = datetime.now(UTC).timestamp() - float(cursor.fetchone()[0])
    if abs(difference) > 1:
        signals.log_clock_differs(using, difference)
    return difference


def prune(before: datetime | None = None) -> dict[str, int]:
    """
    Delete finished runs, and events no run refers to, that ended or came before ``before``.

    By default that is ``RETENTION_DAYS`` ago; None there keeps everything. Works in batches, never
    touches an open run or its event, nor what one still waits for: the run it invoked, an event that was put
    before it or is still to be. May be stopped and repeated. Returns the counts.
    """
    if before is None:
        if conf.RETENTION_DAYS is None:
            return {"runs": 0, "events": 0}
        before = clock.now() - timedelta(days=conf.RETENTION_DAYS)
    using = router.db_for_write(Run)
    runs, events = Run.objects.using(using), Event.objects.using(using)
    awaited = Exists(runs.filter(pk=OuterRef("parent"), finished_at=None))
    old_runs = runs.filter(~awaited, finished_at__lt=before).order_by("finished_at")
    used = Exists(runs.filter(event=OuterRef("pk")))
    put_before = Exists(Delivery.objects.using(using).filter(event=OuterRef("pk")))
    events = events.filter(~used, ~put_before)
    old_events = events.filter(received_at__lt=before, unrouted=None).order_by("received_at")
    return {
        "runs": sum(_delete_runs(batch, using) for batch in _batches(old_runs)),
        "events": sum(events.filter(pk__in=batch)._raw_delete(using) for batch in _batches(old_events)),
    }


def _batches(rows: QuerySet) -> Iterator[list[UUID]]:
    while keys := list(rows.values_list("pk", flat=True)[:BATCH]):
        yield keys


def _delete_runs(keys: list[UUID], using: str) -> int:
    """Delete runs with all that is theirs; another pruner at the same time finds them gone."""
    with transaction.atomic(using=using):
        runs = Run.objects.using(using)
        over = runs.filter(pk__in=keys, finished_at__isnull=False)  # One may have been retried meanwhile.
        keys = list(over.select_for_update().values_list("pk", flat=True))
        if not keys:
            return 0
        runs.filter(parent__in=keys).update(parent=None)
        runs.filter(replay_of__in=keys).update(replay_of=None)
        Attempt.objects.using(using).filter(run__in=keys)._raw_delete(using)
        Listener.objects.using(using).filter(run__in=keys)._raw_delete(using)
        Delivery.objects.using(using).filter(step__run__in=keys)._raw_delete(using)
        Step.objects.using(using).filter(run__in=keys)._raw_delete(using)
        return runs.filter(pk__in=keys)._raw_delete(using)
