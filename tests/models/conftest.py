"""A clock to move, and runs in whatever state a test wants them."""

from datetime import UTC, datetime, timedelta
from uuid import uuid4

import pytest

from django_jobs import clock as jobs_clock
from django_jobs.models import OPEN, Run, RunStatus

NOON = datetime(2026, 5, 4, 12, tzinfo=UTC)


@pytest.fixture(autouse=True)
def _alone(bare_registry):
    """No job but the test's own."""


class Clock:
    def __init__(self):
        self.now = NOON

    def __call__(self):
        return self.now

    def move(self, **span):
        self.now += timedelta(**span)


@pytest.fixture(autouse=True)
def clock():
    clock = Clock()
    jobs_clock.use(clock)
    yield clock
    jobs_clock.use(None)


@pytest.fixture
def a_run(db):
    """Make a run that has the shape its status asks for; due now if it is open."""

    def make(status=RunStatus.QUEUED, **fields):
        now = jobs_clock.now()
        shape = {"wake_at": now} if status in OPEN else {"finished_at": now}
        if status == RunStatus.RUNNING:
            shape |= {"lease": uuid4(), "started_at": now}
        return Run.objects.create(**{"job_id": "a-job", "status": status, "queued_at": now} | shape | fields)

    return make


@pytest.fixture
def claimed(a_run):
    """Make a run and claim it, as a worker does."""

    def make(**fields):
        run = a_run(**fields)
        [held] = Run.objects.claim(1, jobs=[run.job_id], worker="first")
        return held

    return make
