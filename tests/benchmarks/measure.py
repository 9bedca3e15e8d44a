"""
Measure one database, the one that ``DATABASE_URL`` names, and write the figures as JSON.

``__main__`` starts this in a process of its own for each database.
"""

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import django


class Figures:
    """The figures so far: for each (part, name) the values of the repetitions, in one unit."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, str], dict[str, Any]] = {}

    def add(self, part: str, name: str, unit: str, *values: float) -> None:
        figure = {"part": part, "name": name, "unit": unit, "values": []}
        self.found.setdefault((part, name), figure)["values"] += values


def throughput(to: Figures, o: argparse.Namespace) -> None:
    """Limit and workloads turn by turn, so that each ratio is of two figures from the same minute."""
    for _ in range(o.repeat):
        for threads in o.threads:
            _throughput(to, o, threads)


def _throughput(to: Figures, o: argparse.Namespace, threads: int) -> None:
    from . import limits, workloads

    connections = o.workers * threads
    part = f"{o.workers} workers x {threads} thread{'s' if threads > 1 else ''}"
    limit = None
    if "limit" in o.only:
        limit = limits.measure(connections, o.limit_seconds)
        to.add(part, f"limit: single-row INSERTs, {connections} connections", "commits/s", limit)
    if "runs" not in o.only:
        return
    size = {"workers": o.workers, "threads": threads}
    to.add(part, "runs without steps", "runs/s", o.runs / workloads.drain(o.runs, 0, **size))
    to.add(part, "runs of 5 steps", "runs/s", o.runs_of_five / workloads.drain(o.runs_of_five, 5, **size))
    rate = o.chains * o.chain_steps / workloads.drain(o.chains, o.chain_steps, **size)
    to.add(part, f"steps, in runs of {o.chain_steps}", "steps/s", rate)
    if limit:
        to.add(part, "steps/s by limit", "", rate / limit)


def latency(to: Figures, o: argparse.Namespace) -> None:
    from . import moments
    from .processes import runjobs

    with runjobs(workers=o.workers, threads=o.threads[-1]) as cluster:
        cluster.ready(o.workers)
        for _ in range(o.repeat):
            for name, value in moments.pick_up(o.samples).items():
                to.add("pick-up, idle cluster", f"commit to handler, {name}", "ms", value)


def takeover(to: Figures, o: argparse.Namespace) -> None:
    from . import moments
    from .processes import runjobs

    with runjobs(workers=2, threads=1) as cluster:
        cluster.ready(2)
        for _ in range(o.repeat):
            to.add("other moments", "kill -9 of a busy worker to its step begun anew", "ms", moments.takeover(cluster))


def cron(to: Figures, o: argparse.Namespace) -> None:
    from . import moments
    from .processes import runjobs

    with runjobs(workers=o.workers, threads=o.threads[-1], BENCH_CRON="1") as cluster:
        cluster.ready(o.workers)
        to.add("other moments", "cron: slot to start", "ms", *moments.cron_lateness(o.slots))


def idle(to: Figures, o: argparse.Namespace) -> None:
    from . import idle, workloads
    from .processes import runjobs

    workloads.drain(8 * o.workers, 5, workers=o.workers, threads=o.threads[-1])
    statements = Path(f"{_ledger()}.statements")
    with runjobs(workers=o.workers, threads=o.threads[-1], BENCH_STATEMENTS=str(statements)) as cluster:
        cluster.ready(o.workers)
        time.sleep(3)
        for _ in range(o.repeat):
            for name, value in idle.cost(cluster, statements, o.idle / o.repeat).items():
                to.add("idle cluster", *IDLE[name], value)
            for name, value in idle.footprint(cluster).items():
                to.add("idle cluster", *IDLE[name], value)


IDLE = {
    "statements": ("statements", "1/s"),
    "transactions": ("transactions, by PostgreSQL's count", "1/s"),
    "processor": ("processor, all processes", "% of a core"),
    "worker_rss": ("memory of a worker, resident", "MB"),
    "worker_pss": ("memory of a worker, its share", "MB"),
    "tree_pss": ("memory of all processes", "MB"),
}


def claim(to: Figures, o: argparse.Namespace) -> None:
    from . import crowd, workloads

    workloads.clear()
    beside = {f"alone, {crowd.BATCH} due": 0, f"beside {o.rows:,} sleeping and {o.rows:,} finished": o.rows}
    for words, rows in beside.items():
        crowd.fill(rows)
        for _ in range(o.repeat):
            for name, value in crowd.measure(o.claims).items():
                to.add("claim", f"{name} {words}", "ms", value)
    if o.explain:
        print(crowd.explain(), file=sys.stderr)
    workloads.clear()


def profile(to: Figures, o: argparse.Namespace) -> None:
    from . import profiling

    for _ in range(o.repeat):
        for name, value in profiling.of_a_step(o.profile_steps).items():
            to.add("processor time", f"a step, {PROFILE[name]}", "µs", value)
        for name, value in profiling.of_a_run(o.profile_runs).items():
            to.add("processor time", f"a run without steps, {PROFILE[name]}", "µs", value)
    for owner, share in profiling.shares(o.profile_steps).items():
        to.add("profile of a step", owner, "%", share)
