"""
What is measured, part by part. Each part adds its figures, once for each repetition, and checks that
what it counted was really done, and done once.
"""

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import crowd, idle, limits, moments, profiling, workloads
from .processes import runjobs


class Figures:
    """For each (group, name) the values of the repetitions, in the order in which they came up."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], dict[str, Any]] = {}

    def add(self, group: str, name: str, unit: str, *values: float) -> None:
        figure = {"group": group, "name": name, "unit": unit, "values": []}
        self._found.setdefault((group, name), figure)["values"] += values

    def all(self) -> list[dict[str, Any]]:
        return list(self._found.values())


def throughput(to: Figures, o: argparse.Namespace) -> None:
    """Take limit and workloads in turn, so that each ratio is of two figures from the same minute."""
    for _ in range(o.repeat):
        for threads in o.threads:
            _throughput(to, o, threads)


def _throughput(to: Figures, o: argparse.Namespace, threads: int) -> None:
    group = f"{_count(o.workers, 'worker')} of {_count(threads, 'thread')}"
    connections = o.workers * threads
    limit = limits.measure(connections, o.limit_seconds) if "limit" in o.only else 0
    if limit:
        to.add(group, f"limit: plain INSERTs, {_count(connections, 'connection')}", "commits/s", limit)
    if "runs" in o.only:
        size = {"workers": o.workers, "threads": threads}
        to.add(group, "runs without steps", "runs/s", o.runs / workloads.drain(o.runs, 0, **size))
        to.add(group, "runs of 5 steps", "runs/s", o.fives / workloads.drain(o.fives, 5, **size))
        rate = o.chains * o.chain_steps / workloads.drain(o.chains, o.chain_steps, **size)
        to.add(group, f"steps, in runs of {o.chain_steps}", "steps/s", rate)
        if limit:
            to.add(group, "steps/s as a share of the limit", "", rate / limit)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def latency(to: Figures, o: argparse.Namespace) -> None:
    with runjobs(workers=o.workers, threads=o.threads[-1]) as cluster:
        cluster.ready(o.workers)
        for _ in range(o.repeat):
            for name, value in moments.pick_up(o.samples).items():
                to.add(
                    "picking up, idle cluster", f"commit to first line of the handler, {name}", "ms", value
                )


def takeover(to: Figures, o: argparse.Namespace) -> None:
    with runjobs(workers=2, threads=1) as cluster:
        cluster.ready(2)
        for _ in range(o.repeat):
            value = moments.takeover(cluster)
            to.add("takeover", "kill -9 of a worker to its step begun by another", "ms", value)


def cron(to: Figures, o: argparse.Namespace) -> None:
    with runjobs(workers=o.workers, threads=o.threads[-1], BENCH_CRON="1") as cluster:
        cluster.ready(o.workers)
        to.add("cron", "slot to start", "ms", *moments.cron_lateness(o.slots))


def long(to: Figures, o: argparse.Namespace) -> None:
    """Compare the halves of one long run: what a step costs must not grow with the steps before it."""
    group = "a long run"
    for _ in range(o.repeat):
        workloads.drain(1, o.long_steps, workers=1, threads=1)
        first, second = workloads.halves()
        to.add(group, f"{o.long_steps:,} steps", "ms", 1000 * (first + second))
        to.add(group, f"{o.long_steps:,} steps: second half / first half", "", second / first)


def idleness(to: Figures, o: argparse.Namespace) -> None:
    """Watch a cluster that has worked and has nothing to do any more."""
    group = "idle cluster"
    statements = Path(os.environ["BENCH_LEDGER"]).with_name("statements")
    with runjobs(workers=o.workers, threads=o.threads[-1], BENCH_STATEMENTS=str(statements)) as cluster:
        cluster.ready(o.workers)
        moments.pick_up(4 * o.workers)
        time.sleep(3)
        for _ in range(o.repeat):
            cost = idle.cost(cluster, statements, o.idle_seconds / o.repeat)
            for (name, unit), value in {**cost, **idle.footprint(cluster)}.items():
                to.add(group, name, unit, value)


def claim(to: Figures, o: argparse.Namespace) -> None:
    workloads.clear()
    for rows in (0, o.rows):
        crowd.fill(rows)
        group = (
            f"beside {rows:,} sleeping and {rows:,} finished runs" if rows else "in a table with nothing else"
        )
        for _ in range(o.repeat):
            for name, value in crowd.measure(o.claims).items():
                to.add(group, name, "ms", value)
    if o.explain:
        print(crowd.explain(), flush=True)
    workloads.clear()


def profile(to: Figures, o: argparse.Namespace) -> None:
    for _ in range(o.repeat):
        for name, value in profiling.of_a_step(o.profile_steps).items():
            to.add("processor time of a step", name, "µs", value)
        for name, value in profiling.of_a_run(o.profile_runs).items():
            to.add("processor time of a run without steps", name, "µs", value)
    samples = [profiling.shares(o.profile_steps) for _ in range(o.repeat)]
    owners = {
        owner: sum(sample.get(owner, 0) for sample in samples) for sample in samples for owner in sample
    }
    for owner in sorted(owners, key=owners.__getitem__, reverse=True):
        shares = [sample.get(owner, 0.0) for sample in samples]
        to.add("whose code a step's processor time is spent in", owner, "%", *shares)


#: The parts in the order in which they are measured; ``limit`` and ``runs`` go together.
ALL: dict[str, Callable[[Figures, argparse.Namespace], None]] = {
    "limit runs": throughput,
    "latency": latency,
    "idle": idleness,
    "takeover": takeover,
    "cron": cron,
    "long": long,
    "profile": profile,
    "claim": claim,
}
