"""
What every test gets: the database the environment names, no skips in CI, no deadlines.
"""

import os

import hypothesis
import pytest
from django.db import connection

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
