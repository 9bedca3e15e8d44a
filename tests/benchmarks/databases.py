"""Throw-away databases, and how to reach them without Django."""

import contextlib
import os
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import environ

NAME = "bench_django_jobs"

#: The servers, which CI names by the same variables.
SERVERS = {
    "postgresql": ("TEST_POSTGRES_URL", "postgres://postgres@127.0.0.1:5432/test"),
    "mariadb": ("TEST_MARIADB_URL", "mysql://root@127.0.0.1:3306/test"),
}


@contextlib.contextmanager
def throw_away(kind: str) -> Iterator[str]:
    """Create a database, give its URL, and drop it whatever happens."""
    if kind == "sqlite":
        with tempfile.TemporaryDirectory(prefix="bench_django_jobs_") as folder:
            yield f"sqlite:///{Path(folder) / 'bench.sqlite3'}"
        return
    variable, default = SERVERS[kind]
    server = os.environ.get(variable) or default
    force = " WITH (FORCE)" if kind == "postgresql" else ""
    _tell(server, f"DROP DATABASE IF EXISTS {NAME}{force}", f"CREATE DATABASE {NAME}")
    try:
        yield urlunsplit(urlsplit(server)._replace(path=f"/{NAME}"))
    finally:
        _tell(server, f"DROP DATABASE IF EXISTS {NAME}{force}")


def _tell(url: str, *statements: str) -> None:
    connection = connect(environ.Env.db_url_config(url))
    try:
        for statement in statements:
            connection.cursor().execute(statement)
    finally:
        connection.close()


def connect(database: dict[str, Any]) -> Any:
    """Connect by the plain driver, autocommitting, as Django's settings ``database`` say."""
    if database["ENGINE"].endswith("sqlite3"):
        connection = sqlite3.connect(database["NAME"], timeout=20, isolation_level=None)
        connection.executescript(database.get("OPTIONS", {}).get("init_command", ""))
        return connection
    names = {"host": "HOST", "port": "PORT", "user": "USER", "password": "PASSWORD"}
    login = {key: database[name] for key, name in names.items() if database[name]}
    if database["ENGINE"].endswith("postgresql"):
        import psycopg

        return psycopg.connect(dbname=database["NAME"], autocommit=True, **login)
    import MySQLdb

    return MySQLdb.connect(database=database["NAME"], autocommit=True, **login)
