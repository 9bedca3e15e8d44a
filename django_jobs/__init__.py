"""
Durable, scheduled and event-driven jobs for Django, in the database the project already has.

The public names live here and are loaded on first use, because Django imports this package
while it is still filling the app registry, when no model may be imported.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .backoff import Backoff
    from .endings import Timeouts, cancel_on
    from .events import EventSpec, aemit, aemit_many, emit, emit_many, trigger
    from .exceptions import (
        InvalidEvent,
        InvalidJob,
        InvalidVerb,
        JobNotFound,
        NonRetriableError,
        RetryAfter,
        StepError,
    )
    from .policies import Batch, Concurrency, Debounce, Idempotency, RateLimit, Singleton, Throttle
    from .registry import job
    from .signals import (
        admin_action,
        emit_on,
        event_received,
        run_finished,
        run_queued,
        run_started,
        step_finished,
    )
    from .triggers import cron, on

__all__ = [
    "Backoff",
    "Batch",
    "Concurrency",
    "Debounce",
    "EventSpec",
    "Idempotency",
    "InvalidEvent",
    "InvalidJob",
    "InvalidVerb",
    "JobNotFound",
    "NonRetriableError",
    "RateLimit",
    "RetryAfter",
    "Singleton",
    "StepError",
    "Throttle",
    "Timeouts",
    "admin_action",
    "aemit",
    "aemit_many",
    "cancel_on",
    "cron",
    "emit",
    "emit_many",
    "emit_on",
    "event_received",
    "job",
    "on",
    "run_finished",
    "run_queued",
    "run_started",
    "step_finished",
    "trigger",
]

_HOMES = {
    "backoff": ["Backoff"],
    "endings": ["Timeouts", "cancel_on"],
    "events": ["EventSpec", "aemit", "aemit_many", "emit", "emit_many", "trigger"],
    "exceptions": [
        "InvalidEvent",
        "InvalidJob",
        "InvalidVerb",
        "JobNotFound",
        "NonRetriableError",
        "RetryAfter",
        "StepError",
    ],
    "policies": ["Batch", "Concurrency", "Debounce", "Idempotency", "RateLimit", "Singleton", "Throttle"],
    "registry": ["job"],
    "signals": [
        "admin_action",
        "emit_on",
        "event_received",
        "run_finished",
        "run_queued",
        "run_started",
        "step_finished",
    ],
    "triggers": ["cron", "on"],
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
