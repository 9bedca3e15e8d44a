"""
The gates a run passes once, before its first step: each says go, wait or skip.

All of them are asked inside one short transaction that holds the lanes concerned, so that what one gate has
noted is kept only if the run is not dropped by a later one. A gate changes its lane in memory; ``admission``
saves it. What happens to other runs (a debounced one, a cancelled one) is written here.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import NamedTuple
from uuid import UUID

from . import clock, wakeup
from .models import OPEN, Event, Lane, Run
from .policies import Batch, Debounce, Idempotency, Meter, Place, RateLimit, Singleton, Throttle, span


class Skip(NamedTuple):
    """Drop the run, in favour of another one perhaps."""

    reason: str
    to: UUID | None = None


class Wait(NamedTuple):
    """Let the run wait until then: in the lane ``on``, or for its start if there is none."""

    until: datetime
    on: str | None
    reason: str


Answer = Skip | Wait | None


@dataclass
class Asking:
    """A run at the gates, and what they did to others on its way."""

    run: Run
    event: Event | None
    using: str
    now: datetime = field(default_factory=clock.now)
    #: Other runs that came to their end here, to be told about after the commit.
    ended: list[UUID] = field(default_factory=list)

    @property
    def came_at(self) -> datetime:
        """When it came in; an event of the future comes when it occurs."""
        return arrival(self.run, self.event)

    @property
    def order(self) -> tuple[datetime, UUID]:
        return self.came_at, self.run.pk

    def others(self, pk: UUID | None) -> Run | None:
        """Return the open run of this id, if it is another one."""
        if pk is None or pk == self.run.pk:
            return None
        runs = Run.objects.using(self.using).select_related("event")
        return runs.filter(pk=pk, status__in=OPEN).first()

    def collected(self, lane: Lane) -> Run | None:
        """Return the run that is being held back in ``lane``, if it is another one."""
        run = self.others(lane.run_id)
        return run if run and run.admitted_at is None and run.blocked_on == lane.digest else None


def arrival(run: Run, event: Event | None) -> datetime:
    return max(run.queued_at, event.occurred_at) if event else run.queued_at


def idempotency(asking: Asking, lane: Lane, place: Place) -> Answer:
    came_at = asking.came_at
    period, first = place.policy.period, lane.run_id
    if first and first != asking.run.pk and lane.since and abs(came_at - lane.since) < period:
        return Skip(f"Idempotency: run {first} came first{place.words} (within {span(period)}).", first)
    lane.run_id, lane.since, lane.until = asking.run.pk, came_at, came_at + period
    return None


def rate_limit(asking: Asking, lane: Lane, place: Place) -> Answer:
    policy = place.policy
    start, meter = policy.pace.next(Meter(lane.tat, lane.rest), asking.came_at)
    if start > asking.came_at:
        return Skip(f"Rate limit: more than {policy.limit} in {span(policy.period)}{place.words}.")
    lane.tat, lane.rest = meter
    return None


def throttle(asking: Asking, lane: Lane, place: Place) -> Answer:
    policy = place.policy
    start, (lane.tat, lane.rest) = policy.pace.next(Meter(lane.tat, lane.rest), asking.now)
    if start <= asking.now:
        return None
    return Wait(start, None, f"Throttle: {policy.limit} in {span(policy.period)}{place.words}.")


def debounce(asking: Asking, lane: Lane, place: Place) -> Answer:
    """
    Hold back the latest run of the key; ``lane.run_id`` names it, ``since`` is when the first of them came.

    The period goes by the clock and not by when events came in: after an outage a backlog of a key is one run.
    """
    policy, now, run = place.policy, asking.now, asking.run
    if lane.run_id == run.pk:
        return _go_or_wait(lane, now, f"Debounce: waits for {span(policy.period)} of quiet{place.words}.")
    held = asking.collected(lane)
    since = lane.since if held and lane.since else now
    until = now + policy.period
    if policy.max_wait is not None:
        until = min(until, since + policy.max_wait)
    lane.since, lane.until = since, until
    if held and _occurred(held, held.event) > _occurred(run, asking.event):
        Run.objects.using(asking.using).filter(pk=held.pk).postpone(until)
        return Skip(f"Debounce: run {held.pk} is of a later event{place.words}.", held.pk)
    if held:
        reason = f"Debounce: run {run.pk} came later{place.words}."
        if Run.objects.using(asking.using).filter(pk=held.pk).skip(reason, run.pk):
            asking.ended.append(held.pk)
    lane.run_id = run.pk
    return _go_or_wait(lane, now, f"Debounce: waits for {span(policy.period)} of quiet{place.words}.")


def _occurred(run: Run, event: Event | None) -> tuple[datetime, UUID]:
    return (event.occurred_at if event else run.queued_at), run.pk


def _go_or_wait(lane: Lane, now: datetime, reason: str) -> Answer:
    """Let the collected run go when its time has come: from then on it collects nothing more."""
    if lane.until and now < lane.until:
        return Wait(lane.until, lane.digest, reason)
    lane.run_id = None
    return None


def batch(asking: Asking, lane: Lane, place: Place) -> Answer:
    """
    Collect the events of the key in the first run of them; ``lane.run_id`` names it until it is full.

    The events of the others are found by whom they yielded to, so nothing about a batch is written twice.
    """
    policy, run = place.policy, asking.run
    why = f"Batch: collects up to {policy.size} events{place.words}."
    if lane.run_id == run.pk:
        return _go_or_wait(lane, asking.now, why)
    if run.blocked_on == lane.digest:
        return None  # It was full, and the next one has begun.
    first = asking.collected(lane)
    if first is None:
        lane.run_id, lane.until = run.pk, asking.now + policy.timeout
        return Wait(lane.until, lane.digest, why)
    runs = Run.objects.using(asking.using)
    if runs.filter(yielded_to=first.pk).count() + 2 >= policy.size:
        lane.run_id = None
        if runs.filter(pk=first.pk).call():
            wakeup.ring(asking.using)
    return Skip(f"Batch: its event is in run {first.pk}{place.words}.", first.pk)


def singleton(asking: Asking, lane: Lane, place: Place) -> Answer:
    """Let one in: ``lane.run_id`` names it, ``lane.since`` is when it came."""
    run, mode = asking.run, place.policy.mode
    at_work = asking.others(lane.run_id)
    if mode == "skip" and at_work:
        return Skip(f"Singleton: run {at_work.pk} is at work{place.words}.", at_work.pk)
    if mode == "cancel" and lane.run_id and lane.since and (lane.since, lane.run_id) > asking.order:
        return Skip(f"Singleton: run {lane.run_id} came later{place.words}.", lane.run_id)
    if mode == "cancel" and at_work:
        reason = f"Singleton: run {run.pk} came later{place.words}."
        if Run.objects.using(asking.using).filter(pk=at_work.pk).cancel(reason[:500]):
            asking.ended.append(at_work.pk)
    lane.run_id, lane.since = run.pk, asking.came_at
    return None


GATES: dict[type, Callable[[Asking, Lane, Place], Answer]] = {
    Idempotency: idempotency,
    RateLimit: rate_limit,
    Debounce: debounce,
    Batch: batch,
    Singleton: singleton,
    Throttle: throttle,
}

#: Those behind which a run waits in a lane before it is admitted; what comes before them is not asked again.
COLLECTING = (Debounce, Batch)
EARLIER = (Idempotency, RateLimit)
