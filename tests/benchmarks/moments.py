"""How long things take to begin: a run that was emitted, a cron slot, a run whose worker was killed."""

import os
import random
import signal
import statistics
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from django.db import transaction

from django_jobs import emit
from django_jobs.models import Run, Step
from tests.acceptance.conftest import Cluster, all_final, until

from . import ledger, workloads

#: The shortest and longest time between two samples, so that they fall anywhere in a poller's period.
GAPS = (0.05, 0.35)


def pick_up(samples: int) -> dict[str, float]:
    """Return the milliseconds from the commit of an emission to the first line of the handler."""
    workloads.clear()
    lags = [_one_pick_up() for _ in range(samples)]
    until(all_final)
    workloads.check(samples, steps=0)
    return {"p50": statistics.median(lags), "p95": quantile(lags, 0.95), "max": max(lags)}


def quantile(values: list[float], share: float) -> float:
    """Return the value that ``share`` of ``values`` do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)]


def _one_pick_up() -> float:
    time.sleep(random.uniform(*GAPS))
    with transaction.atomic():
        event = emit("bench/chain", {"steps": 0})
    committed = time.time()
    run = str(event.runs.get().pk)
    line = _wait(lambda: next((line for line in ledger.lines("begun") if line.run == run), None))
    return 1000 * (line.at - committed)


def _wait(condition: Callable[[], Any], within: float = 30.0) -> Any:
    """Wait as ``until`` does, but look less often: looking takes processor time from what is measured."""
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        time.sleep(0.02)
        if found := condition():
            return found
    raise AssertionError(f"it did not happen within {within} s")


def cron_lateness(slots: int) -> list[float]:
    """Return how many milliseconds after its instant each slot of a minutely cron was started."""
    workloads.clear()
    runs = Run.objects.filter(job_id="bench-cron")
    until(lambda: runs.filter(status="completed").count() == slots, within=60 * slots + 10)
    found = list(runs)
    assert len({run.scheduled_for for run in found}) == slots
    assert ledger.counts() == {(str(run.pk), "begun"): 1 for run in found}
    return [(run.started_at - run.scheduled_for) / timedelta(milliseconds=1) for run in found]


def takeover(cluster: Cluster) -> float:
    """Kill a worker in the middle of a step; return the milliseconds until another one begins it anew."""
    workloads.clear()
    emit("bench/outside", {"seconds": 1.0})
    [begun] = _wait(lambda: ledger.lines("waiting"))
    os.kill(begun.pid, signal.SIGKILL)
    killed = time.time()
    again = _wait(lambda: [line for line in ledger.lines("waiting") if line.pid != begun.pid])
    until(all_final)
    run = Run.objects.get()
    assert (run.status, run.passes, len(again)) == ("completed", 2, 1), cluster.output()
    assert ledger.counts()[str(run.pk), "after"] == 1
    assert Step.objects.count() == 2
    until(lambda: len(cluster.workers) == 2)
    return 1000 * (again[0].at - killed)
