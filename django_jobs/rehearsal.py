"""
What a run went through, taken out of the database, and rehearsed with today's code.

A rehearsal replays the recorded steps to a job and does no new one. So it tells, before a deploy, whether the
code still goes the way that the run went.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from django.db import router

from . import executor, payloads, registry
from .exceptions import Interrupt, JobsError
from .models import Event, Run, RunStatus, Step
from .passes import Pass

EVENT = ("id", "name", "key", "data", "occurred_at", "received_at")
RUN = ("id", "job_id", "version", "status", "output", "error", "queued_at", "started_at", "scheduled_for")
STEP = (
    "name",
    "place",
    "kind",
    "status",
    "output",
    "error",
    "attempts",
    "started_at",
    "finished_at",
    "wake_at",
)


class Deviation(AssertionError):
    """Today's code goes another way than the run did."""


class NotAHistory(JobsError):
    """This is not the history of a run; ``manage.py jobs export RUN`` writes one."""


def history(run: Run) -> str:
    """Return what ``run`` went through as typed JSON: the run, its event and its steps in order."""
    event = run.event and {name: getattr(run.event, name) for name in EVENT}
    steps = [{name: getattr(step, name) for name in STEP} for step in run.steps.order_by("pk")]
    told = {"run": {name: getattr(run, name) for name in RUN}, "event": event, "steps": steps}
    return payloads.dumps(told, where="the history")


def rehearse(recorded: str | Path | Run) -> None:
    """
    Replay a run's history with the job as it is now; raise ``Deviation`` saying where it goes another way.

    It does when the code comes to a step that a finished run did not have, when it no longer comes to one that is
    recorded, or when it ends otherwise. A run that is still open may have steps to come. The code
    between the steps is run; of the steps, none is.
    """
    told = _told(recorded)
    run, current = _pass(told)
    came_to, ended = _result(current)
    is_whole = run.status in (RunStatus.COMPLETED, RunStatus.FAILED)
    new = sorted(set(current.names) - {step.name for step in current.history.values()})
    missed = _missed(current, to_the_end=is_whole or ended)
    if is_whole and new:
        raise Deviation(f'{run.job_id}: today\'s code comes to step "{new[0]}", which the run did not have.')
    if missed:
        raise Deviation(f'{run.job_id}: today\'s code no longer comes to step "{missed[0]}".')
    if is_whole and came_to != _recorded(run):
        raise Deviation(
            f"{run.job_id}: today's code ends with {came_to}, and the run ended with {_recorded(run)}."
        )


def _missed(current: Pass, *, to_the_end: bool) -> list[str]:
    """List the recorded steps that the code did not come to, up to the last that it did."""
    steps = sorted(current.history.values(), key=lambda step: step.pk)
    came_by = [step.identity in current.visited for step in steps]
    last = len(steps) if to_the_end else len(steps) - came_by[::-1].index(True) if True in came_by else 0
    return [step.name for step, seen in zip(steps[:last], came_by, strict=False) if not seen]


def _told(recorded: str | Path | Run) -> Mapping[str, Any]:
    if isinstance(recorded, Run):
        recorded = history(recorded)
    if isinstance(recorded, Path):
        recorded = recorded.read_text()
    try:
        told = payloads.loads(recorded)
        return {name: told[name] for name in ("run", "event", "steps")}
    except (ValueError, KeyError, TypeError) as error:
        raise NotAHistory from error


def _pass(told: Mapping[str, Any]) -> tuple[Run, Pass]:
    """Return the run that is told of and a pass of it, neither of which is in the database."""
    run = Run(**told["run"], passes=2, lease=uuid4())
    failure, run.error = run.error, None  # Rehearsed is the job's own code, up to its failure.
    steps = [Step(pk=number, run_id=run.pk, **row) for number, row in enumerate(told["steps"], 1)]
    current = Pass(
        run=run,
        job=registry.get(run.job_id),
        using=router.db_for_write(Run),
        event=Event(**told["event"]) if told["event"] else None,
        history={step.identity: step for step in steps},
        stopping=lambda: True,  # At whatever is still to be done.
    )
    run.error = failure
    return run, current


def _result(current: Pass) -> tuple[Any, bool]:
    """Return what the job comes to, and whether it comes to an end at all with the steps there are."""
    try:
        return ("completed", payloads.loads(executor.call(current))), True
    except Interrupt:
        return None, False
    except Exception as error:
        return ("failed", type(error).__name__), True


def _recorded(run: Run) -> tuple[Any, Any]:
    if run.status == RunStatus.FAILED:
        return run.status, (run.error or {}).get("type")
    return run.status, run.output
