"""Runs that wait for events, and events that come for them, while processes die."""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest
from django.db import OperationalError

from django_jobs.models import Delivery, Event, Listener, Run, RunStatus
from tests.acceptance.conftest import ROOT, all_final, database_url
from tests.lab.models import Effect

RUNS = 1000
CORRESPONDENTS = 4


@pytest.fixture
def correspondents():
    """Processes that ask and answer, each for its share of the numbers."""
    started = []

    def start(count, processes):
        environment = {
            **os.environ,
            "DATABASE_URL": database_url(),
            "DJANGO_SETTINGS_MODULE": "tests.settings",
            "LAB": "1",
        }
        share = count // processes
        for seed in range(processes):
            arguments = [str(seed), str(seed * share), str((seed + 1) * share)]
            command = [sys.executable, "-m", "tests.lab.correspondent", *arguments]
            started.append(subprocess.Popen(command, cwd=ROOT, env=environment))
        return started

    yield start
    for process in started:
        process.kill()
        process.wait()


def kill_one_of(clusters, chance):
    """Kill a pusher, which routes, or a worker, which waits; return which it was."""
    cluster = chance.choice(clusters)
    victims = [("pusher", cluster.pusher), *(("worker", pid) for pid in cluster.workers)]
    kind, pid = chance.choice(victims)
    os.kill(pid, signal.SIGKILL)
    return kind


def test_every_run_gets_its_event_and_none_two_while_routers_and_workers_are_killed(
    runjobs, lab, correspondents
):
    clusters = [runjobs(workers=2, threads=4), runjobs(workers=2, threads=4)]
    processes = correspondents(RUNS, CORRESPONDENTS)
    chance, killed, deadline = random.Random(7), Counter(), time.monotonic() + 240
    while not (all(process.poll() is not None for process in processes) and all_final()):
        assert time.monotonic() < deadline, clusters[0].output()[-5000:]
        time.sleep(0.8)
        try:
            killed[kill_one_of(clusters, chance)] += 1
        except (IndexError, ProcessLookupError, OperationalError):
            pass  # It is just being replaced.

    assert [process.returncode for process in processes] == [0] * CORRESPONDENTS
    runs = list(Run.objects.filter(job_id="lab-asks").select_related("event"))
    assert Counter(run.status for run in runs) == {RunStatus.COMPLETED: RUNS}
    assert [run for run in runs if run.output["n"] != run.event.data["n"]] == []
    answers = {event.pk: event.data["n"] for event in Event.objects.filter(name="lab/answered")}
    assert {run.output["event"]: run.output["n"] for run in runs} == answers
    assert len(answers) == RUNS
    noted = Counter(Effect.objects.filter(name="answered").values_list("run", flat=True))
    assert noted == {run.pk: 1 for run in runs}
    assert not Listener.objects.exists()
    assert not Delivery.objects.exists()
    assert not Event.objects.filter(unrouted=True).exists()
    assert min(killed["pusher"], killed["worker"]) > 3, killed
