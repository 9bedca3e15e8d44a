"""
Crons: one django-q2 ``Schedule`` row for each cron trigger, kept and fired by us.

django-q2 reckons cron times in one zone for the whole project and from *now*; so the row's ``next_run``
is reckoned here, by the trigger, and what is due becomes a run here. A run is unique by (job, trigger,
slot): however many clusters fire a slot, however often, it starts once.
"""

import ast
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any

from django.db import InterfaceError, OperationalError, connections, router
from django.db.models import Min
from django_q.models import Schedule

from . import clock, registry, services, signals, wakeup
from .exceptions import JobNotFound
from .models import Job, Run, Worker
from .models.fields import uuid7
from .triggers import PUNCTUAL, CronTrigger

#: The django-q2 cluster that ``runjobs`` is; a host's ``qcluster`` has another name and never fires our rows.
CLUSTER = "django_jobs"
FIRE = "django_jobs.scheduler.fire"

#: A job that another release has written down within this time is one of a release still at work.
RELEASE = timedelta(minutes=3)

#: So many missed slots of one trigger are started in one tick; the rest in the next ones.
MOST_AT_ONCE = 1000


def fire(job_id: str, trigger: str, scheduled_for: datetime | str) -> str | None:
    """
    Start ``job_id`` for one slot of its cron trigger; return the run's id, or None if it had started.

    This is the function the Schedule rows name, so that django-q2's own scheduler and admin can fire them too.
    """
    slot = datetime.fromisoformat(scheduled_for) if isinstance(scheduled_for, str) else scheduled_for
    job = registry.get(job_id)
    cron = next((cron for cron in job.crons if cron.key == trigger), None)
    if cron is None:
        raise JobNotFound(f'Job "{job_id}" has no cron "{trigger}".')
    runs = _start(job, cron, [slot.astimezone(UTC)])
    return str(runs[0].pk) if runs else None


def tick() -> None:
    """Start the runs of every cron trigger that is due, each row by itself: a bad one stops no other."""
    now = clock.now()
    for row in _ours().filter(next_run__lte=now):
        try:
            _fire_due(row, now)
        except (OperationalError, InterfaceError):
            raise
        except Exception as error:
            signals.log_chore_failed(f"fire the schedule {row.name}", error)


def _fire_due(row: Schedule, now: datetime) -> None:
    found = _wanted().get(_identity(row))
    if found is None:
        return  # The next ``reconcile`` takes the row away.
    job, cron = found
    slots = _slots(cron, row.next_run, now)
    # Started first and moved on second: a crash in between fires the slot again, which starts nothing.
    _start(job, cron, slots)
    done_until = slots[-1] if len(slots) == MOST_AT_ONCE else now
    _ours().filter(pk=row.pk, next_run=row.next_run).update(next_run=cron.next(done_until))


def _slots(cron: CronTrigger, first: datetime, now: datetime) -> list[datetime]:
    """Return the slots since ``first`` that are to run, by the trigger's ``catch_up``."""
    before = first - timedelta(microseconds=1)
    if cron.catch_up == "all":
        return list(cron.slots(before, now, limit=MOST_AT_ONCE))
    latest = cron.latest(before, now)
    if latest is None or (cron.catch_up == "skip" and now - latest > PUNCTUAL):
        return []
    return [latest]


def _start(job: registry.Job, cron: CronTrigger, slots: Iterable[datetime]) -> list[Run]:
    """Insert a run for each slot that has none; return those inserted. Unique index on (job, cron, slot)."""
    now = clock.now()
    runs = [
        Run(
            id=uuid7(),
            job_id=job.id,
            version=job.version,
            queue=job.queue,
            priority=0 if callable(job.priority) else job.priority,
            cron=cron.key,
            scheduled_for=slot,
            wake_at=cron.start(job.id, slot) if cron.jitter else now,
            queued_at=now,
        )
        for slot in slots
    ]
    if not runs:
        return []
    using = router.db_for_write(Run)
    Run.objects.using(using).bulk_create(runs, ignore_conflicts=True)
    wakeup.ring(using)
    started = list(Run.objects.using(using).filter(pk__in=[run.pk for run in runs]))
    for run in started:
        signals.announce(signals.run_queued, Run, using=using, run=run)
    return started


def write_down(using: str | None = None) -> None:
    """
    Bring the Schedule and the Job rows up to what the registry knows. Safe to repeat, on every cluster.

    In this order: what another release wrote of its jobs a minute ago tells whose rows are not ours to remove.
    """
    reconcile(using)
    services.sync(using)
    _note_next_runs(using or router.db_for_write(Schedule))


def reconcile(using: str | None = None) -> None:
    """
    Make the Schedule rows match the registry: create, mend, remove. Safe to repeat, on every cluster.

    A new row begins with the next slot from now. Two clusters that create the same row at once leave
    a double, which the next call removes; its slots start once all the same. During a rolling deploy
    two releases are at work: neither removes what the other has just declared.
    """
    using = using or router.db_for_write(Schedule)
    if not router.allow_migrate_model(using, Schedule) or not _migrated(using):
        return
    wanted, others = _wanted(), _other_releases()
    for row in Schedule.objects.using(using).filter(cluster=CLUSTER, func=FIRE):
        found = wanted.pop(_identity(row), None)
        if found is None and _identity(row)[0] in others:
            continue
        if found is None:
            row.delete()
        elif _is_damaged(row, *found):
            Schedule.objects.using(using).filter(pk=row.pk).update(**_columns(*found))
    # bulk_create, because ``Schedule.save`` would reckon ``next_run`` in its own way.
    Schedule.objects.using(using).bulk_create([Schedule(**_columns(*found)) for found in wanted.values()])
    _note_next_runs(using)


def _other_releases() -> set[str]:
    """Return the ids of jobs that a release at work beside ours declares with other triggers, or alone."""
    if not Worker.objects.using(router.db_for_write(Worker)).alive().exists():
        return set()
    ours = {job.id: [str(trigger) for trigger in job.triggers] for job in registry.known()}
    lately = Job.objects.using(router.db_for_write(Job)).filter(synced_at__gt=clock.now() - RELEASE)
    return {pk for pk, triggers in lately.values_list("pk", "triggers") if triggers != ours.get(pk)}


def faults() -> list[tuple[str, str]]:
    """
    List what is wrong with the Schedule rows under our cluster's name, as (name of the row, fault).

    A running cluster mends its own rows within a minute; the rows of others it leaves alone.
    """
    wanted = _wanted()
    found = []
    for row in Schedule.objects.using(router.db_for_write(Schedule)).filter(cluster=CLUSTER):
        mine = wanted.pop(_identity(row), None) if row.func == FIRE else None
        if row.func != FIRE:
            found.append((row.name or str(row.pk), f"is not a cron of a job: it calls {row.func}"))
        elif mine is None:
            found.append((row.name, "stands for no cron of a registered job, or is there twice"))
        elif _is_damaged(row, *mine):
            found.append((row.name, "was changed by hand and would fire wrongly"))
    return found + [(_columns(*missing)["name"], "is missing") for missing in wanted.values()]


def _migrated(using: str) -> bool:
    return Schedule._meta.db_table in connections[using].introspection.table_names()


def next_run() -> datetime | None:
    """Return when the next cron trigger is due. A handful of rows: no index needed."""
    return _ours().aggregate(next=Min("next_run"))["next"]


def _ours() -> Any:
    return Schedule.objects.using(router.db_for_write(Schedule)).filter(cluster=CLUSTER, func=FIRE)


def _wanted() -> dict[tuple[str, str], tuple[registry.Job, CronTrigger]]:
    return {(job.id, cron.key): (job, cron) for job in registry.jobs(own=True) for cron in job.crons}


def _columns(job: registry.Job, cron: CronTrigger) -> dict[str, Any]:
    return {
        "name": f"{job.id}: {cron.key}"[:100],
        "func": FIRE,
        "kwargs": repr({"job_id": job.id, "trigger": cron.key}),
        "schedule_type": Schedule.CRON,
        "cron": cron.expr[:100],
        "cluster": CLUSTER,
        "repeats": -1,
        "intended_date_kwarg": "scheduled_for",
        "next_run": cron.next(clock.now()),
    }


def _identity(row: Schedule) -> tuple[str, str]:
    """Return which (job, trigger) a row stands for, by the arguments it would call ``fire`` with."""
    try:
        arguments = ast.literal_eval(row.kwargs)
        return str(arguments["job_id"]), str(arguments["trigger"])
    except (ValueError, SyntaxError, KeyError, TypeError):
        return "", ""


def _is_damaged(row: Schedule, job: registry.Job, cron: CronTrigger) -> bool:
    """Tell whether a row was changed by hand, or by django-q2's scheduler, into what would not fire rightly."""
    good = _columns(job, cron)
    fixed = ("name", "schedule_type", "cron", "repeats", "intended_date_kwarg")
    if any(getattr(row, column) != good[column] for column in fixed) or row.next_run is None:
        return True
    overdue = row.next_run <= clock.now()
    return not overdue and row.next_run != good["next_run"]


def _note_next_runs(using: str) -> None:
    for row in Schedule.objects.using(using).filter(cluster=CLUSTER, func=FIRE):
        Job.objects.using(router.db_for_write(Job)).filter(pk=_identity(row)[0]).update(
            next_run_at=row.next_run
        )
