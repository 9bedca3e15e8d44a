"""
The steps that park a run until something comes: a time, an event, the end of another run.

None holds a worker or a thread. What a step waits for is looked at by the run itself, in a pass; a router
(``routing``) and the end of a child only wake it.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any, cast
from uuid import UUID

from . import clock, events, passes, payloads, registry
from .exceptions import InvalidEvent, JobNotFound, JobsError, NonRetriableError
from .models import Delivery, Event, Listener, Run, RunStatus, Step, StepKind, StepStatus
from .outage import outlast
from .passes import Parked, Pass
from .perform import Doing, Policy, Try, complete, encode, fail, perform, persist, settled, write
from .wanted import Wanted

#: No retries: what another run came to, it came to.
ONCE = Policy(retries=0, backoff=cast(Any, None))

#: How long a step waits that was not told for how long.
LONGEST = timedelta(days=365)


def sleep(current: Pass, step: Step, until: Callable[[], datetime]) -> Doing:
    """Park the run until a time; one that has passed is no sleep at all."""
    yield from ()
    if step.status == StepStatus.COMPLETED:
        return
    step.wake_at = step.wake_at or until()
    over = step.wake_at <= clock.now()
    if over:
        step.status, step.finished_at = StepStatus.COMPLETED, clock.now()
    if over or step.pk is None:
        write(current, step, "null" if over else None)
    if not over:
        raise _park(current, step)
    current.progressed(step)


def _end_of(step: Step, timeout: timedelta) -> datetime:
    try:
        return clock.now() + timeout
    except OverflowError:
        raise NonRetriableError(f'Step "{step.name}": no calendar goes on for {timeout}.') from None


def _park(current: Pass, step: Step) -> Parked:
    parked = Parked(step.name, cast(datetime, step.wake_at), asleep=True)
    current.end(parked)
    return parked


# Events.

#: An event that was routed before a wait listened was received at most so long after the wait began.
A_WHILE = timedelta(seconds=10)


def wait(current: Pass, step: Step, wanted: Wanted, timeout: timedelta) -> Doing:
    """
    Return the first event that is wanted and that no other wait of the run has taken, or None in the end.

    At the end of the time it looks back once more: an event that came in time counts even if no router has
    seen it yet.
    """
    yield from ()
    if step.status != StepStatus.WAITING:
        return _as_events(settled(step), current.using)
    if step.pk is None and (answer := passes.stand_in(current, step)):
        told = yield from perform(current, step, lambda: _as_told(answer(), wanted), ONCE, is_stood_in=True)
        return _as_events(told, current.using)
    is_new = step.pk is None or step.pk not in current.listening
    if is_new:
        step.wake_at = step.wake_at or _end_of(step, timeout)
        persist(current, step, lambda: _listen(current, step, wanted))
        current.listening[step.pk] = wanted.start
    if wanted.since:  # Reckoned once, as a sleep's end is.
        wanted = replace(wanted, since=current.listening[step.pk])
    until = cast(datetime, step.wake_at)
    taken = _take(current, wanted, until, lambda: _come(current, step, wanted, is_new=is_new))
    if taken is None and until > clock.now():
        _pass_over(current, step, wanted)
        raise _park(current, step)
    complete(step, 1)
    text = encode(_as_data(taken, wanted), f'step "{step.name}"')
    persist(current, step, lambda: _answer(current, step, text))
    current.progressed(step)
    return _as_events(payloads.loads(text), current.using)


def _listen(current: Pass, step: Step, wanted: Wanted) -> None:
    passes.boundary(f"before {step.name}")
    with current.fence():
        if step.identity not in current.history:
            step.pk = None  # A try that was rolled back has left an id here.
            step.started_at = clock.now()
            step.save(using=current.using, force_insert=True)
        listeners = wanted.listeners(step, step.wake_at)
        Listener.objects.using(current.using).bulk_create(listeners, ignore_conflicts=True)
    current.history[step.identity] = step
    passes.boundary(f"after {step.name}")


def _come(current: Pass, step: Step, wanted: Wanted, *, is_new: bool) -> Iterator[Event]:
    """
    Iterate over the events that have come for ``step``.

    Those delivered are all there are, but for what was routed before the wait listened. A first pass has looked for
    that; but it may have come to nothing, or to one of several events that are wanted together, which is not kept.
    """
    until, delivered = cast(datetime, step.wake_at), current.delivered.get(step.pk, [])
    everything = is_new or current.is_takeover or until <= clock.now()
    known = until if everything else min(until, step.started_at + A_WHILE)
    if not wanted.each:
        yield from delivered
    yield from wanted.look_back(current.using, known)
    if wanted.each:
        yield from delivered


def _take(
    current: Pass, wanted: Wanted, until: datetime, come: Callable[[], Iterator[Event]]
) -> list[Event] | None:
    """Choose from the events that come, and note that they are taken: each is, once in a run."""
    while True:
        chosen: dict[str, Event] = {}
        for event in come():
            place = event.name if wanted.each else ""
            if place in chosen or event.pk in current.consumed or not wanted.fits(event, until):
                continue
            chosen[place] = event
            if len(chosen) == len(wanted.names) or not wanted.each:
                break
        else:
            return None
        ids = {event.pk for event in chosen.values()}
        with current.lock:  # Another branch may just have taken one.
            if not ids & current.consumed:
                current.consumed |= ids
                return [chosen[name] for name in wanted.names] if wanted.each else [*chosen.values()]


def _pass_over(current: Pass, step: Step, wanted: Wanted) -> None:
    """Put away what has been delivered in vain, or each pass would look at all of it again."""
    vain = current.delivered.get(step.pk, [])
    if wanted.each:  # The others have still to come.
        until = cast(datetime, step.wake_at)
        vain = [event for event in vain if event.pk in current.consumed or not wanted.fits(event, until)]
    if vain:
        outlast(current.using, lambda: _put_away(current, step, vain))


def _put_away(current: Pass, step: Step, events: list[Event]) -> None:
    with current.fence():
        deliveries = Delivery.objects.using(current.using).filter(step=step.pk, event__in=events)
        deliveries._raw_delete(current.using)


def _answer(current: Pass, step: Step, text: str) -> None:
    """Write what the wait came to, and listen no longer."""
    passes.boundary(f"before the answer of {step.name}")
    with current.fence():
        Step.objects.using(current.using).resume(step, current.run.lease, text)
        Listener.objects.using(current.using).filter(step=step.pk)._raw_delete(current.using)
        Delivery.objects.using(current.using).filter(step=step.pk)._raw_delete(current.using)
    current.listening.pop(step.pk, None)
    passes.boundary(f"after the answer of {step.name}")


FIELDS = ("id", "name", "key", "data", "occurred_at", "received_at")


def _as_data(taken: list[Event] | None, wanted: Wanted) -> Any:
    if taken is None:
        return None
    rows = [{name: getattr(event, name) for name in FIELDS} for event in taken]
    return rows if wanted.each else rows[0]


def _as_told(answer: Any, wanted: Wanted) -> Any:
    """Return what a test has a wait come to: None, the data of the event, or of each event."""
    if answer is None:
        return None
    now, data = clock.now(), answer if wanted.each else [answer]
    events = [
        Event(name=name, data=one, occurred_at=now, received_at=now)
        for name, one in zip(wanted.names, data, strict=wanted.each)
    ]
    return _as_data(events, wanted)


def _as_events(data: Any, using: str) -> Any:
    if isinstance(data, list):
        return [_as_events(one, using) for one in data]
    if data is None:
        return None
    event = Event(**data, unrouted=None)
    event._state.adding, event._state.db = False, using
    return event


def consumed(run: Run, steps: Iterable[Step]) -> set[UUID]:
    """Return the ids of the events that the waits among ``steps`` have taken, and that of the run's own."""
    answers: list[Any] = [step.output for step in steps if step.kind == StepKind.WAIT and step.output]
    taken = {row["id"] for answer in answers for row in (answer if isinstance(answer, list) else [answer])}
    return taken | {run.event_id} if run.event_id else taken


# Other runs.


class ChildEnded(JobsError):
    """The run that a step invoked did not complete."""

    def __init__(self, kind: str, message: str, traceback: str = "") -> None:
        self.report = {"type": kind, "message": message, "traceback": traceback}
        super().__init__(message)


def invoke(
    current: Pass, step: Step, job: registry.Job | str, data: dict | None, timeout: timedelta
) -> Doing:
    """Return the output of another job's run, started with this step's row in one transaction."""
    yield from ()
    if step.status != StepStatus.WAITING:
        return settled(step)
    if step.pk is None and (answer := passes.stand_in(current, step)):
        return (yield from perform(current, step, answer, ONCE, is_stood_in=True))
    started = clock.now()
    try:
        if step.pk is None:
            step.wake_at = _end_of(step, timeout)
            persist(current, step, lambda: _start_child(current, step, job, data))
            raise _park(current, step)
        text = _output(current, step)
    except (ChildEnded, JobNotFound, InvalidEvent, TypeError, ValueError) as error:
        fail(Try(current, step, ONCE, 1, started), error, report=getattr(error, "report", None))
        raise
    if text is None:
        raise _park(current, step)
    complete(step, 1)
    write(current, step, text)
    current.progressed(step)
    return payloads.loads(text)


def _start_child(current: Pass, step: Step, job: registry.Job | str, data: dict | None) -> None:
    passes.boundary(f"before {step.name}")
    with current.fence():
        child = events.start(registry.get(job) if isinstance(job, str) else job, data, parent=current.run)
        step.pk, step.child_id = None, child.pk
        step.save(using=current.using, force_insert=True)
    current.history[step.identity] = step
    passes.boundary(f"after {step.name}")


def _output(current: Pass, step: Step) -> str | None:
    """Return the child's output as typed JSON, or None while it is open; raise ``ChildEnded`` if there will be none."""
    child = outlast(
        current.using, Run.objects.using(current.using).filter(pk=cast(UUID, step.child_id)).first
    )
    if child is None:
        raise ChildEnded("Pruned", f"Run {step.child_id} is no more; what it came to is not known.")
    if child.status == RunStatus.COMPLETED:
        return payloads.dumps(child.output, where=f'step "{step.name}"')
    who = f'Run {child.pk} of "{child.job_id}"'
    if child.status == RunStatus.FAILED:
        error = child.error or {}
        raise ChildEnded(
            error.get("type", ""), f"{who} failed: {error.get('message')}", error.get("traceback", "")
        )
    if child.is_final:
        reason = f": {child.reason}" if child.reason else "."
        raise ChildEnded(child.status.capitalize(), f"{who} was {child.status}{reason}")
    if cast(datetime, step.wake_at) <= clock.now():
        raise ChildEnded("TimeoutError", f"{who} has not ended in time; it goes on.")
    return None
