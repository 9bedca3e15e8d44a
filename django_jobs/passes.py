"""
One pass of a run: what it has done before, what it may do now, and how it ends.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property

from django.db import transaction

from . import clock, signals
from .conf import conf
from .exceptions import Interrupt, NonRetriableError, storable
from .models import Event, Run, Step, StepKind, StepStatus
from .models.run import Held
from .outage import outlast
from .registry import Job
from .runlog import RunLog

#: Called at each boundary of a checkpoint; the testing kit lets a worker die there.
boundary: Callable[[str], None] = lambda moment: None  # noqa: E731


class Parked(Interrupt):
    """The pass is over: the run sleeps, or waits for its next attempt, until ``until``."""

    def __init__(self, step: str, until: datetime, *, asleep: bool) -> None:
        super().__init__(step)
        self.step, self.until, self.asleep = step, until, asleep


class HandedBack(Interrupt):
    """The worker is stopping: another one goes on from here."""


class Died(Interrupt):
    """Stands for kill -9 in the testing kit: nothing may act on it."""


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
    started_at: datetime = field(default_factory=clock.now)
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
        self.log.reached(known=step is not None)
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
        """Write the checkpoint of ``step``, in whatever transaction there is; end a pass that lost its lease."""
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
            if not Run.objects.using(self.using).renew([self.run.hold]):
                raise self.end(Lost())
            yield

    def progressed(self, step: Step) -> None:
        """Start the counts of failed tries and lost workers anew, and tell the world."""
        if self.attempt or self.run.crashes:
            self.attempt = self.run.crashes = 0
            outlast(self.using, self.held.forget_failures)
        if signals.step_finished.has_listeners(Step):
            signals.announce(signals.step_finished, Step, using=self.using, run=self.run, step=step)
        if not self.log.flush_if_due():
            raise self.end(Lost())

    @cached_property
    def held(self) -> Held:
        return Run.objects.using(self.using).held(self.run)

    @cached_property
    def log(self) -> RunLog:
        return RunLog(self.run, self.using, lambda: self.replaying)
