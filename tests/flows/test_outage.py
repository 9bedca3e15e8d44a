"""A connection that breaks at the worst moment, between the work and its checkpoint."""

import pytest
from django.db import InterfaceError, OperationalError, connection, connections

from django_jobs import StepError, emit, job, on
from django_jobs.executor import execute
from django_jobs.models import Event, Run, RunStatus, Step
from django_jobs.outage import outlast


def break_the_connection():
    """End our own session at the server, as a restart does."""
    other = connection.copy("other")
    try:
        with connection.cursor() as cursor:
            if connection.vendor == "postgresql":
                cursor.execute("SELECT pg_backend_pid()")
                kill = "SELECT pg_terminate_backend(%s)"
            else:
                cursor.execute("SELECT CONNECTION_ID()")
                kill = "KILL %s"
            session = cursor.fetchone()[0]
        with other.cursor() as cursor:
            cursor.execute(kill, [session])
    finally:
        other.close()


@pytest.mark.only_on("postgresql", "mysql")
@pytest.mark.django_db(transaction=True)
def test_a_checkpoint_outlives_the_connection_that_was_to_write_it(ledger, caplog):
    def work():
        ledger.note("worked")
        break_the_connection()
        return 7

    @job("unlucky")
    def unlucky(ctx):
        return ctx.step.run("work", work)

    run = unlucky.start()
    [claimed] = Run.objects.claim(1, jobs=["unlucky"])
    execute(claimed)
    run.refresh_from_db()
    assert (run.status, run.output, ledger) == (RunStatus.COMPLETED, 7, ["worked"])
    assert not run.attempts.exists()


@pytest.mark.only_on("postgresql", "mysql")
@pytest.mark.django_db(transaction=True)
def test_the_lines_of_a_run_outlive_the_connection_that_was_to_write_them(said):
    @job("unlucky")
    def unlucky(ctx):
        ctx.logger.info("before")
        break_the_connection()
        ctx.logger.info("after")

    run = unlucky.start()
    [claimed] = Run.objects.claim(1, jobs=["unlucky"])
    execute(claimed)
    run.refresh_from_db()
    assert (run.status, said(run)) == (RunStatus.COMPLETED, ["before", "after"])


@pytest.mark.only_on("postgresql", "mysql")
@pytest.mark.django_db(transaction=True)
def test_an_atomic_step_begins_again_when_its_transaction_is_lost(rows, jobs):
    broken = []

    def work():
        rows.add("row")
        if not broken:
            broken.append(True)
            break_the_connection()
            rows.add("never")

    @job("unlucky")
    def unlucky(ctx):
        ctx.step.atomic("work", work)

    run = unlucky.start()
    [claimed] = Run.objects.claim(1, jobs=["unlucky"])
    execute(claimed)
    run.refresh_from_db()
    assert (run.status, run.attempts.count()) == (RunStatus.QUEUED, 1)
    for waiting in (Run.objects, Step.objects):
        waiting.update(wake_at="2020-01-01T00:00Z")
    [claimed] = Run.objects.claim(1, jobs=["unlucky"])
    execute(claimed)
    run.refresh_from_db()
    assert (run.status, rows.names()) == (RunStatus.COMPLETED, ["row"])


@pytest.mark.django_db(transaction=True)
def test_what_a_database_that_is_there_refuses_again_and_again_is_an_error():
    tries = []

    def refused():
        tries.append(1)
        raise OperationalError("deadlock")

    with pytest.raises(OperationalError, match="deadlock"):
        outlast("default", refused)
    assert len(tries) == 5
    assert connections["default"].is_usable()


@pytest.mark.django_db
def test_inside_a_transaction_nothing_is_tried_again():
    tries = []

    def refused():
        tries.append(1)
        raise OperationalError("gone")

    with pytest.raises(OperationalError):
        outlast("default", refused)
    assert len(tries) == 1


@pytest.fixture
def database_away(monkeypatch):
    """Break the connection and let the next attempts to connect fail."""
    connect, refusals = connection.connect, []

    def refuse():
        if refusals:
            refusals.pop()
            raise OperationalError("nobody is listening there")
        connect()

    def go_away(refused=3):
        connection.ensure_connection()
        refusals[:] = [None] * refused
        connection.connection.close()

    monkeypatch.setattr(connection, "connect", refuse)
    monkeypatch.setattr("django_jobs.outage.LONGEST_PAUSE", 0.1)
    return go_away


@pytest.mark.only_on("postgresql", "mysql")
@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize(
    "when", ["in a step", "between steps", "before a sleep", "in a failing step", "at the end"]
)
def test_a_database_that_is_away_for_a_while_is_waited_for(when, database_away, ledger, caplog):
    @job("patient", retries=0)
    def patient(ctx):
        def work():
            ledger.note("worked")
            if when in ("in a step", "in a failing step"):
                database_away()
            return 1 / 0 if when == "in a failing step" else 7

        try:
            result = ctx.step.run("work", work)
        except StepError as error:
            result = error.type
        if when in ("between steps", "at the end"):
            database_away()
        if when == "between steps":
            ctx.step.run("more", int)
        if when == "before a sleep":
            database_away()
            ctx.step.sleep_until("past", ctx.now)
        return result

    run = patient.start()
    [claimed] = Run.objects.claim(1, jobs=["patient"])
    execute(claimed)

    run.refresh_from_db()
    assert (run.status, run.output) == (RunStatus.COMPLETED, "ZeroDivisionError" if "failing" in when else 7)
    assert ledger == ["worked"]
    assert "cannot be reached" in caplog.text
    assert "is back" in caplog.text


@pytest.mark.only_on("postgresql", "mysql")
@pytest.mark.django_db(transaction=True)
def test_who_emits_is_told_at_once_when_the_database_is_away(database_away):
    database_away()

    with pytest.raises((OperationalError, InterfaceError)):
        emit("a/b")


@pytest.mark.only_on("postgresql", "mysql")
@pytest.mark.django_db(transaction=True)
def test_an_event_emitted_over_a_broken_connection_is_emitted_once():
    job("listener", on("a/b"))(lambda ctx: None)
    break_the_connection()

    event = emit("a/b", {"x": 1})

    assert Event.objects.get() == event
    assert event.runs.count() == 1
