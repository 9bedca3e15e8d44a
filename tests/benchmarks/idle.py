"""What a cluster costs that has nothing to do: statements, processor time and memory."""

import os
import time
from pathlib import Path

from django.db import connection

from tests.acceptance.conftest import Cluster

from .processes import memory, processor_seconds


def cost(cluster: Cluster, seconds: float) -> dict[str, float]:
    """Watch an idle cluster for ``seconds``; return what it used, by the second and in per cent of one core."""
    tree = cluster.tree()
    statements, transactions, used, begun = (
        _statements(),
        _transactions(),
        processor_seconds(tree),
        time.monotonic(),
    )
    time.sleep(seconds)
    took = time.monotonic() - begun
    assert cluster.tree() == tree, "a process ended and was replaced"
    found = {
        "statements": (_statements() - statements) / took,
        "processor": 100 * (processor_seconds(tree) - used) / took,
    }
    if transactions is not None:
        # Less the one that asked.
        found["transactions"] = (_transactions() - transactions - 1) / took
    return found


def footprint(cluster: Cluster) -> dict[str, float]:
    """Return the megabytes of a worker process, alone and as its share, and of all processes together."""
    workers = [memory(pid) for pid in cluster.workers]
    return {
        "worker_rss": max(worker["rss"] for worker in workers),
        "worker_pss": max(worker["pss"] for worker in workers),
        "tree_pss": sum(memory(pid)["pss"] for pid in cluster.tree()),
    }


def _statements() -> int:
    """Count what the processes noted of the statements they gave the database."""
    return Path(os.environ["BENCH_STATEMENTS"]).read_text().count("\n")


def _transactions() -> int | None:
    """Ask PostgreSQL, which counts by itself: every statement outside a transaction is one."""
    if connection.vendor != "postgresql":
        return None
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = current_database()"
        )
        return cursor.fetchone()[0]
