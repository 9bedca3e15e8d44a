"""
The handler at the root logger that hands what a job's code says to the log of its pass.

It learns from a context variable whose code is running, and it writes nothing: ``runlog`` does that. Whatever
it finds or leaves out, the host's own handlers get their records as before.
"""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

from . import clock
from .conf import conf
from .exceptions import storable
from .models import Run
from .models.log import Line

#: Bytes of a message; the middle of a longer one is left out.
LONGEST = 8 * 1024

#: The engine's own logger. Its lines tell what the rows tell already.
ENGINE = "django_jobs"


class Listener(Protocol):
    def add(self, line: Line) -> None:
        """Take a line."""

    def mute(self, record: logging.LogRecord) -> bool:
        """Take a record of ``ctx.logger`` and return True if nobody is to have it now."""


#: Whose code is running: the log of its pass, and the name of the step. Not thread-local, so that branches in
#: threads and on an event loop take it along with their context.
_speaker: ContextVar[tuple[Listener, str] | None] = ContextVar("django_jobs_speaker", default=None)


class Scribe(logging.Handler):
    """
    Adds a record to the log of the pass whose code made it, and takes no notice of any other.

    It stands at the root logger from the first pass of a process on. Python sends a warning that no handler
    takes to ``logging.lastResort``; one that none but the scribe takes goes there too.
    """

    def emit(self, record: logging.LogRecord) -> None:
        self.keep(record)
        resort = logging.lastResort
        if resort and record.levelno >= resort.level and _is_unheard(record.name):
            resort.handle(record)

    def keep(self, record: logging.LogRecord) -> None:
        speaker = _speaker.get()
        if speaker is None or not conf.MAX_LOGS or record.levelno < _level() or _is_noise(record.name):
            return
        log, step = speaker
        try:
            message = _capped(self.format(record))
            log.add(Line(step, record.levelno, storable(record.name)[:200], message, clock.now()))
        except Exception:
            self.handleError(record)


scribe = Scribe()


@contextmanager
def listening(log: Listener, step: str = "") -> Iterator[None]:
    """Take what is said in here, and in every context copied from it, for the words of ``step``."""
    root = logging.getLogger()
    if scribe not in root.handlers:  # Not yet, or not any more: a host that sets up logging anew removes it.
        root.addHandler(scribe)
    token = _speaker.set((log, step))
    try:
        yield
    finally:
        _speaker.reset(token)


def logger_of(run: Run) -> logging.LoggerAdapter:
    """Return the logger of a job, bound to the run and silent about what an earlier pass has said."""
    logger = logging.getLogger(f"django_jobs.job.{run.job_id}")
    logger.addFilter(_is_to_be_heard)  # Once: a filter that is there is not added again.
    return logging.LoggerAdapter(logger, {"run_id": str(run.pk), "job_id": run.job_id})


def _is_to_be_heard(record: logging.LogRecord) -> bool:
    speaker = _speaker.get()
    if speaker is None or not speaker[0].mute(record):
        return True
    scribe.keep(record)
    return False


def say(records: Iterable[logging.LogRecord]) -> None:
    """Give the host's handlers what was kept back from them. The scribe has it."""
    token = _speaker.set(None)
    try:
        for record in records:
            logging.getLogger(record.name).handle(record)
    finally:
        _speaker.reset(token)


def _level() -> int:
    return logging.getLevelNamesMapping().get(conf.LOG_LEVEL, logging.INFO)


def _is_noise(name: str) -> bool:
    return name == ENGINE or name.startswith("django.db.backends")


def _is_unheard(name: str) -> bool:
    logger: logging.Logger | None = logging.getLogger(name)
    while logger:
        if any(handler is not scribe for handler in logger.handlers):
            return False
        logger = logger.parent if logger.propagate else None
    return True


def _capped(text: str) -> str:
    raw = storable(text).encode()
    if len(raw) <= LONGEST:
        return raw.decode()
    head, tail = (part.decode(errors="ignore") for part in (raw[: LONGEST // 2], raw[-LONGEST // 2 :]))
    return f"{head}\n[{len(raw) - LONGEST:,} bytes left out]\n{tail}"
