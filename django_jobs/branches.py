"""
Branches of a pass, side by side in threads: what ``parallel`` and ``map`` run on.

A branch begins when the one before it has come to its first step, so that steps get their names in the order in
which the branches stand. Each is waited for: those that come to their end do, whatever becomes of the others.
"""

import contextvars
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from django.db import connections

from .exceptions import Interrupt
from .passes import Branch, Pass, together

#: A branch that takes longer to come to its first step no longer holds up the next.
PATIENCE = 0.25


@dataclass
class Ended:
    """How a branch went."""

    value: Any = None
    error: BaseException | None = None


Thunk = Callable[[], Any]


def fork(current: Pass, count: int) -> list[Branch]:
    """Return ``count`` branches of the one that the caller is in, each with a place of its own in the history."""
    parent = current.branch
    parent.forks += 1
    stem = f"{parent.tag}/" if parent.tag else ""
    return [Branch(tag=f"{stem}{parent.forks}.{n}", is_async=parent.is_async) for n in range(count)]


def side_by_side(current: Pass, branches: Sequence[Branch], thunks: Sequence[Thunk], limit: int) -> list[Any]:
    """
    Call the thunks, each in its branch and at most ``limit`` at a time; return their values in order.

    When all have ended, an interrupt of one ends the pass here (the next one finds the others' steps
    done), and else the first error is raised. Each thread has a connection of its own, closed at the end; under
    a transaction that others could not see into (a test case's) the branches run one after the other.
    """
    ended = [Ended() for _ in thunks]
    if limit < 2 or len(thunks) < 2 or connections[current.using].in_atomic_block:
        for branch, thunk, end in zip(branches, thunks, ended, strict=True):
            _run(current, branch, thunk, end)
    else:
        _in_threads(current, branches, thunks, ended, limit)
    return join(current, branches, ended)


def _in_threads(
    current: Pass, branches: Sequence[Branch], thunks: Sequence[Thunk], ended: Sequence[Ended], limit: int
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

    context = contextvars.copy_context()
    threads = [
        threading.Thread(target=context.copy().run, args=(work,), daemon=True)
        for _ in range(min(limit, len(thunks)))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _drawn(turns: Iterator[int], lock: threading.Lock) -> Iterator[int]:
    while True:
        with lock:
            turn = next(turns, None)
        if turn is None:
            return
        yield turn


def _run(current: Pass, branch: Branch, thunk: Thunk, end: Ended) -> None:
    with current.enter(branch):
        try:
            end.value = thunk()
        except BaseException as error:
            end.error = error
        finally:
            branch.arrived.set()


def join(current: Pass, branches: Sequence[Branch], ended: Sequence[Ended]) -> list[Any]:
    """Return the values of branches that have all ended; raise what their ends come to together."""
    parent = current.branch
    for branch, end in zip(branches, ended, strict=True):
        if branch.swallowed or (branch.interrupts and not isinstance(end.error, Interrupt)):
            parent.swallowed = True
            parent.interrupts.append(branch.interrupts[-1])
            raise branch.interrupts[-1]
    if interrupts := [end.error for end in ended if isinstance(end.error, Interrupt)]:
        raise current.end(together(interrupts))
    for end in ended:
        if end.error:
            raise end.error
    return [end.value for end in ended]
