"""Events come to those who listen for them, whatever dies, whoever else is at it, and however many wait."""

import time
from contextlib import contextmanager
from datetime import timedelta
from threading import Event as Flag
from threading import Thread

import pytest
from django.db import OperationalError, connection, connections, transaction
from django.test.utils import CaptureQueriesContext

from django_jobs import cancel_on, emit, job, on, passes, routing
from django_jobs.executor import execute
from django_jobs.models import Delivery, Event, Listener, Run, RunStatus
from django_jobs.models.sql import adapt
from tests.crowd import multiply

pytestmark = pytest.mark.django_db(transaction=True)

DAY = timedelta(days=1)
SERVERS = pytest.mark.only_on("postgresql", "mysql")  # On SQLite only one can be in a transaction.


@pytest.fixture
def waits():
    @job("waits", on("a/begun"))
    def waits(ctx):
        event = ctx.step.wait_for_event("event", "a/b", match="id", timeout=DAY)
        return event and event.data["n"]

    return waits


def route():
    count = 0
    while batch := routing.route():
        count += batch
    return count


def ended(run):
    run.refresh_from_db()
    return run.status, run.output


def elsewhere(work):
    """Do ``work`` in a thread, with a connection of its own, and let errors in it fail the test."""
    caught = []

    def do():
        try:
            work()
        except BaseException as error:
            caught.append(error)
        finally:
            connections.close_all()

    thread = Thread(target=do)
    thread.start()

    def join():
        thread.join(30)
        assert not thread.is_alive()
        if caught:
            raise caught[0]

    return join


def done_elsewhere(work):
    elsewhere(work)()


# Whoever dies.


@pytest.fixture
def everybody():
    """Jobs of each kind that listens. Returns what starts them all, and what they come to."""
    job("child")(lambda ctx: ctx.step.sleep("nap", 2 * DAY))

    @job("one", on("a/begun"))
    def one(ctx):
        return ctx.step.wait_for_event("event", "a/one", match="id", timeout=DAY).data["n"]

    @job("all", on("a/begun"))
    def all_of(ctx):
        both = ctx.step.wait_for_all("both", ["a/one", "a/two"], timeout=DAY)
        return [event.data["n"] for event in both]

    @job("two", on("a/begun"))
    def two(ctx):
        wait = ctx.step.wait_for_event
        return [wait("next", "a/one", timeout=DAY).data["n"] for _ in range(2)]

    @job("other", on("a/begun"))
    def other(ctx):
        return ctx.step.wait_for_event("event", "a/other", timeout=DAY)

    @job("cancelled", on("a/begun"), cancel_on=cancel_on("a/two", match="id"))
    def cancelled(ctx):
        ctx.step.invoke("child", "child")


OUTCOME = {
    "one": ("completed", 1),
    "all": ("completed", [1, 3]),
    "two": ("completed", [1, 2]),
    "other": ("completed", None),
    "cancelled": ("cancelled", None),
    "child": ("cancelled", None),
}


def begin(jobs):
    emit("a/begun", {"id": 7})
    jobs.drain()
    for name, n in [("a/one", 1), ("a/one", 2), ("a/two", 3), ("a/nobody", 4)]:
        emit(name, {"id": 7, "n": n})


def state():
    """All that routing changes."""
    return (
        list(Run.objects.order_by("job_id").values()),
        list(Delivery.objects.order_by("step", "event").values_list("step", "event")),
        Event.objects.filter(unrouted=True).count(),
        Listener.objects.count(),
    )


@contextmanager
def raising_at(nth, error, *, after=False):
    """Raise ``error`` at the nth statement, before it is done or right after; one about the transaction is none."""
    seen = []

    def die(do, sql, params, many, context):
        if sql.startswith(("BEGIN", "SAVEPOINT", "RELEASE", "ROLLBACK")):
            return do(sql, params, many, context)
        seen.append(sql)
        if len(seen) - 1 == nth and not after:
            raise error
        result = do(sql, params, many, context)
        if len(seen) - 1 == nth:
            raise error
        return result

    with connection.execute_wrapper(die):
        yield seen


@pytest.mark.django_db
@pytest.mark.parametrize("after", [False, True], ids=["before it", "after it"])
def test_a_router_may_die_at_every_statement_and_all_is_as_if_it_had_not(after, everybody, jobs):
    begin(jobs)
    before, clean, deaths = state(), None, 0
    while deaths is not None:
        with transaction.atomic():
            try:
                with raising_at(deaths, passes.Died("the router"), after=after) as seen:
                    routing.route()
            except passes.Died:
                deaths += 1
                assert state() == before, seen[-1]
                route()
            else:
                assert len(seen) == deaths > 12
                deaths = None
            clean = clean or state()
            assert state() == clean, seen[-1]
            transaction.set_rollback(True)
    route()
    assert state() == clean
    jobs.advance(DAY)
    assert {run.job_id: (run.status, run.output) for run in Run.objects.all()} == OUTCOME
    assert not Listener.objects.exists()
    assert not Delivery.objects.exists()


@pytest.mark.parametrize("words", ["UPDATE", "INSERT", "SELECT", 'SET "unrouted"'])
def test_a_router_whose_statement_is_refused_for_once_goes_on_by_itself(words, everybody, jobs):
    """As MariaDB refuses one of two that lock the same rows in another order."""
    refused = []

    def refuse(do, sql, params, many, context):
        if words in sql.replace("`", '"') and not refused:
            refused.append(sql)
            raise OperationalError("deadlock")
        return do(sql, params, many, context)

    begin(jobs)
    with connection.execute_wrapper(refuse):
        assert routing.route() == 4
    assert refused
    jobs.advance(DAY)
    assert {run.job_id: (run.status, run.output) for run in Run.objects.all()} == OUTCOME


def test_an_event_that_nobody_can_read_does_not_hold_up_the_others(waits, jobs, caplog):
    """A newer release wrote it, with a type that this one does not know."""
    run = waits.start({"id": 7})
    jobs.drain()
    event = emit("a/b", {"id": 7, "n": 1})
    emit("a/b", {"id": 7, "n": 2})
    with connection.cursor() as cursor:
        unknown = ['{"id": {"$novelty": 7}}', adapt(connection, event.pk)]
        cursor.execute("UPDATE django_jobs_event SET data = %s WHERE id = %s", unknown)
    jobs.drain()
    assert ended(run) == ("completed", 2)
    [told] = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert told.startswith(f"event {event.pk} cannot be read, so nobody who waits for it is told: A newer")
    assert not Event.objects.filter(unrouted=True).exists()


# Whoever else is at it.


def test_two_routers_at_once_put_each_event_before_each_wait_once(jobs, at_once, monkeypatch):
    monkeypatch.setattr(routing, "BATCH", 5)

    @job("three", on("a/begun"))
    def three(ctx):
        wait = ctx.step.wait_for_event
        return [wait("next", "a/b", match="id", timeout=DAY).data["n"] for _ in range(3)]

    runs = [three.start({"id": id}) for id in range(4)]
    jobs.drain()
    for n in range(15):
        for id in range(4):
            emit("a/b", {"id": id, "n": n})

    def work():
        until = time.monotonic() + 30
        while Event.objects.filter(unrouted=True).exists() and time.monotonic() < until:
            routing.route()

    at_once(work)

    assert Delivery.objects.count() == 60
    jobs.drain()
    assert [ended(run) for run in runs] == [("completed", [0, 1, 2])] * 4


def paused_router(words, there, go):
    """Route in a thread that stops before the first statement with these words."""

    def pause(do, sql, params, many, context):
        if words in sql and not there.is_set():
            there.set()
            assert go.wait(20)
        return do(sql, params, many, context)

    def work():
        with connection.execute_wrapper(pause):
            route()

    join = elsewhere(work)
    assert there.wait(10)
    return join


DELIVERS = "django_jobs_delivery"


@SERVERS
def test_while_one_router_is_at_it_another_one_takes_no_later_event(waits, jobs):
    run = waits.start({"id": 7})
    jobs.drain()
    emit("a/b", {"id": 7, "n": 1})
    there, go = Flag(), Flag()
    join = paused_router(DELIVERS, there, go)
    emit("a/b", {"id": 7, "n": 2})
    assert routing.route() == 0
    go.set()
    join()
    assert route() == 0  # That one went on with it.
    jobs.drain()
    assert ended(run) == ("completed", 1)


@SERVERS
def test_an_emission_does_not_wait_for_a_router(waits, jobs):
    waits.start({"id": 7})
    jobs.drain()
    emit("a/b", {"id": 7, "n": 1})
    there, go = Flag(), Flag()
    join = paused_router(DELIVERS, there, go)
    with transaction.atomic():
        emit("a/b", {"id": 7, "n": 2})
        emit("a/begun", {"id": 8})
    assert Event.objects.count() == 4
    go.set()
    join()


def test_events_are_routed_in_the_order_of_their_ids(jobs, monkeypatch):
    monkeypatch.setattr(routing, "BATCH", 2)

    @job("first", on("a/begun"))
    def first(ctx):
        return ctx.step.wait_for_any("event", ["a/one", "a/two"], timeout=DAY).data["n"]

    run = first.start()
    jobs.drain()
    for n in range(6):
        emit(["a/one", "a/two"][n % 2], {"n": n})
    assert routing.route() == 2
    while runs := Run.objects.claim(1, jobs=["first"]):
        execute(*runs)
    assert ended(run) == ("completed", 0)


# The lost wake-up: an event is routed while the run is on its way to sleep.


@pytest.mark.parametrize("moment", ["before event", "after event", "before sleeping"])
def test_an_event_routed_while_its_run_falls_asleep_wakes_it(moment, waits, jobs, monkeypatch):
    came = []

    def come(at):
        if at == moment and not came:
            came.append(at)
            done_elsewhere(lambda: (emit("a/b", {"id": 7, "n": 1}), route()))

    monkeypatch.setattr(passes, "boundary", come)
    run = waits.start({"id": 7})
    [held] = Run.objects.claim(1, jobs=["waits"])
    execute(held)
    assert came
    run.refresh_from_db()
    assert run.status == RunStatus.COMPLETED or run.wake_at <= jobs._now
    while runs := Run.objects.claim(1, jobs=["waits"]):  # No router is needed any more.
        execute(*runs)
    assert ended(run) == ("completed", 1)
    assert run.passes <= 2


@SERVERS
def test_an_event_routed_while_the_listener_is_written_and_not_committed_is_looked_back_for(waits, jobs):
    def come(do, sql, params, many, context):
        result = do(sql, params, many, context)
        if sql.startswith("INSERT") and "django_jobs_listener" in sql:
            done_elsewhere(lambda: (emit("a/b", {"id": 7, "n": 1}), route()))
        return result

    run = waits.start({"id": 7})
    [held] = Run.objects.claim(1, jobs=["waits"])
    with connection.execute_wrapper(come):
        execute(held)
    assert ended(run) == ("completed", 1)


def is_waiting_for_a_lock():
    ask = {
        "postgresql": "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
        " AND datname = current_database()",
        "mysql": "SELECT count(*) FROM information_schema.innodb_trx WHERE trx_state = 'LOCK WAIT'",
    }
    with connection.cursor() as cursor:
        cursor.execute(ask[connection.vendor])
        return cursor.fetchone()[0] > 0


def until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.15)  # MariaDB says what it said before to whoever asks more often.


@SERVERS
def test_a_run_that_falls_asleep_while_a_router_is_about_to_wake_it_is_awake(waits, jobs, monkeypatch):
    """The router has nudged it and not yet committed; the settle waits for that, and then sees it."""
    run = waits.start({"id": 7})
    [held] = Run.objects.claim(1, jobs=["waits"])
    there, go, joins = Flag(), Flag(), []

    def come(at):
        if at == "before sleeping" and not joins:
            emit("a/b", {"id": 7, "n": 1})
            joins.append(paused_router(DELIVERS, there, go))

    monkeypatch.setattr(passes, "boundary", come)
    join = elsewhere(lambda: execute(held))
    assert there.wait(10)
    until(is_waiting_for_a_lock)
    go.set()
    joins[0]()
    join()
    run.refresh_from_db()
    assert (run.status, run.wake_at <= jobs._now) == (RunStatus.SLEEPING, True)
    jobs.drain()
    assert ended(run) == ("completed", 1)


@SERVERS
def test_a_wait_that_gets_its_answer_while_a_router_delivers_it_gets_it_once(waits, jobs, monkeypatch):
    """The worker has looked back and found the event; each locks the run before all else, so neither is refused."""
    run = waits.start({"id": 7})
    [held] = Run.objects.claim(1, jobs=["waits"])
    there, go, joins = Flag(), Flag(), []

    def come(at):
        if at == "after event":
            emit("a/b", {"id": 7, "n": 1})
            joins.append(paused_router(DELIVERS, there, go))

    refused = []

    def note(do, sql, params, many, context):
        try:
            return do(sql, params, many, context)
        except Exception as error:
            refused.append(error)
            raise

    def work():
        with connection.execute_wrapper(note):
            execute(held)

    monkeypatch.setattr(passes, "boundary", come)
    join = elsewhere(work)
    assert there.wait(10)
    until(is_waiting_for_a_lock)
    go.set()
    joins[0]()
    join()
    assert ended(run) == ("completed", 1)
    assert (run.passes, refused) == (1, [])
    assert not Listener.objects.exists()
    assert not Delivery.objects.exists()


@SERVERS
def test_a_wait_written_and_answered_while_a_router_is_between_two_statements_is_answered_once(waits, jobs):
    """The router woke whom it found, and has yet to deliver; a new wait finds the event by itself."""
    sleeper = waits.start({"id": 7})
    jobs.drain()
    late = waits.start({"id": 7})
    emit("a/b", {"id": 7, "n": 1})
    there, go = Flag(), Flag()
    join = paused_router(DELIVERS, there, go)
    [held] = Run.objects.filter(pk=late.pk).claim(1, jobs=["waits"])
    assert held.pk == late.pk
    execute(held)
    assert ended(late) == ("completed", 1)
    go.set()
    join()
    jobs.drain()
    assert ended(sleeper) == ("completed", 1)
    assert not Delivery.objects.exists()


@pytest.mark.parametrize("moment", ["after child", "before sleeping"])
def test_a_child_that_ends_while_its_parent_falls_asleep_wakes_it(moment, jobs, monkeypatch):
    job("child")(lambda ctx: 7)
    job("parent")(lambda ctx: ctx.step.invoke("child", "child"))
    came = []

    def child_ends():
        [child] = Run.objects.claim(1, jobs=["child"])
        execute(child)

    def come(at):
        if at == moment and not came:
            came.append(at)
            done_elsewhere(child_ends)

    monkeypatch.setattr(passes, "boundary", come)
    run = jobs.run("parent")
    assert came
    assert ended(run) == ("completed", 7)
    assert run.passes == 2


# However many wait.


def statements_of_routing():
    with CaptureQueriesContext(connection) as seen:
        assert routing.route() == 1
    return [query["sql"].split(maxsplit=1)[0] for query in seen if "NOTIFY" not in query["sql"]]


def test_an_event_that_a_thousand_runs_wait_for_is_routed_in_as_many_statements_as_for_one(waits, jobs):
    counts = []
    for id, count in enumerate([0, 999]):
        waits.start({"id": id})
        jobs.drain()
        if count:
            multiply(Run.objects.get(status=RunStatus.SLEEPING), count, alike=True)
        emit("a/b", {"id": id, "n": 1})
        counts.append(statements_of_routing())
        assert Run.objects.filter(status=RunStatus.SLEEPING, wake_at__lte=jobs._now).count() == count + 1
        assert Delivery.objects.count() == count + 1
        Run.objects.all().delete()
    longer = ["UPDATE"] if connection.vendor == "mysql" else []  # Its 1,000 runs are more than one list.
    assert sorted(counts[1]) == sorted(counts[0] + longer)


MANY = 100_000


def test_one_of_a_hundred_thousand_waiting_runs_is_found_by_an_index(waits, jobs):
    run = waits.start({"id": 7})
    jobs.drain()
    multiply(run, MANY, alike=False)
    emit("a/b", {"id": 7, "n": 1})
    seen = []

    def note(do, sql, params, many, context):
        seen.append((sql, params))
        return do(sql, params, many, context)

    with connection.execute_wrapper(note):
        assert routing.route() == 1
    assert Run.objects.filter(wake_at__lte=jobs._now).count() == 1
    assert len(seen) <= 11
    for sql, params in seen:
        if sql.startswith(("SELECT", "WITH", "INSERT", "UPDATE")) or "RECURSIVE" in sql:
            assert not read_whole(sql, params) & {"django_jobs_run", "django_jobs_listener"}, sql


def read_whole(sql, params):
    """The tables that a statement reads from end to end."""
    prefix = {"sqlite": "EXPLAIN QUERY PLAN"}.get(connection.vendor, "EXPLAIN")
    with connection.cursor() as cursor:
        cursor.execute(f"{prefix} {sql}", params)
        columns = [column[0] for column in cursor.description]
        plan = [dict(zip(columns, row, strict=True)) for row in cursor.fetchall()]
    if connection.vendor == "mysql":
        return {row["table"] for row in plan if row["type"] in ("ALL", "index")}
    lines = [next(reversed(row.values())) for row in plan]
    scan = "Seq Scan on" if connection.vendor == "postgresql" else "SCAN"
    return {line.split(scan)[1].split()[0] for line in lines if scan in line}


def test_the_check_of_the_plans_notices_a_statement_that_reads_it_all(db):
    assert read_whole("SELECT id FROM django_jobs_listener WHERE since IS NOT NULL", []) == {
        "django_jobs_listener"
    }
