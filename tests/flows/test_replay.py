import logging
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from uuid import UUID

import pytest

from django_jobs import job
from django_jobs.models import Step

DAY = timedelta(days=1)

VALUES = {
    "none": None,
    "text": "Grüße",
    "numbers": [1, 2.5, True, 10**30],
    "nested": {"items": [{"user": 3}, {}], "$odd": 1},
    "datetime": datetime(2026, 5, 4, 12, 30, 15, 123456, tzinfo=UTC),
    "naive": datetime(2026, 5, 4),
    "date": date(2026, 5, 4),
    "time": time(12, 30),
    "span": timedelta(days=2, microseconds=1),
    "decimal": Decimal("9.90"),
    "uuid": UUID(int=7),
    "bytes": b"\x00\xff",
    "tuple": (1, (2, "x")),
    "set": {1, 2},
    "empty": {},
}


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_a_step_gives_the_same_in_each_pass_and_of_the_same_type(value, run_through):
    seen = []

    @job("a-job")
    def a_job(ctx):
        seen.append(ctx.step.run("give", lambda: value))
        ctx.step.sleep("night", DAY)
        return seen[-1]

    run = run_through(a_job)

    assert seen == [value, value]
    assert [type(one) for one in seen] == [type(value)] * 2
    assert run.output == value
    assert repr(seen[0]) == repr(seen[1])


def test_the_first_pass_sees_a_copy_as_later_passes_do(run_through):
    mine = {"list": [1]}
    seen = []

    @job("a-job")
    def a_job(ctx):
        given = ctx.step.run("give", lambda: mine)
        given["list"].append(2)
        seen.append((given, ctx.step.run("look", lambda: mine)))
        ctx.step.sleep("night", DAY)

    run_through(a_job)

    assert seen[0] == seen[1] == ({"list": [1, 2]}, {"list": [1]})
    assert mine == {"list": [1]}


def test_what_is_not_just_json_comes_back_as_its_plain_type_in_the_first_pass_too(run_through):
    class Colour(str):
        pass

    seen = []

    @job("a-job")
    def a_job(ctx):
        seen.append(type(ctx.step.run("give", Colour, "red")))
        ctx.step.sleep("night", DAY)

    run_through(a_job)

    assert seen == [str, str]


def test_a_step_is_worked_once_however_often_the_body_is_replayed(run_through, ledger):
    @job("a-job")
    def a_job(ctx):
        ledger.note("body")
        first = ctx.step.run("first", ledger.note, "first", 1)
        ctx.step.sleep("night", DAY)
        second = ctx.step.run("second", ledger.note, "second", result=first + 1)
        ctx.step.sleep("another-night", DAY)
        return [first, second]

    run = run_through(a_job)

    assert ledger == ["body", "first", "body", "second", "body"]
    assert run.output == [1, 2]
    assert run.passes == 3


def test_a_step_that_gave_none_is_not_worked_again(run_through, ledger):
    @job("a-job")
    def a_job(ctx):
        ctx.step.run("quiet", ledger.note, "quiet")
        ctx.step.sleep("night", DAY)

    run_through(a_job)

    assert ledger == ["quiet"]


def test_a_repeated_name_is_numbered_in_order(run_through, ledger):
    @job("a-job")
    def a_job(ctx):
        given = []
        for number in range(3):
            given.append(ctx.step.run("step", ledger.note, number, number))
            ctx.step.sleep("night", DAY)
        return given

    run = run_through(a_job)

    assert run.output == ledger == [0, 1, 2]
    names = list(run.steps.values_list("name", flat=True))
    assert names == ["step", "night", "step#2", "night#2", "step#3", "night#3"]


def test_a_name_written_like_a_numbered_one_is_told_apart(run_through):
    @job("a-job")
    def a_job(ctx):
        given = [ctx.step.run("step", int, 1), ctx.step.run("step#2", int, 2), ctx.step.run("step", int, 3)]
        ctx.step.sleep("night", DAY)
        return given

    run = run_through(a_job)

    assert run.output == [1, 2, 3]
    assert len(set(run.steps.values_list("name", flat=True))) == 4


def test_the_longest_name_may_be_repeated(run_through):
    @job("a-job")
    def a_job(ctx):
        return [ctx.step.run("x" * 190, int, number) for number in range(12)]

    assert run_through(a_job).output == list(range(12))


@pytest.mark.parametrize(
    "name",
    ["", "x" * 191, None, 7, "a\0b", "\udcff"],
    ids=["empty", "long", "none", "number", "nul", "surrogate"],
)
def test_a_step_needs_a_name(name, run_through, ledger):
    @job("a-job")
    def a_job(ctx):
        ctx.step.run(name, ledger.note, "never")

    run = run_through(a_job)

    assert run.status == "failed"
    assert "name" in run.error["message"]
    assert ledger == []
    assert run.attempts.count() == 1


@pytest.mark.parametrize("tool", ["run", "atomic"])
def test_a_step_passes_on_every_keyword_even_those_it_is_called_by_itself(tool, run_through):
    @job("a-job")
    def a_job(ctx):
        return getattr(ctx.step, tool)("make", dict, name="Ada", fn="f", self="me")

    assert run_through(a_job).output == {"name": "Ada", "fn": "f", "self": "me"}


@pytest.mark.parametrize("tool", ["run", "atomic"])
def test_a_step_given_what_a_function_returned_in_its_place_says_so(tool, run_through):
    @job("a-job")
    def a_job(ctx):
        getattr(ctx.step, tool)("greet", print("called too early"))

    run = run_through(a_job)

    assert run.status == "failed"
    assert 'Step "greet" is given None, which is no function.' in run.error["message"]
    assert run.attempts.count() == 1


def test_the_start_of_the_run_is_the_same_in_every_pass(run_through):
    seen = []

    @job("a-job")
    def a_job(ctx):
        seen.append(ctx.now)
        ctx.step.sleep("night", DAY)

    run = run_through(a_job)

    assert seen == [run.started_at] * 2


def test_the_context_says_who_and_why(jobs):
    seen = {}

    @job("a-job", version="3")
    def a_job(ctx):
        facts = ("run_id", "job", "attempt", "version", "scheduled_for", "events", "event")
        seen.update({name: getattr(ctx, name) for name in facts}, cancelled=ctx.cancelled())

    run = jobs.run(a_job, {"x": 1})

    assert seen == {
        "run_id": run.pk,
        "job": a_job,
        "attempt": 0,
        "version": "3",
        "scheduled_for": None,
        "events": [run.event],
        "event": run.event,
        "cancelled": False,
    }
    assert seen["event"].data == {"x": 1}


def test_the_event_is_the_same_in_every_pass(run_through):
    seen = []

    @job("a-job")
    def a_job(ctx):
        event = ctx.event
        seen.append([event.pk, event.name, event.data, event.key, event.occurred_at, event.received_at])
        ctx.step.sleep("night", DAY)

    run = run_through(a_job, {"amount": Decimal("9.90"), "at": (1, 2)})

    event = run.event
    told = [event.pk, event.name, event.data, event.key, event.occurred_at, event.received_at]
    assert seen == [told, told]


# Loggers.


def test_the_logger_says_each_thing_once(run_through, caplog):
    @job("a-job")
    def a_job(ctx):
        ctx.logger.info("begun")
        ctx.step.run("one", int)
        ctx.logger.info("one is done")
        ctx.step.sleep("night", DAY)
        ctx.logger.info("awake")
        ctx.step.run("two", int)
        ctx.step.sleep("another-night", DAY)
        ctx.logger.info("the end")

    with caplog.at_level(logging.INFO, logger="django_jobs.job"):
        run = run_through(a_job)

    mine = [record for record in caplog.records if record.name == "django_jobs.job.a-job"]
    assert [record.message for record in mine] == ["begun", "one is done", "awake", "the end"]
    assert {(record.run_id, record.job_id) for record in mine} == {(str(run.pk), "a-job")}


def test_the_logger_speaks_again_where_work_is_repeated(run_through, caplog):
    @job("a-job", retries=1, backoff=[DAY])
    def a_job(ctx):
        ctx.logger.info("begun")
        ctx.step.run("one", int)
        ctx.logger.info("on the way")
        if ctx.attempt == 0:
            raise ValueError("once more")

    with caplog.at_level(logging.INFO, logger="django_jobs.job"):
        run_through(a_job)

    mine = [record.message for record in caplog.records if record.name == "django_jobs.job.a-job"]
    assert mine == ["begun", "on the way", "on the way"]


def test_the_logger_is_heard_while_a_step_is_tried_again(run_through, caplog):
    tries = []

    @job("a-job", retries=1, backoff=[DAY])
    def a_job(ctx):
        ctx.logger.info("begun")

        def flaky():
            tries.append(1)
            ctx.logger.info("try %s", len(tries))
            assert len(tries) > 1

        ctx.step.run("flaky", flaky)

    with caplog.at_level(logging.INFO, logger="django_jobs.job"):
        run_through(a_job)

    mine = [record.message for record in caplog.records if record.name == "django_jobs.job.a-job"]
    assert mine == ["begun", "try 1", "try 2"]


# The limit of steps.


def test_a_run_has_a_limit_of_steps(jobs, settings):
    settings.DJANGO_JOBS = {"MAX_STEPS": 3}

    @job("endless")
    def endless(ctx):
        while True:
            ctx.step.run("on", int)

    run = jobs.run(endless)

    assert run.status == "failed"
    assert "MAX_STEPS" in run.error["message"]
    assert run.steps.count() == 3


def test_the_last_step_allowed_may_be_a_sleep_or_need_a_second_try(run_through, settings):
    settings.DJANGO_JOBS = {"MAX_STEPS": 2}

    @job("naps")
    def naps(ctx):
        ctx.step.run("on", int)
        ctx.step.sleep("night", DAY)
        return "awake"

    assert run_through(naps).output == "awake"
    assert Step.objects.count() == 2
