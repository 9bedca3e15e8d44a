"""What every flow gets: a registry of its own, and two ledgers of what really happened."""

import logging
from datetime import timedelta
from uuid import uuid4

import pytest
from django.contrib.auth.models import Group
from django.db import connections
from django.test.utils import override_settings


@pytest.fixture(autouse=True)
def _alone(bare_registry):
    """No job but the test's own."""


@pytest.fixture
def brief_connections(monkeypatch):
    """Let the threads of a server close their connections after each request: one left open outlives the test."""
    monkeypatch.setitem(connections["default"].settings_dict, "CONN_MAX_AGE", 0)


class Ledger(list):
    """What happened in the world outside the database: nothing takes it back."""

    def note(self, what, result=None):
        self.append(what)
        return result


@pytest.fixture
def ledger():
    return Ledger()


class Rows:
    """What happened in the database: a row each time."""

    def add(self, what):
        Group.objects.create(name=f"{what} {uuid4()}")
        return what

    def names(self):
        return [
            name.rsplit(" ", 1)[0] for name in Group.objects.order_by("pk").values_list("name", flat=True)
        ]

    def clear(self):
        Group.objects.all().delete()


@pytest.fixture
def rows():
    return Rows()


@pytest.fixture
def run_through(jobs):
    """Run a job to its end, through its sleeps and retries."""

    def go(job, data=None):
        run = jobs.run(job, data)
        jobs.advance(timedelta(days=30))
        run.refresh_from_db()
        return run

    return go


@pytest.fixture
def a_host_that_logs(caplog):
    """Python makes no record below WARNING unless somebody wants it."""
    caplog.set_level(logging.INFO)


@pytest.fixture
def said():
    """List the messages in the log of a run."""
    return lambda run: [line.message for line in run.logs.all()]


@pytest.fixture
def flags():
    """Set feature flags for the rest of the test: ``flags({"payment": {"enabled": False}})``."""
    overrides = []

    def set_to(tree):
        override = override_settings(DJANGO_JOBS={"FLAGS": tree})
        override.enable()
        overrides.append(override)

    yield set_to
    for override in reversed(overrides):
        override.disable()
