"""
``ctx.step``: the named pieces of a run, each remembered once it is done.

A step first looks for its checkpoint and returns what it says. Only without one does it work, and then
writes the checkpoint in one fenced statement before it returns: at least once, and never again after
that. ``atomic`` and ``emit`` put their database writes and the checkpoint in one transaction: exactly once.
"""

from collections.abc import Callable
from contextlib import nullcontext
from datetime import datetime, timedelta
from functools import partial
from typing import Any, cast
from uuid import UUID

from django.db import IntegrityError, InterfaceError, OperationalError, connections, transaction

from . import clock, events, passes, payloads, signals
from .backoff import AnyBackoff, Backoff, as_backoff
from .conf import conf
from .exceptions import Interrupt, InvalidEvent, NonRetriableError, RetryAfter, StepError
from .history import describe
from .models import Attempt, Step, StepKind, StepStatus
from .outage import outlast
from .passes import Parked, Pass


class Steps:
    """The step tools of a job, ``ctx.step``."""

    def __init__(
        self, current: Pass, *, retries: int | None = None, backoff: AnyBackoff | None = None
    ) -> None:
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
        self,
        name: str,
        event: str,
        data: dict | None = None,
        *,
        key: str | None = None,
        at: datetime | None = None,
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
        except (Interrupt, KeyboardInterrupt):
            raise
        except (
            BaseException
        ) as error:  # SystemExit and CancelledError are failures of the step like any other.
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
        text = ""  # What ``_call`` returns is never empty: even None is "null".
        try:
            with transaction.atomic(using=self._pass.using):
                text = self._call(step, work)
                _done(step, number)
                self._pass.record(step, text)
        except (OperationalError, InterfaceError):
            # A connection that broke may have lost no more than the answer to the COMMIT.
            if not text or not outlast(self._pass.using, lambda: self._is_recorded(step)):
                raise
        passes.boundary(f"committed {step.name}")
        return text

    def _is_recorded(self, step: Step) -> bool:
        steps = Step.objects.using(self._pass.using)
        return steps.filter(run=step.run_id, name=step.name, status=StepStatus.COMPLETED).exists()

    def _call(self, step: Step, work: Callable[[], Any]) -> str:
        """Return what the step returned, as typed JSON."""
        current, where = self._pass, f'step "{step.name}"'
        # Under a transaction that is not ours (a test case's) a failing statement must not spoil it.
        nested = step.kind == StepKind.RUN and connections[current.using].in_atomic_block
        current.inside = step.name
        try:
            with (
                current.log.listening(step.name),
                transaction.atomic(using=current.using) if nested else nullcontext(),
            ):
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
        hopeless = isinstance(error, _HOPELESS) or (
            step.kind == StepKind.EMIT and isinstance(error, TypeError)
        )
        final = hopeless or number > self._retries
        step.attempts, step.error = number, describe(cause)
        step.status = StepStatus.FAILED if final else StepStatus.WAITING
        step.finished_at = clock.now() if final else None
        step.wake_at = None if final else next_try(cause, self._backoff, number)
        self._persist(step, lambda: self._record_failure(step, known, started))
        if final:
            current.progressed(step)
            raise _step_error(step) from cause
        again_at = cast(datetime, step.wake_at)
        wait = (again_at - clock.now()).total_seconds()
        signals.log_retry(current.run, error=step.error, wait=wait, step=step.name)
        raise current.end(Parked(step.name, again_at, asleep=False))

    def _record_failure(self, step: Step, known: int | None, started: datetime) -> None:
        current = self._pass
        passes.boundary(f"before failure of {step.name}")
        with current.fence():
            steps = Step.objects.using(current.using)
            if known and not steps.filter(attempts=step.attempts - 1).resume(step, current.run.lease, None):
                return  # Recorded before; only the answer got lost.
            if not known:
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
        passes.boundary(f"after failure of {step.name}")


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


def _step_error(step: Step) -> StepError:
    error = step.error or {}
    return StepError(
        step.name,
        type=error.get("type", ""),
        message=error.get("message", ""),
        attempts=step.attempts,
        traceback=error.get("traceback", ""),
    )


def next_try(error: BaseException, backoff: AnyBackoff, attempt: int) -> datetime:
    """Return when to try again: when the error says, else by the back-off."""
    try:
        delay = error.delay if isinstance(error, RetryAfter) else backoff.delay(attempt)
        return delay if isinstance(delay, datetime) else clock.now() + delay
    except Exception as broken:
        # A back-off function with a bug, a span beyond the calendar: that must not cost the run the
        # attempt's record.
        signals.log_backoff_broken(broken)
        return clock.now() + Backoff().delay(attempt)
