"""What the code of a run says through ``logging``, and what of it the run's rows tell afterwards."""

import logging
from contextvars import copy_context
from datetime import timedelta
from threading import Thread

import pytest
from django.db import connection

from django_jobs import StepError, job, on, scribe, services
from django_jobs.executor import execute
from django_jobs.models import Log, Run, Step

pytestmark = pytest.mark.usefixtures("a_host_that_logs")

DAY = timedelta(days=1)

shop = logging.getLogger("shop.orders")


def lines(run):
    return list(run.logs.values_list("step", "message"))


# What is kept.


def test_a_run_keeps_what_its_steps_and_the_code_between_them_say_through_any_logger(jobs):
    def charge():
        shop.info("charging %s", 7)
        logging.getLogger("stripe").warning("slow")

    @job("orders")
    def orders(ctx):
        ctx.logger.info("begun")
        ctx.step.run("charge", charge)
        shop.error("between")
        ctx.step.atomic("note", lambda: ctx.logger.info("noted"))

    run = jobs.run(orders)

    assert list(run.logs.values_list("number", "step", "level", "logger", "message", "dropped")) == [
        (1, "", 20, "django_jobs.job.orders", "begun", 0),
        (2, "charge", 20, "shop.orders", "charging 7", 0),
        (3, "charge", 30, "stripe", "slow", 0),
        (4, "", 40, "shop.orders", "between", 0),
        (5, "note", 20, "django_jobs.job.orders", "noted", 0),
    ]


def test_a_line_has_the_time_at_which_it_was_said_on_the_one_clock(jobs):
    times = []

    @job("talks")
    def talks(ctx):
        for _ in range(2):
            jobs._now += timedelta(minutes=1)
            times.append(jobs._now)
            shop.info("a minute later")

    run = jobs.run(talks)

    assert [line.at for line in run.logs.all()] == times
    assert run.finished_at == times[-1]


def test_each_run_keeps_its_own_lines(jobs, said):
    @job("talks")
    def talks(ctx):
        shop.info("this is %s", ctx.event.data["who"])

    runs = [talks.start({"who": who}) for who in "ab"]
    jobs.drain()
    shop.info("this is nobody")

    assert [said(run) for run in runs] == [["this is a"], ["this is b"]]
    assert Log.objects.count() == 2


@pytest.mark.only_on("postgresql", "mysql")  # SQLite would let the passes write one after the other.
@pytest.mark.django_db(transaction=True)
def test_passes_in_threads_side_by_side_keep_apart_what_they_say(at_once, said):
    @job("talks")
    def talks(ctx):
        for number in range(50):
            shop.info("%s %s", ctx.run_id, number)

    waiting = [talks.start() for _ in range(4)]
    claimed = Run.objects.claim(4, jobs=["talks"])
    at_once(lambda: execute(claimed.pop()))

    for run in waiting:
        assert said(run) == [f"{run.pk} {number}" for number in range(50)]


def test_a_thread_is_heard_if_it_takes_the_context_along_and_not_otherwise(jobs):
    def work():
        for thread in (
            Thread(target=shop.info, args=["alone"]),
            Thread(target=copy_context().run, args=[shop.info, "taken along"]),
        ):
            thread.start()
            thread.join()

    @job("threads")
    def threads(ctx):
        ctx.step.run("work", work)

    assert lines(jobs.run(threads)) == [("work", "taken along")]


def test_an_exception_is_kept_with_its_traceback(jobs, said):
    def work():
        try:
            raise ValueError("out of stock")
        except ValueError:
            shop.exception("no luck")

    @job("catches")
    def catches(ctx):
        ctx.step.run("work", work)

    [message] = said(jobs.run(catches))

    assert message.startswith("no luck\nTraceback (most recent call last):")
    assert message.endswith("ValueError: out of stock")


@pytest.mark.parametrize("letter", ["x", "é", "🐘"])
def test_the_middle_of_a_very_long_message_is_left_out(letter, jobs, said):
    @job("talks")
    def talks(ctx):
        shop.info("begin %s end", letter * 100_000)

    [message] = said(jobs.run(talks))

    assert message.startswith(f"begin {letter}")
    assert message.endswith(f"{letter} end")
    assert "bytes left out" in message
    assert len(message.encode()) < scribe.LONGEST + 50


def test_a_message_of_just_the_size_is_kept_whole(jobs, said):
    @job("talks")
    def talks(ctx):
        shop.info("x" * scribe.LONGEST)

    assert said(jobs.run(talks)) == ["x" * scribe.LONGEST]


def test_what_no_database_can_keep_is_written_out(jobs):
    @job("talks")
    def talks(ctx):
        logging.getLogger("a\0b" + "c" * 300).info("nul \0 and surrogate \udcff, %% and 🐘")

    [line] = jobs.run(talks).logs.all()

    assert line.message == "nul \\0 and surrogate \\udcff, %% and 🐘"
    assert line.logger == "a\\0b" + "c" * 196


def test_a_line_that_cannot_be_worded_costs_no_run(jobs, capsys, monkeypatch, said):
    @job("talks")
    def talks(ctx):
        shop.info("%d apples", "many")
        shop.info("after")

    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # Those of pytest raise.
    run = jobs.run(talks)

    assert (run.status, said(run)) == ("completed", ["after"])
    assert "many" in capsys.readouterr().err


# What is not.


def test_what_is_below_the_level_is_not_kept(jobs, caplog, settings, said):
    caplog.set_level(logging.DEBUG)

    @job("talks")
    def talks(ctx):
        for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR):
            shop.log(level, "%s", level)
            ctx.logger.log(level, "%s", level)

    assert said(jobs.run(talks)) == ["20", "20", "30", "30", "40", "40"]
    settings.DJANGO_JOBS = {"LOG_LEVEL": "ERROR"}
    assert said(jobs.run(talks)) == ["40", "40"]
    settings.DJANGO_JOBS = {"LOG_LEVEL": "DEBUG"}
    logging.getLogger("django_jobs").setLevel(logging.DEBUG)
    try:
        assert said(jobs.run(talks)) == ["10", "10", "20", "20", "30", "30", "40", "40"]
    finally:
        logging.getLogger("django_jobs").setLevel(logging.INFO)


def test_a_logger_that_is_quieter_than_the_level_is_as_quiet_as_its_host_wants(jobs, caplog, said):
    caplog.set_level(logging.ERROR, logger="shop")

    @job("talks")
    def talks(ctx):
        shop.warning("never made")
        shop.error("made")

    assert said(jobs.run(talks)) == ["made"]


def test_a_logger_that_does_not_propagate_is_not_seen(jobs, monkeypatch, said):
    monkeypatch.setattr(shop, "propagate", False)

    @job("talks")
    def talks(ctx):
        shop.error("to itself")

    assert said(jobs.run(talks)) == []


def test_the_engine_and_the_database_layer_are_not_kept(jobs, caplog, settings, rows, said):
    settings.DJANGO_JOBS = {"LOG_LEVEL": "DEBUG"}
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.DEBUG, logger="django_jobs")
    caplog.set_level(logging.DEBUG, logger="django.db.backends")
    connection.force_debug_cursor = True

    @job("queries", retries=0)
    def queries(ctx):
        ctx.step.atomic("query", rows.add, "row")
        logging.getLogger("django_jobs.catalog").info("an app like any other")
        ctx.step.run("fail", int, "x")

    try:
        run = jobs.run(queries)
    finally:
        connection.force_debug_cursor = False

    assert {"django.db.backends", "django_jobs"} <= {record.name for record in caplog.records}
    assert said(run) == ["an app like any other"]


def test_a_record_whose_wording_asks_the_database_is_kept_like_any_other(jobs, caplog, settings, said):
    settings.DJANGO_JOBS = {"LOG_LEVEL": "DEBUG"}
    caplog.set_level(logging.DEBUG, logger="django.db.backends")

    class Lazy:
        def __str__(self):
            shop.info("counting")
            return f"{Step.objects.count()} steps"

    connection.force_debug_cursor = True

    @job("lazy")
    def lazy(ctx):
        shop.info("%s", Lazy())

    try:
        spoken = said(jobs.run(lazy))
    finally:
        connection.force_debug_cursor = False

    assert spoken.count("0 steps") == 1
    assert set(spoken) == {"counting", "0 steps"}


# Failures.


def test_the_lines_of_a_failed_attempt_are_kept_and_so_are_those_of_the_next(run_through):
    tries = []

    def flaky():
        tries.append(1)
        shop.info("try %s", len(tries))
        if len(tries) < 3:
            raise ConnectionError
        shop.info("at last")

    @job("flaky")
    def a_job(ctx):
        ctx.step.run("call", flaky)

    run = run_through(a_job)

    assert run.status == "completed"
    assert lines(run) == [("call", message) for message in ("try 1", "try 2", "try 3", "at last")]


def test_the_lines_of_an_atomic_step_outlive_its_rollback(run_through, rows):
    def work():
        rows.add("row")
        shop.info("added")
        raise ValueError

    @job("rolls-back", retries=0)
    def rolls_back(ctx):
        ctx.step.atomic("work", work)

    run = run_through(rolls_back)

    assert rows.names() == []
    assert lines(run) == [("work", "added")]


def test_the_lines_of_a_run_that_fails_are_kept_and_a_retry_adds_to_them(run_through, said):
    broken = [True]

    @job("mends", retries=1)
    def mends(ctx):
        shop.info("attempt %s", ctx.attempt)
        if broken:
            raise ValueError

    run = run_through(mends)
    assert (run.status, said(run)) == ("failed", ["attempt 0", "attempt 1"])

    broken.clear()
    services.retry(run)
    run_through(mends)
    assert said(run) == ["attempt 0", "attempt 1", "attempt 0"]


def test_a_job_that_swallows_an_interrupt_still_tells_what_it_said(jobs, said):
    @job("swallows")
    def swallows(ctx):
        try:
            ctx.step.sleep("night", DAY)
        except BaseException:
            shop.info("caught it")

    run = jobs.run(swallows)

    assert (run.status, said(run)) == ("failed", ["caught it"])


def test_a_cancelled_run_keeps_what_was_written_and_no_more(jobs, said):
    @job("cancelled")
    def cancelled(ctx):
        shop.info("before")
        ctx.step.sleep("night", DAY)
        ctx.step.run("cancel", lambda: services.cancel(ctx.run_id) and None)

    run = jobs.run(cancelled)
    jobs.advance(2 * DAY)

    run.refresh_from_db()
    assert (run.status, said(run)) == ("cancelled", ["before"])


def test_a_worker_may_die_at_every_boundary_and_no_line_is_there_more_than_twice(jobs, said):
    @job("everything", retries=1, backoff=[timedelta(seconds=5)])
    def everything(ctx):
        shop.info("begun")
        ctx.step.run("one", shop.info, "one")
        shop.info("on the way")
        ctx.step.sleep("night", DAY)
        shop.info("awake")
        ctx.step.atomic("two", shop.info, "two")
        try:
            ctx.step.run("hopeless", int, "x")
        except StepError:
            shop.info("the end")

    told = ["begun", "one", "on the way", "awake", "two", "the end"]
    deaths = 0
    for run in jobs.crash_everywhere(everything):
        deaths += 1
        spoken = said(run)
        assert run.status == "completed"
        assert sorted(set(spoken), key=told.index) == [message for message in told if message in spoken]
        assert all(spoken.count(message) <= 2 for message in spoken)
        assert spoken[-1] == "the end"
        assert [line.number for line in run.logs.all()] == list(range(1, len(spoken) + 1))
    assert deaths > 8


# The end.


def test_pruning_takes_the_lines_with_the_run(jobs):
    @job("talks", on("a/b"))
    def talks(ctx):
        shop.info("x")

    old = jobs.run(talks)
    jobs.advance(2 * DAY)
    young = jobs.run(talks)

    services.prune(before=jobs._now - DAY)

    assert list(Log.objects.values_list("run_id", flat=True)) == [young.pk]
    assert not Run.objects.filter(pk=old.pk).exists()
