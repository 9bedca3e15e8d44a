"""
Run one pass of one run: replay it from memory, go on with the next step, settle it.

A worker calls ``execute`` with a run it has claimed; nothing else does. No status is written here:
every change to a row is a move in ``models.run``, fenced by the lease.
"""

import logging
from collections.abc import Callable
from datetime import datetime
from functools import cached_property, partial
from inspect import iscoroutinefunction
from typing import Any, cast

from asgiref.sync import sync_to_async
from django.db import router, transaction

from . import admission, awaited, cancelling, clock, passes, payloads, registry, scribe, signals
from .conf import conf
from .exceptions import Interrupt, InvalidJob, JobsError, NonRetriableError, RunFailed, StepError
from .history import History, brought_event, describe, read_history
from .models import Attempt, Event, Run, Step
from .outage import outlast
from .passes import Died, HandedBack, Overdue, Parked, Pass
from .perform import HOPELESS, Unserialisable, encode, failed_with, next_try, step_error
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
        if current.job.batch:
            self.events = admission.batched(current)
            self.event = self.events[0] if self.events else None
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
        return scribe.logger_of(self._pass.run)

    def cancelled(self) -> bool:
        """Ask the database whether this pass is in vain: cancelled, or taken over. For long steps."""
        return not self._pass.held.exists()

    async def acancelled(self) -> bool:
        """Await ``cancelled``."""
        return await sync_to_async(self.cancelled)()


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
        current = _open(run, job, using, stopping)
        if not job.policies:
            _begin(current)
        elif admission.admit(current):
            _begin(current)
            admission.leave(current)


def _open(run: Run, job: registry.Job, using: str, stopping: Callable[[], bool]) -> Pass:
    history = History()
    is_blank = run.passes == 1 and not run.replay_of_id  # A replay may begin with copied checkpoints.
    if is_blank:
        history.event = brought_event(run, using)
    if not is_blank or (run.event_id and history.event is None):
        history = outlast(using, lambda: read_history(run, using))
    return Pass(
        run=run,
        job=job,
        using=using,
        event=history.event,
        history=history.steps,
        delivered=history.delivered,
        listening=history.listening,
        stopping=stopping,
        deadline=cancelling.deadline(run, job),
        consumed=consumed(run, history.steps.values()),
    )


def _begin(current: Pass) -> None:
    """Bring the run as far as it comes now, and if it fails for good on the way, what the job wants done then."""
    noted = current.failure
    _go_on(current)
    if current.failure is not noted:
        _execute(current)


def _go_on(current: Pass) -> None:
    """See to what may end the run before its code is asked; then ask it."""
    run, job = current.run, current.job
    if run.passes == 1 and signals.run_started.has_listeners(Run):
        signals.announce(signals.run_started, Run, using=current.using, run=run)
    if current.failure and job.on_failure is None:
        _end_failed(current, current.failure)  # A deploy took away what was to be done about it.
    elif run.crashes >= conf.MAX_CRASHES:
        _give_up(current, _crashed(run))
    elif reason := _ended_from_outside(current):
        _cancel(current, reason)
    else:
        _execute(current)


def _ended_from_outside(current: Pass) -> str | None:
    return None if current.failure else cancelling.too_late(current) or cancelling.look(current)


def _cancel(current: Pass, reason: str) -> None:
    """Cancel the run with its children, or none of them if the lease is lost."""

    def cancel() -> int:
        with transaction.atomic(using=current.using):
            cancelled = current.held.cancel(reason)
            if cancelled:
                cancelling.cascade([current.run.pk], current.using)
        return cancelled

    _finish(current.run, current.using, cancel)


def _crashed(run: Run) -> dict[str, str]:
    message = (
        f"The run took its worker down {run.crashes} times in a row (MAX_CRASHES is {conf.MAX_CRASHES})."
    )
    return {"type": CRASHED, "message": message, "traceback": ""}


def _execute(current: Pass) -> None:
    """Call the job and turn how it ended into the run's next status, the one place that decides it."""
    try:
        output = call(current)
    except (Died, KeyboardInterrupt):
        raise
    except Interrupt as interrupt:
        if current.root.swallowed:
            _fail(current, _swallowed(current))
        else:
            _interrupted(current, interrupt)
    except BaseException as error:
        _fail(current, _swallowed(current) if current.root.interrupts else error)
    else:
        if current.root.interrupts:
            _fail(current, _swallowed(current))
        else:
            _complete(current, output)


def _complete(current: Pass, output: str) -> None:
    current.log.close()
    if current.failure:
        _end_failed(current, current.failure)
    elif unvisited := current.unvisited():
        _finish(
            current.run, current.using, lambda: _complete_and_mark(current, output, unvisited), output=output
        )
    else:
        _finish(current.run, current.using, lambda: current.held.complete(output), output=output)


def call(current: Pass) -> str:
    """Return what the job returned, as typed JSON. What ``on_failure`` returns is nobody's."""
    handler, arguments = _code(current)
    with passes.outside(), current.enter(current.root), current.log.listening():
        if iscoroutinefunction(handler):
            value = awaited.call(current, handler, Context(current, awaited.AsyncSteps(current)), *arguments)
        else:
            value = handler(Context(current, Steps(current)), *arguments)
    return "" if current.failure else encode(value, f'the result of job "{current.job.id}"')


def _complete_and_mark(current: Pass, output: str, unvisited: list[int]) -> int:
    with transaction.atomic(using=current.using):
        completed = current.held.complete(output)
        if completed:
            Step.objects.using(current.using).filter(pk__in=unvisited).update(unvisited=True)
    return completed


def _code(current: Pass) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Return what to call beside the context: the job, or once that has failed for good what it wants then."""
    if current.failure is None or current.job.on_failure is None:
        return current.job.handler, ()
    return current.job.on_failure, (_failure(current, current.failure),)


def _failure(current: Pass, report: dict[str, str]) -> JobsError:
    """Return what a job failed with, the same in every pass: the step that was out of retries, or the error."""
    step = failed_with(report, current.history.values())
    return step_error(step) if step else RunFailed(**report)


def _swallowed(current: Pass) -> NonRetriableError:
    interrupt = current.root.swallowed or current.root.interrupts[-1]
    step = getattr(interrupt, "step", None)
    at = f'step "{step}"' if step else "a step"
    return NonRetriableError(
        f"The job caught the control interrupt of {at} and went on. Catch `Exception`, not everything"
        " (`except:`, `except BaseException:`), and call no step in a `finally:`."
    )


def _interrupted(current: Pass, interrupt: Interrupt) -> None:
    run, using, held = current.run, current.using, current.held
    current.log.close()
    if isinstance(interrupt, Overdue):
        _cancel(current, cast(str, cancelling.too_late(current)))
        return
    if isinstance(interrupt, HandedBack):
        settled = outlast(using, lambda: Run.objects.using(using).hand_back([run.hold]))
    elif isinstance(interrupt, Parked):
        until = current.in_time(interrupt.until)
        sleep = lambda: held.sleep(until)  # noqa: E731
        park = sleep if interrupt.asleep else lambda: held.retry(until, current.attempt)
        settled = _write(using, "sleeping", park)
    else:
        settled = 0
    if not settled:
        signals.log_lease_lost(run)


def _fail(current: Pass, error: BaseException) -> None:
    """Record that the code between steps failed; try again by policy, or give up."""
    current.log.close()
    attempt = current.attempt + 1
    report = describe(error.cause if isinstance(error, Unserialisable) else error)
    if isinstance(error, (StepError, InvalidJob, *HOPELESS)) or attempt > current.job.retries:
        # A step out of retries has its attempts already; its failure is none of the code around it.
        _give_up(current, report, attempt=None if isinstance(error, StepError) else attempt)
        return
    at = current.in_time(next_try(error, current.job.backoff, attempt))
    retry = partial(_record_failure, current, lambda: current.held.retry(at, attempt), attempt, report)
    if _write(current.using, "the next try", retry):
        signals.log_retry(current.run, error=report, wait=(at - clock.now()).total_seconds())
    else:
        signals.log_lease_lost(current.run)


def _give_up(current: Pass, report: dict, *, attempt: int | None = None) -> None:
    """End the run as failed; or note that it has, where the job wants something done about that first."""
    note = lambda: current.held.note_failure(report)  # noqa: E731
    if first := current.failure:
        # What was to be done about a failure has failed too; the run's error stays what it was.
        signals.log_on_failure_failed(current.run, report)
        _end_failed(
            current, first, partial(_record_failure, current, _failing(current, first), attempt, report)
        )
    elif current.job.on_failure is None:
        _end_failed(
            current, report, partial(_record_failure, current, _failing(current, report), attempt, report)
        )
    elif _write(current.using, "the failure", partial(_record_failure, current, note, attempt, report)):
        current.turn_to_failure(report)
        passes.boundary("after the failure")
    else:
        signals.log_lease_lost(current.run)


def _reason(report: dict) -> str:
    """Return what people read beside the status, where the error is none of the job's own."""
    return report["message"] if report["type"] == CRASHED else ""


def _failing(current: Pass, report: dict) -> Callable[[], int]:
    return lambda: current.held.fail(report, _reason(report))


def _end_failed(current: Pass, report: dict, ending: Callable[[], int] | None = None) -> None:
    _finish(current.run, current.using, ending or _failing(current, report), error=report)


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


def _write(using: str, what: str, move: Callable[[], int]) -> int:
    """Move the run, waiting for a database that is away; return 0 if the lease is lost."""
    passes.boundary(f"before {what}")
    return outlast(using, move)


def _finish(
    run: Run, using: str, move: Callable[[], int], *, output: str | None = None, error: dict | None = None
) -> None:
    """Bring the run to its end, and tell the world once that is committed."""
    if not _write(using, "the end", move):
        signals.log_lease_lost(run)
    elif signals.run_finished.has_listeners(Run):
        signals.announce(signals.run_finished, Run, using=using, run=_as_ended(run, using, output, error))


def _as_ended(run: Run, using: str, output: str | None, error: dict | None) -> Run:
    """Return the run as its row now is, without reading it where that can be known."""
    if output is None and error is None:
        return Run.objects.using(using).get(pk=run.pk)
    run.status = "completed" if error is None else "failed"
    run.error, run.output = error, payloads.loads(output) if output else None
    run.reason = _reason(error) if error else ""
    run.lease = run.wake_at = None
    run.finished_at = clock.now()
    return run
