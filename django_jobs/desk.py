"""
Where an async job stands: which of its steps are at work, and which tasks wait for what only a later pass can bring.

A step that has to wait does not return in this pass. Its task stays where it is, and the others go on. Only when
none can, the pass ends, and that is when the job's code hears of it: as a task that is cancelled.
"""

import asyncio
from asyncio import locks, queues, taskgroups, tasks
from collections.abc import Coroutine, Iterable, Iterator
from contextlib import contextmanager
from inspect import CORO_CREATED, getcoroutinestate, iscoroutine
from typing import Any

from .exceptions import Interrupt
from .passes import Pass, together

Task = asyncio.Task[Any]

#: So many seconds a task may be busy with anything but steps while another one waits for the next pass.
PATIENCE = 30.0
#: How long to wait, at first and at most, before looking again whether it still is.
GLANCE, LONGEST_GLANCE = 0.001, 0.1
#: So many turns of the loop it takes, at the most, until what has ended reaches the task that waits for it.
TURNS = 3


class Desk:
    """The steps of an async job in one pass."""

    def __init__(self, current: Pass, *, in_transaction: bool) -> None:
        self.current = current
        #: There is a transaction around the pass, a test case's: no two steps may be in it at once.
        self.in_transaction = in_transaction
        self.busy = 0
        #: The tasks that cannot go on in this pass.
        self.parked: dict[Task, Interrupt] = {}
        #: The branches of ``parallel`` at work, each with what it has a slot of.
        self.branches: dict[Task, asyncio.Semaphore] = {}
        #: All that was called and is to be awaited, with what to call it.
        self.called: list[tuple[str, Coroutine[Any, Any, Any]]] = []
        self.news = asyncio.Event()

    # For steps.

    def call(self, what: str, step: Coroutine[Any, Any, Any]) -> Coroutine[Any, Any, Any]:
        self.called.append((what, step))
        return step

    @contextmanager
    def at_work(self) -> Iterator[None]:
        if self.current.ended:
            raise self.current.ended
        self.busy += 1
        try:
            yield
        finally:
            self.busy -= 1
            self.news.set()

    async def park(self, interrupt: Interrupt) -> None:
        """Stay here: the step's result is for a later pass."""
        if self.current.ended:
            raise interrupt
        self.parked[_this_task()] = interrupt
        self.news.set()
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            del self.parked[_this_task()]

    @contextmanager
    def branch(self, slots: asyncio.Semaphore) -> Iterator[None]:
        """Hold a slot until the branch ends, or can do no more in this pass."""
        self.branches[task := _this_task()] = slots
        try:
            yield
        finally:
            self._free(task)

    def _free(self, task: Task) -> None:
        if slots := self.branches.pop(task, None):
            slots.release()

    # For the job.

    async def attend(self, job: Task) -> Interrupt | None:
        """Return when the job has ended and no step is at work; if the pass had to end, what it ended with."""
        job.add_done_callback(lambda _: self.news.set())
        glance, left = GLANCE, PATIENCE
        while self.busy or not job.done():
            waits = await self._waits(job)
            if waits and (left <= 0 or not self._anyone_goes_on()):
                self.current.ended = together(self.parked.values())
                job.cancel()
            elif await self._hears_of(within=glance if waits else None):
                glance, left = GLANCE, PATIENCE
            else:
                glance, left = min(2 * glance, LONGEST_GLANCE), left - glance
        ended, self.current.ended = self.current.ended, Interrupt()
        return ended

    async def _waits(self, job: Task) -> bool:
        """Tell whether all there is to do is wait: for the next pass, or for a task that is busy with other things."""
        for _ in range(TURNS if self.parked and not self.busy else 0):
            await asyncio.sleep(0)
        return bool(self.parked) and not (self.busy or job.done() or self.current.ended)

    async def _hears_of(self, *, within: float | None) -> bool:
        try:
            async with asyncio.timeout(within):
                await self.news.wait()
        except TimeoutError:
            return False
        self.news.clear()
        return True

    def _anyone_goes_on(self) -> bool:
        """Tell whether a task can go on in this pass; free the slots of the branches that cannot."""
        for task in [task for task in self.branches if not self._goes_on(task)]:
            self._free(task)
        return any(self._goes_on(task) for task in asyncio.all_tasks() - {_this_task()})

    def _goes_on(self, task: Task, seen: frozenset[Task] = frozenset()) -> bool:
        if task.done() or task in self.parked or task in seen:
            return False
        others = awaited_by(task)
        return others is None or any(self._goes_on(other, seen | {task}) for other in others)

    def close(self) -> str:
        """Return what was called and never awaited, the first of it."""
        forgotten = [(what, step) for what, step in self.called if getcoroutinestate(step) == CORO_CREATED]
        for _, step in forgotten:
            step.close()
        return forgotten[0][0] if forgotten else ""


def _this_task() -> Task:
    task = asyncio.current_task()
    assert task is not None, "steps are awaited in a task"
    return task


# What a task waits for. asyncio does not tell, so this looks at its insides; where they are other than it thinks, it
# takes a task for one that goes on, and the pass ends ``PATIENCE`` later.

PRIMITIVES = {locks.__file__, queues.__file__}


def awaited_by(task: Task) -> Iterable[Task] | None:
    """Return the tasks that this one waits for, no one in particular at a lock or a queue; None if it goes on."""
    waiter = getattr(task, "_fut_waiter", None)
    if waiter is None or waiter.done():
        return None
    if isinstance(waiter, asyncio.Task):
        return [waiter]
    if hasattr(waiter, "_children"):  # What asyncio.gather returns.
        return _pending(waiter._children)
    inner: Any = task.get_coro()
    while iscoroutine(getattr(inner, "cr_await", None)):
        inner = inner.cr_await
    return _awaited_in(inner.cr_frame) if iscoroutine(inner) else None


def _awaited_in(frame: Any) -> Iterable[Task] | None:
    code, variables = frame.f_code, frame.f_locals
    if code.co_filename == taskgroups.__file__:
        return _pending(getattr(variables.get("self"), "_tasks", ()))
    if code.co_filename == tasks.__file__:
        within = {"_wait": variables.get("fs"), "wait_for": [variables.get("fut")]}.get(code.co_name)
        return _pending(within) if within else None
    return () if code.co_filename in PRIMITIVES else None


def _pending(futures: Iterable[Any]) -> Iterable[Task] | None:
    """Return those that are not done; None if there is none, so that the news is on its way, or one is no task."""
    pending = [future for future in futures if future and not future.done()]
    found = [one for one in pending if isinstance(one, asyncio.Task)]
    return found if found and len(found) == len(pending) else None
