"""What a cluster costs that has nothing to do: statements, processor time and memory."""

import time
from pathlib import Path

from django.db import connection

from tests.acceptance.conftest import Cluster

from .processes import memory, processor_seconds

#: What is measured and its unit, with the value.
Measured = dict[tuple[str, str], float]


def cost(cluster: Cluster, noted: Path, seconds: float) -> Measured:
    """Watch an idle cluster that notes its statements for ``seconds``; return what it used of everything."""
    tree = cluster.tree()
    before, begun = _read(tree, noted), time.monotonic()
    time.sleep(seconds)
    after, took = _read(tree, noted), time.monotonic() - begun
    assert cluster.tree() == tree, "a process ended and was replaced"
    return {what: (after[what] - before[what]) / took for what in before}


def _read(tree: list[int], noted: Path) -> Measured:
    # SQLite cannot be asked from outside what it was given. The PRAGMA that watches it is no statement.
    found: Measured = {
        ("statements", "/s"): noted.read_text().count("\n"),
        ("processor, all processes", "% of a core"): 100 * processor_seconds(tree),
    }
    if connection.vendor == "postgresql":
        found["transactions, as PostgreSQL counts them", "/s"] = _transactions()
    return found


def footprint(cluster: Cluster) -> Measured:
    """Return the megabytes of a worker process, alone and as its share, and of all processes together."""
    workers = [memory(pid) for pid in cluster.workers]
    return {
        ("memory of a worker, resident", "MB"): max(worker["rss"] for worker in workers),
        ("memory of a worker, its share", "MB"): max(worker["pss"] for worker in workers),
        ("memory of all processes", "MB"): sum(memory(pid)["pss"] for pid in cluster.tree()),
    }


def _transactions() -> int:
    """Ask the database, whose count has those of this process in it: one for each question."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = current_database()"
        )
        return cursor.fetchone()[0]
