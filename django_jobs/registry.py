"""
The jobs this process knows: declared by ``@job``, found in every app's ``jobs.py``.

Declaring puts a job here; its gate, read live, decides whether it counts as registered. That is the
single place gates are applied. No database here: ``AppConfig.ready()`` runs before it may be used.
"""

import difflib
import inspect
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from typing import Any, NamedTuple

from django.utils.module_loading import autodiscover_modules

from . import flags, policies
from .backoff import AnyBackoff, Backoff, as_backoff
from .conf import conf
from .endings import CancelOn, Timeouts
from .exceptions import InvalidJob, JobNotFound
from .triggers import CronTrigger, EventTrigger, candidates

Trigger = EventTrigger | CronTrigger

#: Ids that begin so are the engine's own. Those jobs are claimed and fired like any; listings leave them out.
OWN = "django-jobs-"

#: The longest time a job may ask for its runs to be kept.
LONGEST_RETENTION = timedelta(days=36_500)

_KEBAB = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_jobs: dict[str, "Job"] = {}
_by_event: dict[str, list["Job"]] | None = None
_starter: Callable[["Job", dict | None], Any] | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class Job:
    """A declared job: a function, what triggers it and by which policy it runs."""

    id: str
    handler: Callable[..., Any]
    triggers: tuple[Trigger, ...] = ()
    group: str = ""
    gate: flags.Gate = None
    retries: int = 4
    backoff: AnyBackoff = field(default_factory=Backoff)
    version: str = "1"
    queue: str = "default"
    priority: int | Callable[[Any], int] = 0
    cancel_on: tuple[CancelOn, ...] = ()
    timeouts: Timeouts | None = None
    #: Called as ``on_failure(ctx, error)`` when a run has failed for good, before it ends.
    on_failure: Callable[..., Any] | None = None
    # Flow control, see ``policies``.
    concurrency: tuple[policies.Concurrency, ...] = ()
    throttle: policies.Throttle | None = None
    rate_limit: policies.RateLimit | None = None
    debounce: policies.Debounce | None = None
    batch: policies.Batch | None = None
    singleton: policies.Singleton | None = None
    idempotency: policies.Idempotency | None = None
    #: How long its finished runs are kept; None: as long as everybody's (``RETENTION_DAYS``).
    retention: timedelta | None = None

    #: A template that shows a job must not run it.
    do_not_call_in_templates = True

    def __post_init__(self) -> None:
        if isinstance(self.cancel_on, CancelOn | list):
            given = [self.cancel_on] if isinstance(self.cancel_on, CancelOn) else self.cancel_on
            object.__setattr__(self, "cancel_on", tuple(given))
        _validate(self)

    def __call__(self, ctx: Any) -> Any:
        return self.handler(ctx)

    def __str__(self) -> str:
        return self.id

    @property
    def doc(self) -> str:
        return inspect.getdoc(self.handler) or ""

    @property
    def closed_by(self) -> str | None:
        """The flag that keeps this job out, or None while it is registered."""
        return flags.closed(self.gate)

    @cached_property
    def policies(self) -> tuple[tuple[str, int, policies.Policy], ...]:
        """The flow control of this job as (option, position, policy), in the order a run meets it."""
        given = ((name, policies.as_concurrency(getattr(self, name))) for name in policies.OPTIONS)
        return tuple((name, position, one) for name, some in given for position, one in enumerate(some))

    @property
    def crons(self) -> list[CronTrigger]:
        return [trigger for trigger in self.triggers if isinstance(trigger, CronTrigger)]

    def start(self, data: dict | None = None) -> Any:
        """
        Start this job once with ``data`` and return its Run.

        The run is written in the caller's transaction: rolled back, it never was.
        """
        assert _starter is not None  # ``events`` sets it when the app is ready.
        return _starter(self, data)


class Declared(NamedTuple):
    """A job and the flag that keeps it out (None when it is registered). Reads as its job."""

    job: Job
    closed_by: str | None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.job, name)


def job(id: str, *triggers: Trigger, **policy: Any) -> Callable[[Callable[..., Any]], Job]:
    """
    Declare the decorated function as a job; raise ``InvalidJob`` here and now if it is not right.

    ``triggers`` are ``on(...)`` and ``cron(...)``; a job without any is started by ``start``.
    ``policy``: group, gate, retries (per step, and for the code between steps), backoff, version,
    queue, priority (a number or a function of the event; higher first), retention (of its finished runs); for
    flow control concurrency (one limit or several), throttle, rate_limit, debounce, batch, singleton, idempotency;
    and cancel_on, timeouts, on_failure.
    """
    if callable(id):
        raise InvalidJob('@job takes the id of the job: @job("send-invoice", on("invoice/due")).')
    if isinstance(id, str) and id.startswith(OWN):
        raise InvalidJob(f'Job "{id}": ids that begin with {OWN} are the engine\'s own; choose another one.')

    def declare(handler: Callable[..., Any]) -> Job:
        if "concurrency" in policy:
            policy["concurrency"] = policies.as_concurrency(policy["concurrency"])
        if "backoff" in policy:
            policy["backoff"] = _backoff(id, policy["backoff"])
        unknown = policy.keys() - Job.__dataclass_fields__.keys()
        if unknown:
            known = ", ".join(sorted(Job.__dataclass_fields__.keys() - {"id", "handler", "triggers"}))
            raise InvalidJob(f'Job "{id}" has no option {", ".join(sorted(unknown))}. Options: {known}.')
        return register(Job(id=id, handler=handler, triggers=triggers, **policy))

    return declare


def register(job: Job) -> Job:
    """Put ``job`` into the registry; declaring the same function again replaces it (autoreload)."""
    global _by_event
    there = _jobs.get(job.id)
    if there and _home(there) != _home(job):
        raise InvalidJob(f'Job id "{job.id}" is taken by {_home(there)}; give {_home(job)} another one.')
    _jobs[job.id] = job
    _by_event = None
    return job


def autodiscover() -> None:
    """Import the ``jobs`` module (``AUTODISCOVER``) of every installed app."""
    if conf.AUTODISCOVER:
        autodiscover_modules(conf.AUTODISCOVER)


def get(job_id: str) -> Job:
    """Return the registered job; raise ``JobNotFound`` saying why it is not one."""
    found = _jobs.get(job_id)
    if found is None:
        raise JobNotFound(_undeclared(job_id))
    if flag := found.closed_by:
        raise JobNotFound(f'Job "{job_id}" is not registered: its gate {flag} is off.')
    return found


def _undeclared(job_id: str) -> str:
    ids = sorted(job.id for job in known())
    near = difflib.get_close_matches(str(job_id), ids, n=1)
    hint = f' Did you mean "{near[0]}"?' if near else ""
    return f'No job "{job_id}" is declared.{hint} Declared: {", ".join(ids) or "none"}.'


def find(job_id: str) -> Job | None:
    """Return the declared job, its gate open or not; None if this process does not know it."""
    return _jobs.get(job_id)


def known(*, own: bool = False) -> list[Job]:
    """List every declared job, with ``own`` the engine's own ones too; no gate is asked."""
    return [job for job in _jobs.values() if own or not job.id.startswith(OWN)]


def jobs(*, own: bool = False) -> list[Job]:
    """List the registered jobs, those whose gate is open, with ``own`` the engine's own ones too."""
    return [job for job in known(own=own) if job.closed_by is None]


def declared() -> list[Declared]:
    """List every declared job with the flag that keeps it out, if one does."""
    return [Declared(job, job.closed_by) for job in known()]


def listening(event_name: str) -> list[Job]:
    """List the registered jobs with a trigger on this event name, ``when`` not yet asked."""
    global _by_event
    if _by_event is None:
        _by_event = _index(_jobs.values())
    found = {job.id: job for name in candidates(event_name) for job in _by_event.get(name, ())}
    return [job for job in found.values() if job.closed_by is None]


def start_with(starter: Callable[[Job, dict | None], Any]) -> None:
    """Tell ``Job.start`` how; ``events`` calls this, which comes after this module."""
    global _starter
    _starter = starter


def _index(jobs: Iterable[Job]) -> dict[str, list[Job]]:
    index: dict[str, list[Job]] = {}
    for job in jobs:
        for trigger in job.triggers:
            if isinstance(trigger, EventTrigger):
                index.setdefault(trigger.name, []).append(job)
    return index


def _backoff(id: str, value: Any) -> AnyBackoff:
    try:
        return as_backoff(value)
    except InvalidJob as fault:
        raise InvalidJob(f'Job "{id}": {fault}') from None


def _home(job: Job) -> str:
    """Say where ``job`` is declared, as far as its function tells."""
    name = getattr(job.handler, "__qualname__", type(job.handler).__qualname__)
    return f"{job.handler.__module__}.{name}"


def _validate(job: Job) -> None:
    def refuse(what: str) -> None:
        raise InvalidJob(f'Job "{job.id}": {what}')

    if not isinstance(job.id, str) or not _KEBAB.fullmatch(job.id) or len(job.id) > 100:
        refuse("an id is kebab-case (lower-case letters, digits, single hyphens), at most 100 characters.")
    if not callable(job.handler):
        refuse("@job decorates a function that takes ctx.")
    if not isinstance(job.group, str) or len(job.group) > 100:
        refuse(f"group is a string of at most 100 characters, not {job.group!r}.")
    for trigger in job.triggers:
        if not isinstance(trigger, EventTrigger | CronTrigger):
            refuse(f"{trigger!r} is not a trigger; use on(...) or cron(...).")
    if len(set(map(_identity, job.triggers))) < len(job.triggers):
        refuse("the same trigger is given twice.")
    if isinstance(job.retries, bool) or not isinstance(job.retries, int) or not 0 <= job.retries <= 1000:
        refuse(f"retries is a whole number from 0 to 1000, not {job.retries!r}.")
    if not _is_gate(job.gate):
        refuse(f"gate is a flag's dotted path, a tuple of them or a callable, not {job.gate!r}.")
    if not isinstance(job.version, str) or not 1 <= len(job.version) <= 50:
        refuse(f"version is a string of 1 to 50 characters, not {job.version!r}.")
    if not isinstance(job.queue, str) or not 1 <= len(job.queue) <= 50:
        refuse(f"queue is a string of 1 to 50 characters, not {job.queue!r}.")
    if not isinstance(job.cancel_on, tuple) or not all(isinstance(one, CancelOn) for one in job.cancel_on):
        refuse(f"cancel_on is a list of cancel_on(...), not {job.cancel_on!r}.")
    if job.timeouts is not None and not isinstance(job.timeouts, Timeouts):
        refuse(f"timeouts is Timeouts(start=..., finish=...), not {job.timeouts!r}.")
    if job.on_failure is not None and not _takes_two(job.on_failure):
        refuse(f"on_failure is a function that takes ctx and error, not {job.on_failure!r}.")
    if not callable(job.priority) and not is_priority(job.priority):
        refuse(
            f"priority is a whole number of at most 32 bits or a function of the event, not {job.priority!r}."
        )
    try:
        policies.check({name: getattr(job, name) for name in policies.OPTIONS})
    except InvalidJob as error:
        refuse(str(error))
    if job.retention is not None and not _is_retention(job.retention):
        refuse(
            f"retention is a timedelta above zero, of at most {LONGEST_RETENTION.days} days,"
            f" or None, not {job.retention!r}."
        )


def _takes_two(function: Any) -> bool:
    try:
        inspect.signature(function).bind("ctx", "error")
    except ValueError:
        return True  # One without a signature to be read.
    except TypeError:
        return False
    return True


def is_priority(value: Any) -> bool:
    """Tell whether ``value`` is a number that the column of priorities can hold."""
    return isinstance(value, int) and not isinstance(value, bool) and -(2**31) <= value < 2**31


def _is_retention(value: Any) -> bool:
    return isinstance(value, timedelta) and timedelta(0) < value <= LONGEST_RETENTION


def _identity(trigger: Trigger) -> Any:
    # A cron's slots are unique by its key, whatever its other options.
    return trigger.key if isinstance(trigger, CronTrigger) else trigger


def _is_gate(gate: Any) -> bool:
    if isinstance(gate, tuple):
        return bool(gate) and all(isinstance(path, str) for path in gate)
    return gate is None or callable(gate) or (isinstance(gate, str) and bool(gate))
