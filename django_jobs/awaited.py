"""
The same step tools for a job that is an ``async def``: each returns an awaitable.

What touches the database runs in the worker's own thread, one piece at a time, which is where Django's
async ORM calls go too; only the work of a step is awaited side by side with others.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextvars import ContextVar
from inspect import isawaitable, iscoroutinefunction
from typing import Any

from asgiref.sync import async_to_sync, sync_to_async
from django.db import connections

from .branches import join
from .desk import Desk
from .exceptions import Interrupt, NonRetriableError
from .models import Step, StepKind, StepStatus
from .passes import Branch, Died, Pass
from .perform import Doing, Outcome, Work, late
from .steps import Steps, drive, outcome

_desk: ContextVar[Desk] = ContextVar("desk")


class AsyncSteps(Steps):
    """The step tools of an async job, ``ctx.step``: await each, or several at once with ``asyncio.gather``."""

    def _do(self, step: Step, doing: Doing) -> Awaitable[Any]:
        # Named when it was called, not when it is awaited: so the names follow the order in the code.
        return _desk.get().call(f'Step "{step.name}"', self._await(step, doing))

    async def _await(self, step: Step, doing: Doing) -> Any:
        if step.status != StepStatus.WAITING:
            return drive(doing)  # What is remembered needs no database.
        desk = _desk.get()
        try:
            with desk.at_work():
                whole = desk.in_transaction or step.kind in (StepKind.ATOMIC, StepKind.EMIT)
                how = await (_in_one_go(doing) if whole else _by_pieces(doing))
            return how.result()
        except Interrupt as interrupt:
            await desk.park(interrupt.with_traceback(None))

    def _side_by_side(
        self, forked: Sequence[Branch], thunks: Sequence[Callable[[], Any]], limit: int
    ) -> Awaitable[Any]:
        return _desk.get().call("A parallel", self._await_all(forked, thunks, limit))

    async def _await_all(
        self, forked: Sequence[Branch], thunks: Sequence[Callable[[], Any]], limit: int
    ) -> Any:
        ended, slots, desk = [Outcome() for _ in thunks], asyncio.Semaphore(limit), _desk.get()

        async def one(branch: Branch, thunk: Callable[[], Any], end: Outcome) -> None:
            await slots.acquire()
            with desk.branch(slots), self._pass.enter(branch):
                try:
                    value = thunk()
                    end.value = await value if isawaitable(value) else value
                except BaseException as error:
                    end.error = error

        await asyncio.gather(*map(one, forked, thunks, ended))
        return join(self._pass, forked, ended)


# A step that works. What it ends with is returned and not raised through asgiref, which would not let go of it.


async def _by_pieces(doing: Doing) -> Outcome:
    """Do a step whose work is awaited; meanwhile others go on."""
    now = await sync_to_async(_advance)(doing, None)
    while isinstance(now, Work):
        now = await sync_to_async(_advance)(doing, await _outcome(now))
    return now


def _advance(doing: Doing, how: Outcome | None) -> Work | Outcome:
    try:
        return next(doing) if how is None else doing.send(how)
    except StopIteration as ended:
        return Outcome(ended.value)
    except BaseException as error:
        return Outcome(error=error)
    finally:
        if how:
            how.error = None  # See ``Outcome.result``.


async def _outcome(work: Work) -> Outcome:
    """Call what a step wants called, await it if it is to be, and return how that went."""
    if iscoroutinefunction(work.call):
        return await _awaited(work, work.call)
    how = await sync_to_async(outcome)(work)
    return await _awaited(work, lambda: how.value) if isawaitable(how.value) else how


async def _in_one_go(doing: Doing) -> Outcome:
    """
    Do a step without a break in the worker's own thread, transaction and all.

    What it awaits runs on the job's event loop and comes back to this thread for the database, ahead of
    everybody else: whatever other tasks want of the database is done before this transaction or after it.
    """

    def work() -> Outcome:
        try:
            return Outcome(drive(doing, _outcome_here))
        except BaseException as error:
            return Outcome(error=error)
        finally:
            doing.close()  # Of a task that was cancelled the transaction is open still.

    return await sync_to_async(work)()


def _outcome_here(work: Work) -> Outcome:
    if iscoroutinefunction(work.call):
        return async_to_sync(_awaited)(work, work.call)
    how = outcome(work)
    return async_to_sync(_awaited)(work, lambda: how.value) if isawaitable(how.value) else how


async def _awaited(work: Work, call: Callable[[], Awaitable[Any]]) -> Outcome:
    with work.watched():
        try:
            async with asyncio.timeout(work.timeout) as limit:
                value = await call()
        except BaseException as error:
            if isinstance(error, asyncio.CancelledError) and _is_cancelled():
                raise  # By the job's own code. It is no failure of the step, which was not done.
            return Outcome(error=late(work.timeout) if limit.expired() else error)
    # It may have caught its cancellation, or not have let the event loop look at the time.
    return Outcome(error=late(work.timeout)) if limit.expired() else work.returned(value)


def _is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


# The job.


def call(current: Pass, handler: Callable[..., Coroutine[Any, Any, Any]], *arguments: Any) -> Any:
    """
    Return what an async job returns, on an event loop of its own; this thread serves its database meanwhile.

    Steps that are at work when it ends come to their end first: what they write is fenced by a lease that is
    ours until the run is settled. Other tasks that it left behind are cancelled.
    """
    in_transaction = connections[current.using].in_atomic_block
    how = Outcome()

    async def job() -> None:
        try:
            how.value = await handler(*arguments)
        except BaseException as error:
            how.error = error

    async def main() -> None:
        desk = Desk(current, in_transaction=in_transaction)
        _desk.set(desk)
        ended = await desk.attend(asyncio.create_task(job()))
        forgotten = desk.close()
        if isinstance(current.over, Died):
            how.error = current.over
        elif ended:
            if not isinstance(how.error, asyncio.CancelledError | Interrupt):
                current.root.swallowed = ended
            how.error = ended
        elif forgotten and how.error is None:
            how.error = NonRetriableError(f"{forgotten} was called and not awaited: it was not done.")

    current.root.users = {}
    async_to_sync(main, force_new_loop=True)()
    while isinstance(how.error, BaseExceptionGroup):
        how.error = how.error.exceptions[0]  # What a TaskGroup raises: it counts as the first of its errors.
    return how.result()
