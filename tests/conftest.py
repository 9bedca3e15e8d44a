"""
What every test gets: the database the environment names, no skips in CI, no deadlines.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import hypothesis
import pytest
from django.db import connection, connections

pytest_plugins = ["tests.noskip"]

# No test here is about speed, and CI looks at the same examples each time.
hypothesis.settings.register_profile("django_jobs", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("django_jobs")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests that concern another database: no skip, there is nothing they could show."""
    elsewhere = [item for item in items if _is_for_another_database(item)]
    if elsewhere:
        config.hook.pytest_deselected(items=elsewhere)
        items[:] = [item for item in items if item not in elsewhere]


def _is_for_another_database(item: pytest.Item) -> bool:
    mark = item.get_closest_marker("only_on")
    return mark is not None and connection.vendor not in mark.args


@pytest.fixture
def bare_registry(monkeypatch):
    """Only the jobs that the test itself declares, forgotten afterwards."""
    from django_jobs import registry
    from django_jobs.models import claim

    monkeypatch.setattr(registry, "_jobs", {})
    monkeypatch.setattr(registry, "_by_event", None)
    claim.forget()


@pytest.fixture
def at_once():
    """Call a function in some threads that start together, each with connections of its own."""

    def call(work, threads=4):
        together = Barrier(threads)

        def one(_):
            together.wait()
            try:
                return work()
            finally:
                connections.close_all()

        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(one, range(threads)))

    return call
