"""The fixture ``jobs``; pytest finds it by the package's entry point."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from .testing import Jobs


@pytest.fixture
def jobs(db: None) -> "Iterator[Jobs]":
    """Run jobs inline on a virtual clock; see ``django_jobs.testing.Jobs``."""
    from .testing import Jobs

    with Jobs() as jobs:
        yield jobs
