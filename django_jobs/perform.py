"""
One step that works: find its checkpoint, or do it and write one; record how it failed.

A step is a generator. What it yields is the work, a call of the job's own; what it is sent is how that
went. So the same lines serve a job that is a plain function and one that awaits (see ``steps``).
"""

import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import Any, cast

from django.db import IntegrityError, InterfaceError, OperationalError, connections, transaction

from . import clock, passes, payloads, signals
from .backoff import AnyBackoff, Backoff
from .conf import conf
from .exceptions import Interrupt, InvalidEvent, NonRetriableError, RetryAfter, StepError
from .history import describe
from .models import Attempt, Step, StepKind, StepStatus
from .outage import outlast
from .passes import Lost, Parked, Pass, inside


@dataclass
class Outcome:
    """How a work went, or all of a step."""

    value: Any = None
    error: BaseException | None = None

    def result(self) -> Any:
        """
        Return the value or raise the error, which is kept no longer.

        An error and a frame that know each other stay until the garbage collector comes, and with them all that
        the frames around have: among them the one that has the thread of an event loop.
        """
        error, self.error = self.error, None
        try:
            if error is not None:
                raise error
            return self.value
        finally:
            del error


@dataclass(frozen=True)
class Policy:
    """How often a step is tried, when again, and how long one try may take."""

    retries: int
    backoff: AnyBackoff
    timeout: float | None = None


@dataclass(eq=False)
class Try:
    """One try of a step."""

    current: Pass
    step: Step
    policy: Policy
    number: int
    started_at: datetime = field(default_factory=clock.now)
    _ended: threading.Lock = field(default_factory=threading.Lock)

    def end(self) -> bool:
        """Take it upon the caller to say how it ended. One of two threads may; the other is told False."""
        return self._ended.acquire(blocking=False)


@dataclass(eq=False)
class Work:
    """What a try calls of the job's own code, inside of the step."""

    call: Callable[[], Any]
    attempt: Try
    began_at: datetime | None = None

    @property
    def timeout(self) -> float | None:
        return self.attempt.policy.timeout

    @property
    def took(self) -> float:
        return (clock.now() - (self.began_at or clock.now())).total_seconds()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Do it within: it knows which step it is inside of, and all see for how long, if it may not take for ever."""
        token, self.began_at = inside.set(self.attempt.step.name), clock.now()
        if self.timeout:
            going_on.add(self)
        try:
            with self.attempt.current.log.listening(self.attempt.step.name):
                yield
        finally:
            going_on.discard(self)
            inside.reset(token)

    def returned(self, value: Any) -> Outcome:
        """Return how it went that returned ``value``: what comes too late is discarded, however good."""
        if self.timeout and self.took > self.timeout:
            return Outcome(error=late(self.timeout))
        return Outcome(value)


#: The works of this process that may not take for ever.
going_on: set[Work] = set()

Doing = Generator[Work, Outcome, Any]


def late(timeout: float | None) -> TimeoutError:
    return TimeoutError(f"It took longer than {timeout:g} s.")


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
HOPELESS = (NonRetriableError, InvalidEvent, Unserialisable)


def guarded(current: Pass, step: Step, doing: Doing) -> Doing:
    """Do ``step`` unless the pass has to end, and see to it that all its branches know when it has."""
    if step.status == StepStatus.WAITING:
        current.may_work(step)
    try:
        return (yield from doing)
    except Interrupt as interrupt:
        current.met(interrupt)
        raise


def perform(
    current: Pass, step: Step, call: Callable[[], Any], policy: Policy, *, is_stood_in: bool = False
) -> Doing:
    """Return what ``step`` came to, now or before; park the run until its next try."""
    if step.status != StepStatus.WAITING:
        return settled(step)
    if step.wake_at and step.wake_at > clock.now():
        raise current.end(Parked(step.name, step.wake_at, asleep=False))
    attempt = Try(current, step, policy, step.attempts + 1)
    try:
        call = call if is_stood_in else _stood_in(current, step, call)
        text = yield from _work(attempt, call)
    except Failed as failed:
        fail(attempt, failed.error)
    except (Interrupt, KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:
        fail(attempt, error)
    current.progressed(step)
    return payloads.loads(text)


def _stood_in(current: Pass, step: Step, call: Callable[[], Any]) -> Callable[[], Any]:
    """Return what a test has a step call in place of ``call``, with the arguments of that."""
    answer = passes.stand_in(current, step)
    if answer is None or not isinstance(call, partial):
        return answer or call
    return partial(answer, *call.args, **call.keywords)


def settled(step: Step) -> Any:
    """Return what a step completed with before, or raise what it failed with."""
    if step.status == StepStatus.COMPLETED:
        return step.output
    raise step_error(step)


def _work(attempt: Try, call: Callable[[], Any]) -> Generator[Work, Outcome, str]:
    """Do the step and write its checkpoint; the two in one transaction if the step is of that kind."""
    current, step = attempt.current, attempt.step
    if step.kind == StepKind.RUN:
        text = yield from _call(attempt, call)
        complete(step, attempt.number)
        write(current, step, text)
        return text
    text = ""  # What ``_call`` returns is never empty: even None is "null".
    try:
        with transaction.atomic(using=current.using):
            text = yield from _call(attempt, call)
            complete(step, attempt.number)
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


def _call(attempt: Try, call: Callable[[], Any]) -> Generator[Work, Outcome, str]:
    """Return what the step returned, as typed JSON."""
    current, step = attempt.current, attempt.step
    # Under a transaction that is not ours (a test case's) a failing statement must not spoil it.
    nested = step.kind == StepKind.RUN and connections[current.using].in_atomic_block
    with transaction.atomic(using=current.using) if nested else nullcontext():
        outcome = yield Work(call, attempt)
        if not attempt.end():
            raise current.end(Lost())  # It was given up (see ``overdue``), and the lease with it.
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


def fail(attempt: Try, error: BaseException, *, report: dict[str, str] | None = None) -> None:
    """Record the failed attempt; park the run until the next one, or raise ``StepError`` if it was the last."""
    current, step = attempt.current, attempt.step
    known = step.pk
    cause = error.cause if isinstance(error, Unserialisable) else error
    spoil(attempt, error, report or describe(cause))
    persist(current, step, lambda: _record_failure(attempt, known))
    if step.status == StepStatus.FAILED:
        current.progressed(step)
        raise step_error(step) from cause
    again_at = cast(datetime, step.wake_at)
    wait = (again_at - clock.now()).total_seconds()
    signals.log_retry(current.run, error=cast(dict, step.error), wait=wait, step=step.name)
    raise current.end(Parked(step.name, again_at, asleep=False))


def spoil(attempt: Try, error: BaseException, report: dict[str, str] | None = None) -> None:
    """Give the step the shape of one that failed, for good or until its next try."""
    step, policy = attempt.step, attempt.policy
    hopeless = isinstance(error, HOPELESS) or (step.kind == StepKind.EMIT and isinstance(error, TypeError))
    final = hopeless or attempt.number > policy.retries
    step.attempts, step.error = attempt.number, report or describe(error)
    step.status = StepStatus.FAILED if final else StepStatus.WAITING
    step.finished_at = clock.now() if final else None
    step.wake_at = None if final else next_try(error, policy.backoff, attempt.number)


def _record_failure(attempt: Try, known: int | None) -> None:
    current, step = attempt.current, attempt.step
    passes.boundary(f"before failure of {step.name}")
    with current.fence():
        if not keep_failure(attempt, known):
            return  # Recorded before; only the answer got lost.
    current.history[step.identity] = step
    passes.boundary(f"after failure of {step.name}")


def keep_failure(attempt: Try, known: int | None) -> bool:
    """Write the step as it is after a failed try, and that try, in a transaction that holds the run."""
    current, step = attempt.current, attempt.step
    steps = Step.objects.using(current.using)
    if known and not steps.filter(attempts=step.attempts - 1).resume(step, current.run.lease, None):
        return False
    if not known:
        step.pk = None  # A try that was rolled back has left an id here.
        step.save(using=current.using, force_insert=True)
    Attempt.objects.using(current.using).create(
        run_id=current.run.pk,
        step=step,
        number=step.attempts,
        error=step.error,
        started_at=attempt.started_at,
        finished_at=clock.now(),
    )
    return True


def step_error(step: Step) -> StepError:
    error = step.error or {}
    return StepError(
        step.name,
        type=error.get("type", ""),
        message=error.get("message", ""),
        attempts=step.attempts,
        traceback=error.get("traceback", ""),
    )


def failed_with(report: Mapping[str, Any], steps: Iterable[Step]) -> Step | None:
    """Return the step that was out of retries and failed its run with ``report``, if one did."""
    if report.get("type") != StepError.__name__:
        return None
    failed = (step for step in steps if step.status == StepStatus.FAILED)
    return next((step for step in failed if str(step_error(step)) == report.get("message")), None)


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
