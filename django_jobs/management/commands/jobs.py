"""``manage.py jobs``: look at jobs and runs, and act on them."""

import difflib
import json
import os
import sys
from argparse import SUPPRESS, ArgumentTypeError
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.core.management.color import no_style
from django.db import Error, router
from django.utils import timezone

from django_jobs import clock, console, events, health, registry, rehearsal, services
from django_jobs.conf import conf
from django_jobs.exceptions import JobsError
from django_jobs.management import acting
from django_jobs.models import Job, Operation, Run, RunStatus
from django_jobs.triggers import EventTrigger


class Command(BaseCommand):
    help = "Look at jobs and runs, and act on them."
    #: Looking for what is wrong must work while something is: ``doctor`` runs the checks itself.
    requires_system_checks: list[str] = []

    def add_arguments(self, parser: CommandParser) -> None:
        _add_json(parser, default=False)
        verbs = parser.add_subparsers(dest="verb", required=True, title="verbs")
        _add_verbs(
            lambda name, help: verbs.add_parser(name, help=help, description=help, parents=[_common()])
        )

    def handle(self, *args: Any, verb: str, **options: Any) -> None:
        if os.environ.get("NO_COLOR") and not options["force_color"]:
            self.style = no_style()
        try:
            getattr(self, f"do_{verb.replace('-', '_')}")({**options, "verb": verb})
        except Error as error:
            raise CommandError(health.trouble(router.db_for_write(Run), error)) from error
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
        unread = () if options["json"] else ("output",)
        runs = list(_runs().filter(**wanted).defer(*unread).order_by("-queued_at", "-pk")[: options["limit"]])
        documents = [console.document(run) for run in runs]
        self._reply(
            options, documents, lambda: console.runs_table(runs, self.style) if runs else _no_runs(options)
        )

    def do_show(self, options: dict[str, Any]) -> None:
        run = services.find_run(options["run"])
        steps, attempts = list(run.steps.all()), list(run.attempts.select_related("step"))
        logs = list(run.logs.all())
        document = console.document(run) | {
            "event": run.event and console.document(run.event),
            "steps": [console.document(step) for step in steps],
            "attempts": [console.document(attempt) for attempt in attempts],
            "logs": [console.document(line) for line in logs],
        }
        self._reply(options, document, lambda: console.run_page(run, steps, attempts, logs, self.style))

    def do_export(self, options: dict[str, Any]) -> None:
        self.stdout.write(rehearsal.history(services.find_run(options["run"])))

    # Acting.

    def do_emit(self, options: dict[str, Any]) -> None:
        started = clock.now()
        at = _instant(options["at"], "--at")
        with _one_line():
            event = events.emit(options["name"], _data(options["data"]), key=options["key"], at=at)
        runs = list(event.runs.all())
        seen = event.received_at < started
        document = console.document(event) | {"runs": [console.document(run) for run in runs]}

        def text() -> str:
            if seen:
                return (
                    f"An event {event.name} with this key is there already ({event.pk}): nothing was started."
                )
            if not runs:
                return f"Emitted {event.name} ({event.pk}). {_unheard(event.name)}"
            return f"Emitted {event.name} ({event.pk}), which starts:\n{console.runs_table(runs, self.style)}"

        self._reply(options, document, text)

    def do_trigger(self, options: dict[str, Any]) -> None:
        with _one_line():
            run = events.trigger(options["job"], _data(options["data"]))
        self._reply(options, console.document(run), lambda: f"Started {run.job_id}: run {run.pk}.")

    def do_cancel(self, options: dict[str, Any]) -> None:
        cancel = partial(services.cancel, cascade=not options["alone"], **acting.why(options))
        self._act(options, cancel, "Cancelled run {0.pk} of {0.job_id}.")

    def do_retry(self, options: dict[str, Any]) -> None:
        words = "Run {0.pk} of {0.job_id} goes on from its last checkpoint."
        self._act(options, partial(services.retry, **acting.why(options)), words)

    def do_replay(self, options: dict[str, Any]) -> None:
        data = _data(options["data"])
        replay = partial(services.replay, from_step=options["from_step"], data=data, **acting.why(options))
        self._act(options, replay, "Started {0.job_id} once more: run {0.pk} for run {0.replay_of_id}.")

    def do_skip_wait(self, options: dict[str, Any]) -> None:
        words = "Run {0.pk} of {0.job_id} goes on now."
        self._act(options, partial(services.skip_wait, **acting.why(options)), words)

    def do_pause(self, options: dict[str, Any]) -> None:
        mode = "skip" if options["skip"] else "wait"
        job = services.pause(options["job"], mode, **acting.why(options))
        come = "are skipped" if options["skip"] else "wait"
        words = f"Paused {job.pk}: none of its runs goes on, and those that come {come}. Resume it with jobs resume."
        self._reply(options, console.document(job), lambda: words)

    def do_resume(self, options: dict[str, Any]) -> None:
        job = services.resume(options["job"], **acting.why(options))
        self._reply(options, console.document(job), lambda: f"Resumed {job.pk}: its runs go on.")

    def _act(self, options: dict[str, Any], act: Callable[[str], Run], words: str) -> None:
        """Do it to each run named. One that is refused keeps no other from it; the reasons come at the end."""
        if bool(options["runs"]) == bool(options["where"]):
            raise CommandError("Name runs, or say which with --where; one of the two.", returncode=2)
        if options["where"]:
            self._act_on_all(options)
            return
        done, refused = [], []
        for key in options["runs"]:
            try:
                with _one_line():
                    done.append(act(key))
            except (JobsError, CommandError) as error:
                refused.append(str(error))
        documents = [console.document(run) for run in done]
        if len(options["runs"]) > 1:
            self._reply(options, documents, lambda: "\n".join(map(words.format, done)))
        elif done:
            self._reply(options, documents[0], lambda: words.format(done[0]))
        if refused:
            raise CommandError(" ".join(refused))

    def _act_on_all(self, options: dict[str, Any]) -> None:
        """Have it done to all runs of a filter, once a person has seen how many these are."""
        verb, filter = options["verb"].replace("-", "_"), acting.read_filter(options["where"])
        times = {name: _instant(filter[name][-1], name) for name in ("since", "until") if name in filter}
        for option in ("alone", "from_step", "data"):
            if options.get(option):
                name = option.replace("_", "-")
                raise CommandError(f"--{name} is for runs that are named, not for --where.", returncode=2)
        number = services.matching(verb, filter | times)
        question = f"{options['verb']} {number} {'run' if number == 1 else 'runs'}"
        may_ask = not options["json"]
        if number and not (options["yes"] or acting.confirm(f"{question.capitalize()}?", may_ask=may_ask)):
            self.stdout.write("Nothing was done.")
            return
        operation = services.bulk(verb, filter | times, **acting.why(options))
        words = f"Operation {operation.pk} is to {question}. How far it is: manage.py jobs operations"
        self._reply(options, console.document(operation), lambda: words)

    def do_operations(self, options: dict[str, Any]) -> None:
        rows = list(Operation.objects.using(router.db_for_write(Operation))[: options["limit"]])
        empty = "No operations yet. Begin one: manage.py jobs cancel --where status=queued,job=JOB"
        documents = [console.document(row) for row in rows]
        self._reply(options, documents, lambda: console.operations_table(rows, self.style) if rows else empty)

    def do_abort(self, options: dict[str, Any]) -> None:
        operation = services.abort(options["operation"], **acting.why(options))
        words = f"Aborted operation {operation.pk}: {operation.done} of {operation.total} runs were done."
        self._reply(options, console.document(operation), lambda: words)

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
    add("show", "a run with its steps, failures and log").add_argument("run", metavar="RUN")
    add("export", "what a run went through, for jobs.replays() in a test").add_argument("run", metavar="RUN")
    emit = add("emit", "record an event and start what it triggers")
    emit.add_argument("name", metavar="NAME")
    emit.add_argument("--data", metavar="JSON", help="the event's data, a JSON object")
    emit.add_argument("--key", help="a second event with this name and key starts nothing")
    emit.add_argument("--at", metavar="ISO", help="when it happens; its runs are held until then")
    trigger = add("trigger", "start a job now, whatever its triggers")
    trigger.add_argument("job", metavar="JOB")
    trigger.add_argument("--data", metavar="JSON", help="the data of its event, a JSON object")
    cancel = add("cancel", "cancel open runs before their next step, and the runs they invoked")
    cancel.add_argument("--alone", action="store_true", help="leave the runs they invoked as they are")
    retry = add("retry", "let failed runs go on from their checkpoints")
    replay = add("replay", "start runs that have ended once more, as new runs")
    replay.add_argument("--from-step", metavar="NAME", help="begin there; what came before is remembered")
    replay.add_argument("--data", metavar="JSON", help="in place of the event's data, a JSON object")
    skip_wait = add("skip-wait", "let runs that sleep, or wait for their time, go on now")
    for verb in (cancel, retry, replay, skip_wait):
        acting.add_runs(verb)
        acting.add_why(verb)
    add("operations", "what was begun with --where, newest first").add_argument(
        "--limit", type=_limit, default=20, help="at most so many (%(default)s)"
    )
    abort = add("abort", "let an operation go no further")
    abort.add_argument("operation", metavar="OPERATION")
    acting.add_why(abort)
    pause = add("pause", "let no run of a job go on until it is resumed")
    pause.add_argument(
        "--skip", action="store_true", help="skip the runs that come meanwhile; else they wait"
    )
    resume = add("resume", "let the runs of a paused job go on")
    for verb in (pause, resume):
        verb.add_argument("job", metavar="JOB")
        acting.add_why(verb)
    prune = add("prune", "delete finished runs and old events").add_mutually_exclusive_group()
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
    _add_json(parser, default=SUPPRESS)
    for flag in ("--traceback", "--no-color", "--force-color"):
        parser.add_argument(flag, action="store_true", default=SUPPRESS, help=SUPPRESS)
    for option in ("--settings", "--pythonpath"):
        parser.add_argument(option, default=SUPPRESS, help=SUPPRESS)
    parser.add_argument("-v", "--verbosity", type=int, choices=range(4), default=SUPPRESS, help=SUPPRESS)
    return parser


def _add_json(parser: CommandParser, default: Any) -> None:
    words = "print one JSON document and nothing else"
    parser.add_argument("--json", action="store_true", default=default, help=words)


def _runs() -> Any:
    return Run.objects.using(router.db_for_write(Run))


def _jobs() -> list[tuple[Job, Run | None]]:
    """Return the jobs this code declares and those the database knows besides, with their last runs."""
    now = clock.now()
    jobs = {row.pk: row for row in services.described()}
    for row in Job.objects.using(router.db_for_write(Job)):
        if row.pk in jobs:
            for name in ("paused_at", "pause_mode", "paused_after"):
                setattr(jobs[row.pk], name, getattr(row, name))
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


def _unheard(name: str) -> str:
    """Say why an event of this name started nothing: a gate, a ``when``, or perhaps a slip of the pen."""
    ears = [(job, ear) for job in registry.known() for ear in job.triggers if isinstance(ear, EventTrigger)]
    deaf = {job.id: job.closed_by for job, ear in ears if ear.matches(name)}
    if deaf:
        why = [f"{job} ({f'off: {flag}' if flag else 'its when says no'})" for job, flag in deaf.items()]
        return f"It starts nothing: {', '.join(why)}."
    near = difflib.get_close_matches(name, [ear.name for _, ear in ears], n=1)
    return "No registered job is triggered by it." + (f' Did you mean "{near[0]}"?' if near else "")


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
