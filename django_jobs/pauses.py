"""
Pausing a job: none of its runs begins another pass until it is resumed.

A cluster leaves the runs of a paused job where they are, by leaving the job out of what it claims. Those
that come meanwhile wait there too or, paused that way, are skipped when their turn comes.
"""

from collections.abc import Iterable

from django.db import router, transaction
from django.db.models import QuerySet

from . import clock, registry, signals, wakeup
from .exceptions import InvalidVerb
from .models import Job, PauseMode, Run, RunStatus
from .triggers import PUNCTUAL, CronTrigger

#: Runs of one UPDATE.
BATCH = 500


def pause(job_id: str, mode: PauseMode) -> Job:
    """Pause a job, or change what becomes of its new runs from now on."""
    using = router.db_for_write(Job)
    with transaction.atomic(using=using):
        job = _locked(job_id, using)
        _skip_new(job, using)  # By the mode there was.
        if not Job.objects.using(using).filter(pk=job_id).pause(mode):
            raise InvalidVerb(f'Job "{job_id}" is paused already, and its {PauseMode(mode).label}.')
        wakeup.ring(using)
    return Job.objects.using(using).get(pk=job_id)


def resume(job_id: str) -> Job:
    """Let everything go on, except the slots of its crons that ``catch_up`` gives up."""
    using = router.db_for_write(Job)
    with transaction.atomic(using=using):
        job = _locked(job_id, using)
        if not job.paused_at:
            raise InvalidVerb(f'Job "{job_id}" is not paused.')
        _skip_new(job, using)
        for cron in _crons(job_id):
            _catch_up(job, cron, using)
        Job.objects.using(using).filter(pk=job_id).resume()
        wakeup.ring(using)
    return Job.objects.using(using).get(pk=job_id)


def skip_new(using: str) -> list[str]:
    """
    Skip the runs whose turn has come of jobs that are paused so; return the ids of all paused jobs.

    Two clusters at once each skip some, and what they leave the next time does, or ``resume``.
    """
    paused = list(Job.objects.using(using).paused())
    for job in paused:
        _skip_new(job, using)
    return [job.pk for job in paused]


def _locked(job_id: str, using: str) -> Job:
    """Return the row, ours until the transaction ends: of two people one comes second."""
    try:
        return Job.objects.using(using).select_for_update().get(pk=job_id)
    except Job.DoesNotExist:
        raise InvalidVerb(f'There is no job "{job_id}".') from None


def _skip_new(job: Job, using: str) -> None:
    if job.pause_mode == PauseMode.SKIP:
        due = _new(job, using).filter(wake_at__lte=clock.now())
        _skip(due, f'Its turn came while job "{job.pk}" was paused.', using)


def _new(job: Job, using: str) -> QuerySet[Run]:
    """Return the runs that came since the pause. Index: ``django_jobs_run_job``."""
    runs = Run.objects.using(using).filter(
        job_id=job.pk, queued_at__gte=job.paused_at, pk__gt=job.paused_after
    )
    return runs.filter(status=RunStatus.QUEUED, passes=0)


def _crons(job_id: str) -> Iterable[CronTrigger]:
    found = registry.find(job_id)
    return found.crons if found else ()


def _catch_up(job: Job, cron: CronTrigger, using: str) -> None:
    """Of the slots that a pause held up, leave those that would be started after an outage of the clusters."""
    if cron.catch_up == "all":
        return
    slots = _new(job, using).filter(cron=cron.key)
    latest = slots.order_by("-scheduled_for").first()
    if latest is None or latest.scheduled_for is None:
        return
    if cron.catch_up == "latest" or clock.now() - latest.scheduled_for <= PUNCTUAL:
        slots = slots.exclude(pk=latest.pk)
    _skip(slots, f'Its slot passed while job "{job.pk}" was paused (catch_up is "{cron.catch_up}").', using)


def _skip(runs: QuerySet[Run], reason: str, using: str) -> None:
    while _skip_some(runs, reason, using) == BATCH:
        pass


def _skip_some(runs: QuerySet[Run], reason: str, using: str) -> int:
    of_ids = Run.objects.using(using)
    with transaction.atomic(using=using):
        locked = runs.select_for_update(skip_locked=True).order_by("pk").values_list("pk", flat=True)
        ids = list(locked[:BATCH])
        if ids:
            of_ids.filter(pk__in=ids).skip(reason)
            for run in of_ids.filter(pk__in=ids):
                signals.announce(signals.run_finished, Run, using=using, run=run)
    return len(ids)
