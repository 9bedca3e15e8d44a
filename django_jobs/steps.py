"""
``ctx.step``: the named pieces of a run, each remembered once it is done.

A step first looks for its checkpoint and returns what it says. Only without one does it work, and then
writes the checkpoint in one fenced statement before it returns: at least once, and never again after
that. ``atomic`` and ``emit`` put their database writes and the checkpoint in one transaction: exactly once.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from functools import partial
from typing import Any
from uuid import UUID

from . import branches, clock, events, matching, perform, registry, waiting
from .backoff import as_backoff
from .exceptions import InvalidEvent, NonRetriableError
from .models import Event, Step, StepKind, StepStatus
from .passes import Branch, Pass
from .perform import Doing, Outcome, Policy, Work
from .waiting import LONGEST
from .wanted import Wanted, check_wait

#: So many branches run at a time when nothing else is said: each has a database connection.
LIMIT = 8


class Steps:
    """The step tools of a job, ``ctx.step``."""

    def __init__(self, current: Pass, policy: Policy | None = None) -> None:
        self._pass = current
        self._policy = policy or Policy(current.job.retries, current.job.backoff)

    def using(
        self, *, retries: int | None = None, backoff: Any = None, timeout: timedelta | None = None
    ) -> "Steps":
        """
        Return the same tools with another policy: ``ctx.step.using(retries=0).run(...)``.

        A try of a step that works and takes longer than ``timeout`` has failed, with a ``TimeoutError``, and what it
        returns late is discarded. Code that awaits is cancelled then; a function in a thread cannot be, and goes on
        in vain, while its run goes on elsewhere.
        """
        if retries is not None and (isinstance(retries, bool) or not isinstance(retries, int) or retries < 0):
            raise NonRetriableError(f"retries is a whole number from 0, not {retries!r}.")
        if timeout is not None:
            _check_span(timeout, "timeout")
        policy = Policy(
            retries=self._policy.retries if retries is None else retries,
            backoff=self._policy.backoff if backoff is None else as_backoff(backoff),
            timeout=self._policy.timeout if timeout is None else timeout.total_seconds(),
        )
        return type(self)(self._pass, policy)

    def run(self, name: str, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """
        Return ``fn(*args, **kwargs)``, remembered.

        At least once: a worker that dies between the call and its checkpoint makes it run again.
        Never again once the checkpoint is committed. A failure is retried by policy; out of
        retries, ``StepError`` is raised here, and again on every replay.
        """
        return self._perform(name, StepKind.RUN, _call_of(name, fn, *args, **kwargs))

    def atomic(self, name: str, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """
        Do the same with ``fn``'s database writes and the checkpoint in one transaction.

        Exactly once for those writes: they commit with the checkpoint or not at all. Keep calls to
        the outside out of it; they would hold the transaction open and are not undone.
        """
        return self._perform(name, StepKind.ATOMIC, _call_of(name, fn, *args, **kwargs))

    def emit(
        self,
        name: str,
        event: str,
        data: dict | None = None,
        *,
        key: str | None = None,
        at: datetime | None = None,
    ) -> UUID:
        """Emit an event exactly once: it commits with this step's checkpoint. Return the event's id."""
        return self._perform(name, StepKind.EMIT, lambda: events.emit(event, data, key=key, at=at).pk)

    def sleep(self, name: str, duration: timedelta) -> None:
        """Park the run for ``duration``; it holds no worker and no thread meanwhile."""
        if not isinstance(duration, timedelta):
            raise NonRetriableError(f'Step "{name}" sleeps for a timedelta, not {duration!r}.')
        return self._wait(waiting.sleep, name, StepKind.SLEEP, lambda: clock.now() + duration)

    def sleep_until(self, name: str, until: datetime) -> None:
        """Park the run until an instant; one that has passed is no sleep at all."""
        if not isinstance(until, datetime) or until.tzinfo is None:
            raise NonRetriableError(f'Step "{name}" sleeps until an aware datetime, not {until!r}.')
        return self._wait(waiting.sleep, name, StepKind.SLEEP, lambda: until)

    def wait_for_event(
        self,
        name: str,
        event: str,
        match: str | Mapping[str, Any] | None = None,
        where: Callable[[Event], bool] | None = None,
        timeout: timedelta = LONGEST,
        since: datetime | None = None,
    ) -> Event | None:
        """
        Park the run until ``event`` comes, and return it; return None when it has not come within ``timeout``.

        One that came since the run was queued counts too, or since ``since``: nothing is missed between
        two steps. With ``match``, a dotted path, its data must hold there what the data of the event that
        started the run does (or, given a dict of paths, what that says); ``where(event)`` may ask for more. A run takes
        an event once: the next wait gets the next one. The event that started the run is not waited for.
        """
        return self._listen(name, [event], match, where, timeout, since, each=False)

    def wait_for_any(
        self,
        name: str,
        events: Sequence[str],
        match: str | Mapping[str, Any] | None = None,
        where: Callable[[Event], bool] | None = None,
        timeout: timedelta = LONGEST,
        since: datetime | None = None,
    ) -> Event | None:
        """Return the first of several ``events`` to come, or None; its ``name`` says which. See ``wait_for_event``."""
        return self._listen(name, events, match, where, timeout, since, each=False)

    def wait_for_all(
        self,
        name: str,
        events: Sequence[str],
        match: str | Mapping[str, Any] | None = None,
        where: Callable[[Event], bool] | None = None,
        timeout: timedelta = LONGEST,
        since: datetime | None = None,
    ) -> list[Event] | None:
        """Return one of each of ``events``, in this order, once all have come, or None. See ``wait_for_event``."""
        return self._listen(name, events, match, where, timeout, since, each=True)

    def invoke(
        self, name: str, job: registry.Job | str, data: dict | None = None, timeout: timedelta = LONGEST
    ) -> Any:
        """
        Run another job and return its output; the run is parked meanwhile.

        The child (``parent`` is this run) is started exactly once, with this step. If it fails, is cancelled or
        skipped, or has not ended within ``timeout``, ``StepError`` is raised, with the child's error in ``type``
        and ``message``. A child that is too late goes on. Cancelling the parent cancels it.
        """
        _check_span(timeout, f'step "{name}": timeout')
        if not isinstance(job, registry.Job | str):
            raise NonRetriableError(f'Step "{name}": what it invokes is a job or the id of one, not {job!r}.')
        return self._wait(waiting.invoke, name, StepKind.INVOKE, job, data, timeout)

    def parallel(self, *thunks: Callable[[], Any], limit: int = LIMIT) -> list[Any]:
        """
        Call the thunks side by side, at most ``limit`` at a time, and return their values in order.

        Each is a branch: the steps it calls are its own, whatever their names and the timing of the others, and it
        may sleep, wait and fail. When all have come as far as they can, the pass goes on, is parked, or raises the
        first error. Branches are known by their place, so add new ones at the end while runs are open.
        """
        _check_limit(limit)
        _check_thunks(thunks)
        return self._side_by_side(self._pass.fork(len(thunks)), thunks, limit)

    def map(
        self,
        name: str,
        fn: Callable[[Any], Any],
        items: Iterable[Any],
        *,
        key: Callable[[Any], Hashable] | None = None,
        limit: int = LIMIT,
    ) -> list[Any]:
        """
        Call ``fn(item)`` for each item as a step of its own, side by side; return the results in order.

        The steps are called ``name-0``, ``name-1`` and so on, or by ``key(item)``, which lets the list change while
        the run is open. Only those without a checkpoint work.
        """
        _check_limit(limit)
        items = list(items)
        names = [f"{name}-{key(item) if key else place}" for place, item in enumerate(items)]
        if len(set(names)) < len(names):
            double = next(one for one in names if names.count(one) > 1)
            raise NonRetriableError(
                f'Two items of map "{name}" have the same key: both would be step "{double}".'
            )
        steps = [self._pass.visit(one, StepKind.RUN) for one in names]
        thunks = [
            partial(self._one, step, partial(fn, item)) for step, item in zip(steps, items, strict=True)
        ]
        if not any(step.status == StepStatus.WAITING for step in steps):
            limit = 1  # Nothing but a replay: that needs no threads.
        return self._side_by_side([self._pass.branch.item() for _ in thunks], thunks, limit)

    # How it is done. A job that awaits overrides no more than the last two (see ``awaited``).

    def _perform(self, name: str, kind: StepKind, call: Callable[[], Any]) -> Any:
        return self._one(self._pass.visit(name, kind), call)

    def _one(self, step: Step, call: Callable[[], Any]) -> Any:
        return self._begin(step, perform.perform(self._pass, step, call, self._policy))

    def _wait(self, tool: Callable[..., Doing], name: str, kind: StepKind, *arguments: Any) -> Any:
        step = self._pass.visit(name, kind)
        return self._begin(step, tool(self._pass, step, *arguments))

    def _begin(self, step: Step, doing: Doing) -> Any:
        return self._do(step, perform.guarded(self._pass, step, doing))

    def _listen(
        self, name: str, names: Sequence[str], match: Any, where: Any, timeout: Any, since: Any, *, each: bool
    ) -> Any:
        _check_span(timeout, f'step "{name}": timeout')
        run, event = self._pass.run, self._pass.event
        try:
            check_wait(names, match, where, since)
            values = matching.sought(match, event.data if event else None)
        except LookupError as error:
            raise NonRetriableError(f'Step "{name}": match: {error.args[0]}.') from None
        except (InvalidEvent, ValueError) as error:
            raise NonRetriableError(f'Step "{name}": {error}') from None
        wanted = Wanted(tuple(dict.fromkeys(names)), values, run, since, where, each)
        return self._wait(waiting.wait, name, StepKind.WAIT, wanted, timeout)

    def _do(self, step: Step, doing: Doing) -> Any:
        return drive(doing)

    def _side_by_side(self, forked: Sequence[Branch], thunks: Sequence[Callable[[], Any]], limit: int) -> Any:
        return branches.side_by_side(self._pass, forked, thunks, limit)


def _call_of(name: str, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Callable[[], Any]:
    if not callable(fn):
        raise NonRetriableError(
            f'Step "{name}" is given {fn!r:.100}, which is no function. Give it the function and, after it, the'
            " arguments: it is called here, once."
        )
    return partial(fn, *args, **kwargs)


def drive(doing: Doing, call: Callable[[Work], Outcome] | None = None) -> Any:
    """Do a step in this thread: call what it wants called, until it has what it returns."""
    call = call or outcome
    try:
        work = next(doing)
        while True:
            work = doing.send(call(work))
    except StopIteration as ended:
        return ended.value


def outcome(work: Work) -> Outcome:
    """Call what a step wants called, and return how that went."""
    with work.watched():
        try:
            value = work.call()
        except BaseException as error:
            return Outcome(error=error)
    return work.returned(value)


def _check_span(span: Any, where: str) -> None:
    if not isinstance(span, timedelta) or span <= timedelta(0):
        raise NonRetriableError(f"{where} is a timedelta above zero, not {span!r}.")


def _check_thunks(thunks: Sequence[Any]) -> None:
    for thunk in thunks:
        if not callable(thunk):
            raise NonRetriableError(
                f"A branch of parallel is a function without arguments, not {thunk!r:.100}. Write"
                " lambda: ctx.step.run(...), so that it is called in its branch."
            )


def _check_limit(limit: Any) -> None:
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        raise NonRetriableError(f"limit is a whole number above zero, not {limit!r}.")
