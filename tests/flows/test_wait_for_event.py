"""A run waits for an event, wherever it stands when that comes."""

import asyncio
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from threading import Event as Flag
from threading import Thread
from uuid import UUID

import pytest
from django.contrib.auth.models import Group
from django.db import connection, transaction

from django_jobs import EventSpec, NonRetriableError, emit, emit_many, job, on, passes, routing, services
from django_jobs.executor import execute
from django_jobs.models import Delivery, Event, Listener, Run, RunStatus

DAY = timedelta(days=1)
MOMENT = timedelta(microseconds=1)


@pytest.fixture
def order():
    @job("order", on("order/placed"))
    def order(ctx):
        paid = ctx.step.wait_for_event("payment", "order/paid", match="id", timeout=3 * DAY)
        return paid and paid.data["amount"]

    return order


def the_run(job_id="order"):
    return Run.objects.get(job_id=job_id)


def a_pass(job_id):
    """Let a worker take the job's run up before any router has looked at the events."""
    [run] = Run.objects.claim(1, jobs=[job_id])
    execute(run)


def waiting_for(given, name="waits", **options):
    """Declare a job that waits for "a/b" and returns what its data has under "n"."""

    @job(name, on("a/begun"))
    def waits(ctx):
        event = ctx.step.wait_for_event("event", "a/b", **{"timeout": DAY, "match": given} | options)
        return event and event.data.get("n")

    return waits


def test_a_run_sleeps_until_its_event_comes_and_goes_on_with_it(order, jobs):
    emit("order/placed", {"id": 7})
    jobs.drain()
    assert (the_run().status, the_run().wake_at) == (RunStatus.SLEEPING, jobs._now + 3 * DAY)

    emit("order/paid", {"id": 8, "amount": 1})
    jobs.drain()
    assert (the_run().status, the_run().passes) == (RunStatus.SLEEPING, 1)

    emit("order/paid", {"id": 7, "amount": 99})
    jobs.drain()
    assert (the_run().status, the_run().output) == (RunStatus.COMPLETED, 99)
    assert not Listener.objects.exists()
    assert not Delivery.objects.exists()


def test_an_event_that_came_before_the_wait_is_not_missed(jobs):
    @job("slow", on("order/placed"))
    def slow(ctx):
        ctx.step.sleep("first", DAY)
        return ctx.step.wait_for_event("payment", "order/paid", match="id", timeout=DAY).data

    emit("order/paid", {"id": 7, "n": "too early"})
    jobs.advance(timedelta(seconds=1))
    emit("order/placed", {"id": 7})
    jobs.drain()
    emit("order/paid", {"id": 7, "n": 1})
    jobs.advance(DAY)

    assert the_run("slow").output == {"id": 7, "n": 1}


def test_of_many_that_came_before_the_wait_the_oldest_is_taken(jobs, monkeypatch):
    monkeypatch.setattr("django_jobs.wanted.PAGE", 2)

    @job("slow", on("a/begun"))
    def slow(ctx):
        ctx.step.sleep("first", DAY)
        wait = ctx.step.wait_for_event
        return [wait("next", "a/b", where=lambda event: event.data["n"] > 3).data["n"] for _ in range(3)]

    emit("a/begun")
    for n in range(9):
        if n % 3 == 0:  # Some in the same instant.
            jobs.advance(MOMENT)
        emit("a/b", {"n": n})
    jobs.advance(DAY)

    assert the_run("slow").output == [4, 5, 6]


def test_it_is_none_when_nothing_came_in_time(order, jobs):
    emit("order/placed", {"id": 7})
    jobs.advance(3 * DAY)

    assert (the_run().status, the_run().output) == (RunStatus.COMPLETED, None)
    assert not Listener.objects.exists()

    emit("order/paid", {"id": 7, "amount": 99})
    jobs.drain()
    assert the_run().output is None


def test_a_replay_gives_the_same_event(jobs):
    seen = []

    @job("twice", on("order/placed"))
    def twice(ctx):
        seen.append(ctx.step.wait_for_event("payment", "order/paid", timeout=DAY))
        ctx.step.sleep("night", DAY)

    emit("order/placed")
    jobs.drain()
    event = emit("order/paid", {"at": DAY, "who": {1, 2}}, key="k")
    jobs.advance(2 * DAY)

    assert len(seen) == 2
    for one in seen:
        assert isinstance(one, Event)
        for field in ("pk", "name", "data", "key", "occurred_at", "received_at"):
            assert getattr(one, field) == getattr(event, field)


def test_a_run_takes_each_event_once(jobs):
    @job("two", on("a/begun"))
    def two(ctx):
        first = ctx.step.wait_for_event("one", "a/done", timeout=DAY)
        second = ctx.step.wait_for_event("two", "a/done", timeout=DAY)
        return [first.data["n"], second.data["n"]]

    emit("a/begun")
    emit("a/done", {"n": 1})
    jobs.drain()
    assert the_run("two").status == RunStatus.SLEEPING
    emit("a/done", {"n": 2})
    jobs.drain()
    assert the_run("two").output == [1, 2]


def test_two_branches_never_take_the_same_event(jobs):
    @job("fork", on("a/begun"))
    def fork(ctx):
        def branch():
            return ctx.step.wait_for_event("event", "a/done", timeout=DAY).data["n"]

        return ctx.step.parallel(branch, branch, branch)

    emit("a/begun")
    jobs.drain()
    for n in range(3):
        emit("a/done", {"n": n})
    jobs.drain()
    assert sorted(the_run("fork").output) == [0, 1, 2]
    assert not Delivery.objects.exists()


def test_one_event_wakes_all_the_runs_that_wait_for_it(jobs):
    waits = waiting_for(None)
    runs = [waits.start() for _ in range(5)]
    jobs.drain()
    emit("a/b", {"n": 1})
    jobs.drain()
    assert [run.output for run in Run.objects.filter(pk__in=[run.pk for run in runs])] == [1] * 5


# What is taken for the same.

SAME = {
    "int": (7, 7),
    "large int": (2**60, 2**60),
    "negative": (-1, -1),
    "int as float": (7, 7.0),
    "float": (7.5, 7.5),
    "bool": (True, True),
    "null": (None, None),
    "text": ("user@example.com", "user@example.com"),
    "empty text": ("", ""),
    "odd text": ("ж 'x' \"y\" \\ %s {0}", "ж 'x' \"y\" \\ %s {0}"),
    "text like JSON": ("true", "true"),
    "decimal": (Decimal("9.90"), Decimal("9.9")),
    "whole decimal": (Decimal("1E+2"), Decimal("100")),
    "long decimal": (Decimal("0." + "1" * 40), Decimal("0." + "1" * 40)),
    "instant": (
        datetime(2026, 5, 4, 12, tzinfo=UTC),
        datetime(2026, 5, 4, 14, tzinfo=timezone(timedelta(hours=2))),
    ),
    "end of the calendar": (datetime.max.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)),
    "date": (date(2026, 5, 4), date(2026, 5, 4)),
    "uuid": (UUID(int=7), UUID(int=7)),
    "bytes": (b"\0\xff", b"\0\xff"),
    "dict": ({"a": 1, "bb": [2, 3.0]}, {"bb": [2.0, 3], "a": 1}),
    "list": ([1, "2"], [1, "2"]),
    "tuple": ((1, 2), (1, 2)),
    "set": ({1, 2, 3}, {3, 2, 1}),
}

OTHER = {
    "text for int": (7, "7"),
    "bool for int": (1, True),
    "bool for zero": (0, False),
    "text for null": (None, "null"),
    "text for bool": (True, "true"),
    "nothing for null": (None, {}),
    "decimal for int": (1, Decimal(1)),
    "case": ("a", "A"),
    "space at the end": ("a", "a "),
    "text for uuid": (UUID(int=7), str(UUID(int=7))),
    "text for instant": (datetime(2026, 5, 4, tzinfo=UTC), "2026-05-04T00:00:00+00:00"),
    "naive for aware": (datetime(2026, 5, 4, tzinfo=UTC), datetime(2026, 5, 4)),
    "list for tuple": ((1, 2), [1, 2]),
    "order": ([1, 2], [2, 1]),
    "next large int": (2**60, 2**60 + 1),
    "next long decimal": (Decimal("0." + "1" * 40), Decimal("0." + "1" * 39 + "2")),
}

WHEN = pytest.mark.parametrize("early", [True, False], ids=["looked back for", "routed"])


def outcome_of(jobs, waits, begun, came, *, early):
    """Start the job and let the event come, before its wait is written or after; return what it waited for."""
    run = waits.start(begun)
    if early:
        while routing.route():
            pass
        emit("a/b", {**came, "n": 1})
        while routing.route():  # By now nobody listens.
            pass
    jobs.drain()
    if not early:
        emit("a/b", {**came, "n": 1})
        jobs.drain()
    jobs.travel_to(jobs._now + DAY)
    run.refresh_from_db()
    assert run.status == RunStatus.COMPLETED, run.error
    return run.output


@WHEN
@pytest.mark.parametrize(("wanted", "came"), SAME.values(), ids=SAME)
def test_what_is_equal_matches(wanted, came, early, jobs):
    waits = waiting_for("x.of")
    assert outcome_of(jobs, waits, {"x": {"of": wanted}}, {"x": {"of": came}}, early=early) == 1


@WHEN
@pytest.mark.parametrize(("wanted", "came"), OTHER.values(), ids=OTHER)
def test_what_is_not_equal_does_not_match(wanted, came, early, jobs):
    waits = waiting_for("x.of")
    data = {"x": {} if came == {} else {"of": came}}
    assert outcome_of(jobs, waits, {"x": {"of": wanted}}, data, early=early) is None


@WHEN
@pytest.mark.parametrize(("wanted", "came"), [*SAME.values()][:8], ids=[*SAME][:8])
def test_a_value_may_be_given_in_place_of_a_path(wanted, came, early, jobs):
    waits = waiting_for({"x.of": wanted, "y": "z"})
    assert outcome_of(jobs, waits, {}, {"x": {"of": came}, "y": "z"}, early=early) == 1


@WHEN
def test_all_of_several_values_must_be_there(early, jobs):
    waits = waiting_for({"x": 1, "y": 2})
    assert outcome_of(jobs, waits, {}, {"x": 1, "y": 3}, early=early) is None


ODD_KEYS = [
    "first name",
    " ",
    "2024",
    "0",
    "100%",
    "%20",
    "%s",
    "%(x)s",
    "ключ",
    "it's",
    'say "hi"',
    "$id",
    "a\\b",
    "[0]",
    "*",
    "select",
    "a-b",
    "a\tb",
    "x" * 240,
]


@WHEN
@pytest.mark.parametrize("key", ODD_KEYS)
def test_a_path_may_go_through_any_key_that_has_no_dot(key, early, jobs):
    waits = waiting_for(f"at.{key}")
    assert outcome_of(jobs, waits, {"at": {key: 7}}, {"at": {key: 7}}, early=early) == 1


@WHEN
def test_a_path_that_an_event_lacks_or_that_ends_in_a_value_does_not_match(early, jobs):
    waits = waiting_for("x.y.z")
    for came in ({}, {"x": 7}, {"x": {"y": 7}}, {"x": {"y": [7]}}, {"x": {"y": {"z": None}}}):
        assert outcome_of(jobs, waits, {"x": {"y": {"z": 7}}}, came, early=early) is None


def test_listeners_of_one_event_may_look_at_different_paths(jobs):
    by_id, by_user, by_none = (waiting_for(m, f"by-{m}".lower()) for m in ("id", "user", None))
    runs = [one.start({"id": 1, "user": 2}) for one in (by_id, by_user, by_none)]
    jobs.drain()
    emit("a/b", {"id": 1, "n": "id"})
    emit("a/b", {"id": 9, "user": 2, "n": "user"})
    jobs.drain()
    for run in runs:
        run.refresh_from_db()
    assert [run.output for run in runs] == ["id", "user", "id"]


# Where.


def test_where_may_ask_for_more(jobs):
    waits = waiting_for(None, where=lambda event: event.data["n"] > 10)
    run = waits.start()
    jobs.drain()
    for n in (3, 11, 12):
        emit("a/b", {"n": n})
        jobs.drain()
    run.refresh_from_db()
    assert run.output == 11


@pytest.mark.parametrize("taken", [True, False])
def test_each_event_is_asked_about_once_however_many_come_in_vain(taken, jobs):
    asked = []
    waits = waiting_for(None, where=lambda event: asked.append(event.data["n"]) or event.data["n"] > 10)
    waits.start()
    jobs.drain()
    for n in range(10):
        jobs.advance(timedelta(minutes=1))
        emit("a/b", {"n": n})
        jobs.drain()
        assert not Delivery.objects.exists()
    if taken:
        emit("a/b", {"n": 11})
        jobs.drain()
    assert asked == [*range(10), *([11] if taken else [])]


def test_an_error_in_where_is_an_error_of_the_run(jobs):
    run = waiting_for(None, where=lambda event: event.data["no"]).start()
    jobs.drain()
    emit("a/b")
    jobs.advance(DAY / 2)
    run.refresh_from_db()
    assert (run.status, run.error["type"]) == (RunStatus.FAILED, "KeyError")
    assert not Listener.objects.exists()


# The event that started the run.


@pytest.mark.parametrize("routed", ["before the pass", "after it"])
def test_the_event_that_started_the_run_is_not_waited_for(routed, jobs):
    @job("chain", on("a/done"))
    def chain(ctx):
        event = ctx.step.wait_for_event("next", "a/done", timeout=DAY)
        return event and event.data["n"]

    emit("a/done", {"n": 1})
    if routed == "after it":
        a_pass("chain")
    jobs.drain()
    assert the_run("chain").status == RunStatus.SLEEPING
    jobs.advance(DAY)
    assert the_run("chain").output is None


# From when, and until when.


@WHEN
@pytest.mark.parametrize(("at", "counts"), [(-MOMENT, False), (timedelta(0), True), (MOMENT, True)])
def test_an_event_counts_from_the_moment_the_run_was_queued(at, counts, early, jobs):
    waits = waiting_for(None)
    jobs._now += DAY
    queued_at = jobs._now
    run = waits.start()
    if not early:
        a_pass("waits")
    jobs._now = queued_at + at
    emit("a/b", {"n": 1})
    if early:
        while routing.route():
            pass
    jobs._now = queued_at + DAY / 2
    jobs.drain()
    run.refresh_from_db()
    assert (run.output == 1) is counts


@WHEN
@pytest.mark.parametrize("since", [None, "then"])
def test_of_what_comes_in_the_very_moment_the_run_is_queued_that_counts_which_comes_after(since, early, jobs):
    """A clock of tests stands still. Who says since when knows what that means."""

    @job("waits", on("a/begun"))
    def waits(ctx):
        start = since and ctx.event.received_at
        return ctx.step.wait_for_event("event", "a/b", timeout=DAY, since=start).data["n"]

    emit("a/b", {"n": 1})
    emit("a/begun")
    if not early:
        a_pass("waits")
    emit("a/b", {"n": 2})
    while early and routing.route():
        pass
    jobs.drain()
    assert the_run("waits").output == (1 if since else 2)


def test_of_what_is_emitted_together_that_counts_which_comes_after(jobs):
    waiting_for(None)
    emit_many([EventSpec("a/b", {"n": 1}), EventSpec("a/begun"), EventSpec("a/b", {"n": 2})])
    jobs.drain()
    assert the_run("waits").output == 2


@WHEN
@pytest.mark.parametrize(("at", "counts"), [(-MOMENT, True), (timedelta(0), True), (MOMENT, False)])
def test_an_event_counts_until_the_wait_is_over(at, counts, early, jobs):
    run = waiting_for(None).start()
    jobs.drain()
    until = Run.objects.get().wake_at
    jobs._now = until + at
    emit("a/b", {"n": 1})
    if not early:
        while routing.route():
            pass
    jobs._now = max(jobs._now, until)
    a_pass("waits")  # "Looked back for" is here: no router has seen it yet.
    jobs.drain()
    run.refresh_from_db()
    assert (run.status, run.output) == (RunStatus.COMPLETED, 1 if counts else None)


@WHEN
@pytest.mark.parametrize("since", [-DAY, timedelta(0)])
def test_since_says_from_when_on_an_event_counts_instead(since, early, jobs):
    """An emitter whose clock is behind, or one that was before the run, is allowed for in this way."""

    @job("allows", on("a/begun"))
    def allows(ctx):
        event = ctx.step.wait_for_event("event", "a/b", timeout=DAY, since=ctx.event.received_at + since)
        return event and event.data["n"]

    jobs._now += 2 * DAY
    queued_at = jobs._now
    emit("a/begun")
    if not early:
        a_pass("allows")
    jobs._now = queued_at - DAY
    emit("a/b", {"n": 1})
    if early:
        while routing.route():
            pass
    jobs._now = queued_at
    jobs.drain()
    assert the_run("allows").output == (1 if since else None)


def test_since_may_be_later_than_the_run(jobs):
    @job("late", on("a/begun"))
    def late(ctx):
        ctx.step.sleep("night", DAY)
        morning = ctx.step.run("morning", lambda: jobs._now)
        return ctx.step.wait_for_event("event", "a/b", since=morning).data["n"]

    emit("a/begun")
    jobs.drain()
    emit("a/b", {"n": 1})
    jobs.advance(DAY)
    emit("a/b", {"n": 2})
    jobs.drain()
    assert the_run("late").output == 2


def test_since_is_reckoned_once(jobs):
    """Nobody was up for a while, and by the time somebody is, "the last hour" has passed the event."""

    @job("hourly", on("a/begun"))
    def hourly(ctx):
        last_hour = jobs._now - timedelta(hours=1)
        return ctx.step.wait_for_event("event", "a/b", since=last_hour, timeout=9 * DAY).data["n"]

    emit("a/begun")
    jobs.drain()
    emit("a/b", {"n": 1})
    jobs._now += DAY
    jobs.drain()
    assert the_run("hourly").output == 1


# Emitted elsewhere.


def test_an_event_that_commits_with_the_row_it_tells_of_in_another_runs_step_is_not_missed(order, jobs, rows):
    def book():
        rows.add("payment")
        emit("order/paid", {"id": 7, "amount": 5})

    @job("books")
    def books(ctx):
        ctx.step.atomic("book", book)

    emit("order/placed", {"id": 7})
    jobs.drain()
    for _ in jobs.crash_everywhere(books):
        pass
    assert the_run().output == 5
    assert rows.names() == ["payment"] * Event.objects.filter(name="order/paid").count()


def test_an_event_that_was_rolled_back_was_never_there(order, jobs):
    emit("order/placed", {"id": 7})
    jobs.drain()
    with pytest.raises(ZeroDivisionError), transaction.atomic():
        Group.objects.create(name="payment 7")
        emit("order/paid", {"id": 7, "amount": 1})
        jobs.drain()
        raise ZeroDivisionError
    jobs.advance(3 * DAY)
    assert (the_run().status, the_run().output) == (RunStatus.COMPLETED, None)


@pytest.mark.django_db(transaction=True)
@pytest.mark.only_on("postgresql", "mysql")  # On SQLite nobody could write the wait meanwhile.
def test_an_event_written_before_the_wait_and_committed_after_it_is_not_missed(order, jobs):
    written, waiting = Flag(), Flag()

    def pay():
        try:
            with transaction.atomic():
                emit("order/paid", {"id": 7, "amount": 99})
                written.set()
                assert waiting.wait(10)
        finally:
            connection.close()

    emit("order/placed", {"id": 7})
    paying = Thread(target=pay)
    paying.start()
    assert written.wait(10)
    jobs.drain()
    assert the_run().status == RunStatus.SLEEPING
    waiting.set()
    paying.join()
    jobs.drain()
    assert the_run().output == 99


# What nobody can wait for.

WRONG = {
    "timeout=5": ({"timeout": 5}, "timeout is a timedelta above zero, not 5"),
    "no timeout": ({"timeout": timedelta(0)}, "timeout is a timedelta above zero"),
    "for ever": ({"timeout": timedelta.max}, "no calendar goes on for 999999999 days"),
    "wildcard": ({"event": "a/*"}, 'Event "a/*": * is for triggers'),
    "no name": ({"event": ""}, "the name is empty"),
    "no str": ({"event": 7}, "an event name is a str"),
    "control character": ({"event": "a\nb"}, "the name contains a control character"),
    "long": ({"event": "a" * 256}, "the name has 256 characters"),
    "reserved": ({"event": "django_jobs/job.started"}, "are the engine's own"),
    "match=7": ({"match": 7}, "match is a dotted path into the data"),
    "empty match": ({"match": ""}, "match is a dotted path into the data"),
    "match={7: 7}": ({"match": {7: 7}}, "match is a dotted path into the data"),
    "NUL in match": ({"match": "a\0"}, "match is a dotted path into the data"),
    "long match": ({"match": {"x" * 256: 1}}, "the paths of match take more than 255 characters"),
    "no JSON": ({"match": {"x": object()}}, "match: .x is an object, which JSON cannot hold"),
    "not there": ({"match": "no"}, 'match: the event that started the run has no "no" in its data'),
    "where": ({"where": "n > 5"}, "where is a plain function of the event, not 'n > 5'"),
    "async where": ({"where": asyncio.sleep}, "where is a plain function of the event"),
    "naive since": ({"since": datetime(2026, 1, 1)}, "since is an aware datetime"),
    "since=5": ({"since": 5}, "since is an aware datetime, not 5"),
}


@pytest.mark.parametrize(("options", "words"), WRONG.values(), ids=WRONG)
def test_a_wrong_argument_fails_the_run_at_once_and_names_the_step(options, words, jobs):
    options = {"event": "a/b", **options}
    run = jobs.run(job("odd")(lambda ctx: ctx.step.wait_for_event("the-step", **options)))
    assert run.status == RunStatus.FAILED
    assert run.error["type"] == NonRetriableError.__name__
    assert run.error["message"].lower().startswith('step "the-step": ')
    assert words in run.error["message"]
    assert not run.steps.exists()


# What goes wrong.


def test_a_worker_may_die_anywhere_in_a_wait(jobs):
    @job("waits")
    def waits(ctx):
        ctx.step.emit("ask", "a/asked", {"id": str(ctx.run_id)})
        event = ctx.step.wait_for_event("reply", "a/replied", match={"id": str(ctx.run_id)}, timeout=DAY)
        nothing = ctx.step.wait_for_event("never", "a/never", timeout=DAY)
        return event.data["id"], nothing

    @job("replies", on("a/asked"))
    def replies(ctx):
        ctx.step.emit("reply", "a/replied", {"id": ctx.event.data["id"]})

    count = 0
    for run in jobs.crash_everywhere(waits):
        count += 1
        assert (run.status, run.output) == (RunStatus.COMPLETED, (str(run.pk), None))
    assert count > 8
    assert not Listener.objects.exists()


def test_what_came_before_the_wait_is_found_though_its_worker_died_before_it_looked_back(jobs, monkeypatch):
    """And though another event was put before the wait meanwhile, which is not the one."""
    waits = waiting_for(None, where=lambda event: event.data["n"] == 1)
    run = waits.start()
    emit("a/b", {"n": 1})
    while routing.route():
        pass

    def die(moment):
        if moment == "after event":
            raise passes.Died(moment)

    monkeypatch.setattr(passes, "boundary", die)
    with pytest.raises(passes.Died):
        a_pass("waits")
    monkeypatch.setattr(passes, "boundary", lambda moment: None)
    emit("a/b", {"n": 2})
    jobs.advance(timedelta(minutes=5))
    run.refresh_from_db()
    assert (run.status, run.output) == (RunStatus.COMPLETED, 1)


def test_a_run_handed_back_in_the_middle_of_a_wait_finds_what_came_before_it(jobs, monkeypatch):
    waits = waiting_for(None)
    run = waits.start()
    emit("a/b", {"n": 1})
    while routing.route():
        pass

    def hand_back(moment):
        if moment == "after event":
            Run.objects.hand_back([(run.pk, Run.objects.get().lease)])
            raise passes.Died(moment)

    monkeypatch.setattr(passes, "boundary", hand_back)
    with pytest.raises(passes.Died):
        a_pass("waits")
    monkeypatch.setattr(passes, "boundary", lambda moment: None)
    jobs.drain()
    run.refresh_from_db()
    assert (run.status, run.output, run.crashes) == (RunStatus.COMPLETED, 1, 0)


def test_a_run_that_waits_for_its_next_try_takes_its_event_then(jobs):
    """It is queued and not asleep: the event does not make the try come sooner."""
    tries = []

    @job("tries", on("a/begun"), backoff=timedelta(hours=1))
    def tries_again(ctx):
        def waits():
            return ctx.step.wait_for_event("event", "a/b", timeout=DAY).data["n"]

        tries.append(jobs._now)
        if len(tries) == 2:
            raise ConnectionError
        return ctx.step.parallel(waits, lambda: ctx.step.sleep("nap", timedelta(minutes=1)))

    emit("a/begun")
    jobs.advance(timedelta(minutes=2))
    assert the_run("tries").status == RunStatus.QUEUED
    emit("a/b", {"n": 1})
    jobs.drain()
    assert len(tries) == 2
    jobs.advance(timedelta(hours=1))
    assert the_run("tries").output == [1, None]


def test_a_failed_run_that_a_person_retries_listens_again(jobs):
    broken = []

    @job("mends", on("a/begun"), retries=0)
    def mends(ctx):
        if broken:
            raise ValueError
        return ctx.step.wait_for_event("event", "a/b", timeout=9 * DAY).data["n"]

    emit("a/begun")
    jobs.drain()
    broken.append("in the next pass")
    Run.objects.update(wake_at=jobs._now)
    jobs.drain()
    assert the_run("mends").status == RunStatus.FAILED
    assert not Listener.objects.exists()

    broken.clear()
    services.retry(the_run("mends"))
    jobs.drain()
    assert the_run("mends").status == RunStatus.SLEEPING
    jobs.advance(DAY)
    emit("a/b", {"n": 1})
    jobs.drain()
    assert the_run("mends").output == 1


ENDS = {
    "cancelled": lambda jobs, flags: services.cancel(Run.objects.get(job_id="order")),
    "skipped": lambda jobs, flags: (
        flags({"order": {"enabled": False}}),
        Run.objects.filter(job_id="order").update(wake_at=jobs._now),
        jobs.drain(),
    ),
    "completed": lambda jobs, flags: jobs.advance(4 * DAY),
}


@pytest.mark.parametrize(("status", "end"), ENDS.items(), ids=ENDS)
def test_a_run_that_has_ended_listens_no_longer(status, end, jobs, flags):
    flags({"order": {"enabled": True}})

    @job("order", on("order/placed"), gate="order.enabled")
    def order(ctx):
        ctx.step.wait_for_event("payment", "order/paid", timeout=3 * DAY)

    emit("order/placed")
    jobs.drain()
    assert Listener.objects.exists()
    end(jobs, flags)
    assert the_run().status == status
    assert not Listener.objects.exists()


def test_pruning_takes_nothing_that_a_run_waits_for_and_is_not_hindered_by_what_it_did(jobs):
    @job("patient", on("a/begun"))
    def patient(ctx):
        both = ctx.step.wait_for_all("both", ["a/one", "a/two"], timeout=200 * DAY)
        return [event.data["n"] for event in both]

    emit("a/begun")
    jobs.drain()
    emit("a/one", {"n": 1})
    jobs.drain()
    jobs.advance(100 * DAY)
    emit("a/nobody")
    unrouted = emit("a/two", {"n": 2})
    jobs._now += 40 * DAY

    services.prune()

    assert set(Event.objects.values_list("name", flat=True)) == {"a/begun", "a/one", "a/two"}
    jobs.drain()
    assert the_run("patient").output == [1, 2]
    jobs.advance(40 * DAY)
    assert services.prune() == {"runs": 1, "events": 3}
    assert not Event.objects.filter(pk=unrouted.pk).exists()


def test_what_was_put_before_a_run_goes_with_it_even_what_came_too_late(jobs):
    run = waiting_for(None).start()
    jobs.drain()
    event = emit("a/b")
    while routing.route():
        pass
    assert Delivery.objects.exists()
    services.cancel(run)
    assert not Delivery.objects.exists()

    Delivery.objects.create(step=run.steps.get(), event=event)  # By a router at just that moment.
    jobs._now += 40 * DAY
    assert services.prune() == {"runs": 1, "events": 2}
    assert not Delivery.objects.exists()


def test_an_async_job_awaits_an_event(jobs):
    @job("awaits", on("a/begun"))
    async def awaits(ctx):
        wait = ctx.step.wait_for_event
        first, second = await asyncio.gather(
            wait("event", "a/b", timeout=DAY), wait("event", "a/c", timeout=DAY)
        )
        return first.data["n"], second

    emit("a/begun")
    jobs.drain()
    emit("a/b", {"n": 1})
    jobs.advance(DAY)
    assert the_run("awaits").output == (1, None)
