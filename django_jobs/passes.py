"""
One pass of a run: what it has done before, what it may do now, and how it ends.

A pass has branches: the job's own code, and each thunk of a ``parallel``. They share the history, and the
lease that fences all they write; each has its own place in it.
"""

import asyncio
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import Any
from uuid import UUID

from django.db import transaction

from . import clock, signals
from .conf import conf
from .exceptions import Interrupt, NonRetriableError, storable
from .models import Event, Run, Step, StepKind, StepStatus
from .models.run import Held
from .models.step import FAILURE
from .outage import outlast
from .registry import Job
from .runlog import RunLog

#: Called at each boundary of a checkpoint; the testing kit lets a worker die there.
boundary: Callable[[str], None] = lambda moment: None  # noqa: E731


#: Asked before a step works: what to call instead of the job's own code. For the testing kit.
stand_in: Callable[["Pass", Step], Callable[..., Any] | None] = lambda current, step: None  # noqa: E731


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
    swallowed: Interrupt | None = None
    #: Where the job awaits: the task of the event loop that used a name.
    users: dict[str, Any] | None = None
    #: What the code does now, it did before, in an earlier pass.
    replaying: bool = False
    #: Set when it has come to its first step.
    arrived: threading.Event = field(default_factory=threading.Event)

    def place(self, name: str) -> str:
        """Return the identity of its next step called ``name``: repeated names are told apart by a number."""
        self.claim(name, f'Step "{name}"')
        return f"{self.tag}:{self._numbered(name)}"

    def fork(self) -> str:
        """Return what the tags of its next branches begin with."""
        self.claim("", "A parallel")
        self.forks += 1
        return f"{self.tag}/{self.forks}." if self.tag else f"{self.forks}."

    def item(self) -> "Branch":
        """Return a branch for a step that has its name already and is done beside others."""
        branch = Branch(tag=self.tag, users=self.users)
        branch.arrived.set()
        return branch

    def claim(self, name: str, what: str) -> None:
        """Refuse a name that another task of the event loop has used: which comes first is chance."""
        if self.users is None:
            return
        task = _current_task()
        if task is None:
            raise NonRetriableError(
                f"{what} is called in a thread. An async job calls its steps in async code."
            )
        if self.users.setdefault(name, weakref.ref(task))() is not task:
            raise NonRetriableError(
                f"{what} is called by several tasks, and which of them comes first is chance. Give each step a"
                " name of its own, or make the tasks branches of one ctx.step.parallel."
            )

    def _numbered(self, name: str) -> str:
        count = self.used[name] = self.used.get(name, 0) + 1
        return name if count == 1 else self._numbered(f"{name}#{count}")


#: The branch that the code now running belongs to, and the step it is inside of. Not thread-local: a
#: task of an event loop has its own, and a thread that a branch starts gets a copy.
_branch: ContextVar[Branch | None] = ContextVar("branch", default=None)
inside: ContextVar[str | None] = ContextVar("inside", default=None)


@contextmanager
def outside() -> Iterator[None]:
    """Do what is within inside of no step, whatever called it."""
    token = inside.set(None)
    try:
        yield
    finally:
        inside.reset(token)


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
    #: When the run has taken too long, by its ``timeouts.finish``; what is done about a failure may take its time.
    deadline: datetime | None = None
    #: What the run failed with for good, while ``on_failure`` is at work; None before.
    failure: dict | None = field(init=False)
    root: Branch = field(init=False)
    #: What ends all branches alike, once one has met it.
    over: Interrupt | None = field(init=False)
    #: What it has ended with, where the job awaits and its tasks are being cancelled.
    ended: Interrupt | None = field(init=False)
    #: The identities of the steps it came by.
    visited: set[str] = field(default_factory=set)
    #: The events that its waits have taken, each once, and the one that started it.
    consumed: set[UUID] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.lock = threading.RLock()
        self.attempt = self.run.attempt
        self.run.listening = self.listening
        #: The last pass was cut off: nobody knows how far it came after its last write.
        self.is_takeover = self.run.crashes > 0
        #: A pass that died or failed may have got no further than its newest checkpoint.
        self.cut_short = bool(self.run.attempt or self.run.crashes)
        #: How often each name was asked for: those of the steps there are, once.
        self.names = {step.name: 1 for step in self.history.values()}
        self.newest = _newest(self.history.values())
        self._begin(self.run.error)

    def _begin(self, failure: dict | None) -> None:
        """Begin with the job's code, or with what is to be done about its failure: each has a history of its own."""
        self.failure, part = failure, FAILURE if failure else ""
        mine = sum(step.part == part for step in self.history.values())
        self.others = len(self.names) - mine
        # A step that waits counts too: what comes before it was done, and logged, in an earlier pass.
        self.root = Branch(tag=part, replaying=bool(mine))
        self.over = self.ended = None
        if failure:
            self.deadline = None

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

    def fork(self, count: int) -> list[Branch]:
        """Return ``count`` branches of the one that the caller is in, each with a place of its own in the history."""
        parent = self.branch
        stem = parent.fork()
        # Did an earlier pass come past them? If not, each is where its own last step is.
        parent.replaying = parent.replaying and not self.newest.get(parent.tag, "").startswith(stem)
        return [
            Branch(
                tag=(tag := f"{stem}{n}"),
                users=None if parent.users is None else {},
                replaying=parent.replaying or tag in self.newest,
            )
            for n in range(count)
        ]

    @property
    def replaying(self) -> bool:
        """Whether the code now running only does again what it did in an earlier pass."""
        return self.branch.replaying

    def turn_to_failure(self, report: dict) -> None:
        """Go on with what the job wants done about its failure, once that is noted."""
        self.attempt = self.run.crashes = 0
        self._begin(report)

    def end(self, interrupt: Interrupt) -> Interrupt:
        """Note that ``interrupt`` is raised in this branch."""
        if self.branch.users is None:
            self.branch.interrupts.append(interrupt)
        return interrupt

    def met(self, interrupt: Interrupt) -> None:
        """Have the other branches end too, unless ``interrupt`` is about one step only."""
        if not isinstance(interrupt, Parked):
            self.over = self.over or interrupt

    # Steps.

    def visit(self, name: str, kind: StepKind) -> Step:
        """Return the step of this name, from the history or new; refuse what no job may do here."""
        branch = self.branch
        with self.lock:
            place = branch.place(_checked(name))
            self.visited.add(place)
            self._may_go_on(branch, name)
            known = self.history.get(place)
            self.log.reached(known=known is not None)
            step = known or self._new(place, name, kind)
        branch.arrived.set()
        # A branch that has nothing left to do says so in each pass: once was enough.
        has_ended = place == self.newest.get(branch.tag) and (self.cut_short or not branch.tag)
        if step.status == StepStatus.WAITING or has_ended:
            branch.replaying = False
        return step

    def _may_go_on(self, branch: Branch, name: str) -> None:
        if self.ended:
            self.root.swallowed = self.ended
            raise self.ended
        if branch.interrupts:
            branch.swallowed = branch.interrupts[-1]
            raise branch.swallowed
        if outer := inside.get():
            raise NonRetriableError(
                f'Step "{name}" is called inside step "{outer}". A step cannot hold another:'
                " call it from the job itself, one after the other."
            )

    def _new(self, place: str, name: str, kind: StepKind) -> Step:
        """Make a step; its name is the one it was given, numbered if another has it."""
        free = name
        while free in self.names:
            self.names[name] += 1
            free = f"{name}#{self.names[name]}"
        self.names[free] = 1
        return Step(
            run_id=self.run.pk,
            name=free,
            place="" if place == f":{free}" else place,
            kind=kind,
            status=StepStatus.WAITING,
            started_at=clock.now(),
        )

    def may_work(self, step: Step) -> None:
        """End the pass, or refuse, where ``step`` may not be worked on."""
        if self.over:
            raise self.end(type(self.over)(*self.over.args))
        if self.stopping():
            raise self.end(HandedBack())
        if self.deadline and clock.now() >= self.deadline:
            raise self.end(Overdue())
        if step.pk is None and len(self.names) - self.others > conf.MAX_STEPS:
            raise NonRetriableError(
                f"The run has {conf.MAX_STEPS} steps, the most it may have (MAX_STEPS)."
                " Start other runs from it for the rest."
            )

    def unvisited(self) -> list[int]:
        """List the checkpoints of the job's code that it did not come by."""
        return [
            step.pk for place, step in self.history.items() if place not in self.visited and not step.part
        ]

    def in_time(self, until: datetime) -> datetime:
        """Return when the run goes on that waits ``until`` then: at its deadline at the latest, to be ended."""
        return min(until, self.deadline or until)

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
        self.tell(step)

    def tell(self, step: Step) -> None:
        """Tell the world that ``step`` is done, or failed for good."""
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


def _current_task() -> "asyncio.Task[Any] | None":
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None


def _checked(name: str) -> str:
    if not isinstance(name, str) or not 1 <= len(name) <= 190 or storable(name) != name:
        raise NonRetriableError(f"A step name is a string of 1 to 190 characters, not {name!r}.")
    return name


def _newest(steps: Iterable[Step]) -> dict[str, str]:
    """
    Return the identity of the newest step of each branch, by its tag, those of its own branches included.

    A step that waits counts too: what comes before it was done, and logged, in an earlier pass.
    """
    newest = {}
    for step in sorted(steps, key=lambda step: step.pk):
        tag = step.identity.partition(":")[0]
        newest[tag] = step.identity
        while tag:
            tag = tag.rpartition("/")[0]
            newest[tag] = step.identity
    return newest
