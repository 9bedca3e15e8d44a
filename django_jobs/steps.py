"""
``ctx.step``: the named pieces of a run, each remembered once it is done.

A step first looks for its checkpoint and returns what it says. Only without one does it work, and then
writes the checkpoint in one fenced statement before it returns: at least once, and never again after
that. ``atomic`` and ``emit`` put their database writes and the checkpoint in one transaction: exactly once.
"""

import json
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import cached_property, partial
from typing import Any
from uuid import UUID

from django.db import IntegrityError, connections, transaction

from . import clock, events, payloads, signals
from .backoff import Backoff, as_backoff
from .conf import conf
from .exceptions import Interrupt, InvalidEvent, NonRetriableError, RetryAfter, StepError, storable, words
from .models import Attempt, Event, Run, Step, StepKind, StepStatus
from .models.run import Held
from .models.sql import adapt, instant
from .outage import outlast
from .registry import Job

#: Called at each boundary of a checkpoint; the testing kit lets a worker die there.
boundary: Callable[[str], None] = lambda moment: None  # noqa: E731


class Parked(Interrupt):
    """The pass is over: the run sleeps, or waits for its next attempt, until ``until``."""

    def __init__(self, step: str, until: datetime, *, asleep: bool) -> None:
        super().__init__(step)
        self.step, self.until, self.asleep = step, until, asleep


class HandedBack(Interrupt):
    """The worker is stopping: another one goes on from here."""


class Lost(Interrupt):
    """Another worker holds the run's lease now, or the run was cancelled."""


@dataclass
class Pass:
    """What one pass of a run knows: its history, how far it came, and whether it must end."""

    run: Run
    job: Job
    using: str
    event: Event | None = None
    history: dict[str, Step] = field(default_factory=dict)
    stopping: Callable[[], bool] = bool
    #: Failed tries of the code between steps since the last checkpoint.
    attempt: int = 0
    #: The interrupt that was raised. A step called after it shows that the job swallowed it.
    interrupt: Interrupt | None = None
    swallowed: bool = False
    inside: str | None = None
    replaying: bool = False
    used: dict[str, int] = field(default_factory=dict)
    newest: str | None = None

    def __post_init__(self) -> None:
        self.attempt = self.run.attempt
        # A step that waits counts too: what comes before it was done, and logged, in an earlier pass.
        self.newest = max(self.history.values(), key=lambda step: step.pk).name if self.history else None
        self.replaying = bool(self.history)

    def end(self, interrupt: Interrupt) -> Interrupt:
        self.interrupt = interrupt
        return interrupt

    def visit(self, name: str, kind: StepKind) -> Step:
        """Return the step of this name, from the history or new; refuse what no job may do here."""
        name = self._unique(name)
        if self.interrupt:
            self.swallowed = True
            raise self.interrupt
        if self.inside:
            raise NonRetriableError(
                f'Step "{name}" is called inside step "{self.inside}". A step cannot hold another:'
                " call it from the job itself, one after the other."
            )
        step = self.history.get(name)
        if step is None or step.status == StepStatus.WAITING:
            self.replaying = False
            self._may_work(is_new=step is None)
        if name == self.newest:
            self.replaying = False
        return step or Step(
            run_id=self.run.pk, name=name, kind=kind, status=StepStatus.WAITING, started_at=clock.now()
        )

    def _may_work(self, *, is_new: bool) -> None:
        if self.stopping():
            raise self.end(HandedBack())
        if is_new and len(self.history) >= conf.MAX_STEPS:
            raise NonRetriableError(
                f"The run has {conf.MAX_STEPS} steps, the most it may have (MAX_STEPS)."
                " Start other runs from it for the rest."
            )

    def _unique(self, name: str) -> str:
        if not isinstance(name, str) or not 1 <= len(name) <= 190 or storable(name) != name:
            raise NonRetriableError(f"A step name is a string of 1 to 190 characters, not {name!r}.")
        return self._numbered(name)

    def _numbered(self, name: str) -> str:
        count = self.used[name] = self.used.get(name, 0) + 1
        return name if count == 1 else self._numbered(f"{name}#{count}")

    # Writing. All of it is fenced by the lease.

    def record(self, step: Step, text: str | None) -> None:
        """Write the checkpoint of ``step``, in whatever transaction there is; end the pass if the lease is lost."""
        boundary(f"before {step.name}")
        steps, lease = Step.objects.using(self.using), self.run.lease
        if step.pk is None:
            written = steps.checkpoint(step, lease, text)
        elif step.kind == StepKind.SLEEP:
            written = steps.resume(step, lease, text)
        else:
            with self.fence():
                written = steps.resume(step, lease, text)
        if not written:
            raise self.end(Lost())
        self.history[step.name] = step
        boundary(f"after {step.name}")

    @contextmanager
    def fence(self) -> Iterator[None]:
        """Open a transaction that holds the run's row: ours when it begins, and so until it ends."""
        with transaction.atomic(using=self.using):
            if not Run.objects.using(self.using).renew([(self.run.pk, self.run.lease)]):
                raise self.end(Lost())
            yield

    def progressed(self, step: Step) -> None:
        """Start the count of the code between steps anew, and tell the world."""
        if self.attempt:
            self.attempt = 0
            outlast(self.using, self.held.forget_attempts)
        if signals.step_finished.has_listeners(Step):
            signals.announce(signals.step_finished, Step, using=self.using, run=self.run, step=step)

    @cached_property
    def held(self) -> Held:
        return Run.objects.using(self.using).held(self.run)


class Steps:
    """The step tools of a job, ``ctx.step``."""

    def __init__(self, current: Pass, *, retries: int | None = None, backoff: Backoff | None = None) -> None:
        self._pass = current
        self._retries = current.job.retries if retries is None else retries
        self._backoff = backoff or current.job.backoff

    def using(self, *, retries: int | None = None, backoff: Any = None) -> "Steps":
        """Return the same tools with another policy: ``ctx.step.using(retries=0).run(...)``."""
        if retries is not None and (isinstance(retries, bool) or not isinstance(retries, int) or retries < 0):
            raise NonRetriableError(f"retries is a whole number from 0, not {retries!r}.")
        return Steps(
            self._pass,
            retries=self._retries if retries is None else retries,
            backoff=self._backoff if backoff is None else as_backoff(backoff),
        )

    def run(self, name: str, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """
        Return ``fn(*args, **kwargs)``, remembered.

        At least once: a worker that dies between the call and its checkpoint makes it run again.
        Never again once the checkpoint is committed. A failure is retried by policy; out of
        retries, ``StepError`` is raised here, and again on every replay.
        """
        return self._perform(name, StepKind.RUN, partial(fn, *args, **kwargs))

    def atomic(self, name: str, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """
        Do the same with ``fn``'s database writes and the checkpoint in one transaction.

        Exactly once for those writes: they commit with the checkpoint or not at all. Keep calls to
        the outside out of it; they would hold the transaction open and are not undone.
        """
        return self._perform(name, StepKind.ATOMIC, partial(fn, *args, **kwargs))

    def emit(
        self, name: str, event: str, data: dict | None = None, *, key: str | None = None, at: datetime | None = None
    ) -> UUID:
        """Emit an event exactly once: it commits with this step's checkpoint. Return the event's id."""
        return self._perform(name, StepKind.EMIT, lambda: events.emit(event, data, key=key, at=at).pk)

    def sleep(self, name: str, duration: timedelta) -> None:
        """Park the run for ``duration``; it holds no worker and no thread meanwhile."""
        if not isinstance(duration, timedelta):
            raise NonRetriableError(f'Step "{name}" sleeps for a timedelta, not {duration!r}.')
        self._sleep(name, lambda: clock.now() + duration)

    def sleep_until(self, name: str, until: datetime) -> None:
        """Park the run until an instant; one that has passed is no sleep at all."""
        if not isinstance(until, datetime) or until.tzinfo is None:
            raise NonRetriableError(f'Step "{name}" sleeps until an aware datetime, not {until!r}.')
        self._sleep(name, lambda: until)

    def _sleep(self, name: str, until: Callable[[], datetime]) -> None:
        current = self._pass
        step = current.visit(name, StepKind.SLEEP)
        if step.status == StepStatus.COMPLETED:
            return
        step.wake_at = step.wake_at or until()
        over = step.wake_at <= clock.now()
        if over:
            step.status, step.finished_at = StepStatus.COMPLETED, clock.now()
        if over or step.pk is None:
            self._write(step, "null" if over else None)
        if not over:
            raise current.end(Parked(step.name, step.wake_at, asleep=True))
        current.progressed(step)

    # One step that works.

    def _perform(self, name: str, kind: StepKind, work: Callable[[], Any]) -> Any:
        current = self._pass
        step = current.visit(name, kind)
        if step.status == StepStatus.COMPLETED:
            return step.output
        if step.status == StepStatus.FAILED:
            raise _step_error(step)
        if step.wake_at and step.wake_at > clock.now():
            raise current.end(Parked(step.name, step.wake_at, asleep=False))
        started, number = clock.now(), step.attempts + 1
        try:
            text = self._work(step, work, number)
        except (Exception, SystemExit) as error:
            self._failed(step, error, number, started)
        current.progressed(step)
        return payloads.loads(text)

    def _work(self, step: Step, work: Callable[[], Any], number: int) -> str:
        """Do the step and write its checkpoint; the two in one transaction if the step is of that kind."""
        if step.kind == StepKind.RUN:
            text = self._call(step, work)
            _done(step, number)
            self._write(step, text)
            return text
        with transaction.atomic(using=self._pass.using):
            text = self._call(step, work)
            _done(step, number)
            self._pass.record(step, text)
        boundary(f"committed {step.name}")
        return text

    def _call(self, step: Step, work: Callable[[], Any]) -> str:
        """Return what the step returned, as typed JSON."""
        current, where = self._pass, f'step "{step.name}"'
        # Under a transaction that is not ours (a test case's) a failing statement must not spoil it.
        nested = step.kind == StepKind.RUN and connections[current.using].in_atomic_block
        current.inside = step.name
        try:
            with transaction.atomic(using=current.using) if nested else nullcontext():
                value = work()
        finally:
            current.inside = None
        try:
            text = payloads.dumps(value, where=where)
            payloads.check_size(text, conf.MAX_OUTPUT_BYTES, where=where, setting="MAX_OUTPUT_BYTES")
        except (TypeError, ValueError) as error:
            # Trying again would repeat the effect and fail in the same way.
            raise Unserialisable(error) from error
        return text

    def _write(self, step: Step, text: str | None) -> None:
        self._persist(step, lambda: self._pass.record(step, text))

    def _persist(self, step: Step, write: Callable[[], None]) -> None:
        """Write about ``step``, waiting for a database that is away."""
        known = step.pk
        try:
            outlast(self._pass.using, write)
        except IntegrityError:
            # It was committed and only the answer got lost. Nobody else can have written this row
            # while the lease is ours.
            written = Step.objects.using(self._pass.using).filter(run=step.run_id, name=step.name)
            if known or not (self._pass.held.exists() and written.exists()):
                raise
            self._pass.history[step.name] = step

    # Failure.

    def _failed(self, step: Step, error: BaseException, number: int, started: datetime) -> None:
        """Record the failed attempt; park the run until the next one, or raise ``StepError`` if it was the last."""
        current, known = self._pass, step.pk
        cause = error.cause if isinstance(error, Unserialisable) else error
        hopeless = isinstance(error, _HOPELESS) or (step.kind == StepKind.EMIT and isinstance(error, TypeError))
        final = hopeless or number > self._retries
        step.attempts, step.error = number, describe(cause)
        step.status = StepStatus.FAILED if final else StepStatus.WAITING
        step.finished_at = clock.now() if final else None
        step.wake_at = None if final else next_try(cause, self._backoff, number)
        self._persist(step, lambda: self._record_failure(step, known, started))
        if final:
            current.progressed(step)
            raise _step_error(step) from cause
        wait = (step.wake_at - clock.now()).total_seconds()
        signals.log_retry(current.run, error=step.error, wait=wait, step=step.name)
        raise current.end(Parked(step.name, step.wake_at, asleep=False))

    def _record_failure(self, step: Step, known: int | None, started: datetime) -> None:
        current = self._pass
        boundary(f"before failure of {step.name}")
        with current.fence():
            if known:
                Step.objects.using(current.using).resume(step, current.run.lease, None)
            else:
                step.pk = None  # A try that was rolled back has left an id here.
                step.save(using=current.using, force_insert=True)
            attempts = Attempt.objects.using(current.using)
            attempts.create(
                run_id=current.run.pk,
                step=step,
                number=step.attempts,
                error=step.error,
                started_at=started,
                finished_at=clock.now(),
            )
        current.history[step.name] = step
        boundary(f"after failure of {step.name}")


def _done(step: Step, number: int) -> None:
    step.status, step.attempts = StepStatus.COMPLETED, number
    step.finished_at, step.wake_at, step.error = clock.now(), None, None


class Unserialisable(Exception):
    """What a step returned is not JSON."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


#: Errors that another attempt would only meet again.
_HOPELESS = (NonRetriableError, InvalidEvent, Unserialisable)


def describe(error: BaseException) -> dict[str, str]:
    """Return an error as the rows keep it: ``{"type", "message", "traceback"}``."""
    text = storable("".join(traceback.format_exception(error)))
    if isinstance(error, StepError) and error.traceback:
        text = error.traceback
    return {"type": type(error).__name__, "message": words(error), "traceback": text[-65536:]}


def _step_error(step: Step) -> StepError:
    error = step.error or {}
    return StepError(
        step.name,
        type=error.get("type", ""),
        message=error.get("message", ""),
        attempts=step.attempts,
        traceback=error.get("traceback", ""),
    )


def next_try(error: BaseException, backoff: Backoff, attempt: int) -> datetime:
    """Return when to try again: when the error says, else by the back-off."""
    if isinstance(error, RetryAfter):
        return error.delay if isinstance(error.delay, datetime) else clock.now() + error.delay
    return clock.now() + backoff.delay(attempt)




def read_history(run: Run, using: str) -> tuple[Event | None, dict[str, Step]]:
    """
    Read a run's event and checkpoints, in one statement.

    The event comes as the one row without an id. Primary key of the event; unique index (run, name)
    of the steps.
    """
    connection = connections[using]
    q = connection.ops.quote_name
    text = "CHAR" if connection.vendor == "mysql" else "TEXT"
    statement = (
        f"SELECT NULL AS id, name, {q('key')}, '', CAST(data AS {text}), NULL, 0, occurred_at, received_at, NULL"  # noqa: S608
        f" FROM {q(Event._meta.db_table)} WHERE id = %s UNION ALL"
        f" SELECT id, name, kind, status, output, CAST(error AS {text}), attempts, started_at, finished_at, wake_at"
        f" FROM {q(Step._meta.db_table)} WHERE run_id = %s"
    )
    with connection.cursor() as cursor:
        cursor.execute(statement, [adapt(connection, run.event_id), adapt(connection, run.pk)])
        rows = cursor.fetchall()
    event, history = None, {}
    for row in rows:
        if row[0] is None:
            event = _event(run, connection, row)
        else:
            history[row[1]] = _step(run, connection, row)
    return event, history


def _event(run: Run, connection: Any, row: Sequence[Any]) -> Event:
    _, name, key, _, data, _, _, occurred_at, received_at, _ = row
    times = {"occurred_at": instant(connection, occurred_at), "received_at": instant(connection, received_at)}
    event = Event(id=run.event_id, name=name, key=key, data=payloads.loads(data), **times)
    event._state.adding, event._state.db = False, connection.alias
    return event


def _step(run: Run, connection: Any, row: Sequence[Any]) -> Step:
    pk, name, kind, status, output, error, attempts, *times = row
    started_at, finished_at, wake_at = (instant(connection, time) for time in times)
    step = Step(
        id=pk,
        run_id=run.pk,
        name=name,
        kind=kind,
        status=status,
        output=None if output is None else payloads.loads(output),
        error=None if error is None else json.loads(error),
        attempts=attempts,
        started_at=started_at,
        finished_at=finished_at,
        wake_at=wake_at,
    )
    step._state.adding, step._state.db = False, connection.alias
    return step
