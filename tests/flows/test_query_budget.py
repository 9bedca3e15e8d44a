"""The table of statements in DESIGN section 5, on every database, with BEGIN and COMMIT counted."""

from datetime import timedelta

import pytest
from django.db import connection, transaction

from django_jobs import (
    Batch,
    Concurrency,
    Debounce,
    Idempotency,
    RateLimit,
    Singleton,
    Throttle,
    emit,
    emit_many,
    job,
    on,
)
from django_jobs.events import EventSpec
from django_jobs.executor import execute
from django_jobs.models import Attempt, Run, Step
from tests.statements import BEGIN, COMMIT, claimed, reading_the_event, statements, statements_of_a_pass

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def five_steps():
    @job("five-steps")
    def five_steps(ctx):
        for number in range(5):
            ctx.step.run("step", int, number)

    return five_steps


# Emit.


def in_a_transaction(work):
    with transaction.atomic():
        return statements(work)


def test_an_event_that_nobody_listens_to_is_one_statement():
    assert in_a_transaction(lambda: emit("a/b", {"x": 1})) == ["INSERT"]


@pytest.mark.parametrize("listeners", [1, 5])
def test_emit_is_two_statements_in_the_callers_transaction_however_many_jobs_match(listeners):
    for number in range(listeners):
        job(f"listener-{number}", on("a/b"))(lambda ctx: None)

    assert in_a_transaction(lambda: emit("a/b", {"x": 1})) == ["INSERT", "INSERT"]
    assert Run.objects.count() == listeners


def test_emit_with_a_new_key_is_two_statements():
    job("listener", on("a/b"))(lambda ctx: None)

    assert in_a_transaction(lambda: emit("a/b", key="k")) == ["INSERT", "INSERT"]


def test_emit_with_a_key_seen_before_reads_the_first_event():
    job("listener", on("a/b"))(lambda ctx: None)
    emit("a/b", key="k")

    assert in_a_transaction(lambda: emit("a/b", key="k")) == ["INSERT", "SELECT"]


def test_emit_with_a_key_whose_period_is_over_takes_it_from_the_first_event(jobs):
    job("listener", on("a/b"))(lambda ctx: None)
    for _ in range(3):
        emit("a/b", key="k")
        jobs.advance(timedelta(hours=25))

    taking_over = in_a_transaction(lambda: emit("a/b", key="k"))

    assert taking_over == ["INSERT", "SELECT", "UPDATE", "INSERT", "INSERT"]


def test_many_events_are_two_statements():
    job("listener", on("a/b"))(lambda ctx: None)
    specs = [EventSpec("a/b", {"n": number}, key=f"k{number}") for number in range(10)]

    assert in_a_transaction(lambda: emit_many(specs)) == ["INSERT", "INSERT"]


def test_starting_a_job_is_two_statements(five_steps):
    assert in_a_transaction(five_steps.start) == ["INSERT", "INSERT"]


def test_emit_brings_its_own_transaction_where_there_is_none():
    job("listener", on("a/b"))(lambda ctx: None)

    assert statements(lambda: emit("a/b")) == [BEGIN, "INSERT", "INSERT", COMMIT]


# Claim.


@pytest.mark.parametrize("waiting", [1, 7])
def test_a_batch_of_runs_is_claimed_in_one_statement(waiting, five_steps):
    for _ in range(waiting + 1):
        five_steps.start()
    Run.objects.claim(1, jobs=["five-steps"])  # MariaDB has looked for the priorities in use then.

    claim = statements(lambda: Run.objects.claim(10, jobs=["five-steps"]))

    in_one = {"postgresql": ["WITH"], "sqlite": ["WITH"], "mysql": [BEGIN, "SELECT", "UPDATE", COMMIT]}
    assert claim == in_one[connection.vendor]


# A pass.


def test_a_run_of_five_steps_is_at_most_one_read_five_checkpoints_and_one_settle(five_steps):
    assert statements_of_a_pass(five_steps) == [*reading_the_event(), *["INSERT"] * 5, "UPDATE"]


def test_a_run_without_steps_is_at_most_one_read_and_one_settle():
    nothing = job("nothing")(lambda ctx: None)

    assert statements_of_a_pass(nothing) == [*reading_the_event(), "UPDATE"]


def test_a_large_event_is_read_by_the_worker_and_not_carried_by_the_claim():
    seen = []
    keeps = job("keeps")(lambda ctx: seen.append(ctx.event.data))

    assert statements_of_a_pass(keeps, {"text": "x" * 10_000}) == ["SELECT", "UPDATE"]
    assert seen == [{"text": "x" * 10_000}]


def test_a_first_time_step_is_a_single_statement_with_no_transaction_around_it():
    during = []

    @job("one-step")
    def one_step(ctx):
        during.extend(statements(lambda: ctx.step.run("one", int)))

    statements_of_a_pass(one_step)

    assert during == ["INSERT"]


def test_a_replayed_step_is_no_statement():
    during = []

    @job("replays")
    def replays(ctx):
        during[:] = statements(lambda: [ctx.step.run("step", int, number) for number in range(20)])
        ctx.step.sleep("nap", timedelta(0))
        if ctx.attempt == 0:
            raise ValueError("Once more.")

    execute(claimed(replays))
    Run.objects.update(wake_at="2020-01-01T00:00Z")
    [run] = Run.objects.claim(1, jobs=["replays"])
    again = statements(lambda: execute(run))

    assert during == []
    assert again == ["SELECT", "UPDATE"]


def test_a_sleep_is_one_checkpoint_and_one_settle_and_waking_up_is_one_more():
    @job("naps")
    def naps(ctx):
        ctx.step.sleep("nap", timedelta(hours=1))

    assert statements_of_a_pass(naps) == [*reading_the_event(), "INSERT", "UPDATE"]

    Run.objects.update(wake_at="2020-01-01T00:00Z")
    Step.objects.update(wake_at="2020-01-01T00:00Z")
    [run] = Run.objects.claim(1, jobs=["naps"])
    assert statements(lambda: execute(run)) == ["SELECT", "UPDATE", "UPDATE"]


def test_an_atomic_step_is_its_work_and_one_checkpoint_in_one_transaction(rows):
    @job("atomic")
    def atomic(ctx):
        ctx.step.atomic("add", rows.add, "row")

    assert statements_of_a_pass(atomic) == [*reading_the_event(), BEGIN, "INSERT", "INSERT", COMMIT, "UPDATE"]


def test_an_emitting_step_is_the_emission_and_one_checkpoint_in_one_transaction():
    job("listener", on("a/b"))(lambda ctx: None)

    @job("emits")
    def emits(ctx):
        ctx.step.emit("tell", "a/b")

    assert statements_of_a_pass(emits) == [*reading_the_event(), BEGIN, *["INSERT"] * 3, COMMIT, "UPDATE"]


def test_a_failed_attempt_costs_one_short_transaction():
    @job("fails")
    def fails(ctx):
        ctx.step.run("fail", int, "x")

    failed = [BEGIN, "UPDATE", "INSERT", "INSERT", COMMIT]
    assert statements_of_a_pass(fails) == [*reading_the_event(), *failed, "UPDATE"]
    assert Attempt.objects.count() == 1


def test_a_run_that_fails_is_settled_in_one_short_transaction():
    @job("fails", retries=0)
    def fails(ctx):
        raise ValueError("no")

    assert statements_of_a_pass(fails) == [*reading_the_event(), BEGIN, "UPDATE", "INSERT", COMMIT]


# Flow control.

HOUR = timedelta(hours=1)
LOCK = "INSERT"  # of the lanes, or their update: one statement for all of them.


@pytest.mark.parametrize(
    ("policy", "asked"),
    [
        ({"idempotency": Idempotency("n")}, ["SELECT", "UPDATE"]),
        ({"rate_limit": RateLimit(5, HOUR)}, ["SELECT", "UPDATE"]),
        ({"singleton": Singleton()}, ["SELECT", "UPDATE"]),
        ({"throttle": Throttle(5, HOUR)}, ["SELECT", "UPDATE"]),
    ],
    ids=lambda value: next(iter(value)),
)
def test_a_gate_is_one_short_transaction_once_in_the_life_of_a_run(policy, asked):
    """Lock the lanes, read them, note the run, admit it; then the pass as ever."""
    limited = job("limited", **policy)(lambda ctx: None)

    passed = [BEGIN, LOCK, *asked, "UPDATE", COMMIT]
    assert statements_of_a_pass(limited, {"n": 1}) == [*reading_the_event(), *passed, "UPDATE"]


@pytest.mark.parametrize(
    "policy",
    [{"debounce": Debounce(HOUR)}, {"batch": Batch(9, HOUR)}],
    ids=lambda value: next(iter(value)),
)
def test_a_run_that_is_held_back_is_put_back_in_the_same_transaction(policy):
    limited = job("limited", **policy)(lambda ctx: None)

    held = [BEGIN, LOCK, "SELECT", "UPDATE", "UPDATE", COMMIT]
    assert statements_of_a_pass(limited) == [*reading_the_event(), *held]


@pytest.mark.parametrize("scope", ["run", "step"])
def test_a_place_is_one_short_transaction_and_a_look_at_the_line_afterwards(scope):
    """Lock the lane, read its seats and its line, sit down, go; after the end see whether anyone waits."""
    limited = job("limited", concurrency=Concurrency(3, scope=scope))(lambda ctx: None)

    seated = [BEGIN, LOCK, "SELECT", "SELECT", "INSERT", "UPDATE", COMMIT]
    line = ["SELECT"] if scope == "run" else ["SELECT", "SELECT"]
    assert statements_of_a_pass(limited) == [*reading_the_event(), *seated, "UPDATE", *line]


def test_a_run_that_wakes_up_keeps_its_place_with_one_statement():
    @job("limited", concurrency=Concurrency(3))
    def limited(ctx):
        ctx.step.sleep("nap", HOUR)

    statements_of_a_pass(limited)
    Run.objects.update(wake_at="2020-01-01T00:00Z")
    Step.objects.update(wake_at="2020-01-01T00:00Z")
    [run] = Run.objects.claim(1, jobs=["limited"])

    # Its history, its place, the end of the nap, the end of the run, and the line.
    assert statements(lambda: execute(run)) == ["SELECT", "UPDATE", "UPDATE", "UPDATE", "SELECT"]


def test_a_run_that_finds_a_lane_full_is_put_in_line_and_looks_once_more():
    @job("limited", concurrency=Concurrency(1))
    def limited(ctx):
        ctx.step.sleep("nap", HOUR)

    statements_of_a_pass(limited)

    full = [BEGIN, LOCK, "SELECT", "SELECT", "UPDATE", COMMIT, "SELECT"]
    assert statements_of_a_pass(limited) == [*reading_the_event(), *full]
