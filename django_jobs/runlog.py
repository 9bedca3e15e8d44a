"""
The log of a run: the lines that the scribe heard, collected in memory and written as rows of the run.

A pass has one. It writes at a checkpoint, if it is time, and before it settles, and never while a line is said.
"""

import logging
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from functools import partial
from threading import Lock

from django.db import IntegrityError, connections

from . import clock, scribe, signals
from .conf import conf
from .models import Log, Run
from .models.log import Line
from .outage import outlast

#: A checkpoint writes the buffer once it holds so many lines, or one so old.
MANY = 100
OLD = timedelta(seconds=3)

#: Rows of one statement.
BATCH = 500


class Buffer:
    """The first lines, as many as a run may keep, and the number of those that came after them."""

    def __init__(self) -> None:
        self.lines: deque[Line] = deque()
        self.refused = 0

    def add(self, line: Line) -> None:
        if len(self.lines) < conf.MAX_LOGS:
            self.lines.append(line)
        else:
            self.refused += 1

    def take(self, most: int) -> list[Line]:
        return [self.lines.popleft() for _ in range(min(most, len(self.lines)))]


class RunLog:
    """
    The lines of one pass, from the moment they are said until they are rows.

    A batch is one statement, fenced by the lease: a worker that lost it writes nothing. A worker that dies
    after that and before the run is settled has its lines said again by the next one. A worker that is
    killed takes along what it had not written: some seconds of lines, and those of the step in hand. What is
    said while the pass replays is held back until the next step, which shows whether it was said before.
    """

    def __init__(self, run: Run, using: str, replaying: Callable[[], bool]) -> None:
        self.run = run
        self.using = using
        self.replaying = replaying
        self.buffer = Buffer()
        self.held = Buffer()
        #: Records of ``ctx.logger`` that are held back from the host's handlers too, the newest.
        self.muted: deque[logging.LogRecord] = deque(maxlen=MANY)
        #: How many rows the run has, and how many lines the last one stands for; None while not known.
        self.written: tuple[int, int] | None = (0, 0) if run.passes == 1 else None
        self.no_room = 0
        self.writing = Lock()

    # While the job's code runs.

    def listening(self, step: str = "") -> AbstractContextManager[None]:
        """Take what is said in here for the words of ``step``, or of the code between steps."""
        return scribe.listening(self, step)

    def add(self, line: Line) -> None:
        (self.held if self.replaying() else self.buffer).add(line)

    def mute(self, record: logging.LogRecord) -> bool:
        if muting := self.replaying():
            self.muted.append(record)
        return muting

    def reached(self, *, known: bool) -> None:
        """
        Decide about what was held back, now that the pass has come to a step or to its end.

        A step that is ``known`` was reached by an earlier pass, which said the same. Anything else proves
        nothing: the code may have left the way it took before, and a line too many is better than none.
        """
        if not self.held.lines and not self.muted:
            return
        held, self.held = self.held, Buffer()
        muted, self.muted = self.muted, deque(maxlen=MANY)
        if not known:
            for line in held.lines:
                self.buffer.add(line)
            self.buffer.refused += held.refused
            scribe.say(muted)

    # Writing.

    def flush_if_due(self) -> bool:
        """Write the buffer if it is time; return False if the lease is lost."""
        first = next(iter(self.buffer.lines), None)
        if first is None or (len(self.buffer.lines) < MANY and clock.now() - first.at < OLD):
            return True
        # In a transaction of the job's own the lines would be rolled back with it; they can wait.
        return connections[self.using].in_atomic_block or self._flush()

    def close(self) -> None:
        """Write what there is, before the pass settles."""
        self.reached(known=False)
        if self._flush() and (dropped := self.no_room + self.buffer.refused):
            self._write(partial(self._note_dropped, dropped))

    def _flush(self) -> bool:
        with self.writing:
            while lines := self.buffer.take(BATCH):
                if not self._write(partial(self._keep, lines)):
                    return False
        return True

    def _write(self, write: Callable[[], int]) -> bool:
        """Outlast a database that is away. Whatever else goes wrong costs the lines and never the run."""
        try:
            return bool(outlast(self.using, write))
        except Exception as error:
            signals.log_lines_lost(self.run, error)
            return True

    def _keep(self, lines: Sequence[Line]) -> int:
        """Insert as many of ``lines`` as the run has room for; return 0 if the lease is lost."""
        rows, dropped = self._position()
        fitting = lines[: 0 if dropped else max(conf.MAX_LOGS - rows, 0)]
        if fitting and not self._insert(fitting, after=rows):
            return 0
        self.written = rows + len(fitting), dropped
        self.no_room += len(lines) - len(fitting)
        return 1

    def _note_dropped(self, more: int) -> int:
        """Have the last row say how many lines had no room, those of earlier passes included."""
        rows, before = self._position()
        dropped = before + more
        words = f"{dropped} more lines were dropped: a run keeps {conf.MAX_LOGS} (MAX_LOGS)."
        line = Line("", logging.WARNING, scribe.ENGINE, words, clock.now(), dropped)
        if before:
            return Log.objects.using(self.using).rewrite(self.run, line, number=rows)
        return self._insert([line], after=rows)

    def _position(self) -> tuple[int, int]:
        self.written = self.written or Log.objects.using(self.using).last_of(self.run)
        return self.written

    def _insert(self, lines: Sequence[Line], *, after: int) -> int:
        try:
            return Log.objects.using(self.using).write(self.run, lines, after=after)
        except IntegrityError:
            # Written before, and only the answer got lost: while the lease is ours, so are the numbers.
            return len(lines)
