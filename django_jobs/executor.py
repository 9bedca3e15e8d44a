"""
Run one pass of one run: replay it from memory, go on with the next step, settle it.

A worker calls ``execute`` with a run it has claimed; nothing else does. No status is written here:
every change to a row is a move in ``models.run``, fenced by the lease.
"""

import logging
from collections.abc import Callable
from datetime import datetime
from functools import cached_property

from django.db import router, transaction

from . import admission, clock, passes, payloads, registry, signals
from .conf import conf
from .exceptions import Interrupt, NonRetriableError, StepError
from .history import brought_event, describe, read_history
from .models import Attempt, Event, Run, Step
from .outage import outlast
from .passes import Died, HandedBack, Lost, Parked, Pass
from .steps import Steps, next_try


class Context:
    """What a job is given: the event that started it, its step tools, and who it is."""

    def __init__(self, current: Pass) -> None:
        self._pass = current
        self.step = Steps(current)
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
        run = self._pass.run
        logger = logging.getLogger(f"django_jobs.job.{run.job_id}")
        return _ReplayAwareLogger(logger, self._pass, {"run_id": str(run.pk), "job_id": run.job_id})

    def cancelled(self) -> bool:
        """Ask the database whether this pass is in vain: cancelled, or taken over. For long steps."""
        return not self._pass.held.exists()


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
    elif run.crashes >= conf.MAX_CRASHES:
        _finish(run, using, lambda: held.fail(_crashed(run), _crashed(run)["message"]))
    else:
        current = _open(run, job, using, stopping)
        if not job.policies:
            _execute(current)
        elif admission.admit(current):
            _execute(current)
            admission.leave(current)


def _crashed(run: Run) -> dict[str, str]:
    message = (
        f"The run took its worker down {run.crashes} times in a row (MAX_CRASHES is {conf.MAX_CRASHES})."
    )
    return {"type": "WorkerCrashed", "message": message, "traceback": ""}


def _open(run: Run, job: registry.Job, using: str, stopping: Callable[[], bool]) -> Pass:
    event: Event | None = None
    history: dict[str, Step] = {}
    if run.passes == 1:
        event = brought_event(run, using)
    if run.passes > 1 or (run.event_id and event is None):
        event, history = outlast(using, lambda: read_history(run, using))
    return Pass(run=run, job=job, using=using, event=event, history=history, stopping=stopping)


def _execute(current: Pass) -> None:
    """Call the job and turn how it ended into the run's next status, the one place that decides it."""
    if current.run.passes == 1 and signals.run_started.has_listeners(Run):
        signals.announce(signals.run_started, Run, using=current.using, run=current.run)
    try:
        output = _call(current)
    except (Died, KeyboardInterrupt):
        raise
    except Interrupt as interrupt:
        if current.swallowed:
            _fail(current, _swallowed(current))
        else:
            _interrupted(current, interrupt)
    except BaseException as error:
        _fail(current, _swallowed(current) if current.interrupt else error)
    else:
        if current.interrupt:
            _fail(current, _swallowed(current))
        else:
            passes.boundary("before the end")
            _finish(current.run, current.using, lambda: current.held.complete(output), output=output)


def _call(current: Pass) -> str:
    """Return what the job returned, as typed JSON."""
    # Under a transaction that is not ours (a test case's) a failing statement must not spoil it.
    value = current.job.handler(Context(current))
    where = f'the result of job "{current.job.id}"'
    try:
        text = payloads.dumps(value, where=where)
        payloads.check_size(text, conf.MAX_OUTPUT_BYTES, where=where, setting="MAX_OUTPUT_BYTES")
    except (TypeError, ValueError) as error:
        raise NonRetriableError(str(error)) from error
    return text


def _swallowed(current: Pass) -> NonRetriableError:
    step = getattr(current.interrupt, "step", None)
    at = f'step "{step}"' if step else "a step"
    return NonRetriableError(
        f"The job caught the control interrupt of {at} and went on. Catch `Exception`, not everything"
        " (`except:`, `except BaseException:`), and call no step in a `finally:`."
    )


def _interrupted(current: Pass, interrupt: Interrupt) -> None:
    run, using, held = current.run, current.using, current.held
    if isinstance(interrupt, HandedBack):
        settled = outlast(using, lambda: Run.objects.using(using).hand_back([run.hold]))
    elif isinstance(interrupt, Parked) and interrupt.asleep:
        passes.boundary("before sleeping")
        settled = outlast(using, lambda: held.sleep(interrupt.until))
    elif isinstance(interrupt, Parked):
        settled = outlast(using, lambda: held.retry(interrupt.until, current.attempt))
    else:
        settled = 0
    if not settled or isinstance(interrupt, Lost):
        signals.log_lease_lost(run)


def _fail(current: Pass, error: BaseException) -> None:
    """Record that the code between steps failed; try again by policy, or end the run."""
    attempt = current.attempt + 1
    report = describe(error)
    if isinstance(error, NonRetriableError | StepError) or attempt > current.job.retries:
        # A step out of retries has its attempts already; its failure is none of the code around it.
        own = None if isinstance(error, StepError) else attempt
        ending = lambda: _record_failure(current, own, report)  # noqa: E731
        _finish(current.run, current.using, ending, error=report)
        return
    at = next_try(error, current.job.backoff, attempt)
    if outlast(current.using, lambda: _record_failure(current, attempt, report, at)):
        signals.log_retry(current.run, error=report, wait=(at - clock.now()).total_seconds())
    else:
        signals.log_lease_lost(current.run)


def _record_failure(current: Pass, attempt: int | None, report: dict, at: datetime | None = None) -> int:
    """Move the run and keep its error in one transaction; return 0, and write nothing, if the lease is lost."""
    using, run = current.using, current.run
    with transaction.atomic(using=using):
        moved = current.held.retry(at, attempt or 0) if at else current.held.fail(report)
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
