"""
One step that works: find its checkpoint, or do it and write one; record how it failed.

A step is a generator. What it yields is the work, a call of the job's own; what it is sent is how that
went. So the same lines serve a job that is a plain function and one that awaits (see ``steps``).
"""

from collections.abc import Callable, Generator
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import datetime
from typing import Any, cast

from django.db import IntegrityError, InterfaceError, OperationalError, connections, transaction

from . import clock, passes, payloads, signals
from .backoff import AnyBackoff, Backoff
from .conf import conf
from .exceptions import Interrupt, InvalidEvent, JobNotFound, NonRetriableError, RetryAfter, StepError
from .history import describe
from .models import Attempt, Step, StepKind, StepStatus
from .outage import outlast
from .passes import Parked, Pass


@dataclass(frozen=True)
class Work:
    """What a step calls of the job's own code, inside of the step, and for how many seconds at most."""

    call: Callable[[], Any]
    step: str
    timeout: float | None = None


@dataclass(frozen=True)
class Outcome:
    """How a work went."""

    value: Any = None
    error: BaseException | None = None


@dataclass(frozen=True)
class Policy:
    """How often a step is tried, when again, and how long one try may take."""

    retries: int
    backoff: AnyBackoff
    timeout: float | None = None


Doing = Generator[Work, Outcome, Any]


class Failed(Exception):
    """The job's own code raised ``error`` in a step."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(error)
        self.error = error


class Unserialisable(Exception):
    """What a step returned is not JSON."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


#: Errors that another attempt would only meet again.
HOPELESS = (NonRetriableError, InvalidEvent, JobNotFound, Unserialisable)


def perform(current: Pass, step: Step, call: Callable[[], Any], policy: Policy) -> Doing:
    """Return what ``step`` came to, now or before; park the run until its next try."""
    if step.status != StepStatus.WAITING:
        return settled(step)
    if step.wake_at and step.wake_at > clock.now():
        raise current.end(Parked(step.name, step.wake_at, asleep=False))
    started, number = clock.now(), step.attempts + 1
    try:
        text = yield from _work(current, step, Work(call, step.name, policy.timeout), number)
    except Failed as failed:
        fail(current, step, failed.error, policy, number, started)
    except (Interrupt, KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:
        fail(current, step, error, policy, number, started)
    current.progressed(step)
    return payloads.loads(text)


def settled(step: Step) -> Any:
    """Return what a step completed with before, or raise what it failed with."""
    if step.status == StepStatus.COMPLETED:
        return step.output
    raise step_error(step)


def _work(current: Pass, step: Step, work: Work, number: int) -> Generator[Work, Outcome, str]:
    """Do the step and write its checkpoint; the two in one transaction if the step is of that kind."""
    if step.kind == StepKind.RUN:
        text = yield from _call(current, step, work)
        complete(step, number)
        write(current, step, text)
        return text
    text = ""  # What ``_call`` returns is never empty: even None is "null".
    try:
        with transaction.atomic(using=current.using):
            text = yield from _call(current, step, work)
            complete(step, number)
            current.record(step, text)
    except (OperationalError, InterfaceError):
        # A connection that broke may have lost no more than the answer to the COMMIT.
        if not text or not outlast(current.using, lambda: _is_recorded(current, step)):
            raise
    passes.boundary(f"committed {step.name}")
    return text


def _is_recorded(current: Pass, step: Step) -> bool:
    steps = Step.objects.using(current.using)
    return steps.filter(run=step.run_id, name=step.name, status=StepStatus.COMPLETED).exists()


def _call(current: Pass, step: Step, work: Work) -> Generator[Work, Outcome, str]:
    """Return what the step returned, as typed JSON."""
    # Under a transaction that is not ours (a test case's) a failing statement must not spoil it.
    nested = step.kind == StepKind.RUN and connections[current.using].in_atomic_block
    with transaction.atomic(using=current.using) if nested else nullcontext():
        outcome = yield work
        if isinstance(outcome.error, Interrupt | KeyboardInterrupt):
            raise outcome.error
        if outcome.error:
            raise Failed(outcome.error)
    return encode(outcome.value, f'step "{step.name}"')


def encode(value: Any, where: str) -> str:
    """Return ``value`` as typed JSON; raise ``Unserialisable`` when it has none, or too much of it."""
    try:
        text = payloads.dumps(value, where=where)
        payloads.check_size(text, conf.MAX_OUTPUT_BYTES, where=where, setting="MAX_OUTPUT_BYTES")
    except (TypeError, ValueError) as error:
        # Trying again would repeat the effect and fail in the same way.
        raise Unserialisable(error) from error
    return text


def complete(step: Step, attempts: int) -> None:
    step.status, step.attempts = StepStatus.COMPLETED, attempts
    step.finished_at, step.wake_at, step.error = clock.now(), None, None


def write(current: Pass, step: Step, text: str | None) -> None:
    persist(current, step, lambda: current.record(step, text))


def persist(current: Pass, step: Step, write: Callable[[], None]) -> None:
    """Write about ``step``, waiting for a database that is away."""
    known = step.pk
    try:
        outlast(current.using, write)
    except IntegrityError:
        # It was committed and only the answer got lost. Nobody else can have written this row
        # while the lease is ours.
        written = Step.objects.using(current.using).filter(run=step.run_id, name=step.name)
        if known or not (current.held.exists() and written.exists()):
            raise
        step.pk, step.child_id = written.values_list("pk", "child_id").get()
        current.history[step.identity] = step


# Failure.


def fail(
    current: Pass,
    step: Step,
    error: BaseException,
    policy: Policy,
    number: int,
    started: datetime,
    *,
    report: dict[str, str] | None = None,
) -> None:
    """Record the failed attempt; park the run until the next one, or raise ``StepError`` if it was the last."""
    known = step.pk
    cause = error.cause if isinstance(error, Unserialisable) else error
    hopeless = isinstance(error, HOPELESS) or (step.kind == StepKind.EMIT and isinstance(error, TypeError))
    final = hopeless or number > policy.retries
    step.attempts, step.error = number, report or describe(cause)
    step.status = StepStatus.FAILED if final else StepStatus.WAITING
    step.finished_at = clock.now() if final else None
    step.wake_at = None if final else next_try(cause, policy.backoff, number)
    persist(current, step, lambda: _record_failure(current, step, known, started))
    if final:
        current.progressed(step)
        raise step_error(step) from cause
    again_at = cast(datetime, step.wake_at)
    wait = (again_at - clock.now()).total_seconds()
    signals.log_retry(current.run, error=step.error, wait=wait, step=step.name)
    raise current.end(Parked(step.name, again_at, asleep=False))


def _record_failure(current: Pass, step: Step, known: int | None, started: datetime) -> None:
    passes.boundary(f"before failure of {step.name}")
    with current.fence():
        steps = Step.objects.using(current.using)
        if known and not steps.filter(attempts=step.attempts - 1).resume(step, current.run.lease, None):
            return  # Recorded before; only the answer got lost.
        if not known:
            step.pk = None  # A try that was rolled back has left an id here.
            step.save(using=current.using, force_insert=True)
        Attempt.objects.using(current.using).create(
            run_id=current.run.pk,
            step=step,
            number=step.attempts,
            error=step.error,
            started_at=started,
            finished_at=clock.now(),
        )
    current.history[step.identity] = step
    passes.boundary(f"after failure of {step.name}")


def step_error(step: Step) -> StepError:
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
