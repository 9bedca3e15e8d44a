"""What waits, invocations and routing cost in statements, on every database, with BEGIN and COMMIT counted."""

from datetime import timedelta

import pytest
from django.db import connection

from django_jobs import cancel_on, emit, job, routing
from django_jobs.conf import conf
from django_jobs.executor import execute
from django_jobs.history import read_history
from django_jobs.models import Run, Step
from tests.crowd import multiply
from tests.statements import BEGIN, COMMIT, claimed, reading_the_event, statements, statements_of_a_pass

pytestmark = pytest.mark.django_db(transaction=True)

#: The run is locked, and its lease extended, before anything that is the run's is written.
FENCE = [BEGIN, "UPDATE"]
LISTEN = [*FENCE, "INSERT", "INSERT", COMMIT]
LOOK_BACK = ["SELECT"]
ANSWER = [*FENCE, "UPDATE", "DELETE", "DELETE", COMMIT]

#: The end of a run that still listens.
ENDS = [BEGIN, "UPDATE", "DELETE", "DELETE", COMMIT]


@pytest.fixture
def waits():
    @job("waits")
    def waits(ctx):
        ctx.step.wait_for_event("event", "a/b", match="id", timeout=timedelta(hours=1))

    return waits


def resumed(job_id):
    [run] = Run.objects.claim(1, jobs=[job_id])
    return statements(lambda: execute(run))


def test_a_wait_is_a_short_transaction_that_listens_and_a_look_back(waits):
    assert statements_of_a_pass(waits, {"id": 7}) == [*reading_the_event(), *LISTEN, *LOOK_BACK, "UPDATE"]


def test_several_events_are_waited_for_in_as_many_statements_as_one():
    @job("waits-for-all")
    def waits_for_all(ctx):
        ctx.step.wait_for_all("events", ["a/b", "a/c", "a/d"])

    assert statements_of_a_pass(waits_for_all) == [*reading_the_event(), *LISTEN, *LOOK_BACK, "UPDATE"]


def test_a_wait_for_what_has_come_already_is_one_more_short_transaction(waits):
    run = claimed(waits, {"id": 7})
    emit("a/b", {"id": 7})

    during = statements(lambda: execute(run))

    assert during == [*reading_the_event(), *LISTEN, *LOOK_BACK, *ANSWER, "UPDATE"]


def test_a_wait_that_got_its_event_reads_it_with_its_checkpoints_and_answers(waits):
    execute(claimed(waits, {"id": 7}))
    emit("a/b", {"id": 7})
    routing.route()

    assert resumed("waits") == ["SELECT", *ANSWER, "UPDATE"]


def test_a_wait_whose_time_is_up_looks_back_once_more_and_answers(waits):
    execute(claimed(waits, {"id": 7}))
    Run.objects.update(wake_at="2020-01-01T00:00Z")
    Step.objects.update(wake_at="2020-01-01T00:00Z")

    assert resumed("waits") == ["SELECT", *LOOK_BACK, *ANSWER, "UPDATE"]


def test_an_answered_wait_is_replayed_for_nothing():
    during = []

    @job("replays")
    def replays(ctx):
        work = lambda: ctx.step.wait_for_event("event", "a/b", timeout=timedelta(hours=1))  # noqa: E731
        during[:] = statements(work)
        ctx.step.sleep("nap", timedelta(hours=1))

    run = claimed(replays)
    emit("a/b")
    execute(run)
    assert during == [*LISTEN, *LOOK_BACK, *ANSWER]
    Run.objects.update(wake_at="2020-01-01T00:00Z")
    resumed("replays")
    assert during == []


def test_a_run_that_ends_before_its_wait_is_over_forgets_it_in_one_short_transaction(waits):
    execute(claimed(waits, {"id": 7}))
    Run.objects.update(wake_at="2020-01-01T00:00Z", crashes=conf.MAX_CRASHES)

    assert resumed("waits") == ["SELECT", *ENDS]


def test_listening_for_what_cancels_it_is_paid_for_in_the_first_pass_and_at_the_end():
    @job("cancelled", cancel_on=cancel_on("a/b"))
    def cancelled(ctx):
        ctx.step.sleep("nap", timedelta(hours=1))

    listens = [*FENCE, "SELECT", "INSERT", COMMIT, *LOOK_BACK]
    assert statements_of_a_pass(cancelled) == [*reading_the_event(), *listens, "INSERT", "UPDATE"]
    Run.objects.update(wake_at="2020-01-01T00:00Z")
    Step.objects.update(wake_at="2020-01-01T00:00Z")
    assert resumed("cancelled") == ["SELECT", "UPDATE", *ENDS]


# Children.


@pytest.fixture
def parent():
    job("child")(lambda ctx: 7)
    return job("parent")(lambda ctx: ctx.step.invoke("child", "child"))


def test_an_invocation_starts_its_child_and_is_written_in_one_short_transaction(parent):
    starts = [*FENCE, "INSERT", "INSERT", "INSERT", COMMIT]
    assert statements_of_a_pass(parent) == [*reading_the_event(), *starts, "UPDATE"]


def test_a_child_wakes_its_parent_in_the_transaction_in_which_it_ends(parent):
    execute(claimed(parent))

    assert resumed("child") == [*reading_the_event(), BEGIN, "UPDATE", "UPDATE", COMMIT]


def test_a_parent_looks_at_its_child_and_writes_down_what_it_came_to(parent):
    execute(claimed(parent))
    resumed("child")

    assert resumed("parent") == ["SELECT", "SELECT", *FENCE, "UPDATE", COMMIT, "UPDATE"]


# Routing.

TAKEN_UP = [BEGIN, "SELECT", "WITH"]  # The events, and which paths anybody looks at in such.
ROUTED = ["UPDATE", COMMIT]


def test_events_that_nobody_listens_for_are_routed_in_three_statements(waits):
    execute(claimed(waits, {"id": 7}))
    for number in range(50):
        emit(f"nobody/{number}")

    assert statements(routing.route) == [*TAKEN_UP, *ROUTED]


def test_events_that_others_listen_for_are_routed_in_five_statements(waits):
    execute(claimed(waits, {"id": 7}))
    for number in range(50):
        emit("a/b", {"id": number + 100})

    assert statements(routing.route) == [*TAKEN_UP, "SELECT", "SELECT", *ROUTED]


@pytest.mark.parametrize("heard", [1, 50])
def test_events_that_are_heard_are_routed_in_eight_statements_however_many(heard, waits):
    for number in range(heard):
        execute(claimed(waits, {"id": number}))
        emit("a/b", {"id": number})

    # Wake the runs, ask whom it cancels, deliver. MariaDB asks first whom to wake.
    wake = ["SELECT", "UPDATE"] if connection.vendor == "mysql" else ["UPDATE"]
    assert statements(routing.route) == [*TAKEN_UP, "SELECT", "SELECT", *wake, "SELECT", "INSERT", *ROUTED]


def test_an_idle_router_asks_once():
    assert statements(routing.route) == [BEGIN, "SELECT", COMMIT]


# Nobody pays for what others wait for.


@pytest.mark.only_on("postgresql")
@pytest.mark.parametrize("what", ["claim", "read", "settle"])
def test_a_run_that_waits_for_nothing_is_served_by_indexes_beside_many_that_wait(what, waits):
    template = waits.start({"id": 7})
    [held] = Run.objects.claim(1, jobs=["waits"])
    execute(held)
    multiply(template, 20_000, alike=False)
    nothing = job("nothing")(lambda ctx: None)
    run = claimed(nothing)
    nothing.start()
    seen = []

    def note(do, sql, params, many, context):
        seen.append((sql, params))
        return do(sql, params, many, context)

    work = {
        "claim": lambda: Run.objects.claim(5, jobs=["nothing"]),
        "read": lambda: read_history(run, "default"),
        "settle": lambda: Run.objects.held(run).complete("null"),
    }[what]
    with connection.execute_wrapper(note), connection.cursor() as cursor:
        work()
        for sql, params in seen.copy():
            if sql.lstrip().startswith(("SELECT", "WITH", "UPDATE", "DELETE")):
                cursor.execute(f"EXPLAIN {sql}", params)
                plan = "\n".join(row[0] for row in cursor.fetchall())
                assert "Seq Scan on django_jobs_" not in plan, plan
