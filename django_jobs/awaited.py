"""
The same step tools for a job that is an ``async def``: each returns an awaitable.

What touches the database runs in the worker's own thread, one piece at a time, which is where Django's
async ORM calls go too; only the work of a step is awaited side by side with others.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from inspect import isawaitable, iscoroutinefunction
from typing import Any

from asgiref.sync import async_to_sync, sync_to_async

from .branches import Ended, join
from .exceptions import Interrupt
from .models import Step, StepKind, StepStatus
from .passes import Branch, Pass, together
from .perform import Doing, Outcome, Work, late
from .steps import Steps, outcome


class AsyncSteps(Steps):
    """The step tools of an async job, ``ctx.step``: await each, or several at once with ``asyncio.gather``."""

    def _do(self, step: Step, doing: Doing) -> Awaitable[Any]:
        # Named when it was called, not when it is awaited: so the names follow the order in the code.
        return _Doing(step, doing).drive()

    async def _side_by_side(
        self, forked: Sequence[Branch], thunks: Sequence[Callable[[], Any]], limit: int
    ) -> Any:
        ended, slots = [Ended() for _ in thunks], asyncio.Semaphore(limit)

        async def one(branch: Branch, thunk: Callable[[], Any], end: Ended) -> None:
            async with slots:
                with self._pass.enter(branch):
                    try:
                        value = thunk()
                        end.value = await value if isawaitable(value) else value
                    except BaseException as error:
                        end.error = error

        await asyncio.gather(*map(one, forked, thunks, ended))
        return join(self._pass, forked, ended)


class _Doing:
    """A step that is being done: its generator, driven piece by piece."""

    def __init__(self, step: Step, doing: Doing) -> None:
        self.step, self.doing = step, doing

    async def drive(self) -> Any:
        if self.step.status != StepStatus.WAITING:
            return self._advance(None)[1]  # What is remembered needs no database.
        with _desk.get().at_work() as lock:
            if self.step.kind not in (StepKind.ATOMIC, StepKind.EMIT):
                return await self._drive(lock)
            async with lock:  # Nothing else may write into its transaction.
                return await self._drive(nullcontext())

    async def _drive(self, lock: Any) -> Any:
        how: Outcome | None = None
        while True:
            async with lock:
                done, what = await sync_to_async(self._advance)(how)
            if done:
                return what
            how = await _outcome(what)

    def _advance(self, how: Outcome | None) -> tuple[bool, Any]:
        try:
            return False, next(self.doing) if how is None else self.doing.send(how)
        except StopIteration as ended:
            return True, ended.value


async def _outcome(work: Work) -> Outcome:
    """Call what a step wants called, await it if it is to be, and return how that went."""
    if not iscoroutinefunction(work.call):
        how = await sync_to_async(outcome)(work)
        if not isawaitable(how.value):
            return how
        awaitable = how.value
    else:
        awaitable = work.call()
    with work.watched():
        try:
            async with asyncio.timeout(work.timeout) as limit:
                value = await awaitable
        except asyncio.CancelledError as error:
            if (task := asyncio.current_task()) and task.cancelling():
                raise
            return Outcome(error=error)
        except BaseException as error:
            return Outcome(error=late(work.timeout) if limit.expired() else error)
    # It may have caught its cancellation, or not have let the event loop look at the time.
    return Outcome(error=late(work.timeout)) if limit.expired() else work.returned(value)


class _Desk:
    """Which steps of an async job are being done, and the lock of those that use the database."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.busy = 0
        self.cleared = asyncio.Event()

    @contextmanager
    def at_work(self) -> Iterator[asyncio.Lock]:
        self.busy += 1
        try:
            yield self.lock
        finally:
            self.busy -= 1
            self.cleared.set()

    async def clear(self) -> None:
        """Wait until no step is being done: a task that the job left behind may have begun another meanwhile."""
        await asyncio.sleep(0)
        while self.busy:
            self.cleared.clear()
            await self.cleared.wait()
            await asyncio.sleep(0)


_desk: ContextVar[_Desk] = ContextVar("desk")


def call(current: Pass, handler: Callable[..., Coroutine], *arguments: Any) -> Any:
    """
    Return what an async job returns, from this thread.

    Steps that other tasks still do when it ends come to their end first: what they write is fenced by a lease
    that is ours until the run is settled.
    """

    async def main() -> Any:
        desk = _Desk()
        _desk.set(desk)
        try:
            return await handler(*arguments)
        except Interrupt:
            await desk.clear()
            raise together(current.root.interrupts) from None
        finally:
            await desk.clear()

    current.root.is_async = True
    return async_to_sync(main)()
