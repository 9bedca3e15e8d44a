"""``manage.py runjobs``: work off the jobs of this project."""

import logging
import os
import sys
from argparse import ArgumentParser
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError
from django.db import connections, router
from django.db.migrations.executor import MigrationExecutor
from django.utils.autoreload import iter_all_python_module_files

from django_jobs import __version__, registry
from django_jobs.cluster import JobsCluster, Options, default_options
from django_jobs.models import Run
from django_jobs.outage import outlast


class Command(BaseCommand):
    help = "Work off events, crons and runs until stopped. Start as many as you like, on any host."

    def add_arguments(self, parser: ArgumentParser) -> None:
        default = default_options()
        parser.add_argument("--workers", type=int, default=default.workers, help="processes (%(default)s)")
        parser.add_argument(
            "--threads", type=int, default=default.threads, help="runs at a time in each (%(default)s)"
        )
        parser.add_argument("--queues", default="", help="only the jobs of these queues, comma-separated")
        parser.add_argument("--once", action="store_true", help="end when nothing is due")
        parser.add_argument(
            "--grace",
            type=float,
            default=default.grace,
            help="seconds for steps in hand when stopping (%(default)s)",
        )
        parser.add_argument(
            "--reload", action="store_true", help="start again when code changes (needs DEBUG)"
        )

    def handle(self, *args: Any, **given: Any) -> None:
        options = self._options(given)
        using = router.db_for_write(Run)
        _log_to_console(given["verbosity"])
        outlast(using, connections[using].ensure_connection)
        _refuse_unmigrated(using)
        if given["verbosity"]:
            self._banner(options, using)
        cluster = JobsCluster(options, _code_changed() if given["reload"] else lambda: False)
        code = cluster.start()
        if cluster.reload:
            self.stdout.write("The code has changed: starting again.")
            self.stdout.flush()
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606
        if given["verbosity"]:
            self.stdout.write("Nothing is due any more." if options.once and not code else "Stopped.")
        if code:
            sys.exit(code)

    def _options(self, given: dict[str, Any]) -> Options:
        queues = tuple(name.strip() for name in given["queues"].split(",") if name.strip())
        known = sorted({job.queue for job in registry.known(own=True)})
        if unknown := set(queues) - set(known):
            raise CommandError(
                f"No job is in queue {', '.join(sorted(unknown))}. Queues: {', '.join(known) or 'none'}.",
                returncode=2,
            )
        for name, least in (("workers", 1), ("threads", 1), ("grace", 0)):
            if given[name] < least:
                raise CommandError(f"--{name} must be at least {least}.", returncode=2)
        if given["reload"] and not settings.DEBUG:
            raise CommandError("--reload is for development: it needs DEBUG = True.", returncode=2)
        wanted = {name: given[name] for name in ("workers", "threads", "grace", "once")}
        return replace(default_options(), queues=queues, **wanted)

    def _banner(self, options: Options, using: str) -> None:
        open_jobs = [job.id for job, closed_by in registry.declared() if not closed_by]
        kept_out = [f"{job.id} ({closed_by})" for job, closed_by in registry.declared() if closed_by]
        lines = [
            self.style.MIGRATE_HEADING(f"django_jobs {__version__}"),
            f"  Database  {_database(using)}",
            f"  Workers   {_count(options.workers, 'process', 'processes')},"
            f" {_count(options.threads, 'thread', 'threads')} each",
            f"  Queues    {', '.join(options.queues) or 'all'}",
            f"  Jobs      {', '.join(open_jobs) or 'none: is there a jobs.py in an installed app?'}",
        ]
        if kept_out:
            lines.append(f"  Gated off {', '.join(kept_out)}")
        until = "Ends when nothing is due." if options.once else "Stop with Ctrl-C; twice to stop at once."
        self.stdout.write("\n".join([*lines, until]))
        self.stdout.flush()


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _database(using: str) -> str:
    connection = connections[using]
    name, host = connection.settings_dict["NAME"], connection.settings_dict["HOST"]
    return f"{connection.display_name} {name}{f' on {host}' if host else ''}"


def _refuse_unmigrated(using: str) -> None:
    migrations = MigrationExecutor(connections[using])
    ours = [node for node in migrations.loader.graph.leaf_nodes() if node[0] in ("django_jobs", "django_q")]
    if migrations.migration_plan(ours):
        raise CommandError("The database is not migrated. Run `manage.py migrate` first.")


def _log_to_console(verbosity: int) -> None:
    """Show what goes on, unless the project's LOGGING does so already."""
    logger = logging.getLogger("django_jobs")
    if not logger.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(
            logging.Formatter("{asctime} {levelname:<7} {message}", datefmt="%H:%M:%S", style="{")
        )
        logger.addHandler(handler)
        logger.setLevel({0: logging.WARNING, 1: logging.INFO}.get(verbosity, logging.DEBUG))


def _code_changed() -> Callable[[], bool]:
    """Return a function that tells whether a loaded module's file has changed since now."""

    def stamps() -> dict[Path, float]:
        return {path: path.stat().st_mtime for path in iter_all_python_module_files() if path.exists()}

    before = stamps()

    def changed() -> bool:
        now = stamps()
        return any(before.setdefault(path, stamp) != stamp for path, stamp in now.items())

    return changed
