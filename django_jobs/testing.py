"""
For host projects: run jobs in a test, inline, in its own transaction, on a virtual clock.

Use the pytest fixture ``jobs``, or ``with Jobs() as jobs:``, in a plain ``TestCase``. Nothing sleeps
for real: ``advance`` moves the clock through every wake-up on the way.
"""

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, cast

from asgiref.sync import sync_to_async
from django.db import connections, router
from django.db.models import Min

from . import clock, executor, passes, registry, routing, scheduler
from .models import OPEN, Event, Run, claim

#: More passes than this in one ``drain`` mean that a job goes round in a circle.
MOST_PASSES = 100_000


def now() -> datetime:
    """Return what the clock of ``jobs`` says: the virtual instant inside a test, else the real one."""
    return clock.now()


class Jobs:
    """A worker, a clock and an inspector for tests."""

    def __enter__(self) -> "Jobs":
        self._now = datetime.now(UTC)
        self._declared = dict(registry._jobs)
        clock.use(lambda: self._now)
        return self

    def __exit__(self, *raised: Any) -> None:
        clock.use(None)
        passes.boundary = _nothing
        registry._jobs.clear()
        registry._jobs.update(self._declared)
        registry._by_event = None

    def run(self, job: registry.Job | str, data: dict | None = None) -> Run:
        """Start a job, run everything that is due, and return the run as it is then."""
        run = (registry.get(job) if isinstance(job, str) else job).start(data)
        self.drain()
        return _fresh(run)

    def drain(self) -> int:
        """Run everything due now until nothing is; return the number of passes."""
        passes = 0
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
        self.travel_to(self._now + by)

    def travel_to(self, instant: datetime) -> None:
        """Move the clock to ``instant``; forward, everything that comes due on the way is run."""
        if instant.tzinfo is None:
            raise ValueError(f"travel_to takes an aware datetime, not {instant!r}.")
        self.drain()
        while (wake := self._next_wake()) and wake <= instant:
            self._now = max(self._now, wake)
            self._fire_crons()
            self.drain()
        self._now = instant.astimezone(UTC)
        self.drain()

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
        events = Event.objects.order_by("received_at", "id")
        return list(events.filter(name=name) if name else events.exclude(name__startswith="django_jobs/"))

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
        self.drain()
        while wake := _earliest():
            self._now = max(self._now, wake)
            if not self.drain():
                return

    def _claim(self) -> list[Run]:
        known = [job.id for job, _ in registry.declared()]
        claim.forget()  # On MariaDB a priority never seen before would have to wait a second, a real one.
        return Run.objects.using(router.db_for_write(Run)).claim(1, jobs=known, worker="test")

    def _next_wake(self) -> datetime | None:
        instants = [instant for instant in (_earliest(self._now), self._next_slot()) if instant]
        return min(instants, default=None)

    def _next_slot(self) -> datetime | None:
        return min((cron.next(self._now) for job in registry.jobs() for cron in job.crons), default=None)

    def _fire_crons(self) -> None:
        just_before = self._now - timedelta(microseconds=1)
        for job in registry.jobs():
            for cron in job.crons:
                if cron.next(just_before) == self._now:
                    scheduler.fire(job.id, cron.key, self._now)


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
