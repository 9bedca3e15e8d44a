"""How the lines of a run become rows: fenced, in batches, and bounded."""

import logging
from datetime import timedelta

import pytest
from django.db import connection, transaction
from django.test.utils import CaptureQueriesContext

from django_jobs import NonRetriableError, job, runlog, signals
from django_jobs.conf import conf
from django_jobs.executor import execute
from django_jobs.models import Log, Run

pytestmark = pytest.mark.usefixtures("a_host_that_logs")

DAY = timedelta(days=1)

shop = logging.getLogger("shop.orders")


def talk(lines=runlog.MANY):
    for number in range(lines):
        shop.info("%s", number)


# Fencing.


@pytest.fixture
def taken(jobs, at_once):
    """Let the lease run out and another worker claim the run: call it where the first one is to stall."""

    def take():
        jobs._now += timedelta(seconds=conf.LEASE_SECONDS)
        [[take.second]] = at_once(lambda: Run.objects.claim(1, jobs=["stalls"], worker="second"), threads=1)

    return take


def pass_of_the_first(stalls):
    run = stalls.start()
    [first] = Run.objects.claim(1, jobs=["stalls"], worker="first")
    execute(first)
    return run


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("ending", ["return", "raise", "raise for good", "step", "sleep"])
def test_a_worker_that_lost_its_lease_writes_no_line(ending, taken, settings):
    settings.DJANGO_JOBS = {"MAX_LOGS": 5}

    @job("stalls")
    def stalls(ctx):
        talk(10)
        taken()
        if ending == "step":
            ctx.step.run("late", int)
        if ending == "sleep":
            ctx.step.sleep("late", DAY)
        if ending == "raise":
            raise ValueError
        if ending == "raise for good":
            raise NonRetriableError

    pass_of_the_first(stalls)

    assert not Log.objects.exists()


@pytest.mark.django_db(transaction=True)
def test_a_flush_that_finds_the_lease_lost_ends_the_pass(taken, ledger, said):
    """The run is taken over after the checkpoint of its first step, and before the lines are written."""

    def take_over(sender, **news):
        signals.step_finished.disconnect(take_over)
        taken()

    @job("stalls")
    def stalls(ctx):
        ctx.step.run("talk", talk)
        ctx.step.run("work", ledger.note, "worked")

    signals.step_finished.connect(take_over)
    run = pass_of_the_first(stalls)
    assert (said(run), ledger) == ([], [])

    execute(taken.second)
    run.refresh_from_db()
    assert (run.status, run.claimed_by, ledger) == ("completed", "second", ["worked"])


@pytest.mark.django_db(transaction=True)
def test_what_two_workers_wrote_one_after_the_other_is_in_one_order(taken, said):
    stalled = []

    @job("stalls")
    def stalls(ctx):
        ctx.step.run("talk", talk)
        shop.info("on the way")
        if not stalled:
            stalled.append(True)
            taken()

    run = pass_of_the_first(stalls)
    execute(taken.second)

    assert said(run) == [*map(str, range(runlog.MANY)), "on the way"]
    assert [line.number for line in run.logs.all()] == list(range(1, runlog.MANY + 2))


# What it costs.


def statements(job, data=None):
    """Return the first word of each statement of a pass, without the read of its event."""
    job.start(data)
    [run] = Run.objects.claim(1, jobs=[job.id])
    return statements_of(run)


def statements_of(run):
    with CaptureQueriesContext(connection) as captured:
        execute(run)
    reading_the_event = run.passes == 1 and connection.vendor == "mysql"
    return [query["sql"].split(maxsplit=1)[0].strip(";") for query in captured][reading_the_event:]


@pytest.fixture
def talks():
    @job("talks")
    def talks(ctx):
        talk(ctx.event.data["before"])
        for _ in range(ctx.event.data.get("steps", 0)):
            ctx.step.run("talk", talk, ctx.event.data["each"])

    return talks


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"before": 0}, ["UPDATE"]),
        ({"before": 1}, ["INSERT", "UPDATE"]),
        ({"before": 100}, ["INSERT", "UPDATE"]),
        ({"before": 500}, ["INSERT", "UPDATE"]),
        ({"before": 501}, ["INSERT", "INSERT", "UPDATE"]),
        ({"before": 0, "steps": 2, "each": 0}, ["INSERT", "INSERT", "UPDATE"]),
        ({"before": 0, "steps": 2, "each": 40}, ["INSERT"] * 2 + ["INSERT", "UPDATE"]),
        ({"before": 0, "steps": 3, "each": 40}, ["INSERT"] * 3 + ["INSERT", "UPDATE"]),
        ({"before": 0, "steps": 5, "each": 40}, ["INSERT"] * 5 + ["INSERT", "INSERT", "UPDATE"]),
    ],
)
def test_lines_are_written_in_batches_and_none_costs_nothing(data, expected, talks):
    assert statements(talks, data) == expected
    assert Log.objects.count() == data["before"] + data.get("steps", 0) * data.get("each", 0)


@pytest.mark.django_db(transaction=True)
def test_a_later_pass_looks_once_how_far_the_log_is(jobs, said):
    @job("naps")
    def naps(ctx):
        for number in range(3):
            shop.info("%s", number)
            ctx.step.sleep("night", DAY)

    jobs.run(naps)
    jobs._now += DAY
    [run] = Run.objects.claim(1, jobs=["naps"])

    reading, waking, sleeping, settling = ["SELECT"], ["UPDATE"], ["INSERT"], ["UPDATE"]
    log = ["SELECT", "INSERT"]
    assert statements_of(run) == [*reading, *waking, *sleeping, *log, *settling]
    assert said(run) == ["0", "1"]


@pytest.mark.django_db(transaction=True)
def test_lines_that_grow_old_are_written_at_the_next_checkpoint(jobs):
    counts = []

    @job("slow")
    def slow(ctx):
        shop.info("one")
        for _ in range(3):
            ctx.step.run("wait", int)
            counts.append(Log.objects.count())
            jobs._now += runlog.OLD

    jobs.run(slow)

    assert counts == [0, 1, 1]


@pytest.mark.django_db(transaction=True)
def test_lines_are_not_written_into_a_transaction_of_the_job_that_may_roll_back(jobs):
    @job("rolls-back", retries=0)
    def rolls_back(ctx):
        with transaction.atomic():
            ctx.step.run("talk", talk)
            transaction.set_rollback(True)

    run = jobs.run(rolls_back)

    assert not run.steps.exists()
    assert run.logs.count() == runlog.MANY


# The bound.


def test_a_run_keeps_so_many_lines_and_says_how_many_more_there_were(jobs, settings):
    settings.DJANGO_JOBS = {"MAX_LOGS": 5}

    @job("chatters")
    def chatters(ctx):
        talk(12)

    run = jobs.run(chatters)

    *kept, last = run.logs.all()
    assert [line.message for line in kept] == ["0", "1", "2", "3", "4"]
    assert (last.dropped, last.level, last.number) == (7, logging.WARNING, 6)
    assert last.message == "7 more lines were dropped: a run keeps 5 (MAX_LOGS)."


@pytest.mark.parametrize("each", [1, 3, 5, 6, 20])
def test_the_bound_is_for_the_run_and_not_for_a_pass(each, jobs, settings, said):
    settings.DJANGO_JOBS = {"MAX_LOGS": 5}

    @job("chatters")
    def chatters(ctx):
        for night in range(4):
            for number in range(each):
                shop.info("%s", night * each + number)
            ctx.step.sleep("night", DAY)

    run = jobs.run(chatters)
    jobs.advance(30 * DAY)

    lines = 4 * each
    assert said(run)[:5] == [str(number) for number in range(min(lines, 5))]
    assert run.logs.count() == min(lines, 6)
    assert sum(line.dropped for line in run.logs.all()) == max(lines - 5, 0)


def test_the_last_word_stays_the_last_if_the_limit_is_raised_later(jobs, settings):
    settings.DJANGO_JOBS = {"MAX_LOGS": 5}

    @job("chatters")
    def chatters(ctx):
        talk(7)
        ctx.step.sleep("night", DAY)
        talk(7)

    run = jobs.run(chatters)
    settings.DJANGO_JOBS = {"MAX_LOGS": 100}
    jobs.advance(2 * DAY)

    assert run.logs.count() == 6
    assert run.logs.last().dropped == 9


def test_just_as_many_lines_as_a_run_may_have_need_no_last_word(jobs, settings, said):
    settings.DJANGO_JOBS = {"MAX_LOGS": 3}

    @job("talks")
    def talks(ctx):
        talk(3)

    assert said(jobs.run(talks)) == ["0", "1", "2"]


def test_what_is_held_back_in_a_replay_is_bounded_and_counted_too(jobs, settings, said):
    settings.DJANGO_JOBS = {"MAX_LOGS": 5}
    new = False

    @job("changes")
    def changes(ctx):
        ctx.step.run("one", int)
        if not new:
            ctx.step.sleep("night", DAY)
        talk(12)

    run = jobs.run(changes)
    new = True
    jobs.advance(2 * DAY)

    assert said(run)[:5] == ["0", "1", "2", "3", "4"]
    assert run.logs.get(number=6).dropped == 7


@pytest.mark.django_db(transaction=True)
def test_more_lines_than_the_limit_in_steps_are_dropped_without_a_statement_each(jobs, settings):
    settings.DJANGO_JOBS = {"MAX_LOGS": 150}

    @job("chatters")
    def chatters(ctx):
        for _ in range(10):
            ctx.step.run("talk", talk)

    with CaptureQueriesContext(connection) as captured:
        run = jobs.run(chatters)

    written = [query for query in captured if Log._meta.db_table in query["sql"]]
    assert len([query for query in written if query["sql"].startswith(("INSERT", "UPDATE"))]) == 3
    assert run.logs.count() == 151
    assert run.logs.last().dropped == 850


def test_no_line_at_all_is_kept_if_the_limit_is_zero(jobs, settings):
    settings.DJANGO_JOBS = {"MAX_LOGS": 0}

    @job("chatters")
    def chatters(ctx):
        shop.info("x")

    with CaptureQueriesContext(connection) as captured:
        jobs.run(chatters)

    assert not [query for query in captured if Log._meta.db_table in query["sql"]]


# When it goes wrong.


@pytest.mark.django_db(transaction=True)
def test_a_log_that_cannot_be_written_costs_the_lines_and_never_the_run(jobs, caplog):
    def refuse(execute, sql, params, many, context):
        if Log._meta.db_table in sql:
            sql = sql.replace(Log._meta.db_table, "no_such_table")
        return execute(sql, params, many, context)

    @job("talks")
    def talks(ctx):
        shop.info("x")
        ctx.step.run("one", int)

    with connection.execute_wrapper(refuse):
        run = jobs.run(talks)

    assert run.status == "completed"
    [told] = [record.message for record in caplog.records if "could not be written" in record.message]
    assert str(run.pk) in told
