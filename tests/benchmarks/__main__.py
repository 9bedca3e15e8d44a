"""
``python -m tests.benchmarks``: print what the engine does, beside what the database could, on each database.

Each runs in a process and a throw-away database of its own. Figures mean something on a quiet machine;
the ratios, measured side by side in one run, mean most.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

PARTS = ("limit", "runs", "pick-up", "idle", "claim", "takeover", "cron", "processor")


def main() -> None:
    options = _options()
    if options.one:
        print(json.dumps(measure(options)))
        return
    print(
        f"{os.cpu_count()} processors, Python {platform.python_version()}, 2 workers, sizes: {_sizes(options)}"
    )
    results = {}
    for name in options.databases.split(","):
        with tempfile.TemporaryDirectory() as folder:
            results[name] = _measure_apart(name, Path(folder))
        print(f"\n{name} {results[name].pop('version')}\n{table(results[name])}", flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=1))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--databases", default="sqlite,postgresql")
    parser.add_argument("--only", default=",".join(PARTS), help="parts: " + ", ".join(PARTS))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--chains", type=int, default=100)
    parser.add_argument("--steps", type=int, default=100, help="steps of a chain")
    parser.add_argument("--samples", type=int, default=60)
    parser.add_argument("--seconds", type=float, default=20, help="of idleness")
    parser.add_argument("--rows", type=int, default=1_000_000, help="sleeping, and as many finished")
    parser.add_argument("--json", help="write the figures to this file too")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser.parse_args()


def _sizes(options: argparse.Namespace) -> str:
    names = ("repeat", "runs", "chains", "steps", "samples", "rows")
    return ", ".join(f"{name} {getattr(options, name)}" for name in names)


def _measure_apart(name: str, folder: Path) -> dict[str, Any]:
    url, drop = _database(name, folder)
    environment = {
        **os.environ,
        "DATABASE_URL": url,
        "DJANGO_SETTINGS_MODULE": "tests.benchmarks.settings",
        "BENCH_LEDGER": str(folder / "ledger"),
        "JOBS_LOG_LEVEL": "ERROR",
    }
    command = [sys.executable, "-m", "tests.benchmarks", *sys.argv[1:], "--one", name]
    try:
        done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    finally:
        drop()
    return json.loads(done.stdout.splitlines()[-1])


def _database(name: str, folder: Path) -> tuple[str, Callable[[], None]]:
    if name == "sqlite":
        return f"sqlite:///{folder}/bench.sqlite3", lambda: None
    import psycopg

    server = os.environ.get("TEST_POSTGRES_URL", "postgres://postgres@127.0.0.1:5432/test")
    bench = "bench_django_jobs"

    def execute(statement: Any) -> None:
        with psycopg.connect(server.replace("postgres://", "postgresql://"), autocommit=True) as connection:
            connection.execute(statement)

    execute(f"DROP DATABASE IF EXISTS {bench} WITH (FORCE)")
    execute(f"CREATE DATABASE {bench}")
    return f"{server.rsplit('/', 1)[0]}/{bench}", lambda: execute(f"DROP DATABASE {bench} WITH (FORCE)")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the parts asked for on the database of ``DATABASE_URL``; each figure is a list of repeats."""
    import django

    django.setup()
    from django.core.management import call_command
    from django.db import connection

    call_command("migrate", verbosity=0)
    figures: dict[str, Any] = {"version": ".".join(map(str, connection.get_database_version()))}

    def add(name: str, value: float) -> None:
        figures.setdefault(name, []).append(value)

    for _ in range(options.repeat):
        _repeated(options, add)
    _once(options, add)
    return figures


def _repeated(options: argparse.Namespace, add: Callable[[str, float], None]) -> None:
    from . import limits, measures

    only, url = options.only.split(","), os.environ["DATABASE_URL"]
    for threads in (1, 4):
        connections = 2 * threads
        limit = limits.per_second(url, connections, 3) if "limit" in only else None
        if limit:
            add(f"limit: INSERTs/s on {connections} connections", limit)
        if "runs" not in only:
            continue
        add(f"runs/s, 0 steps, {threads} thread(s)", measures.throughput(options.runs, 0, threads))
        add(f"runs/s, 5 steps, {threads} thread(s)", measures.throughput(options.runs // 2, 5, threads))
        rate = options.steps * measures.throughput(options.chains, options.steps, threads)
        add(f"steps/s, {threads} thread(s)", rate)
        if limit:
            add(f"steps/s : limit, {threads} thread(s)", rate / limit)
    if "takeover" in only:
        add("takeover after kill -9, s", measures.takeover())
    if "processor" in only:
        for name, value in measures.processor_time(2000).items():
            add(
                {"step_us": "processor time of a step, us", "run_us": "of a run without steps, us"}[name],
                value,
            )


def _once(options: argparse.Namespace, add: Callable[[str, float], None]) -> None:
    from . import crowd, measures

    only = options.only.split(",")
    if "pick-up" in only:
        for name, value in measures.pick_up(options.samples).items():
            add(f"pick-up {name}, ms", value)
    if "idle" in only:
        for name, value in measures.idle(options.seconds).items():
            add(f"idle: {name.replace('_', ' ')}", value)
    if "cron" in only:
        add("cron lateness, s", measures.cron_lateness())
    if "claim" in only:
        measures.clear()
        alone = crowd.measure(50)
        crowd.fill(options.rows)
        beside = crowd.measure(50)
        for name in alone:
            words = name.replace("_ms", "").replace("_", " ")
            add(f"{words}, ms, alone", alone[name])
            add(f"{words}, ms, beside {2 * options.rows:,} runs", beside[name])


def table(figures: dict[str, list[float]]) -> str:
    rows = ["| measure | median | min | max |", "| --- | ---: | ---: | ---: |"]
    for name, values in figures.items():
        numbers = [statistics.median(values), min(values), max(values)]
        rows.append(f"| {name} | " + " | ".join(f"{number:,.4g}" for number in numbers) + " |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
