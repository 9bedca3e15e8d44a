"""
What ``manage.py jobs`` prints: rows as tables for people, and as plain values for machines.

No queries and no verbs here; the command has those.
"""

import base64
import json
import textwrap
from collections.abc import Iterable, Sequence
from datetime import date, datetime, time, timedelta
from typing import Any

from django.db import models
from django.utils import timezone
from django.utils.duration import duration_iso_string

from . import clock
from .health import Finding, span
from .models import Attempt, Job, Log, Operation, Run, Step

#: Tables are cut to fit this many columns.
WIDTH = 98

#: No column is cut below this.
NARROWEST = 12

#: As much of a payload or traceback is shown to people; ``--json`` has it all.
MOST_SHOWN = 2_000

#: As many lines of a run's log are shown to people, the last ones.
MOST_LINES = 20

#: The names in Django's ``self.style`` for what comes out of runs and checks.
STYLES = {
    "completed": "SUCCESS",
    "failed": "ERROR",
    "running": "WARNING",
    "sleeping": "HTTP_NOT_MODIFIED",
    "waiting": "HTTP_NOT_MODIFIED",
    "working": "WARNING",
    "error": "ERROR",
    "warning": "WARNING",
    "paused": "WARNING",
    "paused, skips": "WARNING",
    "on": "SUCCESS",
    "healthy": "SUCCESS",
    "unhealthy": "ERROR",
    "cannot tell": "WARNING",
}


# For machines.


def document(row: models.Model, *, without: Sequence[str] = ()) -> dict[str, Any]:
    """Return the fields of ``row`` by name; not those that are deferred or the engine's own."""
    deferred = row.get_deferred_fields()
    return {
        field.name: field.value_from_object(row)
        for field in row._meta.concrete_fields
        if (field.editable or field.primary_key)
        and field.attname not in deferred
        and field.name not in without
    }


def as_json(value: Any) -> str:
    """Return ``value`` as one JSON document: times in ISO, what JSON has no word for as text."""
    return json.dumps(value, default=_plain, indent=2)


def _plain(value: Any) -> Any:
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, timedelta):
        return duration_iso_string(value)
    if isinstance(value, set | frozenset):
        return list(value)
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return str(value)


# For people.


def jobs_table(rows: Iterable[tuple[Job, Run | None]], style: Any) -> str:
    """Show jobs with their triggers, whether they are on, and their next and last run."""
    now = clock.now()
    heads = ["JOB", "TRIGGERS", "STATE", "NEXT", "LAST RUN"]
    cells = [
        [
            job.pk,
            ", ".join(job.triggers) or "by hand",
            _state(job),
            relative(job.next_run_at, now),
            _last(run, now),
        ]
        for job, run in rows
    ]
    return table(heads, cells, style, shrink=[0, 1, 2], coloured=2)


def _state(job: Job) -> str:
    if not job.declared:
        return "not declared"
    if job.closed_by:
        return f"off: {job.closed_by}"
    return {"wait": "paused", "skip": "paused, skips"}.get(job.pause_mode, "on")


def _last(run: Run | None, now: datetime) -> str:
    return f"{run.status} {relative(run.queued_at, now)}" if run else "never"


def runs_table(runs: Sequence[Run], style: Any) -> str:
    """Show runs with when they began and how long they took, or what they wait for; reasons beneath."""
    now = clock.now()
    cells = [
        [str(run.pk), run.job_id, run.status, relative(run.queued_at, now), _took(run, now)] for run in runs
    ]
    heads = ["RUN", "JOB", "STATUS", "QUEUED", "TOOK"]
    first, *lines = table(heads, cells, style, shrink=[1], coloured=2).split("\n")
    for run, line in zip(runs, lines, strict=True):
        reason = f"{'':38}{clean(run.reason)}".replace("\n", " ")
        first += f"\n{line}" + (f"\n{_cut(reason, WIDTH)}" if run.reason else "")
    return first


def _took(run: Run, now: datetime) -> str:
    if run.status == "sleeping" or (run.status == "queued" and run.wake_at and run.wake_at > now):
        return f"wakes {relative(run.wake_at, now)}"
    if not run.started_at:
        return ""
    return span((run.finished_at or now) - run.started_at)


def run_page(
    run: Run, steps: Sequence[Step], attempts: Sequence[Attempt], logs: Sequence[Log], style: Any
) -> str:
    """Show one run in full: where it stands, its steps, what failed and what it said last."""
    parts = [f"{style.MIGRATE_HEADING(clean(run.job_id))}  {colour(run.status, style)}", _facts(run)]
    if steps:
        parts += [_heading("Steps", style), _steps_table(steps, style)]
    if attempts:
        parts += [_heading("Failed attempts", style), _attempts_table(attempts, style)]
    if logs:
        last = f" (the last {MOST_LINES} of {len(logs):,} lines)" if len(logs) > MOST_LINES else ""
        parts += [_heading(f"Log{last}", style), _logs_table(logs[-MOST_LINES:], style)]
    error = run.error or (attempts[-1].error if attempts else None)
    if error and error.get("traceback"):
        parts += [_heading("Last traceback", style), clean(error["traceback"].rstrip()[-MOST_SHOWN:])]
    return "\n".join(parts)


def _heading(text: str, style: Any) -> str:
    return f"\n{style.MIGRATE_HEADING(text)}"


def _facts(run: Run) -> str:
    now = clock.now()
    took = f"{span((run.finished_at or now) - run.started_at)}, " if run.started_at else ""
    wakes = "Wakes" if run.wake_at and run.wake_at > now else "Due"
    facts = {
        "Run": run.pk,
        "Event": f"{run.event.name} {run.event.pk}" if run.event else "",
        "Cron": f"{run.cron}, for {_instant(run.scheduled_for)}" if run.cron else "",
        "Queued": _moment(run.queued_at, now),
        "Started": _moment(run.started_at, now),
        "Finished": _moment(run.finished_at, now),
        "Retried": _moment(run.retried_at, now),
        wakes: _moment(run.wake_at, now) if run.status != "running" else "",
        "Took": f"{took}{run.passes} {'pass' if run.passes == 1 else 'passes'}",
        "Worker": run.claimed_by,
        "Reason": run.reason,
        "Error": f"{run.error.get('type')}: {run.error.get('message')}" if run.error else "",
        "Data": shown(run.event.data) if run.event and run.event.data else "",
        "Output": shown(run.output) if run.output is not None else "",
    }
    return "\n".join(f"  {name:<9} {clean(str(fact))}" for name, fact in facts.items() if fact)


def operations_table(operations: Iterable[Operation], style: Any) -> str:
    """Show operations with how far they have come; the first refusal of each beneath."""
    now = clock.now()
    heads = ["OPERATION", "VERB", "WHERE", "STATUS", "BEGAN", "DONE", "SKIPPED", "FAILED"]
    operations = list(operations)
    cells = [
        [
            str(one.pk),
            one.verb,
            where(one.filter),
            one.status,
            relative(one.created_at, now),
            f"{one.done}/{one.total}",
            str(one.skipped or ""),
            str(one.failed or ""),
        ]
        for one in operations
    ]
    first, *lines = table(heads, cells, style, shrink=[2], coloured=3).split("\n")
    for one, line in zip(operations, lines, strict=True):
        first += f"\n{line}"
        if one.refusals:
            first += f"\n{_cut(clean('{:38}{}'.format('', one.refusals[0]['reason'])), WIDTH)}"
    return first


def where(filter: dict[str, Any]) -> str:
    """Word a filter as the command line takes it."""
    # PostgreSQL keeps names in an order of its own.
    pairs = [(name, [value] if isinstance(value, str) else value) for name, value in sorted(filter.items())]
    return ",".join(f"{name}={value}" for name, values in pairs for value in values)


def _steps_table(steps: Iterable[Step], style: Any) -> str:
    now = clock.now()
    heads = ["NAME", "KIND", "STATUS", "TRIES", "STARTED", "TOOK", "NOTE"]
    cells = [
        [
            step.name,
            step.kind,
            step.status,
            str(step.attempts or 1),
            relative(step.started_at, now),
            span(step.finished_at - step.started_at)
            if step.finished_at
            else f"wakes {relative(step.wake_at, now)}",
            _note(step),
        ]
        for step in steps
    ]
    return table(heads, cells, style, shrink=[0], coloured=2)


def _note(step: Step) -> str:
    """Say of a step what its row alone would not tell: that it is none of the job's code, or no longer."""
    if step.unvisited:
        return "unvisited"
    return "on_failure" if step.part else ""


def _attempts_table(attempts: Iterable[Attempt], style: Any) -> str:
    now = clock.now()
    cells = [
        [
            attempt.step.name if attempt.step else "(between steps)",
            str(attempt.number),
            relative(attempt.finished_at, now),
            f"{attempt.error.get('type', '')}: {attempt.error.get('message', '')}",
        ]
        for attempt in attempts
    ]
    return table(["STEP", "TRY", "WHEN", "ERROR"], cells, style, shrink=[0, 3])


def _logs_table(logs: Iterable[Log], style: Any) -> str:
    cells = [
        [
            timezone.localtime(line.at).strftime("%Y-%m-%d %H:%M:%S"),
            line.level_name.lower(),
            line.step,
            line.message.partition("\n")[0],
        ]
        for line in logs
    ]
    return table(["TIME", "LEVEL", "STEP", "MESSAGE"], cells, style, shrink=[2, 3], coloured=1)


def findings(found: Iterable[Finding], style: Any) -> str:
    """Show what there is to mend, the worst first."""
    order = ["error", "warning", "info"]
    lines = []
    for finding in sorted(found, key=lambda finding: order.index(finding.level)):
        lines.append(f"{colour(finding.level, style, width=8)} {_wrapped(f'{finding.what} ({finding.id})')}")
        if finding.mend:
            lines.append(f"{'':8} {_wrapped(finding.mend)}")
    return "\n".join(lines)


def _wrapped(text: str) -> str:
    lines = textwrap.wrap(clean(text), WIDTH - 9, break_long_words=False, break_on_hyphens=False)
    return f"\n{'':9}".join(lines)


def verdict(word: str, reasons: Sequence[str], style: Any) -> str:
    return "\n".join([colour(word, style), *map(clean, reasons)])


def table(
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    style: Any,
    *,
    shrink: Sequence[int],
    coloured: int = -1,
) -> str:
    """
    Align ``rows`` under ``heads``, without the columns that are empty.

    The columns ``shrink`` give way, the widest first, until a line fits ``WIDTH``; the column
    ``coloured`` holds statuses.
    """
    rows = [[clean(cell).replace("\n", " ") for cell in row] for row in rows]
    filled = [at for at in range(len(heads)) if any(row[at] for row in rows)]
    widths = _widths([[len(line[at]) for line in (heads, *rows)] for at in range(len(heads))], filled, shrink)
    lines = ["  ".join(heads[at].ljust(widths[at]) for at in filled).rstrip()]
    for row in rows:
        cells = [_cut(cell, width).ljust(width) for cell, width in zip(row, widths, strict=True)]
        cells[coloured] = colour(cells[coloured].rstrip(), style, width=widths[coloured])
        lines.append("  ".join(cells[at] for at in filled).rstrip())
    return "\n".join([style.MIGRATE_LABEL(lines[0]), *lines[1:]])


def _widths(lengths: Sequence[Sequence[int]], filled: Sequence[int], shrink: Sequence[int]) -> list[int]:
    widths = [max(column) for column in lengths]
    while sum(widths[at] + 2 for at in filled) - 2 > WIDTH:
        widest = max(shrink, key=widths.__getitem__)
        if widths[widest] <= NARROWEST:
            break
        widths[widest] -= 1
    return widths


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"


def colour(word: str, style: Any, *, width: int = 0) -> str:
    """Colour a status by Django's palette; a word without a colour stays plain."""
    paint = getattr(style, STYLES.get(word, ""), str)
    return paint(word) + " " * (width - len(word))


def clean(text: str) -> str:
    """Take out what would move a terminal's cursor: names and messages come from anywhere."""
    return "".join(letter if letter.isprintable() or letter == "\n" else " " for letter in text)


def relative(instant: datetime | None, now: datetime) -> str:
    """Word an instant by its distance: ``3 min ago``, ``in 2 d``."""
    if instant is None:
        return ""
    if abs(instant - now) < timedelta(seconds=1):
        return "now"
    if instant > now:
        return f"in {span(instant - now)}"
    return f"{span(now - instant)} ago"


def _moment(instant: datetime | None, now: datetime) -> str:
    return f"{_instant(instant)} ({relative(instant, now)})" if instant else ""


def _instant(instant: datetime | None) -> str:
    return timezone.localtime(instant).strftime("%Y-%m-%d %H:%M:%S %Z") if instant else ""


def shown(value: Any, *, indent: int | None = None) -> str:
    """Return ``value`` as JSON for reading, cut off where it gets too long for that."""
    text = json.dumps(value, default=_plain, ensure_ascii=False, indent=indent)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}… ({len(text):,} characters)"
