"""What the verbs of ``manage.py jobs`` that act have in common: on which runs, who does it, and why."""

import getpass
import os
import sys
from typing import Any

from django.core.management.base import CommandError, CommandParser

from django_jobs import operations


def add_runs(verb: CommandParser) -> None:
    """Let ``verb`` take runs by their ids, or all that a filter chooses."""
    verb.add_argument("runs", metavar="RUN", nargs="*")
    names = ", ".join(operations.FILTERS)
    where = f"all runs with these, in the clusters: {names}"
    verb.add_argument("--where", metavar="NAME=VALUE,...", action="append", help=where)
    verb.add_argument("--yes", action="store_true", help="with --where: do not ask first")


def add_why(verb: CommandParser) -> None:
    verb.add_argument("--reason", default="", help="why; kept with what is cancelled, and told to receivers")
    verb.add_argument("--actor", help="who does it (you, by the operating system)")


def why(options: dict[str, Any]) -> dict[str, Any]:
    """Return the reason and the actor as the services take them."""
    return {"reason": options["reason"], "actor": options["actor"] or user()}


def user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"  # A container whose user has no name.


def read_filter(pairs: list[str]) -> dict[str, list[str]]:
    """Read ``name=value,name=value``; a name said again has several values."""
    filter: dict[str, list[str]] = {}
    for pair in ",".join(pairs).split(","):
        name, _, value = pair.partition("=")
        if not (name and value):
            raise CommandError(f"--where takes name=value,..., not {pair!r}.", returncode=2)
        filter.setdefault(name, []).append(value)
    return filter


def confirm(question: str, *, may_ask: bool) -> bool:
    """Ask whoever sits there; where nobody does, it has to be said beforehand."""
    if not may_ask or not sys.stdin.isatty():
        raise CommandError(f"{question} Say --yes to do so.", returncode=2)
    return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
