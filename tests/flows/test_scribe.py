"""The handler at the root logger: where it stands, and what it leaves as it was."""

import logging
import subprocess
import sys
from datetime import timedelta
from io import StringIO

import pytest

from django_jobs import job
from django_jobs.scribe import scribe

pytestmark = pytest.mark.usefixtures("a_host_that_logs")

DAY = timedelta(days=1)

shop = logging.getLogger("shop.orders")


@pytest.fixture
def bare_root(monkeypatch):
    """Call it to leave the root logger without a handler, as Python does; it returns what the last resort writes to."""

    def bare():
        monkeypatch.setattr(logging.getLogger(), "handlers", [])
        resort = logging.StreamHandler(StringIO())
        resort.setLevel(logging.WARNING)
        monkeypatch.setattr(logging, "lastResort", resort)
        return resort.stream

    return bare


def test_a_host_without_logging_still_finds_its_warnings_on_its_screen(jobs, bare_root, said):
    mine, stream = logging.getLogger("shop.mine"), StringIO()
    mine.addHandler(logging.StreamHandler(stream))

    @job("talks")
    def talks(ctx):
        shop.info("not for the screen")
        shop.warning("in a run")
        mine.warning("somewhere else")

    screen = bare_root()
    run = jobs.run(talks)
    shop.warning("in none")
    mine.handlers.clear()

    assert logging.getLogger().handlers == [scribe]
    assert screen.getvalue() == "in a run\nin none\n"
    assert stream.getvalue() == "somewhere else\n"
    assert said(run) == ["not for the screen", "in a run", "somewhere else"]


def test_a_line_of_the_job_s_own_logger_that_is_held_back_is_no_warning_for_the_screen(jobs, bare_root, said):
    @job("naps")
    def naps(ctx):
        ctx.logger.warning("begun")
        ctx.step.sleep("night", DAY)

    logging.getLogger("django_jobs").handlers, handlers = [], logging.getLogger("django_jobs").handlers
    screen = bare_root()
    try:
        run = jobs.run(naps)
        jobs.advance(2 * DAY)
    finally:
        logging.getLogger("django_jobs").handlers = handlers

    assert screen.getvalue() == "begun\n"
    assert said(run) == ["begun"]


def test_the_scribe_stands_there_once_and_comes_back_when_logging_is_set_up_anew(jobs, bare_root, said):
    @job("talks")
    def talks(ctx):
        logging.getLogger().handlers.clear()
        ctx.step.run("one", shop.info, "one")

    bare_root()

    assert said(jobs.run(talks)) == ["one"]
    assert said(jobs.run(talks)) == ["one"]
    assert logging.getLogger().handlers == [scribe]


def test_a_process_that_runs_no_pass_has_no_scribe():
    look = (
        "import os, django, logging; os.environ['DJANGO_SETTINGS_MODULE'] = 'testproject.settings';"
        " django.setup(); from django.urls import get_resolver; get_resolver().url_patterns;"
        " import django_jobs.scribe; print(logging.getLogger().handlers)"
    )
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
