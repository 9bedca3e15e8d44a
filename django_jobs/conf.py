"""
The settings, read lazily from ``settings.DJANGO_JOBS``.

The attributes of ``Defaults`` are the known keys and their defaults. Nothing is read at import, so
``override_settings`` works; ``checks`` reports unknown keys and wrong types.
"""

from typing import Any

from django.conf import settings
from django.core.signals import setting_changed


class Defaults:
    #: Feature flags and the values they carry; a gate is the dotted path of one.
    FLAGS: dict = {}
    #: Options and adapters of the stock jobs.
    CATALOG: dict = {}
    #: Keys accepted by the HTTP event endpoint; it is off while there are none.
    EVENT_KEYS: list | tuple = ()
    #: The module looked for in every installed app; None looks nowhere.
    AUTODISCOVER: str | None = "jobs"
    #: Worker processes of one ``runjobs``; None means one per processor.
    WORKERS: int | None = None
    #: Runs that one worker process takes at the same time.
    THREADS: int = 4
    #: How long a stopping worker may take for the step in hand.
    GRACE_SECONDS: int | float = 30
    #: After this long without a heartbeat another worker takes a run over.
    LEASE_SECONDS: int | float = 15
    #: A run that took its worker down this many times in a row is FAILED.
    MAX_CRASHES: int = 5
    #: The longest an idle cluster goes without looking at the database.
    POLL_SECONDS: int | float = 1.5
    #: A worker process is replaced after so many runs; None never.
    RECYCLE: int | None = None
    #: How long an event key keeps later events with the same name and key out.
    EVENT_KEY_HOURS: int | float = 24
    MAX_EVENT_BYTES: int = 512 * 1024
    #: What one request to the HTTP event endpoint may bring.
    MAX_HTTP_BYTES: int = 4 * 1024 * 1024
    MAX_HTTP_EVENTS: int = 5000
    MAX_OUTPUT_BYTES: int = 4 * 1024 * 1024
    MAX_STEPS: int = 10_000
    #: Lines of a run's log that are kept; 0 keeps none.
    MAX_LOGS: int = 1_000
    #: What is less important than this is not kept.
    LOG_LEVEL: str = "INFO"
    #: Finished runs and events older than this are pruned; None keeps all.
    #: Finished runs and events older than this are pruned; None keeps all. A job may say otherwise.
    RETENTION_DAYS: int | float | None = 30
    #: The engine prunes by itself, every night.
    HOUSEKEEPING: bool = True


class Conf:
    """The current value of each key: the host's if it set one, else the default."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or not hasattr(Defaults, name):
            raise AttributeError(f"DJANGO_JOBS has no setting {name!r}")
        host = getattr(settings, "DJANGO_JOBS", None)
        value = getattr(Defaults, name)
        if isinstance(host, dict):  # Anything else is ignored here, so that ``checks`` gets to report it.
            value = host.get(name, value)
        # Kept until the settings change: the hot path reads these for every run.
        self.__dict__[name] = value
        return value

    def reset(self) -> None:
        self.__dict__.clear()


conf = Conf()


def known_keys() -> list[str]:
    return [name for name in vars(Defaults) if name.isupper()]


def _reset(*, setting: str, **kwargs: Any) -> None:
    if setting == "DJANGO_JOBS":
        conf.reset()


setting_changed.connect(_reset, dispatch_uid="django_jobs.conf")
