"""
Flow control: whether a claimed run goes on, waits, or is skipped.

``executor`` asks before a pass and says when one is over; jobs without a policy never come here. A decision is
one short transaction: it locks the lanes of the run, asks the gates (once in a run's life), takes the seats, and
moves the run, fenced by its lease. A worker that dies leaves either all of it or nothing.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any
from uuid import UUID

from django.db import router, transaction

from . import clock, gates, passes, policies, registry, seats, signals, wakeup
from .exceptions import words
from .gates import Asking, Skip, Wait
from .models import Event, Lane, Run, RunStatus
from .models.run import AT_THE_GATES, Held
from .outage import outlast
from .passes import Pass
from .policies import Concurrency, Place
from .seats import Full


class _Lost(Exception):
    """The lease is not ours any more: undo the decision."""


def admit(current: Pass) -> bool:
    """
    Tell whether the pass may begin. If not, the run is parked or skipped already.

    Retries, replays and takeovers of an admitted run pass no gate a second time, but need a seat again.
    """
    run, using = current.run, current.using
    if current.event:
        run.event = current.event  # So that nobody reads it again.
    if current.history or run.attempt:
        run.admitted_at = run.admitted_at or run.started_at  # It had begun before its job had a policy.
    try:
        places = places_of(current.job, current.event, limits_only=run.admitted_at is not None)
    except Exception as error:
        reason = f"{type(error).__name__} in a key of its flow control: {words(error)}"
        return _end(current, lambda: current.held.skip(reason))
    limits = _limits(places)
    if run.admitted_at and (not limits or seats.keep(run, limits, using)):
        return _clear_reason(run, current.held, using)
    passes.boundary("before admission")
    answer, asking = _decide(current, places)
    passes.boundary("after admission")
    for pk in asking.ended:
        _tell(pk, using)
    if isinstance(answer, Skip):
        _tell(run.pk, using)
    elif isinstance(answer, Full):
        _stand_in_line(current, answer)
    return answer is None


def _stand_in_line(current: Pass, full: Full) -> None:
    run, job, using = current.run, current.job, current.using
    outlast(using, lambda: seats.recheck(full.place, using))
    # Those that have gates before them must be asked one by one.
    if full.crowded and len(job.policies) == len(job.concurrency):
        outlast(using, lambda: seats.sort_out(full.place, run, partial(_belongs, job, full.place), using))


def _belongs(job: registry.Job, place: Place, run: Run) -> bool:
    try:
        return place.digest in [other.digest for other in places_of(job, run.event)]
    except Exception:
        return False  # It is skipped when its turn comes, and says why.


def leave(current: Pass) -> None:
    """After a pass: let others have the seats that were held for its time only."""
    if any(limit.scope == "step" for limit in current.job.concurrency):
        passes.boundary("before moving up")
        limits = places_of(current.job, current.event)
        seats.move_up([limit for limit in limits if limit.policy.scope == "step"], current.using)


def bereave(runs: Iterable[UUID]) -> None:
    """
    Say for a worker that died what it may have had no time for: that those of its runs have left that it settled.
    """
    using = router.db_for_write(Run)
    for run in Run.objects.using(using).filter(pk__in=runs).select_related("event"):
        if run.status != RunStatus.RUNNING:
            _finished(Run, run=run)


def unblock() -> None:
    """Let the runs go on that wait for a place though their job has no flow control any more."""
    free = [job.id for job in registry.known() if not job.policies]
    using = router.db_for_write(Run)
    if Run.objects.using(using).unblock(free):
        wakeup.ring(using)


def batched(current: Pass) -> list[Event]:
    """List the events of a batch, in the order they occurred; the same in every pass."""
    run, using = current.run, current.using
    first = [current.event] if current.event else []
    # A replay has the events of what it replays.
    joined = Event.objects.using(using).filter(runs__yielded_to__in=[run.pk, run.replay_of_id or run.pk])
    events = {event.pk: event for event in [*first, *outlast(using, lambda: list(joined))]}
    return sorted(events.values(), key=lambda event: (event.occurred_at, event.pk))


def places_of(job: registry.Job, event: Event | None, *, limits_only: bool = True) -> list[Place]:
    """
    Return where the policies of ``job`` put a run of ``event``. A key function may raise anything.

    Only its limits, where the gates are behind it: their keys need not hold for ever.
    """
    wanted = [given for given in job.policies if given[0] == "concurrency" or not limits_only]
    places = (policies.place(job.id, *given, event) for given in wanted)
    return [place for place in places if place]


def _limits(places: Sequence[Place]) -> list[Place]:
    return [place for place in places if isinstance(place.policy, Concurrency)]


def _decide(current: Pass, places: Sequence[Place]) -> tuple[Any, Asking]:
    tried = False

    def decide() -> tuple[Any, Asking]:
        nonlocal tried
        if tried:  # The answer to a COMMIT may have got lost: what is done is done.
            current.run.refresh_from_db(using=current.using, fields=AT_THE_GATES)
        tried = True
        asking = Asking(current.run, current.event, current.using)
        with transaction.atomic(using=current.using):
            return _decide_in_transaction(current, places, asking), asking

    try:
        return outlast(current.using, decide)
    except _Lost as lost:
        signals.log_lease_lost(current.run)
        return lost, Asking(current.run, current.event, current.using)


def _decide_in_transaction(current: Pass, places: Sequence[Place], asking: Asking) -> Any:
    run, using, held = current.run, current.using, current.held
    waited_on = run.blocked_on
    Lane.objects.using(using).lock({place.digest: place.name for place in places})
    answer = _ask(asking, places) or seats.take(run, _limits(places), using)
    admitted_at = run.admitted_at or asking.now
    if isinstance(answer, Skip):
        moved = held.skip(answer.reason, answer.to)
    elif isinstance(answer, Wait):
        # With no lane to wait in, the run has been given its start: it is let in, but not yet.
        since = None if answer.on else admitted_at
        moved = held.park(answer.until, on=answer.on, admitted_at=since, reason=answer.reason)
    elif isinstance(answer, Full):
        on = answer.place.digest
        moved = held.park(answer.until, on=on, admitted_at=admitted_at, reason=answer.reason)
    else:
        moved = held.admit(asking.now)
    if not moved:
        raise _Lost
    _leave_line(places, waited_on, answer, using)
    return answer


def _leave_line(places: Sequence[Place], waited_on: str | None, answer: Any, using: str) -> None:
    """See to those behind a run that has waited in a line and does not any more."""
    if waited_on is None or (isinstance(answer, Full) and waited_on == answer.place.digest):
        return
    places = [place for place in places if place.digest == waited_on]
    if not places:  # The job has other keys now than when it began to wait: so have those behind it.
        Run.objects.using(using).line(waited_on).call()
    for place in _limits(places):
        seats.straighten(place, using)


def _ask(asking: Asking, places: Sequence[Place]) -> Skip | Wait | None:
    """Ask the gates that are still before the run; keep what they noted, unless one of them drops it."""
    run, using = asking.run, asking.using
    if run.admitted_at or run.replay_of_id:
        return None
    digests = [place.digest for place in places if type(place.policy) in gates.GATES]
    lanes = Lane.objects.using(using).in_bulk(digests)
    noted: list[Lane] = []
    answer: Skip | Wait | None = None
    for place in places:
        gate = gates.GATES.get(type(place.policy))
        if gate is None or (run.blocked_on and isinstance(place.policy, gates.EARLIER)):
            continue
        lane = lanes[place.digest]
        answer = gate(asking, lane, place)
        noted = [lane] if isinstance(answer, Skip) else [*noted, lane]
        if answer:
            break
    for lane in noted:
        lane.note()
    return answer


def _clear_reason(run: Run, held: Held, using: str) -> bool:
    """Forget why the run had to wait; it does not any more."""
    if run.reason:
        outlast(using, lambda: held.admit(clock.now()))
    return True


def _end(current: Pass, move: Any) -> bool:
    if outlast(current.using, move):
        _tell(current.run.pk, current.using)
    else:
        signals.log_lease_lost(current.run)
    return False


def _tell(pk: Any, using: str) -> None:
    if run := Run.objects.using(using).filter(pk=pk).first():
        signals.announce(signals.run_finished, Run, using=using, run=run)


def _finished(sender: Any, *, run: Run, **news: Any) -> None:
    """
    Let the next one have the seats of a run that has ended, however it ended.

    A receiver, so that whoever ends runs (a worker, a person, a rule) need not know about seats.
    """
    job = registry.find(run.job_id)
    if job is None or not job.concurrency:
        return
    passes.boundary("before moving up")
    try:
        places = places_of(job, run.event)
    except Exception:
        return  # Then it had no seat either.
    seats.move_up(places, run._state.db or router.db_for_write(Run))


signals.run_finished.connect(_finished, sender=Run, dispatch_uid="django_jobs.admission")
