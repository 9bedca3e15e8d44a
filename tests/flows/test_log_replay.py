"""A replay says nothing twice, and nothing new is lost to it."""

import logging
from datetime import timedelta

import pytest

from django_jobs import NonRetriableError, job
from django_jobs.executor import execute
from django_jobs.models import Run

pytestmark = pytest.mark.usefixtures("a_host_that_logs")

DAY = timedelta(days=1)

shop = logging.getLogger("shop.orders")


def lines(run):
    return list(run.logs.values_list("step", "message"))


def test_each_line_is_kept_once_however_often_the_body_is_replayed(run_through):
    @job("naps")
    def naps(ctx):
        shop.info("begun")
        ctx.logger.info("begun too")
        ctx.step.run("one", shop.info, "one")
        shop.info("one is done")
        ctx.step.sleep("night", DAY)
        shop.info("awake")
        ctx.step.run("two", int)
        ctx.step.sleep("another-night", DAY)
        ctx.logger.info("the end")

    run = run_through(naps)

    assert run.passes == 3
    assert lines(run) == [
        ("", "begun"),
        ("", "begun too"),
        ("one", "one"),
        ("", "one is done"),
        ("", "awake"),
        ("", "the end"),
    ]
    assert [line.number for line in run.logs.all()] == [1, 2, 3, 4, 5, 6]


def test_both_kinds_of_logger_are_heard_again_when_the_newest_checkpoint_is_no_longer_visited(
    jobs, caplog, said
):
    new = False

    @job("changes")
    def changes(ctx):
        ctx.step.run("one", int)
        if new:
            ctx.logger.info("on another way")
            shop.info("on it too")
        else:
            ctx.step.sleep("night", DAY)

    run = jobs.run(changes)
    new = True
    jobs.advance(2 * DAY)

    assert said(run) == ["on another way", "on it too"]
    assert [record.message for record in caplog.records if "on another way" in record.message]


def test_a_checkpoint_no_longer_visited_makes_a_new_step_s_neighbours_heard(jobs):
    new = False

    @job("changes")
    def changes(ctx):
        shop.info("begun")
        ctx.step.run("one", int)
        if new:
            shop.info("before")
            ctx.step.run("two", shop.info, "within")
            shop.info("after")
        else:
            ctx.step.sleep("night", DAY)

    run = jobs.run(changes)
    new = True
    jobs.advance(2 * DAY)

    assert lines(run) == [("", "begun"), ("", "before"), ("two", "within"), ("", "after")]


def test_a_second_try_that_leaves_the_way_of_the_first_is_heard_and_so_is_its_failure(run_through, said):
    @job("detours", retries=1)
    def detours(ctx):
        ctx.step.run("one", int)
        if ctx.attempt == 0:
            shop.info("straight on")
            ctx.step.run("two", int)
            raise ConnectionError
        shop.info("round")
        raise NonRetriableError

    run = run_through(detours)

    assert run.status == "failed"
    assert said(run) == ["straight on", "round"]


def test_what_a_new_step_releases_reaches_the_host_in_order_and_with_the_run(jobs, caplog, said):
    new = False

    @job("changes")
    def changes(ctx):
        ctx.logger.info("old news")
        ctx.step.run("one", int)
        if not new:
            ctx.step.sleep("night", DAY)
        ctx.logger.info("first")
        ctx.logger.info("second")
        ctx.step.run("two", int)
        ctx.logger.info("third")

    run = jobs.run(changes)
    new = True
    jobs.advance(2 * DAY)

    mine = [record for record in caplog.records if record.name == "django_jobs.job.changes"]
    assert [record.message for record in mine] == ["old news", "first", "second", "third"]
    assert {record.run_id for record in mine} == {str(run.pk)}
    assert said(run) == ["old news", "first", "second", "third"]


def test_a_stopping_worker_repeats_nothing_of_what_came_before_a_waiting_step(jobs, said):
    @job("naps")
    def naps(ctx):
        shop.info("begun")
        ctx.step.sleep("night", DAY)
        shop.info("the end")

    run = jobs.run(naps)
    jobs._now += DAY
    [claimed] = Run.objects.claim(1, jobs=["naps"])
    execute(claimed, stopping=lambda: True)
    assert said(run) == ["begun"]

    jobs.drain()
    assert said(run) == ["begun", "the end"]
