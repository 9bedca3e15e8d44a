"""A real ``runjobs`` for the benchmarks, and what its processes take: processor time and memory."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.acceptance.conftest import Cluster


@contextlib.contextmanager
def runjobs(*arguments: str, workers: int, threads: int, **environment: str) -> Iterator[Cluster]:
    """Start a cluster; whatever is left of it at the end is killed."""
    arguments = ("--workers", str(workers), "--threads", str(threads), *arguments)
    with tempfile.TemporaryDirectory(prefix="bench_django_jobs_") as folder:
        log = Path(folder) / "runjobs.log"
        cluster = Cluster(list(arguments), {**os.environ, **environment}, log)
        try:
            yield cluster
        finally:
            cluster.end()


def processor_seconds(pids: list[int]) -> float:
    """Return the processor time these processes have had so far, all their threads together."""
    return sum(_nanoseconds(task) for pid in pids for task in Path(f"/proc/{pid}/task").glob("*")) / 1e9


def _nanoseconds(task: Path) -> int:
    try:
        return int((task / "schedstat").read_text().split()[0])
    except FileNotFoundError:
        return 0  # It ended while we looked.


def memory(pid: int) -> dict[str, float]:
    """Return the megabytes a process has in memory, and its share of them: pages in common are divided."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    kilobytes: dict[str, Any] = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    return {"rss": kilobytes["Rss"] / 1024, "pss": kilobytes["Pss"] / 1024}
