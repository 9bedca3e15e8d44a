"""
One pass of a run: what it has done before, what it may do now, and how it ends.

A pass has branches: the job's own code, and each thunk of a ``parallel``. They share the history, and the
lease that fences all they write; each has its own place in it.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from uuid import UUID

from django.db import transaction

from . import clock, signals
from .conf import conf
from .exceptions import Interrupt, NonRetriableError, storable
from .models import Event, Run, Step, StepKind, StepStatus
from .models.run import Held
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


class Died(Interrupt):
    """Stands for kill -9 in the testing kit: nothing may act on it."""


class Lost(Interrupt):
    """Another worker holds the run's lease now, or the run was cancelled."""


class Overdue(Interrupt):
    """The run has taken longer than its ``timeouts.finish``."""


def together(interrupts: Iterable[Interrupt]) -> Interrupt:
    """Return the one interrupt that ends a pass whose branches ended with these."""
    interrupts = list(interrupts)
    for kind in (Died, Lost, Overdue, HandedBack):
        if found := next((one for one in interrupts if isinstance(one, kind)), None):
            return found
    parked = [one for one in interrupts if isinstance(one, Parked)]
    first = min(parked, key=lambda one: one.until)
    return Parked(first.step, first.until, asleep=any(one.asleep for one in parked))


@dataclass
class Branch:
    """A line of code within a pass: where it is in the run, and whether it has been told to end."""

    tag: str = ""
    #: How often each name was used.
    used: dict[str, int] = field(default_factory=dict)
    #: How many ``parallel`` it has begun.
    forks: int = 0
    #: The interrupts raised in it. A step called after one shows that the code swallowed it.
    interrupts: list[Interrupt] = field(default_factory=list)
    swallowed: bool = False
    #: Several tasks of an event loop may be in it at once, so one goes on when another was interrupted.
    is_async: bool = False
    #: Set when it has come to its first step.
    arrived: threading.Event = field(default_factory=threading.Event)

    def place(self, name: str) -> str:
        """Return the identity of its next step called ``name``: repeated names are told apart by a number."""
        return f"{self.tag}:{self._numbered(name)}"

    def _numbered(self, name: str) -> str:
        count = self.used[name] = self.used.get(name, 0) + 1
        return name if count == 1 else self._numbered(f"{name}#{count}")


#: The branch of what a job wants done once it has failed.
FAILURE = "failure"

#: The branch that the code now running belongs to, and the step it is inside of. Not thread-local: a
#: task of an event loop has its own, and a thread that a branch starts gets a copy.
_branch: ContextVar[Branch | None] = ContextVar("branch", default=None)
inside: ContextVar[str | None] = ContextVar("inside", default=None)


@dataclass
class Pass:
    """What one pass of a run knows: its history, how far it came, and whether it must end."""

    run: Run
    job: Job
    using: str
    event: Event | None = None
    #: Its steps, by their identity.
    history: dict[str, Step] = field(default_factory=dict)
    #: The events put before its waiting steps, by the step.
    delivered: dict[int, list[Event]] = field(default_factory=dict)
    #: From when on its waiting steps, and under None the run itself, listen for events.
    listening: dict[int | None, datetime] = field(default_factory=dict)
    stopping: Callable[[], bool] = bool
    #: Failed tries of the code between steps since the last checkpoint.
    attempt: int = 0
    started_at: datetime = field(default_factory=clock.now)
    root: Branch = field(default_factory=Branch)
    replaying: bool = False
    newest: str | None = None
    #: What the run failed with for good, while ``on_failure`` is at work; None before.
    failure: dict | None = None
    #: When the run has taken too long, by its ``timeouts.finish``.
    deadline: datetime | None = None
    #: The events that its waits have taken, each once, and the one that started it.
    consumed: set[UUID] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.lock = threading.RLock()
        self.attempt = self.run.attempt
        self.run.listening = self.listening
        #: The last pass was cut off: nobody knows how far it came after its last write.
        self.is_takeover = self.run.crashes > 0
        # A step that waits counts too: what comes before it was done, and logged, in an earlier pass.
        self.newest = max(self.history.values(), key=lambda step: step.pk).identity if self.history else None
        self.replaying = bool(self.history)
        self.names = {step.name for step in self.history.values()}

    # Branches.

    @property
    def branch(self) -> Branch:
        return _branch.get() or self.root

    @contextmanager
    def enter(self, branch: Branch) -> Iterator[None]:
        """Make ``branch`` the one that the code within belongs to."""
        token = _branch.set(branch)
        try:
            yield
        finally:
            _branch.reset(token)

    def turn_to_failure(self, report: dict, *, attempt: int = 0) -> None:
        """Go on with what the job wants done about its failure, in a branch of its own."""
        self.failure, self.attempt = report, attempt
        self.root = Branch(tag=FAILURE)

    def end(self, interrupt: Interrupt) -> Interrupt:
        self.branch.interrupts.append(interrupt)
        return interrupt

    # Steps.

    def visit(self, name: str, kind: StepKind) -> Step:
        """Return the step of this name, from the history or new; refuse what no job may do here."""
        branch = self.branch
        with self.lock:
            place = branch.place(_checked(name))
            self._may_go_on(branch, name)
            step = self.history.get(place) or self._new(place, name, kind)
            if step.status == StepStatus.WAITING or place == self.newest:
                self.replaying = False
        branch.arrived.set()
        if step.status == StepStatus.WAITING:
            self._may_work(is_new=step.pk is None)
        return step

    def _may_go_on(self, branch: Branch, name: str) -> None:
        if branch.interrupts and not branch.is_async:
            branch.swallowed = True
            raise branch.interrupts[-1]
        if outer := inside.get():
            raise NonRetriableError(
                f'Step "{name}" is called inside step "{outer}". A step cannot hold another:'
                " call it from the job itself, one after the other."
            )

    def _new(self, place: str, name: str, kind: StepKind) -> Step:
        """Make a step; its name is the one it was given, numbered if another has it."""
        free, count = place.split(":", 1)[1], 1
        while free in self.names:
            count += 1
            free = f"{name}#{count}"
        self.names.add(free)
        return Step(
            run_id=self.run.pk,
            name=free,
            place="" if place == f":{free}" else place,
            kind=kind,
            status=StepStatus.WAITING,
            started_at=clock.now(),
        )

    def _may_work(self, *, is_new: bool) -> None:
        if self.stopping():
            raise self.end(HandedBack())
        if self.deadline and clock.now() >= self.deadline:
            raise self.end(Overdue())
        if is_new and len(self.history) >= conf.MAX_STEPS:
            raise NonRetriableError(
                f"The run has {conf.MAX_STEPS} steps, the most it may have (MAX_STEPS)."
                " Start other runs from it for the rest."
            )

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
        self.history[step.identity] = step
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

    @cached_property
    def held(self) -> Held:
        return Run.objects.using(self.using).held(self.run)


def _checked(name: str) -> str:
    if not isinstance(name, str) or not 1 <= len(name) <= 190 or storable(name) != name:
        raise NonRetriableError(f"A step name is a string of 1 to 190 characters, not {name!r}.")
    return name
