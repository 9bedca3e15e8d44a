"""
Concurrency: a run takes a seat in each of its lanes, or in none and stands in line.

The line is kept moving by whoever leaves. Only as many are woken as there are free seats, and the others sleep
on, however many: a full lane is in nobody's way. The first in line looks for itself now and then, because the
one that leaves may die before it has said so.
"""

import random
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import partial
from typing import NamedTuple

from django.db import transaction
from django.db.models import Q

from . import clock, wakeup
from .models import Lane, Run, RunStatus, Seat
from .models.lane import Taken, following, later, soon
from .outage import outlast
from .policies import Place

#: When so many wait in a lane, those that come next are put there so many at a time.
CROWD, BACKLOG = 10, 200


class Full(NamedTuple):
    """No seat for this run: the lane it waits in, until when it sleeps, and why, for people."""

    place: Place
    until: datetime
    reason: str
    #: Whether many wait already, so that more of them may be about to come.
    crowded: bool


def keep(run: Run, places: Sequence[Place], using: str) -> bool:
    """
    Let a run that comes back go on in the seats it has, in one statement; return False if it must ask.

    Only where they last as long as the run. No lock: if someone has found one of them free meanwhile (the run
    had failed, and was retried by hand), one of the two statements changes nothing.
    """
    if run.admitted_at is None or run.blocked_on or not all(place.policy.scope == "run" for place in places):
        return False
    lanes = [place.digest for place in places]
    return outlast(using, lambda: Seat.objects.using(using).confirm(lanes, run)) == len(lanes)


def take(run: Run, places: Sequence[Place], using: str) -> Full | None:
    """
    Seat ``run`` in all of its lanes, which the caller has locked, or return the one that is full.

    In all or in none: a run that held one seat while it waits for another would keep others from it.
    """
    full = _take(run, places, using)
    if full and len(places) > 1:
        for place in places:
            if Seat.objects.using(using).vacate(place.digest, run):
                straighten(place, using)
    return full


def _take(run: Run, places: Sequence[Place], using: str) -> Full | None:
    found = []
    for place in places:
        taken = Seat.objects.using(using).of(place.digest)
        mine = next((seat for seat in taken if seat.run_id == run.pk), None)
        free = _free(place, taken, run)
        line = Run.objects.using(using).line(place.digest).exclude(pk=run.pk)
        if len(free) <= following(line.only("priority", "queued_at")[: len(free)], run):
            return _full(run, place, using)
        found.append((place, [mine.number, *free] if mine and mine.number in free else free, taken))
    for place, numbers, taken in found:
        if not _sit(run, place, numbers, taken, using):
            return _full(run, place, using)
    return None


def _free(place: Place, taken: Sequence[Taken], run: Run | None = None) -> list[int]:
    """Return the numbers that nobody has; those of ``run`` itself are free to it."""
    held = {seat.number for seat in taken if _is_held(place, seat) and not (run and seat.run_id == run.pk)}
    most = max(0, place.policy.limit - len(held))
    return [number for number in range(1, place.policy.limit + 1) if number not in held][:most]


def _is_held(place: Place, seat: Taken) -> bool:
    return seat.is_open if place.policy.scope == "run" else seat.is_leased


def _sit(run: Run, place: Place, numbers: Sequence[int], taken: Sequence[Taken], using: str) -> bool:
    before = {seat.number: seat for seat in taken}
    seats = Seat.objects.using(using)
    return any(seats.take(place.digest, run, number, before.get(number)) for number in numbers)


def _full(run: Run, place: Place, using: str) -> Full:
    now = clock.now()
    others = Run.objects.using(using).line(place.digest).exclude(pk=run.pk).only("priority", "queued_at")
    line = list(others[:CROWD])
    ahead = following(line[:1], run)
    if run.blocked_on != place.digest:
        run.blocked_at = None  # It begins to wait.
    until = later(run, now, random.random()) if ahead else soon(run, now)
    return Full(place, until, _why(place), len(line) == CROWD)


def _why(place: Place) -> str:
    limit = place.policy.limit
    seats = "the only place" if limit == 1 else f"one of {limit} places"
    return f"Concurrency: waits for {seats}{place.words}."


def move_up(places: Sequence[Place], using: str) -> None:
    """
    Wake as many as there are free seats, if anyone waits at all: one statement when nobody does.

    Called after the commit that made room. Whoever was just about to stand in line looks after its own commit
    whether there was room, so one of the two sees the other.
    """
    for place in places:
        if Run.objects.using(using).line(place.digest).exists():
            outlast(using, partial(_move_up, place, using))


def recheck(place: Place, using: str) -> None:
    """See after standing in line whether someone left just then."""
    if _free(place, Seat.objects.using(using).of(place.digest)):
        move_up([place], using)


def _move_up(place: Place, using: str) -> None:
    with transaction.atomic(using=using):
        Lane.objects.using(using).lock({place.digest: place.name})
        straighten(place, using)


def sort_out(place: Place, run: Run, belongs: Callable[[Run], bool], using: str) -> None:
    """
    Put the next of a backlog into a full lane's line all together, without a worker for each.

    So that ten thousand runs of one key are out of the way of the others at once. ``run`` is one of them, and
    ``belongs`` tells whether another one is. Index: ``django_jobs_run_claim``.
    """
    now = clock.now()
    with transaction.atomic(using=using):
        Lane.objects.using(using).lock({place.digest: place.name})
        if _free(place, Seat.objects.using(using).of(place.digest)):
            return
        due = Run.objects.using(using).filter(
            Q(blocked_on__isnull=True) | Q(blocked_on=place.digest),
            queue=run.queue,
            priority=run.priority,
            wake_at__lte=now,
            job_id=run.job_id,
            status=RunStatus.QUEUED,
            admitted_at__isnull=True,
        )
        backlog = due.select_related("event").order_by("wake_at")[:BACKLOG]
        some = [other.pk for other in backlog if belongs(other)]
        until = later(run, now, random.random())
        Run.objects.using(using).filter(pk__in=some).stand(place.digest, until, _why(place))
        straighten(place, using)


def straighten(place: Place, using: str) -> None:
    """Wake those of a locked lane's line for which there is room, or else let the first one be the lookout."""
    runs = Run.objects.using(using)
    free = len(_free(place, Seat.objects.using(using).of(place.digest)))
    first = list(runs.line(place.digest).only("blocked_at")[: max(1, free)])
    if first and free:
        if runs.filter(pk__in=[run.pk for run in first]).call():
            wakeup.ring(using)
    elif first:
        runs.filter(pk=first[0].pk).wake(soon(first[0], clock.now()))
