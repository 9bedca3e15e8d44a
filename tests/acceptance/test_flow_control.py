"""Flow control with real clusters: workers that are killed, and bursts from several processes."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from django_jobs.models import OPEN, Run, RunStatus, Seat
from tests.acceptance.conftest import ROOT, all_final, database_url, until
from tests.lab.models import Effect

#: How many runs compete for the places; a benchmark may take 2,000.
RUNS = 300
LIMIT = 3

#: How many processes emit at once, and how many events each.
EMITTERS, EVENTS = 3, 20


class Reaper:
    """Kills a worker now and then, and remembers when."""

    def __init__(self, clusters, seed=1):
        self.clusters, self.dice, self.next_at, self.deaths = clusters, random.Random(seed), 0.0, {}

    def reap(self):
        if time.monotonic() < self.next_at:
            return
        self.next_at = time.monotonic() + self.dice.uniform(0.3, 1.0)
        workers = self.dice.choice(self.clusters).workers
        if workers:
            victim = self.dice.choice(workers)
            try:
                os.kill(victim, signal.SIGKILL)
            except ProcessLookupError:
                return
            self.deaths[victim] = time.time()


def most_at_once(deaths):
    """Return how many were inside at the same time at the most, by the ledger and the times of death."""
    ends = dict(Effect.objects.filter(name="out").values_list("run", "at"))
    spans = []
    for begun in Effect.objects.filter(name="in").order_by("at"):
        outs = Effect.objects.filter(name="out", run=begun.run, pid=begun.pid, at__gte=begun.at)
        end = outs.order_by("at").values_list("at", flat=True).first() or deaths.get(begun.pid)
        spans.append((begun.at, end or ends[begun.run], begun.run))
    moments = sorted([(at, 1) for at, _, _ in spans] + [(end, -1) for _, end, _ in spans])
    most = now = 0
    for _, change in moments:
        now += change
        most = max(most, now)
    return most


@pytest.mark.parametrize("job", ["limited", "limited_step"])
def test_two_clusters_whose_workers_are_killed_never_exceed_a_limit(job, runjobs, lab):
    limited = getattr(lab, job)
    runs = RUNS if job == "limited" else RUNS // 3
    for _ in range(runs):
        limited.start()
    clusters = [runjobs(workers=2, threads=4) for _ in range(2)]
    reaper = Reaper(clusters)

    def done():
        reaper.reap()
        return all_final()

    until(done, within=180, what="the end of all runs")

    assert Run.objects.filter(status=RunStatus.COMPLETED).count() == runs
    assert len(reaper.deaths) >= 3
    assert most_at_once(reaper.deaths) <= LIMIT
    assert Seat.objects.count() <= LIMIT


def test_a_limit_holds_after_a_kill_and_the_place_of_the_dead_is_taken_again(runjobs, lab):
    for _ in range(30):
        lab.limited.start()
    cluster = runjobs(workers=2, threads=4, wait=False)
    until(lambda: Effect.objects.filter(name="out").count() > 3)
    cluster.kill_tree()
    killed_at = time.time()
    deaths = dict.fromkeys(Effect.objects.values_list("pid", flat=True), killed_at)
    runjobs(workers=2, threads=4)
    until(all_final)

    assert Run.objects.filter(status=RunStatus.COMPLETED).count() == 30
    assert most_at_once(deaths) == LIMIT


def emit_from_several_processes():
    """Emit from all of them in the same seconds."""
    code = (
        "import time, django; django.setup()\n"
        "from django_jobs import emit\n"
        f"time.sleep(max(0, {time.time() + 3} - time.time()))\n"
        f"for n in range({EVENTS}): emit('lab/changed', {{'n': n}}); time.sleep(0.02)\n"
    )
    environment = {
        **os.environ,
        "DATABASE_URL": database_url(),
        "DJANGO_SETTINGS_MODULE": "tests.settings",
        "LAB": "1",
    }
    emitters = [
        subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment) for _ in range(EMITTERS)
    ]
    assert [emitter.wait(60) for emitter in emitters] == [0] * EMITTERS


def test_of_a_burst_from_several_processes_the_last_event_settles_and_the_latest_run_wins(runjobs, lab):
    for _ in range(2):
        runjobs(workers=2, threads=4)

    emit_from_several_processes()
    until(all_final, within=60)

    settled = Run.objects.filter(job_id="lab-settles")
    assert settled.count() == EMITTERS * EVENTS
    [winner] = settled.filter(status=RunStatus.COMPLETED)
    assert winner == settled.order_by("-event__occurred_at", "-pk").first()
    assert settled.filter(status=RunStatus.SKIPPED, reason__startswith="Debounce: run ").count() == (
        EMITTERS * EVENTS - 1
    )
    single = Run.objects.filter(job_id="lab-single")
    [winner] = single.filter(status=RunStatus.COMPLETED)
    assert winner == single.order_by("-queued_at", "-pk").first()
    assert not single.filter(status__in=OPEN).exists()
    assert single.filter(reason__startswith="Singleton: run ").count() == EMITTERS * EVENTS - 1
    assert Effect.objects.filter(name="last").count() == Effect.objects.filter(name="settled").count() == 1
