"""
News out, events in, and the wording of every log line.

Out: ``run_queued, run_started, run_finished, step_finished, event_received, admin_action``, sent after
commit and with ``send_robust``, so that a receiver can neither see a rolled-back row nor break a run.
In: ``event.send(sender, name=..., data=..., key=...)`` is ``emit``; ``emit_on`` bridges any Django signal.
"""

import inspect
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from django.db import transaction
from django.dispatch import Signal

logger = logging.getLogger("django_jobs")

#: A run was created. Arguments: run.
run_queued = Signal()
#: A worker begins the first pass of a run. Arguments: run.
run_started = Signal()
#: A run came to a final status. Arguments: run.
run_finished = Signal()
#: A step completed, or failed for good. Arguments: run, step.
step_finished = Signal()
#: An event was recorded. Arguments: event.
event_received = Signal()
#: A person acted. Arguments: actor (a user, a name or None), verb, ids (what was acted on), reason.
admin_action = Signal()

#: Send it to emit an event. Arguments: name, data, key, at.
event = Signal()


def announce(signal: Signal, sender: Any, *, using: str, **news: Any) -> None:
    """Send ``signal`` once the current transaction of ``using`` has committed."""
    transaction.on_commit(partial(signal.send_robust, sender, **news), using=using, robust=True)


def emit_on(
    signal: Signal,
    name: str,
    *,
    sender: Any = None,
    data: Callable[..., dict] | None = None,
    key: Callable[..., str | None] | None = None,
    when: Callable[..., bool] | None = None,
) -> Callable[..., None]:
    """
    Emit the event ``name`` each time ``signal`` is sent; return the receiver, to disconnect it.

    ``data``, ``key`` and ``when`` are called with those of the signal's arguments that they name
    (``lambda instance: {"user_id": instance.pk}``). The event is written in the transaction the
    signal was sent in, so it commits or rolls back with the change that caused it.
    """

    def receiver(sender: Any, **arguments: Any) -> None:
        arguments["sender"] = sender
        if when is None or _call(when, arguments):
            event.send(
                sender,
                name=name,
                data=_call(data, arguments) if data else {},
                key=_call(key, arguments) if key else None,
            )

    signal.connect(receiver, sender=sender, weak=False)
    return receiver


def _call(function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return function(**arguments)
    return function(**{p.name: arguments[p.name] for p in parameters if p.name in arguments})


# The log.


def _about(run: Any) -> dict[str, Any]:
    return {"extra": {"run_id": str(run.pk), "job_id": run.job_id, "attempt": run.attempt}}


def log_run_started(sender: Any, *, run: Any, **kwargs: Any) -> None:
    if logger.isEnabledFor(logging.INFO):
        logger.info("%s started (run %s)", run.job_id, run.pk, **_about(run))


def log_run_finished(sender: Any, *, run: Any, **kwargs: Any) -> None:
    if run.status == "failed":
        error = run.error or {}
        kind, message = error.get("type", "error"), error.get("message", "")
        logger.error("%s failed: %s: %s (run %s)", run.job_id, kind, message, run.pk, **_about(run))
    elif logger.isEnabledFor(logging.INFO):
        reason = f": {run.reason}" if run.reason else ""
        logger.info("%s %s%s (run %s)", run.job_id, run.status, reason, run.pk, **_about(run))


def log_step_finished(sender: Any, *, run: Any, step: Any, **kwargs: Any) -> None:
    if step.status == "failed":
        error = step.error or {}
        message = '%s: step "%s" failed for good: %s: %s (run %s)'
        kind = error.get("type"), error.get("message")
        logger.warning(message, run.job_id, step.name, *kind, run.pk, **_about(run))
    elif logger.isEnabledFor(logging.DEBUG):
        logger.debug('%s: step "%s" done (run %s)', run.job_id, step.name, run.pk, **_about(run))


def log_retry(run: Any, *, error: dict, wait: float, step: str | None = None) -> None:
    where = f'step "{step}"' if step else "the code between steps"
    message = "%s: %s failed: %s: %s; again in %.1f s (run %s)"
    kind = error["type"], error["message"]
    logger.warning(message, run.job_id, where, *kind, wait, run.pk, **_about(run))


def log_never_cancelled(run: Any, cancel_on: str, why: str) -> None:
    logger.warning("%s: %s cancels no run %s: %s", run.job_id, cancel_on, run.pk, why, **_about(run))


def log_step_stuck(run: Any, steps: list[str]) -> None:
    message = (
        '%s: "%s" takes longer than it may; its worker retires, and what it comes to is discarded (run %s)'
    )
    logger.error(message, run.job_id, '", "'.join(steps), run.pk, **_about(run))


def log_not_given_up(run: Any, error: Exception) -> None:
    message = "%s: that a step took too long cannot be written yet: %s (run %s)"
    logger.warning(message, run.job_id, str(error).strip(), run.pk, **_about(run))


def log_unreadable(event: Any, error: Exception) -> None:
    logger.error("event %s cannot be read, so nobody who waits for it is told: %s", event, error)


def log_on_failure_failed(run: Any, error: dict) -> None:
    message = "%s: its on_failure failed: %s: %s (run %s)"
    logger.error(message, run.job_id, error["type"], error["message"], run.pk, **_about(run))


def log_lease_lost(run: Any) -> None:
    message = "%s: this worker no longer holds run %s; what it did there is discarded"
    logger.warning(message, run.job_id, run.pk, **_about(run))


run_started.connect(log_run_started, dispatch_uid="django_jobs.log")
run_finished.connect(log_run_finished, dispatch_uid="django_jobs.log")
step_finished.connect(log_step_finished, dispatch_uid="django_jobs.log")


def log_database_away(using: str, error: Exception) -> None:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    logger.warning('the database "%s" cannot be reached (%s); waiting for it', using, reason)


def log_database_back(using: str) -> None:
    logger.warning('the database "%s" is back; going on', using)


def log_clock_differs(using: str, seconds: float) -> None:
    ahead = "ahead of" if seconds > 0 else "behind"
    message = 'this host\'s clock is %.1f s %s that of the database "%s"; timers will be off by as much'
    logger.warning(message, abs(seconds), ahead, using)


def log_released(pid: int, runs: int, *, told: bool) -> None:
    if told:
        logger.info("worker %s left %s run(s) unfinished; they are back in the queue", pid, runs)
    else:
        logger.error("worker %s died with %s run(s) in hand; they go on elsewhere", pid, runs)


def log_not_renewed(runs: int, error: Exception) -> None:
    logger.warning("the leases of %s run(s) could not be renewed: %s", runs, str(error).strip())


def log_pass_broken(message: Any, error: BaseException) -> None:
    words = "a pass of %s broke off; its lease runs out and the run is taken up again"
    logger.error(words, message, exc_info=error)


def log_replaced(part: str, pid: int, exitcode: int | None) -> None:
    if exitcode:
        how = f"was killed by signal {-exitcode}" if exitcode < 0 else f"died with exit code {exitcode}"
        logger.error("%s %s %s; another one takes its place", part, pid, how)
    else:
        logger.info("%s %s has done its share; another one takes its place", part, pid)


def log_stuck(part: str, pid: int) -> None:
    logger.error("%s %s no longer answers; it is killed and replaced", part, pid)


def log_gate_broken(gate: str, error: Exception) -> None:
    logger.error("the gate %s raised an error and counts as open", gate, exc_info=error)


def log_chore_failed(chore: str, error: Exception) -> None:
    logger.error("the cluster could not %s; it goes on without, and tries again later", chore, exc_info=error)


def log_lines_lost(run: Any, error: Exception) -> None:
    message = "%s: some lines of the log of run %s could not be written: %s"
    logger.error(message, run.job_id, run.pk, str(error).strip(), **_about(run))


def log_backoff_broken(error: Exception) -> None:
    logger.error("a job's own backoff failed; the default one takes its place", exc_info=error)
