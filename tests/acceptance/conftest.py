"""Real ``manage.py runjobs`` processes on the test database, and what one can do to them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from django.db import connection
from django.test import override_settings

from django_jobs import registry
from django_jobs.models import OPEN, Run, Worker

ROOT = Path(__file__).parent.parent.parent


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.acceptance)


def until(condition, *, within=30.0, what="it"):
    """Wait for ``condition()`` to be true and return it; fail when it takes longer than ``within`` seconds."""
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError(f"{what} did not happen within {within} s")


def all_final():
    return not Run.objects.filter(status__in=OPEN).exists()


def children(pid):
    """List the processes that ``pid`` started, oldest first."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name_end = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue  # It ended while we looked.
        if int(name_end[1]) == pid and name_end[0] != "Z":
            found.append((int(name_end[19]), int(stat.parent.name)))
    return [child for _, child in sorted(found)]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


class Cluster:
    """One ``runjobs`` with all its processes."""

    def __init__(self, arguments, environment, log):
        self.log = log
        self.process = subprocess.Popen(
            [sys.executable, "manage.py", "runjobs", *arguments],
            cwd=ROOT,
            env=environment,
            stdout=log.open("wb"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def ready(self, workers):
        until(
            lambda: len(self.tree()) == workers + 3, what=f"the start of {workers} workers: {self.output()}"
        )
        until(
            lambda: Worker.objects.filter(pid__in=self.tree()).exists(),
            what=f"the heartbeat: {self.output()}",
        )
        return self

    @property
    def parent(self):
        return self.process.pid

    @property
    def guard(self):
        return children(self.parent)[0]

    @property
    def pusher(self):
        return children(self.guard)[0]

    @property
    def workers(self):
        return children(self.guard)[1:]

    def tree(self):
        pids, queue = [], [self.parent]
        while queue:
            pid = queue.pop()
            pids.append(pid)
            queue += children(pid)
        return pids

    def terminate_group(self):
        os.killpg(self.process.pid, signal.SIGTERM)

    def kill_tree(self):
        for pid in self.tree():
            os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def wait(self, within=40):
        return self.process.wait(within)

    def output(self):
        return self.log.read_text(errors="replace")

    def end(self):
        for pid in self.tree():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        self.process.wait()


def database_url(**changes):
    given = connection.settings_dict | changes
    if connection.vendor == "sqlite":
        return f"sqlite:///{given['NAME']}"
    scheme = {"postgresql": "postgres", "mysql": "mysql"}[connection.vendor]
    password = f":{given['PASSWORD']}" if given["PASSWORD"] else ""
    return f"{scheme}://{given['USER']}{password}@{given['HOST']}:{given['PORT']}/{given['NAME']}"


@pytest.fixture
def lab(transactional_db):
    """The jobs of the lab, declared in this process too, so that it can start them."""
    from tests.lab import labjobs

    declared = [value for value in vars(labjobs).values() if isinstance(value, registry.Job)]
    for job in declared:
        registry.register(job)
    yield labjobs
    for job in declared:
        registry._jobs.pop(job.id, None)


@pytest.fixture
def runjobs(lab, tmp_path):
    """Start ``runjobs`` with these arguments; whatever still runs at the end of the test is killed."""
    started = []

    def start(*arguments, workers=2, threads=4, wait=True, url=None, **environment):
        arguments = ["--workers", workers, "--threads", threads, *arguments]
        environment = {
            **os.environ,
            "DATABASE_URL": url or database_url(),
            "DJANGO_SETTINGS_MODULE": "tests.settings",
            "LAB": "1",
            "PYTHONUNBUFFERED": "1",
            **environment,
        }
        cluster = Cluster([str(a) for a in arguments], environment, tmp_path / f"runjobs-{len(started)}.log")
        started.append(cluster)
        return cluster.ready(workers) if wait else cluster

    yield start
    for cluster in started:
        cluster.end()


@pytest.fixture(autouse=True)
def short_leases(monkeypatch):
    """A lease of 3 s in every process, so that a takeover does not take a quarter of a minute."""
    from django.conf import settings

    monkeypatch.setenv("LAB_LEASE_SECONDS", "3")
    with override_settings(DJANGO_JOBS={**settings.DJANGO_JOBS, "LEASE_SECONDS": 3}):
        yield
