"""What is measured, in a process of its own for each database: ``DATABASE_URL`` says which."""

import os
import random
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from django.db import connection, transaction

from django_jobs import executor, registry
from django_jobs.models import OPEN, Attempt, Event, Run, Step, Worker

from . import ledger

ROOT = Path(__file__).parent.parent.parent
HERTZ = os.sysconf("SC_CLK_TCK")


class Cluster:
    """A ``runjobs`` to be measured."""

    def __init__(self, *, workers: int = 2, threads: int = 4, **environment: str) -> None:
        arguments = ["--workers", str(workers), "--threads", str(threads), "--verbosity", "0"]
        self.process = subprocess.Popen(
            [sys.executable, "manage.py", "runjobs", *arguments], cwd=ROOT, env={**os.environ, **environment}
        )

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *raised: Any) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)

    def tree(self) -> list[int]:
        parents = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                parents[int(stat.parent.name)] = int(stat.read_text().rsplit(")", 1)[1].split()[1])
            except OSError:
                continue
        tree = [self.process.pid]
        for pid in tree:
            tree += [child for child, parent in parents.items() if parent == pid]
        return tree

    def cpu_seconds(self) -> float:
        fields = [Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split() for pid in self.tree()]
        return sum(int(field[11]) + int(field[12]) for field in fields) / HERTZ

    def megabytes(self) -> dict[int, float]:
        """The proportional share of each process in the memory of the machine."""
        return {pid: _pss(pid) / 1024 for pid in self.tree()}


def _pss(pid: int) -> int:
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))


def clear() -> None:
    for model in (Attempt, Step, Run, Event, Worker):
        model.objects.all()._raw_delete("default")
    ledger.clear()


def wait_until(condition: Any, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to an end"
        time.sleep(0.02)


def throughput(runs: int, steps: int, threads: int) -> float:
    """Return runs a second: all are waiting when the workers start; from the first start to the last finish."""
    clear()
    job = registry.get("bench-chain")
    with transaction.atomic():
        for _ in range(runs):
            job.start({"steps": steps})
    with Cluster(threads=threads):
        wait_until(lambda: not Run.objects.filter(status__in=OPEN).exists())
    done = Run.objects.filter(status="completed")
    assert done.count() == runs, "not every run was completed"
    assert Step.objects.count() == runs * steps
    counts = ledger.counts()
    assert len(counts) == runs * (steps + 1), "a step is missing from the ledger"
    assert set(counts.values()) == {1}, "something was done twice"
    begun = done.order_by("started_at").values_list("started_at", flat=True)[0]
    ended = done.order_by("-finished_at").values_list("finished_at", flat=True)[0]
    return runs / (ended - begun).total_seconds()


def pick_up(samples: int) -> dict[str, float]:
    """Return milliseconds from the commit of a start to the first line of the handler, on an idle cluster."""
    clear()
    job, sent = registry.get("bench-pick-up"), {}
    with Cluster():
        wait_until(lambda: Worker.objects.exists())
        time.sleep(2)
        for _ in range(samples):
            with transaction.atomic():
                run = job.start()
            sent[str(run.pk)] = time.time()
            time.sleep(random.uniform(0.05, 0.6))
        wait_until(lambda: len(ledger.lines("begun")) == samples)
    taken = sorted(1000 * (line.at - sent[line.run]) for line in ledger.lines("begun"))
    return {"p50": taken[len(taken) // 2], "p95": taken[int(len(taken) * 0.95)], "max": taken[-1]}


def idle(seconds: float) -> dict[str, float]:
    """Return what a cluster with nothing to do costs."""
    clear()
    with Cluster() as cluster:
        wait_until(lambda: Worker.objects.exists())
        time.sleep(12)  # PostgreSQL publishes a session's counters up to 10 s late.
        cpu, statements = cluster.cpu_seconds(), _statements()
        connection.close()
        time.sleep(seconds)
        cost = {"cpu_percent": 100 * (cluster.cpu_seconds() - cpu) / seconds}
        if statements is not None:
            # Our own look at the counter is one of them.
            cost["statements_per_second"] = ((_statements() or 0) - statements - 1) / seconds
        sizes = cluster.megabytes()
        workers = sorted(sizes)[-2:]
        cost["worker_megabytes"] = statistics.mean(sizes[pid] for pid in workers)
        cost["tree_megabytes"] = sum(sizes.values())
    return cost


def _statements() -> int | None:
    if connection.vendor != "postgresql":
        return None
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = current_database()"
        )
        return int(cursor.fetchone()[0])


def processor_time(steps: int) -> dict[str, float]:
    """Return microseconds of processor time in one process: of a step, and of a whole run without steps."""
    clear()
    job = registry.get("bench-chain")
    job.start({"steps": steps})
    one_step = _processor_time(lambda run: executor.execute(run)) / steps
    for _ in range(300):
        job.start({"steps": 0})
    one_run = _processor_time(lambda run: executor.execute(run)) / 300
    return {"step_us": one_step, "run_us": one_run}


def _processor_time(work: Any) -> float:
    runs = Run.objects.claim(1000, jobs=["bench-chain"])
    begun = time.process_time()
    for run in runs:
        work(run)
    return 1e6 * (time.process_time() - begun)


def takeover() -> float:
    """Return the seconds from the kill of a busy worker to the next beginning of the step it had in hand."""
    clear()
    with Cluster(threads=1):
        registry.get("bench-outside").start({"seconds": 1})
        wait_until(lambda: ledger.lines("waiting"))
        os.kill(ledger.lines("waiting")[0].pid, signal.SIGKILL)
        killed = time.time()
        wait_until(lambda: len(ledger.lines("waiting")) == 2)
        wait_until(lambda: not Run.objects.filter(status__in=OPEN).exists())
    return ledger.lines("waiting")[1].at - killed


def cron_lateness() -> float:
    """Return the seconds from a cron slot to the start of its run."""
    clear()
    with Cluster(BENCH_CRON="1"):
        wait_until(lambda: Run.objects.filter(job_id="bench-cron", status="completed").exists(), 70)
    run = Run.objects.filter(job_id="bench-cron").order_by("scheduled_for")[0]
    assert run.started_at is not None
    assert run.scheduled_for is not None
    return (run.started_at - run.scheduled_for).total_seconds()
