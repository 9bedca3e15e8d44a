"""
What the measured jobs really did, when and in which process: lines in a file.

A file, because a row for each effect would cost more than what is measured. One write of a short line to
a file opened for appending is whole, whatever the number of processes and threads.
"""

import os
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

_file: int | None = None


class Line(NamedTuple):
    run: str
    name: str
    pid: int
    at: float


def note(run: object, name: str) -> None:
    """Add a line about ``run``; a few microseconds."""
    global _file
    at = time.time()
    if _file is None:
        _file = os.open(os.environ["BENCH_LEDGER"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(_file, b"%s %s %d %.6f\n" % (str(run).encode(), name.encode(), os.getpid(), at))


def lines(name: str | None = None) -> list[Line]:
    """Read what was noted, under this name or all."""
    text = Path(os.environ["BENCH_LEDGER"]).read_text()
    found = [Line(run, what, int(pid), float(at)) for run, what, pid, at in map(str.split, text.splitlines())]
    return [line for line in found if name in (None, line.name)]


def counts() -> Counter[tuple[str, str]]:
    """Say how often each (run, name) was noted."""
    return Counter((line.run, line.name) for line in lines())


def clear() -> None:
    """Forget everything; the processes that have the file open go on writing to it."""
    Path(os.environ["BENCH_LEDGER"]).write_text("")
