"""
For host projects: run jobs in a test, inline, in its own transaction, on a virtual clock.

Take the pytest fixture ``jobs``; in a ``TestCase``, ``from django_jobs.testing import jobs``; anywhere
else, ``with Jobs() as jobs:``. Nothing sleeps for real: ``advance`` moves the clock through every
wake-up on the way.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import wraps
from pathlib import Path
from traceback import walk_stack
from typing import Any, cast
from unittest import TestCase

from asgiref.sync import sync_to_async
from django.db import connections, router
from django.db.models import Min

from . import clock, executor, passes, pauses, registry, rehearsal, routing, scheduler
from .models import OPEN, Event, Run, RunStatus, Step, claim

#: More passes than this in one ``drain`` mean that a job goes round in a circle.
MOST_PASSES = 100_000


#: The kits in use, the innermost last.
_entered: list["Jobs"] = []


def now() -> datetime:
    """Return what the clock of ``jobs`` says: the virtual instant inside a test, else the real one."""
    return clock.now()


@dataclass
class _StandIn:
    """What a test has a step do in place of the job's own code, for some times or for good."""

    step: str
    job: str | None
    call: Callable[..., Any]
    left: int | None = None

    def is_for(self, job: str, step: str) -> bool:
        # The second step of a name is called ``name#2``.
        return self.left != 0 and self.job in (None, job) and step.split("#")[0] == self.step

    def take(self) -> Callable[..., Any]:
        if self.left is not None:
            self.left -= 1
        return self.call


def _raising(error: BaseException) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        raise error

    return call


class Jobs:
    """A worker, a clock and an inspector for tests."""

    def __enter__(self) -> "Jobs":
        self._now = datetime.now(UTC)
        self._was_moved = False
        self._standing_in: list[_StandIn] = []
        self._declared = dict(registry._jobs)
        _entered.append(self)
        clock.use(self._tell)
        return self

    def __exit__(self, *raised: Any) -> None:
        _entered.remove(self)
        clock.use(_entered[-1]._tell if _entered else None)
        passes.boundary = _nothing
        passes.stand_in = _entered[-1]._find_stand_in if _entered else _nobody
        _forget_jobs_since(self._declared)

    def _tell(self) -> datetime:
        return self._now

    def run(self, job: registry.Job | str, data: dict | None = None) -> Run:
        """Start a job, run everything that is due, and return the run as it is then."""
        run = (registry.get(job) if isinstance(job, str) else job).start(data)
        self.drain()
        return _fresh(run)

    def drain(self) -> int:
        """
        Run everything due now, crons of this very instant too, until nothing is; return the number of passes.

        What host code stamped with the real time is due as well: a clock that no test has moved goes along.
        """
        self._fire_crons()
        passes = self._work()
        while not self._was_moved and (wake := _earliest(self._now)) and wake <= datetime.now(UTC):
            self._now = wake
            passes += self._work()
        return passes

    def _work(self) -> int:
        passes = 0
        _commit()
        while runs := _route() and self._claim():
            for run in runs:
                executor.execute(run)
                _commit()
            passes += len(runs)
            if passes > MOST_PASSES:
                raise AssertionError(
                    f"drain made {passes} passes and {runs[0].job_id} is still due; does it start itself?"
                )
        return passes

    def advance(self, by: timedelta) -> None:
        """Move the clock on by ``by``, stopping at every wake-up and cron slot on the way to run what is due."""
        self._move(self._now + by, with_crons=True)

    def travel_to(self, instant: datetime) -> None:
        """
        Set the clock to ``instant``. Runs wake at their times on the way; crons between are left out.

        A test that is about one Monday in March wants that Monday, and not each night until then.
        """
        if instant.tzinfo is None:
            raise ValueError(f"travel_to takes an aware datetime, not {instant!r}.")
        self._move(instant.astimezone(UTC), with_crons=False)

    def _move(self, until: datetime, *, with_crons: bool) -> None:
        self._was_moved = True
        self._work()
        while (stop := self._next_stop(with_crons)) and stop <= until:
            self._now = stop
            if with_crons:
                self._fire_crons()
            self._work()
        self._now = until
        self._work()

    async def arun(self, job: registry.Job | str, data: dict | None = None) -> Run:
        """Await ``run`` in an async test."""
        return await sync_to_async(self.run)(job, data)

    async def adrain(self) -> int:
        """Await ``drain`` in an async test."""
        return await sync_to_async(self.drain)()

    async def aadvance(self, by: timedelta) -> None:
        """Await ``advance`` in an async test."""
        await sync_to_async(self.advance)(by)

    def emitted(self, name: str | None = None) -> list[Event]:
        """List the events recorded, oldest first; those of one name, or all but the engine's own."""
        events = Event.objects.filter(edited_from=None).order_by("received_at", "id")
        return list(events.filter(name=name) if name else events.exclude(name__startswith="django_jobs/"))

    def queued(self, job: registry.Job | str | None = None) -> list[Run]:
        """List the runs that were started and have done nothing yet, oldest first; of one job or of all."""
        waiting = Run.objects.filter(status=RunStatus.QUEUED, started_at=None).order_by("queued_at", "id")
        return list(waiting.filter(job_id=str(job)) if job else waiting)

    def stub(self, step: str, returns: Any = None, *, job: registry.Job | str | None = None) -> None:
        """
        Have steps of this name return ``returns`` from now on (or what it returns, a function) and call nothing.

        A wait then comes to the event with that data, or to None; an invoke to that output. Sleeps
        are passed by ``advance``.
        """
        self._stand_in(step, job, returns if callable(returns) else lambda *args, **kwargs: returns)

    def fail(
        self,
        step: str,
        times: int = 1,
        error: BaseException | None = None,
        *,
        job: registry.Job | str | None = None,
    ) -> None:
        """Have the next ``times`` tries of steps of this name raise ``error``, and then work as they do."""
        self._stand_in(step, job, _raising(error or RuntimeError("The test has it fail.")), times)

    def replays(self, history: str | Path | Run) -> bool:
        """
        Return True if today's code goes the way that a run went; raise ``AssertionError`` saying where it does not.

        ``history`` is what ``manage.py jobs export RUN`` printed, or the file with it, or a run.
        """
        rehearsal.rehearse(history)
        return True

    def _stand_in(
        self, step: str, job: registry.Job | str | None, call: Callable[..., Any], times: int | None = None
    ) -> None:
        self._standing_in.insert(0, _StandIn(step, str(job) if job else None, call, times))
        passes.stand_in = self._find_stand_in

    def _find_stand_in(self, current: passes.Pass, step: Step) -> Callable[..., Any] | None:
        found = next((one for one in self._standing_in if one.is_for(current.job.id, step.name)), None)
        return found.take() if found else None

    def crash_everywhere(
        self, job: registry.Job | str, data: dict | Callable[[], dict | None] | None = None
    ) -> Iterator[Run]:
        """
        Start the job again and again, each time with a worker that dies one boundary later.

        The boundaries are the moments before and after each write of the engine. The run is then taken
        over and brought to its end, sleeps and all, and yielded. ``data`` may be a function, called
        for each run. The clock moves on by the lease and by what the run sleeps.
        """
        job = registry.get(job) if isinstance(job, str) else job
        for nth in range(MOST_PASSES):
            run = job.start(data() if callable(data) else data)
            died = self._run_until_death(nth)
            if not died:
                self._finish(run)
                return
            self._finish(run)
            yield _fresh(run)

    def _run_until_death(self, nth: int) -> bool:
        seen = 0

        def die(moment: str) -> None:
            nonlocal seen
            seen += 1
            if seen > nth:  # From then on: what else the worker has in hand dies with it.
                raise passes.Died(moment)

        passes.boundary = die
        try:
            self._until_quiet()
        except passes.Died:
            return True
        finally:
            passes.boundary = _nothing
        return False

    def _finish(self, run: Run) -> None:
        self._until_quiet()
        final = _fresh(run)
        if final.status in OPEN:
            raise AssertionError(f"{final} is {final.status} and has no time to wake at.")

    def _until_quiet(self) -> None:
        """Run what is due and follow the wake-ups, leases of dead workers among them, until no run is open."""
        self._work()
        while wake := _earliest():
            self._now = max(self._now, wake)
            if not self._work():
                return

    def _claim(self) -> list[Run]:
        using = router.db_for_write(Run)
        paused = pauses.skip_new(using)
        jobs = [job.id for job in registry.known(own=True) if job.id not in paused]
        claim.forget()  # On MariaDB a priority never seen before would have to wait a second, a real one.
        return Run.objects.using(using).claim(1, jobs=jobs, worker="test")

    def _next_stop(self, with_crons: bool) -> datetime | None:
        slots = [cron.next(self._now) for job in registry.jobs() for cron in job.crons if with_crons]
        wake = _earliest(self._now)
        return min([*slots, wake] if wake else slots, default=None)

    def _fire_crons(self) -> None:
        just_before = self._now - timedelta(microseconds=1)
        for job in registry.jobs():
            for cron in job.crons:
                if cron.next(just_before) == self._now:
                    scheduler.fire(job.id, cron.key, self._now)


def _forget_jobs_since(declared: dict[str, registry.Job]) -> None:
    """Keep those of a module that the test was the first to import: nothing would declare them again."""
    lasting = {name: job for name, job in registry._jobs.items() if "<locals>" not in registry._home(job)}
    registry._jobs.clear()
    registry._jobs.update(declared | lasting)
    registry._by_event = None


def _earliest(after: datetime | None = None) -> datetime | None:
    open_runs = Run.objects.filter(wake_at__isnull=False)
    if after:
        open_runs = open_runs.filter(wake_at__gt=after)
    return open_runs.aggregate(earliest=Min("wake_at"))["earliest"]


def _fresh(run: Run) -> Run:
    return Run.objects.get(pk=run.pk)


def _commit() -> None:
    """Do what a commit would: a worker has no transaction around it, so its callbacks run at once."""
    connection = connections[router.db_for_write(Run)]
    callbacks, connection.run_on_commit = connection.run_on_commit, []
    for _, callback, robust in cast(list[Any], callbacks):
        try:
            callback()
        except Exception:
            if not robust:
                raise


def _route() -> bool:
    """Put all events before those who listen for them."""
    while routing.route():
        pass
    return True


def _nothing(moment: str) -> None:
    pass


def _nobody(current: passes.Pass, step: Step) -> None:
    pass


# The same in a ``TestCase``, on the kit of the test that calls: ``from django_jobs.testing import jobs``.


def _kit() -> Jobs:
    """Return the kit in use; without one, begin to use one until the clean-up of the running ``TestCase``."""
    if not _entered:
        _running_test().enterContext(Jobs())
    return _entered[-1]


def _running_test() -> TestCase:
    for frame, _ in walk_stack(None):
        if isinstance(test := frame.f_locals.get("self"), TestCase):
            return test
    raise RuntimeError(
        "No TestCase calls this. Take the pytest fixture `jobs`, or say `with Jobs() as jobs:`."
    )


def _of_the_kit(name: str) -> Callable[..., Any]:
    method = getattr(Jobs, name)

    @wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        return method(_kit(), *args, **kwargs)

    return call


run, drain, advance, travel_to, emitted, queued, stub, fail, replays, crash_everywhere = map(
    _of_the_kit,
    "run drain advance travel_to emitted queued stub fail replays crash_everywhere".split(),
)
jobs = sys.modules[__name__]
