"""The database did what it was told, but the connection broke before it could say so."""

from datetime import timedelta

import pytest
from django.db import OperationalError, connection

from django_jobs import EventSpec, cancel_on, emit, emit_many, job, on
from django_jobs.executor import execute
from django_jobs.models import Delivery, Event, Listener, Log, Run
from django_jobs.runlog import BATCH

# SQLite is a file: there is nobody whose answer could get lost.
pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.only_on("postgresql", "mysql")]

HOUR = timedelta(hours=1)


@pytest.fixture
def lost_answer(monkeypatch):
    """Lose the next answer: to a COMMIT, or to the next statement that begins so outside a transaction."""
    waiting = []

    def lose(what="COMMIT"):
        waiting.append(what)

    def lost(what):
        waiting.remove(what)
        connection.connection.close()
        raise OperationalError("the connection is gone")

    commit = connection._commit

    def commit_and_lose():
        commit()
        if "COMMIT" in waiting:
            lost("COMMIT")

    def execute_and_lose(execute, sql, params, many, context):
        result = execute(sql, params, many, context)
        for what in [what for what in waiting if sql.startswith(what) and not connection.in_atomic_block]:
            lost(what)
        return result

    monkeypatch.setattr(connection, "_commit", commit_and_lose)
    with connection.execute_wrapper(execute_and_lose):
        yield lose
    assert waiting == [], "nothing was lost: the test does not test what it says"


def ended(run):
    run.refresh_from_db()
    return run.status, run.output


def test_a_checkpoint_that_was_written_is_not_written_twice(jobs, ledger, lost_answer):
    def work():
        lost_answer("INSERT")
        return ledger.note("worked", 7)

    @job("unlucky")
    def unlucky(ctx):
        return [ctx.step.run("work", work), ctx.step.run("after", int)]

    run = jobs.run(unlucky)

    assert ended(run) == ("completed", [7, 0])
    assert ledger == ["worked"]
    assert not run.attempts.exists()


def test_the_checkpoint_of_a_second_try_is_not_lost_either(jobs, ledger, lost_answer):
    def work():
        ledger.note("worked")
        if len(ledger) == 1:
            raise ConnectionError
        lost_answer()
        return 7

    @job("unlucky")
    def unlucky(ctx):
        return ctx.step.run("work", work)

    run = jobs.run(unlucky)
    jobs.advance(HOUR)

    assert ended(run) == ("completed", 7)
    assert ledger == ["worked", "worked"]


@pytest.mark.parametrize("retries", [0, 4])
def test_what_an_atomic_step_committed_counts_though_nobody_heard(retries, jobs, rows, lost_answer):
    def work():
        lost_answer()
        return rows.add("row")

    @job("unlucky", retries=retries)
    def unlucky(ctx):
        return ctx.step.atomic("work", work)

    run = jobs.run(unlucky)
    jobs.advance(HOUR)

    assert rows.names() == ["row"]
    assert ended(run) == ("completed", "row")


@pytest.mark.parametrize("retries", [1, 4])
def test_what_a_second_try_of_an_atomic_step_committed_counts_though_nobody_heard(
    retries, jobs, rows, lost_answer
):
    tries = []

    def work():
        tries.append(1)
        rows.add(f"row {len(tries)}")
        if len(tries) == 1:
            raise ConnectionError
        if len(tries) == 2:
            lost_answer()
        return "done"

    @job("unlucky", retries=retries)
    def unlucky(ctx):
        return ctx.step.atomic("work", work)

    run = jobs.run(unlucky)
    jobs.advance(HOUR)

    assert rows.names() == ["row 2"]
    assert ended(run) == ("completed", "done")


@pytest.mark.parametrize("retries", [0, 4])
def test_an_event_whose_commit_nobody_heard_is_emitted_once(retries, jobs, lost_answer):
    job("listener", on("a/b"))(lambda ctx: None)

    @job("unlucky", retries=retries)
    def unlucky(ctx):
        ctx.step.run("prepare", lost_answer)
        return ctx.step.emit("tell", "a/b")

    run = jobs.run(unlucky)
    jobs.advance(HOUR)

    event = Event.objects.get(name="a/b")
    assert event.runs.count() == 1
    assert ended(run) == ("completed", event.pk)


@pytest.mark.parametrize("which", [1, 2])
def test_a_failure_that_was_recorded_is_recorded_once(which, jobs, lost_answer):
    tries = []

    def work():
        tries.append(1)
        if len(tries) == which:
            lost_answer()
        if len(tries) <= 2:
            raise ConnectionError
        return 7

    @job("unlucky")
    def unlucky(ctx):
        return ctx.step.run("work", work)

    run = jobs.run(unlucky)
    jobs.advance(HOUR)

    assert ended(run) == ("completed", 7)
    assert list(run.attempts.values_list("number", flat=True)) == [1, 2]


@pytest.mark.parametrize("ending", ["complete", "sleep"])
def test_a_settle_that_was_done_stays_done(ending, jobs, lost_answer):
    passes = []

    @job("unlucky")
    def unlucky(ctx):
        if not passes:
            passes.append(1)
            lost_answer("UPDATE")
        if ending == "sleep":
            ctx.step.sleep("nap", HOUR)
        return 7

    run = jobs.run(unlucky)
    jobs.advance(HOUR)

    assert ended(run) == ("completed", 7)
    assert Run.objects.get().crashes == 0


@pytest.mark.parametrize("passes", [1, 2])
def test_lines_that_were_written_are_not_written_twice_and_those_after_them_follow(
    passes, jobs, said, lost_answer
):
    @job("unlucky")
    def unlucky(ctx):
        if passes == 2:
            ctx.logger.info("before")
            ctx.step.sleep("nap", HOUR)
        for number in range(BATCH + 1):
            ctx.logger.info("%s", number)
        lost_answer("INSERT INTO " + connection.ops.quote_name(Log._meta.db_table))

    run = jobs.run(unlucky)
    jobs.advance(2 * HOUR)

    assert ended(run)[0] == "completed"
    assert said(run) == ["before", *map(str, range(BATCH + 1))][2 - passes :]


@pytest.mark.parametrize("when", ["it begins to listen", "it has its event"])
def test_a_wait_goes_on_though_nobody_heard_that_it_was_written(when, jobs, lost_answer):
    @job("unlucky", on("a/begun"))
    def unlucky(ctx):
        if when == "it begins to listen" and not Listener.objects.exists():
            lost_answer()
        if when == "it has its event" and Delivery.objects.exists():
            lost_answer()
        return ctx.step.wait_for_event("event", "a/b", timeout=HOUR).data["n"]

    emit("a/begun")
    jobs.drain()
    [run] = Run.objects.all()
    assert [listener.step for listener in Listener.objects.all()] == [*run.steps.all()]
    emit("a/b", {"n": 7})
    jobs.drain()

    assert ended(run) == ("completed", 7)
    assert not Listener.objects.exists()
    assert not run.attempts.exists()


def test_a_child_whose_start_nobody_heard_is_started_once(jobs, lost_answer):
    job("child")(lambda ctx: 7)

    @job("unlucky")
    def unlucky(ctx):
        if not Event.objects.filter(runs__job_id="child").exists():
            lost_answer()
        return ctx.step.invoke("child", "child")

    run = jobs.run(unlucky)

    assert ended(run) == ("completed", 7)
    assert [child.pk for child in run.children.all()] == [run.steps.get().child_id]
    assert not run.attempts.exists()


def test_a_run_that_is_to_be_cancelled_listens_though_nobody_heard_that_it_does(jobs, lost_answer):
    @job("unlucky", on("a/begun"), cancel_on=cancel_on("a/ended"))
    def unlucky(ctx):
        ctx.step.sleep("nap", HOUR)

    emit("a/begun")
    [run] = Run.objects.claim(1, jobs=["unlucky"])
    lost_answer()
    execute(run)
    assert Listener.objects.count() == 1
    emit("a/ended")
    jobs.drain()

    assert ended(run) == ("cancelled", None)


def test_events_whose_routing_nobody_heard_are_routed_once(jobs, lost_answer):
    @job("waits", on("a/begun"))
    def waits(ctx):
        first = ctx.step.wait_for_event("first", "a/b", timeout=HOUR)
        second = ctx.step.wait_for_event("second", "a/b", timeout=HOUR)
        return first.data["n"], second

    run = jobs.run(waits)
    emit("a/b", {"n": 7})
    lost_answer()
    jobs.advance(HOUR)

    assert ended(run) == ("completed", (7, None))


@pytest.mark.parametrize("key", [None, "7"])
def test_an_emission_outside_a_transaction_whose_commit_nobody_heard_starts_its_jobs_once(key, lost_answer):
    job("listener", on("a/b"))(lambda ctx: None)
    lost_answer()

    event = emit("a/b", {"x": 1}, key=key)

    assert Event.objects.get() == event
    assert event.runs.count() == 1


def test_many_emissions_whose_commit_nobody_heard_come_back_as_if_it_had_been(lost_answer):
    job("listener", on("a/b"))(lambda ctx: None)
    first = emit("a/b", {"n": 0}, key="old")
    lost_answer()

    keys = [None, "old", "new", "new", None]
    events = emit_many(EventSpec("a/b", {"n": number}, key=key) for number, key in enumerate(keys, 1))

    assert [event.data["n"] for event in events] == [1, 0, 3, 3, 5]
    assert events[1] == first
    assert Event.objects.count() == Run.objects.count() == 4


def test_who_starts_a_job_is_told_when_nobody_knows_whether_it_started(lost_answer):
    by_hand = job("by-hand")(lambda ctx: None)
    lost_answer()

    with pytest.raises(OperationalError):
        by_hand.start()
