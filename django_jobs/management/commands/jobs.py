"""``manage.py jobs``: look at jobs and runs, and act on them."""

import json
import os
import sys
from argparse import SUPPRESS, ArgumentTypeError
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.core.management.color import no_style
from django.db import Error, router
from django.utils import timezone

from django_jobs import clock, console, events, health, registry, services
from django_jobs.conf import conf
from django_jobs.exceptions import JobsError
from django_jobs.models import Job, Run, RunStatus


class Command(BaseCommand):
    help = "Look at jobs and runs, and act on them."
    #: Looking for what is wrong must work while something is: ``doctor`` runs the checks itself.
    requires_system_checks: list[str] = []

    def add_arguments(self, parser: CommandParser) -> None:
        verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB", title="verbs")
        _add_verbs(
            lambda name, help: verbs.add_parser(name, help=help, description=help, parents=[_common()])
        )

    def handle(self, *args: Any, verb: str, **options: Any) -> None:
        if os.environ.get("NO_COLOR") and not options["force_color"]:
            self.style = no_style()
        try:
            getattr(self, f"do_{verb}")(options)
        except Error as error:
            reason = health.unreachable(router.db_for_write(Run), error)
            raise CommandError(f"{reason} (manage.py jobs doctor may know more.)") from error
        except JobsError as error:
            raise CommandError(str(error)) from error

    def _reply(self, options: dict[str, Any], document: Any, text: Callable[[], str]) -> None:
        self.stdout.write(console.as_json(document) if options["json"] else text())

    # Looking.

    def do_list(self, options: dict[str, Any]) -> None:
        rows = _jobs()
        documents = [
            console.document(job) | {"last_run": run and console.document(run, without=HEAVY)}
            for job, run in rows
        ]
        empty = "No job is declared yet. Write one with @job in a jobs.py of an installed app."
        self._reply(options, documents, lambda: console.jobs_table(rows, self.style) if rows else empty)

    def do_runs(self, options: dict[str, Any]) -> None:
        wanted = {"job_id": options["job"], "status": options["status"]}
        wanted = {name: value for name, value in wanted.items() if value}
        runs = list(
            _runs().filter(**wanted).defer("output").order_by("-queued_at", "-pk")[: options["limit"]]
        )
        documents = [console.document(run) for run in runs]
        self._reply(
            options, documents, lambda: console.runs_table(runs, self.style) if runs else _no_runs(options)
        )

    def do_show(self, options: dict[str, Any]) -> None:
        run = services.find_run(options["run"])
        steps, attempts = list(run.steps.all()), list(run.attempts.select_related("step"))
        document = console.document(run) | {
            "event": run.event and console.document(run.event),
            "steps": [console.document(step, without=["run"]) for step in steps],
            "attempts": [console.document(attempt, without=["run"]) for attempt in attempts],
        }
        self._reply(options, document, lambda: console.run_page(run, steps, attempts, self.style))

    # Acting.

    def do_emit(self, options: dict[str, Any]) -> None:
        started = clock.now()
        at = _instant(options["at"], "--at")
        with _one_line():
            event = events.emit(options["name"], _data(options["data"]), key=options["key"], at=at)
        runs = list(event.runs.defer("output"))
        seen = event.received_at < started
        document = console.document(event) | {"runs": [console.document(run) for run in runs]}

        def text() -> str:
            if seen:
                return (
                    f"An event {event.name} with this key is there already ({event.pk}): nothing was started."
                )
            if not runs:
                return f"Emitted {event.name} ({event.pk}). No registered job is triggered by it."
            return f"Emitted {event.name} ({event.pk}), which starts:\n{console.runs_table(runs, self.style)}"

        self._reply(options, document, text)

    def do_trigger(self, options: dict[str, Any]) -> None:
        with _one_line():
            run = events.trigger(options["job"], _data(options["data"]))
        self._reply(options, console.document(run), lambda: f"Started {run.job_id}: run {run.pk}.")

    def do_cancel(self, options: dict[str, Any]) -> None:
        run = services.cancel(options["run"], options["reason"])
        self._reply(options, console.document(run), lambda: f"Cancelled run {run.pk} of {run.job_id}.")

    def do_retry(self, options: dict[str, Any]) -> None:
        run = services.retry(options["run"])
        words = f"Run {run.pk} of {run.job_id} goes on from its last checkpoint."
        self._reply(options, console.document(run), lambda: words)

    def do_prune(self, options: dict[str, Any]) -> None:
        before = _instant(options["before"], "--before")
        if options["days"] is not None:
            before = clock.now() - timedelta(days=options["days"])
        counts = services.prune(before)

        def text() -> str:
            pruned = f"Pruned {counts['runs']} finished runs and {counts['events']} events."
            if before is None and conf.RETENTION_DAYS is None:
                pruned += (
                    " RETENTION_DAYS is None, so only a job's own retention counts: say --days or --before."
                )
            return pruned

        self._reply(options, counts, text)

    # Health.

    def do_health(self, options: dict[str, Any]) -> None:
        report = health.health()
        verdict = {True: "healthy", False: "unhealthy", None: "cannot tell"}[report["healthy"]]
        self._reply(options, report, lambda: console.verdict(verdict, report["reasons"], self.style))
        self.stdout.flush()
        if code := {True: 0, False: 1, None: 2}[report["healthy"]]:
            sys.exit(code)

    def do_doctor(self, options: dict[str, Any]) -> None:
        found = health.doctor()
        self._reply(
            options,
            [asdict(finding) for finding in found],
            lambda: console.findings(found, self.style) or self.style.SUCCESS("Nothing to mend."),
        )


#: Fields of a run that may be megabytes, or pages.
HEAVY = ("output", "error")


def _add_verbs(add: Callable[[str, str], CommandParser]) -> None:
    add("list", "the jobs, their triggers, their next and last run")
    runs = add("runs", "the runs, newest first")
    runs.add_argument("--job", help="only of this job")
    runs.add_argument("--status", choices=RunStatus.values, help="only in this status")
    runs.add_argument("--limit", type=_limit, default=20, help="at most so many (%(default)s)")
    add("show", "a run with its steps and failures").add_argument("run", metavar="RUN")
    emit = add("emit", "record an event and start what it triggers")
    emit.add_argument("name", metavar="NAME")
    emit.add_argument("--data", metavar="JSON", help="the event's data, a JSON object")
    emit.add_argument("--key", help="a second event with this name and key starts nothing")
    emit.add_argument("--at", metavar="ISO", help="when it happens; its runs are held until then")
    trigger = add("trigger", "start a job now, whatever its triggers")
    trigger.add_argument("job", metavar="JOB")
    trigger.add_argument("--data", metavar="JSON", help="the data of its event, a JSON object")
    cancel = add("cancel", "cancel an open run before its next step")
    cancel.add_argument("run", metavar="RUN")
    cancel.add_argument("--reason", default="", help="kept with the run")
    add("retry", "let a failed run go on from its checkpoints").add_argument("run", metavar="RUN")
    prune = add(
        "prune", "delete finished runs and events past their retention"
    ).add_mutually_exclusive_group()
    prune.add_argument("--before", metavar="ISO", help="what ended or came before this")
    prune.add_argument("--days", type=_days, metavar="N", help="what is older than N days")
    add("health", "exit code 0: healthy, 1: not, 2: cannot tell")
    add("doctor", "what is misconfigured or stuck, and how to mend it")


def _common() -> CommandParser:
    """
    The options every verb has: ``--json``, and Django's own.

    Those work before the verb too, so a default here must not take the place of what was said there.
    """
    parser = CommandParser(add_help=False)
    parser.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    for flag in ("--traceback", "--no-color", "--force-color"):
        parser.add_argument(flag, action="store_true", default=SUPPRESS, help=SUPPRESS)
    for option in ("--settings", "--pythonpath"):
        parser.add_argument(option, default=SUPPRESS, help=SUPPRESS)
    parser.add_argument("-v", "--verbosity", type=int, choices=range(4), default=SUPPRESS, help=SUPPRESS)
    return parser


def _runs() -> Any:
    return Run.objects.using(router.db_for_write(Run))


def _jobs() -> list[tuple[Job, Run | None]]:
    """Return the jobs this code declares and those the database knows besides, with their last runs."""
    now = clock.now()
    jobs = {row.pk: row for row in services.described()}
    for row in Job.objects.using(router.db_for_write(Job)):
        if row.pk in jobs:
            jobs[row.pk].paused_at = row.paused_at
        else:
            row.declared, row.next_run_at = False, None
            jobs[row.pk] = row
    for job in registry.jobs():
        jobs[job.id].next_run_at = min((cron.next(now) for cron in job.crons), default=None)
    return [(row, _last(row)) for row in sorted(jobs.values(), key=lambda row: (row.group, row.pk))]


def _last(job: Job) -> Run | None:
    return _runs().filter(job_id=job.pk).defer(*HEAVY).order_by("-queued_at").first()


def _no_runs(options: dict[str, Any]) -> str:
    if options["job"] and registry.find(options["job"]) is None:
        known = ", ".join(sorted(job.id for job in registry.known())) or "none"
        return f'No runs, and no job "{options["job"]}" is declared. Declared: {known}.'
    if options["job"] or options["status"]:
        return "No such runs. Leave out --job or --status to see others."
    return (
        "No runs yet. Emit an event (manage.py jobs emit NAME) or start a job (manage.py jobs trigger JOB)."
    )


@contextmanager
def _one_line() -> Iterator[None]:
    """Payloads that cannot be kept are refused with a TypeError or ValueError made for reading."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise CommandError(str(error)) from error


def _data(text: str | None) -> dict | None:
    if text is None:
        return None
    try:
        data = json.loads(text)
    except ValueError as error:
        raise CommandError(f"--data is not JSON: {error}", returncode=2) from None
    if not isinstance(data, dict):
        raise CommandError(f"--data must be a JSON object ({{...}}), not {text[:40]}", returncode=2)
    return data


def _instant(text: str | None, option: str) -> datetime | None:
    """Read an ISO time; one without an offset is in the project's time zone."""
    if text is None:
        return None
    try:
        instant = datetime.fromisoformat(text)
        return (instant if instant.tzinfo else timezone.make_aware(instant)).astimezone(UTC)
    except (ValueError, OverflowError):
        what = f"{option} takes an ISO time such as 2026-11-24T09:00+01:00, not {text}"
        raise CommandError(what, returncode=2) from None


def _limit(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise ArgumentTypeError(f"a whole number above zero, not {text}")
    return int(text)


def _days(text: str) -> int:
    if not text.isdecimal() or int(text) > 100_000:
        raise ArgumentTypeError(f"a whole number of days, not {text}")
    return int(text)
