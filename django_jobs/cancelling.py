"""
Runs that take too long (``timeouts``) or that an event cancels (``cancel_on``), and the children that go with them.

A run listens for such events from its first pass on. What came before, since it was queued, is looked up then; so
nothing is missed, and emission writes nothing for it.
"""

from collections.abc import Iterable
from datetime import datetime
from typing import cast
from uuid import UUID

from . import clock, endings, registry, signals
from .endings import CancelOn
from .models import Event, Listener, Run
from .models.listener import digest
from .outage import outlast
from .passes import Pass


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
    if not current.job.cancel_on or current.history:
        return None
    listeners = list(_listeners(current))
    outlast(current.using, lambda: _listen(current, listeners))
    return outlast(current.using, lambda: _look_back(current, listeners))


def _listeners(current: Pass) -> Iterable[Listener]:
    run, data = current.run, current.event.data if current.event else None
    for one in current.job.cancel_on:
        try:
            wanted = endings.matching(one.match, data)
        except LookupError as error:
            signals.log_never_cancelled(run, str(one), str(error.args[0]))
            continue
        path = endings.paths(wanted)
        yield Listener(
            run_id=run.pk,
            event_name=one.event,
            path=path,
            digest=digest(one.event, path, endings.values(path, data or {}) or "[]"),
            since=run.queued_at,
            until=_until(one),
        )


def _until(one: CancelOn) -> datetime | None:
    return clock.now() + one.timeout if one.timeout else None


def _listen(current: Pass, listeners: list[Listener]) -> None:
    mine = Listener.objects.using(current.using)
    with current.fence():
        # A pass that died before its first checkpoint has left its own here.
        if not mine.filter(run=current.run.pk, step=None).exists():
            for one in listeners:
                one.pk = None
            mine.bulk_create(listeners)


def _look_back(current: Pass, listeners: list[Listener]) -> str | None:
    """Index: name and received_at."""
    by_name: dict[str, list[Listener]] = {}
    for one in listeners:
        by_name.setdefault(one.event_name, []).append(one)
    events = Event.objects.using(current.using).filter(
        edited_from=None, name__in=by_name, received_at__gte=current.run.queued_at
    )
    for event in events.exclude(pk=cast(UUID, current.run.event_id)).order_by("received_at", "id").iterator():
        if any(is_meant(one, event) for one in by_name[event.name]):
            return reason(event)
    return None


def is_meant(listener: Listener, event: Event) -> bool:
    text = endings.values(listener.path, event.data)
    return text is not None and digest(event.name, listener.path, text) == listener.digest


def reason(event: Event) -> str:
    """Word why a run was cancelled."""
    return f'The event "{event.name}" cancels it (event {event.pk}).'


def cascade(runs: Iterable[UUID], using: str) -> None:
    """Cancel the open children of ``runs``, and theirs. Index: ``django_jobs_run_parent``."""
    parents = list(runs)
    while parents:
        children = Run.objects.using(using).filter(parent__in=parents, finished_at=None)
        ids = list(children.values_list("pk", flat=True))
        end(ids, "The run that started it was cancelled.", using)
        parents = ids


def end(runs: Iterable[UUID], reason: str, using: str) -> None:
    """Cancel those of ``runs`` that are open, and tell the world."""
    for pk in runs:
        if Run.objects.using(using).filter(pk=pk).cancel(reason) and signals.run_finished.has_listeners(Run):
            run = Run.objects.using(using).get(pk=pk)
            signals.announce(signals.run_finished, Run, using=using, run=run)
