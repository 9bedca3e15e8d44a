"""
Where the processor time of a step and of a run goes, in one process with no cluster around it.

Time spent waiting for the database is not in these figures: they are of the processor, not of the clock.
"""

import signal
import time
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from django.db import connection

from django_jobs import EventSpec, clock, emit, emit_many, executor
from django_jobs.broker import RunBroker
from django_jobs.channel import pair
from django_jobs.models import Run, Step

from . import workloads
from .databases import connect
from .processes import processor_seconds

BATCH = 8


@cache
def _broker() -> RunBroker:
    """Make one broker, as a cluster does: making one closes the database connection."""
    return RunBroker()


def _claimed(runs: int) -> list[Run]:
    return [run for _, run in _broker().dequeue(runs)]


def _microseconds(work: Callable[[], Any], *, each: int) -> float:
    begun = time.process_time()
    work()
    return 1e6 * (time.process_time() - begun) / each


def of_a_step(steps: int) -> dict[str, float]:
    """Return the microseconds a step takes in the worker, and in the database where that can be seen."""
    workloads.clear()
    emit("bench/chain", {"steps": steps})
    [run] = _claimed(1)
    server = _server()
    before = processor_seconds(server)
    found = {"in the worker": _microseconds(lambda: executor.execute(run), each=steps)}
    if server:
        found["in PostgreSQL's process"] = 1e6 * (processor_seconds(server) - before) / steps
    workloads.check(1, steps)
    return found | {"the same statement by the plain driver": _driver_alone(steps)}


def _server() -> list[int]:
    """Return the process that serves this connection, if it is PostgreSQL's and on this host."""
    if connection.vendor != "postgresql":
        return []
    pid = connection.connection.info.backend_pid
    comm = Path(f"/proc/{pid}/comm")
    return [pid] if comm.exists() and comm.read_text().startswith("postgres") else []


def _driver_alone(steps: int) -> float:
    """Give the statement of a checkpoint to the plain driver, so many times."""
    workloads.clear()
    emit("bench/chain", {"steps": 0})
    [run] = _claimed(1)
    sql, parameters = _checkpoint_statement(run)
    if connection.vendor == "sqlite":
        sql = sql.replace("%s", "?")
    plain = connect(connection.settings_dict)
    cursor = plain.cursor()
    if connection.vendor == "postgresql":
        import psycopg

        cursor = psycopg.ClientCursor(plain)

    def write() -> None:
        for n in range(steps):
            cursor.execute(sql, [f"again-{n}" if value == "once" else value for value in parameters])

    found = _microseconds(write, each=steps)
    plain.close()
    assert Step.objects.filter(run=run).count() == steps + 1
    return found


def _checkpoint_statement(run: Run) -> tuple[str, Any]:
    now = clock.now()
    step = Step(
        run=run, name="once", kind="run", status="completed", attempts=1, started_at=now, finished_at=now
    )
    seen = []

    def note(execute: Any, sql: str, parameters: Any, many: bool, context: Any) -> Any:
        seen.append((sql, parameters))
        return execute(sql, parameters, many, context)

    with connection.execute_wrapper(note):
        Step.objects.checkpoint(step, run.lease, "null")
    [found] = seen
    return found


def of_a_run(runs: int) -> dict[str, float]:
    """Return the microseconds that each part of a run without steps takes, in the process that does it."""
    workloads.clear()
    specs = [EventSpec("bench/chain", {"steps": 0})] * runs
    found = {"emitting it": _microseconds(lambda: [emit(spec.name, spec.data) for spec in specs], each=runs)}
    workloads.clear()
    emit_many(specs)
    claimed: list[Run] = []
    batches = range(0, runs, BATCH)
    claim = lambda: [claimed.extend(_claimed(BATCH)) for _ in batches]  # noqa: E731
    found[f"claiming it, {BATCH} at a time"] = _microseconds(claim, each=runs)
    here, there = pair()
    found["sending it to a worker and receiving it"] = _microseconds(
        lambda: [_send(here, there, run) for run in claimed], each=runs
    )
    found["executing it"] = _microseconds(lambda: [executor.execute(run) for run in claimed], each=runs)
    here.close()
    there.close()
    workloads.check(runs, steps=0)
    return found


def _send(here: Any, there: Any, run: Run) -> None:
    here.send(run)
    there.receive()


def shares(steps: int) -> dict[str, float]:
    """
    Return the per cent of a step's processor time by whose code it is spent in.

    Sampled: the kernel's timer of processor time says when to look. A profiler that is called for each
    function would add most to what calls many small ones.
    """
    workloads.clear()
    emit("bench/chain", {"steps": steps})
    [run] = _claimed(1)
    seen: Counter[str] = Counter()

    def look(number: int, frame: Any) -> None:
        seen[_owner(frame.f_code.co_filename, frame.f_code.co_name)] += 1

    before = signal.signal(signal.SIGPROF, look)
    signal.setitimer(signal.ITIMER_PROF, 0.001, 0.001)
    try:
        executor.execute(run)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
    workloads.check(1, steps)
    return {owner: 100 * times / seen.total() for owner, times in seen.items()}


def _owner(file: str, function: str) -> str:
    """Say whose code a function is, with what it calls that is not Python."""
    parts = Path(file).parts
    if {"psycopg", "MySQLdb"} & set(parts) or (
        parts[-2:] == ("sqlite3", "base.py") and function == "execute"
    ):
        return "the database driver"
    if "django_jobs" in parts:
        return f"django_jobs.{Path(file).stem}"
    packages = {"tests": "the job itself", "django": "Django", "asgiref": "Django", "json": "json"}
    return next((owner for package, owner in packages.items() if package in parts), "the rest of Python")
