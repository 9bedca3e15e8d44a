"""
Runs that take too long (``timeouts``) or that an event cancels (``cancel_on``), and the children that go with them.

A run listens for such events from its first pass on. What came before, since it was queued, is looked up then; so
nothing is missed, and emission writes nothing for it.
"""

from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import cast
from uuid import UUID

from django.db import transaction

from . import clock, matching, registry, signals
from .endings import CancelOn
from .models import Event, Listener, Run
from .outage import outlast
from .passes import Pass
from .wanted import Wanted

#: Runs cancelled in one statement.
BATCH = 500


def deadline(run: Run, job: registry.Job) -> datetime | None:
    """Return when ``run`` will have taken too long; a retry gives it the whole time anew."""
    if job.timeouts is None or job.timeouts.finish is None or run.started_at is None:
        return None
    return (run.retried_at or run.started_at) + job.timeouts.finish


def too_late(current: Pass) -> str | None:
    """Return the reason if the run was started too late or has taken too long."""
    started_at, timeouts = cast(datetime, current.run.started_at), current.job.timeouts
    if timeouts is None:
        return None
    if timeouts.start and started_at - _due(current) > timeouts.start:
        return f"It was not started within {timeouts.start} (timeouts.start)."
    if current.deadline and clock.now() >= current.deadline:
        return f"It did not finish within {timeouts.finish} (timeouts.finish)."
    return None


def _due(current: Pass) -> datetime:
    """Return when the run could first have been claimed: later than it was queued if it was put off then."""
    run, event = current.run, current.event
    times = [run.queued_at]
    if event:
        times.append(event.occurred_at)
    if run.scheduled_for:
        fired = (cron for cron in current.job.crons if cron.key == run.cron)
        times += [cron.start(run.job_id, run.scheduled_for) for cron in fired]
    return max(times)


def look(current: Pass) -> str | None:
    """Listen for what cancels the run, and return the reason if that has been received already."""
    run, listens = current.run, None in current.listening
    if not current.job.cancel_on or (listens and current.history and not current.is_takeover):
        return None
    wanted = list(_wanted(current))
    if wanted and not listens:
        outlast(current.using, lambda: _listen(current, wanted))
    for one, until in wanted:
        for event in one.look_back(current.using, until):
            if event.pk != run.event_id and one.fits(event, until):
                return reason(event)
    return None


def _wanted(current: Pass) -> Iterator[tuple[Wanted, datetime | None]]:
    for one in current.job.cancel_on:
        try:
            values = matching.sought(one.match, current.event.data if current.event else None)
        except LookupError as error:
            if current.run.passes == 1:
                signals.log_never_cancelled(current.run, str(one), str(error.args[0]))
            continue
        yield Wanted((one.event,), values, current.run), _until(one, current.run)


def _until(one: CancelOn, run: Run) -> datetime | None:
    return (run.started_at or clock.now()) + one.timeout if one.timeout else None


def _listen(current: Pass, wanted: Iterable[tuple[Wanted, datetime | None]]) -> None:
    listeners = [new for one, until in wanted for new in one.listeners(None, until)]
    mine = Listener.objects.using(current.using)
    with current.fence():
        # A try whose answer got lost has left its own here.
        if not mine.filter(run=current.run.pk, step=None).exists():
            mine.bulk_create(listeners)
    current.listening[None] = current.run.queued_at


def reason(event: Event) -> str:
    """Word why a run was cancelled."""
    return f'The event "{event.name}" cancels it (event {event.pk}).'


def cascade(runs: Iterable[UUID], using: str) -> None:
    """Cancel the open children of ``runs``, and theirs. Index: ``django_jobs_run_parent``."""
    children = Run.objects.using(using).filter(parent__in=list(runs), finished_at=None)
    end(children.values_list("pk", flat=True), "The run that started it was cancelled.", using)


def end(runs: Iterable[UUID], reason: str, using: str) -> None:
    """Cancel those of ``runs`` that are open, and their children, all of them or none; tell the world."""
    ids = list(runs)
    with transaction.atomic(using=using):
        for at in range(0, len(ids), BATCH):
            _end(ids[at : at + BATCH], reason, using)


def _end(ids: list[UUID], reason: str, using: str) -> None:
    runs = Run.objects.using(using).filter(pk__in=ids, finished_at=None)
    # Locked, so that these are those that are cancelled.
    ids = list(runs.order_by("pk").select_for_update().values_list("pk", flat=True))
    if not ids:
        return
    Run.objects.using(using).filter(pk__in=ids).cancel(reason)
    if signals.run_finished.has_listeners(Run):
        for run in Run.objects.using(using).filter(pk__in=ids):
            signals.announce(signals.run_finished, Run, using=using, run=run)
    cascade(ids, using)
