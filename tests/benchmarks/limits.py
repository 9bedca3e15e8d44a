"""
The physical limit: single rows inserted and committed by the plain driver, on so many connections.

Run as a module this is one of those connections: it says when it is ready, and begins when told.
"""

import subprocess
import sys
import time
from typing import Any

from testproject.settings import DATABASES

from .databases import connect

DATABASE = DATABASES["default"]
MARK = "?" if DATABASE["ENGINE"].endswith("sqlite3") else "%s"
INSERT = f"INSERT INTO bench_limit (payload) VALUES ({MARK})"
ROW = ('{"i": 1}',)
TABLES = {
    "postgresql": "CREATE TABLE bench_limit (id bigserial PRIMARY KEY, payload jsonb)",
    "sqlite3": "CREATE TABLE bench_limit (id integer PRIMARY KEY, payload text)",
    "mysql": "CREATE TABLE bench_limit (id bigint AUTO_INCREMENT PRIMARY KEY, payload text)",
}


def measure(connections: int, seconds: float) -> float:
    """Return the rows committed in a second by ``connections`` processes together."""
    create = TABLES[DATABASE["ENGINE"].rpartition(".")[2]]
    _tell("DROP TABLE IF EXISTS bench_limit", create)
    command = [sys.executable, "-m", "tests.benchmarks.limits", str(seconds)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    writers = [subprocess.Popen(command, **pipes) for _ in range(connections)]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()
    answers = [[float(word) for word in writer.communicate()[0].split()] for writer in writers]
    rows, begun, ended = zip(*answers, strict=True)
    written = int(sum(rows))
    [(found,)] = _tell("SELECT count(*) FROM bench_limit")
    assert found == written, f"{found} rows of {written}"
    _tell("DROP TABLE bench_limit")
    return written / (max(ended) - min(begun))


def _tell(*statements: str) -> Any:
    connection = connect(DATABASE)
    cursor = connection.cursor()
    for statement in statements:
        cursor.execute(statement)
    found = cursor.fetchall() if cursor.description else None
    connection.close()
    return found


def insert(seconds: float) -> tuple[int, float, float]:
    """Insert for so long; return how many rows, and when that began and ended on the clock all processes share."""
    cursor, rows = connect(DATABASE).cursor(), 0
    print("ready", flush=True)
    sys.stdin.readline()
    begun = time.monotonic()
    while time.monotonic() < begun + seconds:
        cursor.execute(INSERT, ROW)
        rows += 1
    return rows, begun, time.monotonic()


if __name__ == "__main__":
    print(*insert(float(sys.argv[1])))
