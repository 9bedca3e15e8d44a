"""
The steps that park a run until something comes: a time, an event, the end of another run.

None holds a worker or a thread. What a step waits for is looked at by the run itself, in a pass; a router
(``routing``) and the end of a child only wake it.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, cast
from uuid import UUID

from django.db.models.fields.json import KeyTransform

from . import clock, endings, events, passes, payloads, registry
from .exceptions import InvalidEvent, JobNotFound, JobsError
from .models import Delivery, Event, Listener, Run, RunStatus, Step, StepKind, StepStatus
from .models.listener import digest
from .outage import outlast
from .passes import Parked, Pass
from .perform import Doing, Policy, Try, complete, encode, fail, perform, persist, settled, write

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


def _park(current: Pass, step: Step) -> Parked:
    parked = Parked(step.name, cast(datetime, step.wake_at), asleep=True)
    current.end(parked)
    return parked


# Events.


@dataclass(frozen=True)
class Wanted:
    """The events that a step waits for, one of them or one of each, and what must be true of them."""

    names: Sequence[str]
    #: What their data must hold, by path.
    values: dict[str, Any]
    where: Callable[[Event], bool] | None
    since: datetime
    timeout: timedelta
    each: bool = False
    path: str = field(init=False)
    text: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", endings.paths(self.values))
        text = payloads.dumps(list(self.values.values()), where="the values to match")
        object.__setattr__(self, "text", text)

    def fits(self, event: Event, until: datetime) -> bool:
        if event.name not in self.names or not self.since <= event.received_at <= until:
            return False
        if endings.values(self.path, event.data) != self.text:
            return False
        return self.where is None or bool(self.where(event))


def wait(current: Pass, step: Step, wanted: Wanted) -> Doing:
    """
    Return the first event that is wanted and that no other wait of the run has taken, or None in the end.

    The listeners are committed before the look back. So an event is either seen by that look, or it came
    later, and a router, which sees all that come, finds the listeners. At the end of the time it looks back once more:
    an event that came in time counts even if no router has seen it yet.
    """
    yield from ()
    if step.status != StepStatus.WAITING:
        return _as_events(settled(step), current.using)
    if step.pk is None and (answer := passes.stand_in(current, step)):
        told = yield from perform(current, step, lambda: _as_told(answer(), wanted), ONCE, is_stood_in=True)
        return _as_events(told, current.using)
    if step.pk is None:
        step.wake_at = clock.now() + wanted.timeout
        persist(current, step, lambda: _listen(current, step, wanted))
    until = cast(datetime, step.wake_at)
    found = current.delivered.pop(step.pk, None)
    if found is None or until <= clock.now():
        found = outlast(current.using, lambda: list(_look_back(current, wanted, until)))
    taken = _take(current, [event for event in found if wanted.fits(event, until)], wanted)
    if taken is None and until > clock.now():
        raise _park(current, step)
    complete(step, 1)
    text = encode(_as_data(taken, wanted), f'step "{step.name}"')
    persist(current, step, lambda: _answer(current, step, text))
    current.progressed(step)
    return _as_events(payloads.loads(text), current.using)


def _listen(current: Pass, step: Step, wanted: Wanted) -> None:
    passes.boundary(f"before {step.name}")
    with current.fence():
        step.pk = None  # A try that was rolled back has left an id here.
        step.save(using=current.using, force_insert=True)
        Listener.objects.using(current.using).bulk_create(
            Listener(
                run_id=current.run.pk,
                step=step,
                event_name=name,
                path=wanted.path,
                digest=digest(name, wanted.path, wanted.text),
                since=wanted.since,
                until=step.wake_at,
            )
            for name in wanted.names
        )
    current.history[step.identity] = step
    passes.boundary(f"after {step.name}")


def _look_back(current: Pass, wanted: Wanted, until: datetime) -> Iterable[Event]:
    """Iterate over the events that may be wanted, oldest first. Index: name and received_at."""
    found = Event.objects.using(current.using).filter(
        edited_from=None, name__in=wanted.names, received_at__gte=wanted.since, received_at__lte=until
    )
    for number, (path, value) in enumerate(wanted.values.items()):
        if isinstance(value, str | int) and not isinstance(value, bool):
            # Spares the transport of those that do not fit; whether one does is decided in Python.
            found = found.annotate(**{f"value_{number}": _key(path)}).filter(**{f"value_{number}": value})
    return (
        found.exclude(pk=cast(UUID, current.run.event_id))
        .order_by("received_at", "id")
        .iterator(chunk_size=500)
    )


def _key(path: str) -> Any:
    at: Any = "data"
    for part in path.split("."):
        at = KeyTransform(part, at)
    return at


def _take(current: Pass, found: Iterable[Event], wanted: Wanted) -> list[Event] | None:
    """Choose from the events that fit, and note that they are taken: each is, once in a run."""
    with current.lock:
        free = [event for event in found if event.pk not in current.consumed]
        chosen = (
            {event.name: event for event in reversed(free)} if wanted.each else {"": free[0]} if free else {}
        )
        if not chosen or (wanted.each and len(chosen) < len(wanted.names)):
            return None
        taken = [chosen[name] for name in wanted.names] if wanted.each else list(chosen.values())
        current.consumed.update(event.pk for event in taken)
        return taken


def _answer(current: Pass, step: Step, text: str) -> None:
    """Write what the wait came to, and listen no longer."""
    passes.boundary(f"before the answer of {step.name}")
    with current.fence():
        Step.objects.using(current.using).resume(step, current.run.lease, text)
        listeners = Listener.objects.using(current.using).filter(step=step.pk)
        Delivery.objects.using(current.using).filter(listener__in=listeners)._raw_delete(current.using)
        listeners._raw_delete(current.using)
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


def consumed(steps: Iterable[Step]) -> set[UUID]:
    """Return the ids of the events that the waits among ``steps`` have taken."""
    answers: list[Any] = [step.output for step in steps if step.kind == StepKind.WAIT and step.output]
    return {row["id"] for answer in answers for row in (answer if isinstance(answer, list) else [answer])}


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
            step.wake_at = started + timeout
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
        return encode(child.output, f'step "{step.name}"')
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
