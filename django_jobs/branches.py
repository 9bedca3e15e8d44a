"""
Branches of a pass, side by side in threads: what ``parallel`` and ``map`` run on.

A branch begins when the one before it has come to its first step, so that steps get their names in the order in
which the branches stand. Each is waited for: those that come to their end do, whatever becomes of the others.
"""

import contextvars
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from django.db import connections

from .exceptions import Interrupt
from .passes import Branch, Pass, together
from .perform import Outcome

#: A branch that takes longer to come to its first step no longer holds up the next.
PATIENCE = 0.25

Thunk = Callable[[], Any]


def side_by_side(current: Pass, branches: Sequence[Branch], thunks: Sequence[Thunk], limit: int) -> list[Any]:
    """
    Call the thunks, each in its branch and at most ``limit`` at a time; return their values in order.

    When all have ended, an interrupt of one ends the pass here (the next one finds the others' steps
    done), and else the first error is raised. Each thread has a connection of its own, closed at the end; where
    others could not see what this thread sees (in a test case) the branches run one after the other.
    """
    ended = [Outcome() for _ in thunks]
    if limit < 2 or len(thunks) < 2 or _sees_alone(current.using):
        for branch, thunk, end in zip(branches, thunks, ended, strict=True):
            _run(current, branch, thunk, end)
    else:
        _in_threads(current, branches, thunks, ended, limit)
    return join(current, branches, ended)


def _sees_alone(using: str) -> bool:
    """Tell whether other threads would not see what this one does, or would get in its way."""
    connection: Any = connections[using]
    return connection.in_atomic_block or (connection.vendor == "sqlite" and connection.is_in_memory_db())


def _in_threads(
    current: Pass, branches: Sequence[Branch], thunks: Sequence[Thunk], ended: Sequence[Outcome], limit: int
) -> None:
    turns, lock = iter(range(len(thunks))), threading.Lock()

    def work() -> None:
        try:
            for turn in _drawn(turns, lock):
                if turn:
                    branches[turn - 1].arrived.wait(PATIENCE)
                context = contextvars.copy_context()
                context.run(_run, current, branches[turn], thunks[turn], ended[turn])
        finally:
            connections.close_all()

    started: list[threading.Thread] = []
    try:
        for _ in range(min(limit, len(thunks))):
            context = contextvars.copy_context()
            thread = threading.Thread(target=context.run, args=(work,), daemon=True)
            thread.start()
            started.append(thread)
    finally:
        # If there can be no more threads, those there are do all of it before that is raised.
        for thread in started:
            thread.join()


def _drawn(turns: Iterator[int], lock: threading.Lock) -> Iterator[int]:
    while True:
        with lock:
            turn = next(turns, None)
        if turn is None:
            return
        yield turn


def _run(current: Pass, branch: Branch, thunk: Thunk, end: Outcome) -> None:
    with current.enter(branch):
        try:
            end.value = thunk()
        except BaseException as error:
            end.error = error
        finally:
            branch.arrived.set()


def join(current: Pass, branches: Sequence[Branch], ended: Sequence[Outcome]) -> list[Any]:
    """Return the values of branches that have all ended; raise what their ends come to together."""
    interrupts = []
    for branch, end in zip(branches, ended, strict=True):
        if isinstance(end.error, Interrupt):
            interrupts.append(end.error)
        elif branch.interrupts:
            branch.swallowed = branch.swallowed or branch.interrupts[-1]
        if branch.swallowed:
            interrupts.append(branch.swallowed)
            current.branch.swallowed = branch.swallowed
    if interrupts:
        raise current.end(together(interrupts))
    return [end.result() for end in ended]
