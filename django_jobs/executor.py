"""
Run one pass of one run: replay it from memory, go on with the next step, settle it.

A worker calls ``execute`` with a run it has claimed; nothing else does. No status is written here:
every change to a row is a move in ``models.run``, fenced by the lease.
"""

import logging
from collections.abc import Callable
from datetime import datetime
from functools import cached_property
from inspect import iscoroutinefunction
from typing import Any, cast

from asgiref.sync import sync_to_async
from django.db import router, transaction

from . import awaited, cancelling, clock, passes, payloads, registry, signals
from .conf import conf
from .exceptions import Interrupt, JobsError, NonRetriableError, RunFailed, StepError
from .history import History, brought_event, describe, read_history
from .models import Attempt, Event, Run, StepStatus
from .outage import outlast
from .passes import Died, HandedBack, Lost, Overdue, Parked, Pass
from .perform import Unserialisable, encode, next_try, step_error
from .steps import Steps
from .waiting import consumed

#: The type of the error of a run that is given up because it takes its workers down.
CRASHED = "WorkerCrashed"


class Context:
    """What a job is given: the event that started it, its step tools, and who it is."""

    def __init__(self, current: Pass, step: Steps) -> None:
        self._pass = current
        self.step = step
        self.event: Event | None = current.event
        self.events: list[Event] = [current.event] if current.event else []
        self.run_id = current.run.pk
        self.job = current.job
        self.version: str = current.run.version
        #: The instant a cron trigger fired for; None when an event started the run.
        self.scheduled_for: datetime | None = current.run.scheduled_for
        #: The start of the run, the same in every pass.
        self.now: datetime = current.run.started_at or clock.now()

    @property
    def attempt(self) -> int:
        """The number of failed tries of the code between steps since the last checkpoint."""
        return self._pass.attempt

    @cached_property
    def logger(self) -> logging.LoggerAdapter:
        """A logger bound to the run. Silent while the body only replays what it did before."""
        run = self._pass.run
        logger = logging.getLogger(f"django_jobs.job.{run.job_id}")
        return _ReplayAwareLogger(logger, self._pass, {"run_id": str(run.pk), "job_id": run.job_id})

    def cancelled(self) -> bool:
        """Ask the database whether this pass is in vain: cancelled, or taken over. For long steps."""
        return not self._pass.held.exists()

    async def acancelled(self) -> bool:
        """Await ``cancelled``."""
        return await sync_to_async(self.cancelled)()


class _ReplayAwareLogger(logging.LoggerAdapter):
    def __init__(self, logger: logging.Logger, current: Pass, extra: dict[str, str]) -> None:
        super().__init__(logger, extra)
        self._pass = current

    def isEnabledFor(self, level: int) -> bool:
        return not self._pass.replaying and super().isEnabledFor(level)


def execute(run: Run, *, stopping: Callable[[], bool] = bool) -> None:
    """
    Run one pass of ``run``, whose lease this worker holds, and settle it.

    When ``stopping()`` turns true the step in hand is finished and the run handed back. Whatever the
    job does, this returns; only a database that refuses the settling itself makes it raise.
    """
    using = router.db_for_write(Run)
    job = registry.find(run.job_id)
    held = Run.objects.using(using).held(run)
    if job is None:
        outlast(using, lambda: Run.objects.using(using).hand_back([run.hold]))
    elif flag := job.closed_by:
        _finish(run, using, lambda: held.skip(f"The gate {flag} is off."))
    else:
        _begin(_open(run, job, using, stopping))


def _open(run: Run, job: registry.Job, using: str, stopping: Callable[[], bool]) -> Pass:
    history = History()
    if run.passes == 1:
        history.event = brought_event(run, using)
    if run.passes > 1 or (run.event_id and history.event is None):
        history = outlast(using, lambda: read_history(run, using))
    if run.passes == 1 and signals.run_started.has_listeners(Run):
        signals.announce(signals.run_started, Run, using=using, run=run)
    return Pass(
        run=run,
        job=job,
        using=using,
        event=history.event,
        history=history.steps,
        delivered=history.delivered,
        listening=history.listening,
        stopping=stopping,
        deadline=_deadline(run, job),
        consumed=consumed(run, history.steps.values()),
    )


def _deadline(run: Run, job: registry.Job) -> datetime | None:
    if job.timeouts is None or job.timeouts.finish is None or run.started_at is None:
        return None
    return run.started_at + job.timeouts.finish


def _begin(current: Pass) -> None:
    """See to what may end the run before its code is asked; then ask it."""
    run, job = current.run, current.job
    if run.passes > 1 and job.on_failure and (failure := outlast(current.using, current.held.failure)):
        current.turn_to_failure(failure, attempt=run.attempt)
    if run.crashes >= conf.MAX_CRASHES:
        _give_up(current, _crashed(run))
    elif reason := _ended_from_outside(current):
        _cancel(current, reason)
    else:
        _execute(current)


def _ended_from_outside(current: Pass) -> str | None:
    return None if current.failure else _too_late(current) or cancelling.look(current)


def _too_late(current: Pass) -> str | None:
    run, timeouts = current.run, current.job.timeouts
    if timeouts is None:
        return None
    due = max(run.queued_at, current.event.occurred_at) if current.event else run.queued_at
    if timeouts.start and run.passes == 1 and clock.now() - due > timeouts.start:
        return f"It was not started within {timeouts.start} (timeouts.start)."
    if current.deadline and clock.now() >= current.deadline:
        return f"It did not finish within {timeouts.finish} (timeouts.finish)."
    return None


def _cancel(current: Pass, reason: str) -> None:
    """End the run as cancelled and its children with it, all of them or none."""

    def cancel() -> int:
        with transaction.atomic(using=current.using):
            if moved := current.held.cancel(reason):
                cancelling.cascade([current.run.pk], current.using)
        return moved

    _finish(current.run, current.using, cancel)


def _crashed(run: Run) -> dict[str, str]:
    message = (
        f"The run took its worker down {run.crashes} times in a row (MAX_CRASHES is {conf.MAX_CRASHES})."
    )
    return {"type": CRASHED, "message": message, "traceback": ""}


def _execute(current: Pass) -> None:
    """Call the job and turn how it ended into the run's next status, the one place that decides it."""
    try:
        output = _call(current)
    except (Died, KeyboardInterrupt):
        raise
    except Interrupt as interrupt:
        if current.root.swallowed:
            _fail(current, _swallowed(current))
        else:
            _interrupted(current, interrupt)
    except BaseException as error:
        _fail(current, _swallowed(current) if _is_swallowed(current, error) else error)
    else:
        if current.root.interrupts:
            _fail(current, _swallowed(current))
        else:
            _complete(current, output)


def _complete(current: Pass, output: str) -> None:
    passes.boundary("before the end")
    if current.failure:
        _end_failed(current, current.failure)
    else:
        _finish(current.run, current.using, lambda: current.held.complete(output), output=output)


def _call(current: Pass) -> str:
    """Return what the job returned, as typed JSON."""
    handler, arguments = _code(current)
    if iscoroutinefunction(handler):
        value = awaited.call(current, handler, Context(current, awaited.AsyncSteps(current)), *arguments)
    else:
        value = handler(Context(current, Steps(current)), *arguments)
    where = f'the result of job "{current.job.id}"'
    try:
        return encode(value, where)
    except Unserialisable as error:
        raise NonRetriableError(str(error)) from error


def _code(current: Pass) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Return what to call beside the context: the job, or once that has failed for good what it wants then."""
    if current.failure is None or current.job.on_failure is None:
        return current.job.handler, ()
    return current.job.on_failure, (_failure(current, current.failure),)


def _failure(current: Pass, report: dict[str, str]) -> JobsError:
    """Return what a job failed with, the same in every pass: the step that was out of retries, or the error."""
    if report["type"] == StepError.__name__:
        failed = [step for step in current.history.values() if step.status == StepStatus.FAILED]
        for step in sorted(failed, key=lambda step: step.finished_at or clock.now(), reverse=True):
            if str(error := step_error(step)) == report["message"]:
                return error
    return RunFailed(**report)


def _is_swallowed(current: Pass, error: BaseException) -> bool:
    """Tell whether ``error`` stands where an interrupt was; in an async job another task may have raised that."""
    if not current.root.is_async:
        return bool(current.root.interrupts)
    seen: BaseException | None = error
    while seen and not isinstance(seen, Interrupt):
        seen = seen.__cause__ or seen.__context__
    return seen is not None


def _swallowed(current: Pass) -> NonRetriableError:
    step = getattr(current.root.interrupts[-1], "step", None)
    at = f'step "{step}"' if step else "a step"
    return NonRetriableError(
        f"The job caught the control interrupt of {at} and went on. Catch `Exception`, not everything"
        " (`except:`, `except BaseException:`), and call no step in a `finally:`."
    )


def _interrupted(current: Pass, interrupt: Interrupt) -> None:
    run, using, held = current.run, current.using, current.held
    if isinstance(interrupt, Overdue):
        _cancel(current, cast(str, _too_late(current)))
        return
    if isinstance(interrupt, HandedBack):
        settled = outlast(using, lambda: Run.objects.using(using).hand_back([run.hold]))
    elif isinstance(interrupt, Parked):
        until = min(interrupt.until, current.deadline or interrupt.until)
        passes.boundary("before sleeping")
        sleep = lambda: held.sleep(until)  # noqa: E731
        settled = outlast(using, sleep if interrupt.asleep else lambda: held.retry(until, current.attempt))
    else:
        settled = 0
    if not settled or isinstance(interrupt, Lost):
        signals.log_lease_lost(run)


def _fail(current: Pass, error: BaseException) -> None:
    """Record that the code between steps failed; try again by policy, or give up."""
    attempt = current.attempt + 1
    report = describe(error)
    if isinstance(error, NonRetriableError | StepError) or attempt > current.job.retries:
        # A step out of retries has its attempts already; its failure is none of the code around it.
        _give_up(current, report, attempt=None if isinstance(error, StepError) else attempt)
        return
    at = next_try(error, current.job.backoff, attempt)
    ending = lambda: _record_failure(current, lambda: current.held.retry(at, attempt), attempt, report)  # noqa: E731
    if outlast(current.using, ending):
        signals.log_retry(current.run, error=report, wait=(at - clock.now()).total_seconds())
    else:
        signals.log_lease_lost(current.run)


def _give_up(current: Pass, report: dict, *, attempt: int | None = None) -> None:
    """End the run as failed, after what the job wants done then (``on_failure``), which has a place of its own."""
    held = current.held
    if current.failure:
        # What was to be done about a failure has failed too; the run's error stays what it was.
        signals.log_on_failure_failed(current.run, report)
        first = current.failure
        _end_failed(
            current,
            first,
            lambda: _record_failure(current, lambda: held.fail(first, _reason(first)), attempt, report),
        )
    elif current.job.on_failure is None:
        fail = lambda: held.fail(report, _reason(report))  # noqa: E731
        _end_failed(current, report, lambda: _record_failure(current, fail, attempt, report))
    elif outlast(
        current.using, lambda: _record_failure(current, lambda: held.note_failure(report), attempt, report)
    ):
        current.turn_to_failure(report)
        _execute(current)
    else:
        signals.log_lease_lost(current.run)


def _reason(report: dict) -> str:
    """Return what people read beside the status, where the error is none of the job's own."""
    return report["message"] if report["type"] == CRASHED else ""


def _end_failed(current: Pass, report: dict, ending: Callable[[], int] | None = None) -> None:
    _finish(
        current.run,
        current.using,
        ending or (lambda: current.held.fail(report, _reason(report))),
        error=report,
    )


def _record_failure(current: Pass, move: Callable[[], int], attempt: int | None, report: dict) -> int:
    """Move the run and keep its error in one transaction; return 0, and write nothing, if the lease is lost."""
    using, run = current.using, current.run
    with transaction.atomic(using=using):
        moved = move()
        if moved and attempt:
            Attempt.objects.using(using).create(
                run_id=run.pk,
                number=attempt,
                error=report,
                started_at=current.started_at,
                finished_at=clock.now(),
            )
    return moved


def _finish(
    run: Run, using: str, move: Callable[[], int], *, output: str | None = None, error: dict | None = None
) -> None:
    """Bring the run to its end, and tell the world once that is committed."""
    if not outlast(using, move):
        signals.log_lease_lost(run)
        return
    if signals.run_finished.has_listeners(Run):
        signals.announce(signals.run_finished, Run, using=using, run=_as_ended(run, using, output, error))


def _as_ended(run: Run, using: str, output: str | None, error: dict | None) -> Run:
    """Return the run as its row now is, without reading it where that can be known."""
    if output is None and error is None:
        return Run.objects.using(using).get(pk=run.pk)
    run.status = "completed" if error is None else "failed"
    run.error, run.output = error, payloads.loads(output) if output else None
    run.lease = run.wake_at = None
    run.finished_at = clock.now()
    return run
