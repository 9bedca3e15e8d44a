"""
What people do to one run: cancel, retry, replay, skip its wait.

The deeds themselves; ``services`` is how to call them. Each is guarded by what the database says: where it
is impossible it raises ``InvalidVerb`` saying why and changes nothing, so that of two people at once one
does it and the other is told.
"""

import difflib
from collections.abc import Sequence
from uuid import UUID

from django.db import router, transaction

from . import clock, events, registry, signals, wakeup
from .exceptions import InvalidVerb, JobNotFound
from .models import Run, RunStatus, Step, StepStatus
from .outage import outlast
from .perform import failed_with

#: A reason is kept as far as the column goes.
REASON = 500

#: So many names are listed for one that is not there.
MOST_NAMES = 10


def find_run(run: Run | UUID | str, using: str | None = None, *, lock: bool = False) -> Run:
    """Return the run as its row is now, with ``lock`` until the transaction ends; ``InvalidVerb`` if there is none."""
    key = run.pk if isinstance(run, Run) else run
    runs = Run.objects.using(using or router.db_for_write(Run))
    try:
        return (runs.select_for_update() if lock else runs).get(pk=UUID(str(key)))
    except (Run.DoesNotExist, ValueError):
        raise InvalidVerb(f"There is no run {key}.") from None


# Cancel.


def cancel(run: Run, reason: str, *, cascade: bool) -> list[Run]:
    """Cancel an open run and, with ``cascade``, the runs it invoked; return them as they are then, itself first."""
    using = router.db_for_write(Run)
    # The runs are locked from parent to child, and by a worker that ends a child the other way round.
    ids = outlast(using, lambda: _cancel(run, reason[:REASON], cascade, using), patient=False)
    found = Run.objects.using(using).in_bulk(ids)
    ended = [found[pk] for pk in ids if pk in found]
    for one in ended:
        signals.announce(signals.run_finished, Run, using=using, run=one)
    return ended


def _cancel(run: Run, reason: str, cascade: bool, using: str) -> list[UUID]:
    runs = Run.objects.using(using)
    with transaction.atomic(using=using):
        if not runs.filter(pk=run.pk).cancel(reason):
            raise InvalidVerb(f"Run {run.pk} is {find_run(run).status}; only an open run can be cancelled.")
        ended = generation = [run.pk]
        # From the cancelled parent on, which can invoke nothing more, so that none is missed.
        while cascade and generation:
            children = runs.filter(parent__in=generation, wake_at__isnull=False)
            generation = list(children.select_for_update().values_list("pk", flat=True))
            why = f"With its parent {run.pk}{': ' if reason else ''}{reason}"[:REASON]
            runs.filter(pk__in=generation).cancel(why)
            ended = ended + generation
    return ended


# Retry.


def retry(run: Run) -> Run:
    using = router.db_for_write(Run)
    _check_registered(run)
    with transaction.atomic(using=using):
        if not Run.objects.using(using).filter(pk=run.pk).requeue():
            raise InvalidVerb(f"Run {run.pk} is {find_run(run).status}; only a failed run can be retried.")
        steps = Step.objects.using(using).filter(run=run)
        if culprit := failed_with(run.error or {}, steps.filter(status=StepStatus.FAILED)):
            steps.filter(pk=culprit.pk).reopen()
        steps.set_aside()
        wakeup.ring(using)
    return find_run(run)


def _check_registered(run: Run) -> None:
    try:
        registry.get(run.job_id)
    except JobNotFound as error:
        raise InvalidVerb(f"Run {run.pk} cannot go on. {error}") from error


# Replay.


def replay(run: Run, from_step: str | None, data: dict | None) -> Run:
    using = router.db_for_write(Run)
    with transaction.atomic(using=using):
        # Locked: of a retry at the same time, either it finds the old run replayed or this finds it open.
        old = find_run(run, using, lock=True)
        if not old.is_final:
            raise InvalidVerb(f"Run {old.pk} is {old.status}; only a run that has ended can be replayed.")
        job = registry.get(old.job_id)
        before = None if from_step is None else _step(old, from_step, using)
        new = events.start_again(job, old, data, using)
        if before:
            Step.objects.using(using).copy(old.pk, new.pk, before=before)
    return new


def _step(run: Run, name: str, using: str) -> int:
    """Return the id of the run's step ``name``, or say which steps there are, the likeliest first."""
    steps = dict(Step.objects.using(using).filter(run=run).values_list("name", "pk"))
    if name in steps:
        return steps[name]
    if not steps:
        raise InvalidVerb(f"Run {run.pk} has no steps to begin from; leave from_step out.")
    raise InvalidVerb(f'Run {run.pk} has no step "{name}". It has: {_nearest(name, list(steps))}.')


def _nearest(name: str, names: Sequence[str]) -> str:
    likeness = difflib.SequenceMatcher(b=name)

    def unlike(other: str) -> float:
        likeness.set_seq1(other)
        return -likeness.ratio()

    first = sorted(names, key=unlike)[:MOST_NAMES]
    rest = len(names) - len(first)
    return ", ".join(first) + (f" and {rest} more" if rest else "")


# Skip a wait.


def skip_wait(run: Run) -> Run:
    using = router.db_for_write(Run)
    now = clock.now()
    with transaction.atomic(using=using):
        # By the time it had when it was looked at: another person's clock may be a little ahead of ours.
        if not Run.objects.using(using).filter(pk=run.pk, wake_at=run.wake_at).hurry(now):
            raise InvalidVerb(_no_wait(find_run(run)))
        waiting = Step.objects.using(using).filter(run=run, status="waiting")
        if waiting.exists() and not waiting.hurry(now):
            raise InvalidVerb(f"Run {run.pk} waits for a run that it invoked; cancel that one instead.")
        wakeup.ring(using)
    return find_run(run)


def _no_wait(run: Run) -> str:
    if run.status in (RunStatus.QUEUED, RunStatus.SLEEPING):
        return f"Run {run.pk} is due already; it waits for a worker and nothing else."
    return f"Run {run.pk} is {run.status}; only one that sleeps or waits for its time can be hurried."
