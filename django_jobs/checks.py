"""
System checks: what is wrong with the settings, before anything runs on them.

Every message has an id, says what is wrong and, in its hint, what to do. ``docs/reference/checks.md``
lists them all. No query here; what only the database can tell is in ``health.doctor``.
"""

import difflib
import logging
import math
import re
from collections.abc import Iterator
from typing import Any, get_type_hints

from django.apps import apps
from django.conf import settings
from django.core.checks import CheckMessage, Error, Warning, register
from django.core.management import get_commands
from django.db import connections, router

from . import registry
from .conf import Defaults, conf, known_keys
from .exceptions import UnknownGate
from .models import Run

#: ``manage.py check --tag django_jobs`` runs these and no others.
TAG = "django_jobs"

#: The settings that may be zero; every other number is above it.
MAY_BE_ZERO = {"GRACE_SECONDS", "MAX_LOGS"}

#: The settings whose value must not stand in a log.
SECRETS = {"EVENT_KEYS"}

#: A SQLite writer that gives up sooner will meet a busy moment some day.
PATIENCE_SECONDS = 10

#: What stands in a URL as it is; and from what length on it is a secret.
PATH_PART, SECRET_LENGTH = re.compile(r"[A-Za-z0-9._~-]+"), 20

SQLITE_OPTIONS = (
    '"OPTIONS": {"transaction_mode": "IMMEDIATE", "timeout": 20,'
    ' "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;"}'
)


@register(TAG)
def check_settings(**kwargs: Any) -> list[CheckMessage]:
    """Report unknown keys of ``DJANGO_JOBS`` and values that cannot be."""
    host = getattr(settings, "DJANGO_JOBS", {})
    if not isinstance(host, dict):
        what = f"DJANGO_JOBS is a {type(host).__name__}, not a dict; all of it is ignored."
        return [Error(what, hint='Write DJANGO_JOBS = {"THREADS": 8}.', id="django_jobs.E001")]
    return [*_unknown_keys(host), *_impossible_values(host)]


def _unknown_keys(host: dict) -> Iterator[CheckMessage]:
    known = known_keys()
    for key in host:
        if key not in known:
            near = difflib.get_close_matches(str(key).upper(), known, n=1)
            hint = f'Did you mean "{near[0]}"?' if near else f"The keys are {', '.join(known)}."
            yield Error(f"DJANGO_JOBS has no setting {key!r}.", hint=hint, id="django_jobs.E002")


def _impossible_values(host: dict) -> Iterator[CheckMessage]:
    for key, kind in get_type_hints(Defaults).items():
        if key in host and (wanted := _unmet(key, host[key], kind)):
            value = "a secret" if key in SECRETS else repr(host[key])
            what = f'DJANGO_JOBS["{key}"] must be {wanted}, not {value} ({type(host[key]).__name__}).'
            hint = f"Correct it, or leave it out: the default is {getattr(Defaults, key)!r}."
            yield Error(what, hint=hint, id="django_jobs.E003")


def _unmet(key: str, value: Any, kind: Any) -> str | None:
    """Return what ``value`` would have to be, or None when it is."""
    if kind is bool:
        return None if isinstance(value, bool) else "True or False"
    name = getattr(kind, "__name__", None) or str(kind)
    if isinstance(value, bool) or not isinstance(value, kind):
        return name.replace("|", "or")
    if key == "LOG_LEVEL" and value not in (levels := logging.getLevelNamesMapping()):
        return f"one of {', '.join(levels)}"
    if not isinstance(value, int | float):
        return None
    enough = value >= 0 if key in MAY_BE_ZERO else value > 0
    if enough and math.isfinite(value):
        return None
    return "zero or above" if key in MAY_BE_ZERO else "above zero"


@register(TAG)
def check_gates(**kwargs: Any) -> list[CheckMessage]:
    """Report the gates of declared jobs that name a flag nobody defines."""
    if not isinstance(getattr(settings, "DJANGO_JOBS", {}), dict):
        return []
    return [message for job in registry.known() for message in _unknown_gates(job)]


def _unknown_gates(job: registry.Job) -> Iterator[CheckMessage]:
    if callable(job.gate):
        return  # Host code that may well need the database: not to be called while settings are checked.
    try:
        job.closed_by  # noqa: B018
    except UnknownGate as unknown:
        hint = 'Define the flag in DJANGO_JOBS["FLAGS"] (False keeps the job out), or correct the gate.'
        yield Error(f'Job "{job.id}": {unknown}', hint=hint, obj=job.handler, id="django_jobs.E004")


@register(TAG)
def check_event_keys(**kwargs: Any) -> list[CheckMessage]:
    """Report keys of the HTTP event endpoint that cannot open it or could be guessed, without printing any."""
    keys = conf.EVENT_KEYS
    if not isinstance(keys, list | tuple):
        return []
    return [message for place, key in enumerate(keys) for message in _faults_of_key(place, key)]


def _faults_of_key(place: int, key: Any) -> Iterator[CheckMessage]:
    name = f'DJANGO_JOBS["EVENT_KEYS"][{place}]'
    hint = 'Make one with python -c "import secrets; print(secrets.token_urlsafe(32))".'
    if not isinstance(key, str) or not PATH_PART.fullmatch(key):
        what = f"{name} must be a str of letters, digits and - . _ ~, because it is part of a URL's path."
        yield Error(what, hint=hint, id="django_jobs.E008")
    elif len(key) < SECRET_LENGTH:
        what = f"{name} has {len(key)} characters; below {SECRET_LENGTH} it may be guessed."
        yield Warning(what, hint=hint, id="django_jobs.W003")


@register(TAG)
def check_project(**kwargs: Any) -> list[CheckMessage]:
    """Report what the rest of the settings must grant."""
    found: list[CheckMessage] = []
    if not settings.USE_TZ:
        what = "USE_TZ is off; runs, timers and crons are kept as instants and need it."
        found.append(Error(what, hint="Set USE_TZ = True.", id="django_jobs.E005"))
    if not apps.is_installed("django_q"):
        what = "django_q is not installed; runjobs is a cluster of it."
        hint = 'Put "django_q" into INSTALLED_APPS, before "django_jobs", and run manage.py migrate.'
        found.append(Error(what, hint=hint, id="django_jobs.E006"))
    else:
        found.extend(_cluster_name())
    return found


def _cluster_name() -> Iterator[CheckMessage]:
    from .scheduler import CLUSTER  # Not at the top: django-q2's models are there only when it is installed.

    host = getattr(settings, "Q_CLUSTER", None) or {}
    if host.get("name") == CLUSTER:
        what = f'Q_CLUSTER["name"] is "{CLUSTER}", the name of the cluster that runjobs is.'
        hint = (
            "Give yours another name: a qcluster of this name would take the messages and crons of runjobs."
        )
        yield Error(what, hint=hint, id="django_jobs.E007")


@register(TAG)
def check_commands(**kwargs: Any) -> list[CheckMessage]:
    """Report commands of ours that an app installed earlier has taken (django-extensions has a ``runjobs``)."""
    owners = get_commands()
    return [
        Warning(
            f"manage.py {command} is the one of {owners[command]}, which comes first in INSTALLED_APPS.",
            hint=f'Put "django_jobs" before "{owners[command]}" in INSTALLED_APPS.',
            id="django_jobs.W001",
        )
        for command in ("runjobs", "jobs")
        if owners.get(command, "django_jobs") != "django_jobs"
    ]


@register(TAG)
def check_sqlite(**kwargs: Any) -> list[CheckMessage]:
    """Report a SQLite database that several processes would soon find locked."""
    using = router.db_for_write(Run)
    if connections[using].vendor != "sqlite":
        return []
    faults = sqlite_faults(connections[using].settings_dict["OPTIONS"])
    if not faults:
        return []
    what = f'The SQLite database "{using}" is not set up for several processes: {"; ".join(faults)}.'
    return [Warning(what, hint=f'Give DATABASES["{using}"] {SQLITE_OPTIONS}.', id="django_jobs.W002")]


def sqlite_faults(options: dict[str, Any]) -> list[str]:
    """List what the options of a SQLite database lack for several processes at once."""
    faults = []
    if str(options.get("transaction_mode")).upper() not in {"IMMEDIATE", "EXCLUSIVE"}:
        faults.append("transaction_mode is not IMMEDIATE")
    if "journal_mode=wal" not in str(options.get("init_command")).lower().replace(" ", ""):
        faults.append("init_command does not switch journal_mode to WAL")
    timeout = options.get("timeout", 5)
    if timeout < PATIENCE_SECONDS:
        faults.append(f"a writer waits for {timeout} s only (timeout)")
    return faults
