"""Counts the statements of the measured processes, when asked to."""

import os
from typing import Any

from django.apps import AppConfig
from django.db.backends.signals import connection_created


class BenchmarksConfig(AppConfig):
    name = "tests.benchmarks"
    label = "benchmarks"

    def ready(self) -> None:
        if "BENCH_STATEMENTS" in os.environ:
            connection_created.connect(_watch, dispatch_uid="tests.benchmarks")


def _watch(connection: Any, **kwargs: Any) -> None:
    if _note not in connection.execute_wrappers:
        connection.execute_wrappers.append(_note)


def _note(execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
    """Add a line to the file of statements: SQLite cannot be asked from outside how many it was given."""
    line = " ".join(sql.split())[:200]
    file = os.open(os.environ["BENCH_STATEMENTS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, line.encode() + b"\n")
    os.close(file)
    return execute(sql, params, many, context)
