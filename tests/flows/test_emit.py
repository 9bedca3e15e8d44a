import asyncio
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import partial

import pytest
from asgiref.sync import sync_to_async
from django.contrib.auth.models import Group
from django.db import OperationalError, connection, connections, transaction
from django.db.models.signals import post_delete, post_save
from django.test.utils import override_settings

from django_jobs import (
    EventSpec,
    InvalidEvent,
    aemit,
    aemit_many,
    emit,
    emit_many,
    emit_on,
    job,
    on,
    signals,
)
from django_jobs.clock import now
from django_jobs.exceptions import UnknownGate
from django_jobs.models import Event, Run

HOUR = timedelta(hours=1)


@pytest.fixture
def listener():
    @job("listener", on("invoice/paid"))
    def listener(ctx):
        return ctx.event.data

    return listener


# What an emission writes.


def test_an_event_is_kept_and_starts_each_job_that_listens_to_it(jobs, listener):
    job("another", on("invoice/paid"), on("invoice/refunded"))(lambda ctx: None)
    job("deaf", on("invoice/sent"))(lambda ctx: None)

    event = emit("invoice/paid", {"amount": Decimal("9.90")})

    assert {run.job_id for run in event.runs.all()} == {"listener", "another"}
    kept = Event.objects.get()
    assert (kept.pk, kept.name, kept.data, kept.key) == (
        event.pk,
        "invoice/paid",
        {"amount": Decimal("9.90")},
        None,
    )
    assert kept.occurred_at == kept.received_at == now()


def test_the_job_is_given_the_event_as_it_was_emitted(jobs, listener):
    at = datetime(2026, 1, 1, tzinfo=UTC)
    event = emit("invoice/paid", {"at": at, "lines": ({"amount": Decimal("9.90")},)})

    jobs.drain()

    assert event.runs.get().output == {"at": at, "lines": ({"amount": Decimal("9.90")},)}


def test_an_event_that_nobody_listens_to_is_kept_and_starts_nothing(jobs):
    event = emit("invoice/paid")

    assert jobs.emitted("invoice/paid") == [event]
    assert not Run.objects.exists()


def test_one_event_starts_a_job_once_however_many_of_its_triggers_match(jobs):
    job("greedy", on("invoice/paid"), on("invoice/*"), on("invoice/paid", when=lambda event: True))(
        lambda ctx: None
    )

    assert emit("invoice/paid").runs.count() == 1


@pytest.mark.parametrize(
    ("name", "starts"), [("user/left", True), ("user/plan.left", True), ("users/left", False)]
)
def test_a_wildcard_listens_to_all_that_begins_like_it(name, starts, jobs):
    job("listener", on("user/*"))(lambda ctx: None)

    assert emit(name).runs.exists() is starts


def test_a_rollback_leaves_nothing(jobs, listener):
    with transaction.atomic():
        Group.objects.create(name="Editors")
        emit("invoice/paid")
        transaction.set_rollback(True)

    assert not Group.objects.exists()
    assert not Event.objects.exists()
    assert not Run.objects.exists()
    assert jobs.drain() == 0


def test_priority_and_queue_and_version_of_the_job_are_noted_on_the_run(jobs):
    urgent = {"queue": "mail", "version": "7", "priority": lambda event: event.data["urgency"]}
    job("urgent", on("mail/wanted"), **urgent)(lambda ctx: None)

    run = emit("mail/wanted", {"urgency": 3}).runs.get()

    assert (run.queue, run.version, run.priority) == ("mail", "7", 3)


# When.


def test_when_decides_whether_the_job_starts(jobs):
    job("large", on("invoice/paid", when=lambda event: event.data["amount"] > 10))(lambda ctx: None)

    assert not emit("invoice/paid", {"amount": 10}).runs.exists()
    assert emit("invoice/paid", {"amount": 11}).runs.exists()


def test_a_when_that_raises_leaves_a_skipped_run_with_the_reason_and_disturbs_no_other(jobs, listener):
    job("broken", on("invoice/paid", when=lambda event: event.data["amount"] > 10))(lambda ctx: None)

    event = emit("invoice/paid", {})

    skipped, started = event.runs.get(job_id="broken"), event.runs.get(job_id="listener")
    assert skipped.status == "skipped"
    assert "KeyError" in skipped.reason
    assert "amount" in skipped.reason
    assert skipped.finished_at == now()
    jobs.drain()
    started.refresh_from_db()
    assert started.status == "completed"


def test_a_priority_that_raises_leaves_a_skipped_run_with_the_reason(jobs):
    job("broken", on("invoice/paid"), priority=lambda event: event.data["urgency"])(lambda ctx: None)

    run = emit("invoice/paid").runs.get()

    assert run.status == "skipped"
    assert "KeyError" in run.reason


@pytest.mark.parametrize("priority", ["high", None, 1.5, 2**31, -(2**31) - 1], ids=str)
def test_a_priority_that_is_no_number_to_keep_disturbs_no_other(priority, jobs, listener):
    job("broken", on("invoice/paid"), priority=lambda event: priority)(lambda ctx: None)

    event = emit("invoice/paid")

    assert event.runs.get(job_id="listener").status == "queued"
    broken = event.runs.get(job_id="broken")
    assert broken.status == "skipped"
    assert "priority" in broken.reason


def test_a_reason_fits_however_much_the_error_says(jobs):
    def explode(event):
        raise ValueError("no \0 " * 1000)

    job("broken", on("invoice/paid", when=explode))(lambda ctx: None)

    assert emit("invoice/paid").runs.get().reason.startswith("ValueError")


# At.


def test_an_event_of_the_future_holds_its_runs_until_then(jobs, listener):
    event = emit("invoice/paid", at=now() + HOUR)
    run = event.runs.get()
    assert (run.status, run.wake_at, event.occurred_at) == ("queued", now() + HOUR, now() + HOUR)

    jobs.advance(HOUR / 2)
    run.refresh_from_db()
    assert run.status == "queued"

    jobs.advance(HOUR / 2)
    run.refresh_from_db()
    assert run.status == "completed"


def test_an_event_of_the_past_starts_its_runs_now(jobs, listener):
    event = emit("invoice/paid", at=now() - HOUR)

    assert event.occurred_at == now() - HOUR
    assert event.runs.get().wake_at == now()


# Key.


def test_the_second_event_with_a_key_gives_back_the_first_and_starts_nothing(jobs, listener):
    first = emit("invoice/paid", {"n": 1}, key="7")
    second = emit("invoice/paid", {"n": 2}, key="7")

    assert second == first
    assert second.data == {"n": 1}
    assert Event.objects.count() == Run.objects.count() == 1


def test_a_key_belongs_to_a_name(jobs):
    assert emit("invoice/paid", key="7") != emit("invoice/sent", key="7")
    assert emit("invoice/paid", key="7") != emit("Invoice/paid", key="7")
    assert emit("invoice/paid", key="a") != emit("invoice/paid", key="A")
    assert emit("invoice/paid") != emit("invoice/paid")


def test_a_key_counts_within_one_call_too(jobs, listener):
    specs = [EventSpec("invoice/paid", {"n": n}, key="7" if n % 2 else None) for n in range(4)]

    events = emit_many(specs)

    assert events[1] == events[3]
    assert [event.data["n"] for event in events] == [0, 1, 2, 1]
    assert Event.objects.count() == Run.objects.count() == 3


def test_when_its_period_is_over_a_key_may_be_used_again(jobs, listener):
    first = emit("invoice/paid", {"n": 1}, key="7")
    jobs.advance(timedelta(hours=24) - timedelta(seconds=1))
    assert emit("invoice/paid", {"n": 2}, key="7") == first

    jobs.advance(timedelta(seconds=1))
    second = emit("invoice/paid", {"n": 3}, key="7")

    assert second != first
    assert second.data == {"n": 3}
    assert second.runs.count() == 1
    assert emit("invoice/paid", {"n": 4}, key="7") == second


def test_the_period_of_a_key_is_a_setting_and_may_pass_many_times(jobs):
    with override_settings(DJANGO_JOBS={"EVENT_KEY_HOURS": 1}):
        seen = []
        for _ in range(4):
            seen.append(emit("invoice/paid", key="7"))
            jobs.advance(HOUR)

    assert len({event.pk for event in seen}) == 4


def test_the_new_event_of_an_old_key_is_one_within_one_call(jobs, listener):
    emit("invoice/paid", key="7")
    jobs.advance(timedelta(hours=25))

    one, other = emit_many([EventSpec("invoice/paid", key="7"), EventSpec("invoice/paid", key="7")])

    assert one == other
    assert one.runs.count() == 1


@pytest.mark.django_db(transaction=True)
def test_of_many_emitters_with_one_key_at_once_one_emits(listener, at_once):
    for number in range(5):
        events = at_once(lambda number=number: emit("invoice/paid", {}, key=f"key-{number}"))
        assert len({event.pk for event in events}) == 1
        assert events[0].runs.count() == 1


def test_a_key_used_for_years_stays_with_its_latest_event_alone(jobs):
    for _ in range(5):
        latest = emit("report/wanted", key="daily")
        jobs.advance(timedelta(hours=25))

    assert Event.objects.filter(key="daily").count() == 5
    assert Event.objects.get(digest__isnull=False) == latest


def test_pruning_the_old_events_of_a_key_does_not_free_it(jobs):
    for _ in range(3):
        latest = emit("report/wanted", key="daily")
        jobs.advance(timedelta(hours=25))
    jobs.advance(timedelta(hours=-2))
    Event.objects.exclude(pk=latest.pk).delete()

    assert emit("report/wanted", key="daily") == latest


def test_only_the_keys_that_are_over_change_hands_in_one_call(jobs, listener):
    old = emit_many([EventSpec("invoice/paid", {"n": n}, key=f"old-{n}") for n in range(3)])
    jobs.advance(timedelta(hours=24))
    young = emit("invoice/paid", {"n": 3}, key="young")

    keys = ["old-0", "young", None, "new", "old-2", "old-0"]
    events = emit_many([EventSpec("invoice/paid", {"n": 10 + n}, key=key) for n, key in enumerate(keys)])

    assert [event.data["n"] for event in events] == [10, 3, 12, 13, 14, 10]
    assert [event.runs.count() for event in events] == [1] * 6
    assert events[1] == young
    kept = Event.objects.filter(key__in=["old-0", "old-1", "old-2"], digest__isnull=False)
    assert set(kept) == {events[0], old[1], events[4]}


def test_a_rolled_back_emission_leaves_the_key_where_it_was(jobs, listener):
    first = emit("invoice/paid", {"n": 1}, key="7")
    jobs.advance(timedelta(hours=24))
    with transaction.atomic():
        assert emit("invoice/paid", {"n": 2}, key="7") != first
        transaction.set_rollback(True)

    assert Event.objects.get(digest__isnull=False) == first
    third = emit("invoice/paid", {"n": 3}, key="7")
    assert third.data == {"n": 3}
    assert emit("invoice/paid", {"n": 4}, key="7") == third


def test_a_key_whose_event_is_pruned_between_two_looks_is_free(jobs, listener):
    first = emit("invoice/paid", {"n": 1}, key="7")
    pruned = []

    def prune_before_the_look(execute, sql, params, many, context):
        if not pruned and sql.startswith("SELECT") and "django_jobs_event" in sql:
            pruned.append(True)
            Run.objects.all().delete()
            first.delete()
        return execute(sql, params, many, context)

    with connection.execute_wrapper(prune_before_the_look):
        second = emit("invoice/paid", {"n": 2}, key="7")

    assert pruned
    assert Event.objects.get() == second
    assert second.runs.get().status == "queued"


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("threads", [2, 8])
def test_of_many_emitters_at_once_after_the_period_one_emits(threads, jobs, listener, at_once):
    for number in range(3):
        key = f"key-{number}"
        first = emit("invoice/paid", key=key)
        jobs.advance(timedelta(hours=25))

        events = at_once(lambda key=key: emit("invoice/paid", key=key), threads)

        [second] = {event.pk for event in events}
        assert second != first.pk
        assert Event.objects.filter(key=key).count() == Run.objects.filter(event__key=key).count() == 2
        assert events[0].runs.count() == 1


@pytest.mark.django_db(transaction=True)
def test_of_many_callers_at_once_in_transactions_of_their_own_one_emits(jobs, listener, at_once):
    first = emit("invoice/paid", key="7")
    jobs.advance(timedelta(hours=25))

    def call():
        with transaction.atomic():
            return emit("invoice/paid", key="7")

    events = at_once(lambda: again_after_a_deadlock(call))

    assert len({event.pk for event in events} - {first.pk}) == 1
    assert first not in events
    assert Run.objects.count() == 2


@pytest.mark.django_db(transaction=True)
@pytest.mark.only_on("postgresql", "mysql")
def test_when_the_first_of_two_emitters_rolls_back_the_other_has_the_key(jobs, listener, at_once):
    first = emit("invoice/paid", {"n": 1}, key="7")
    jobs.advance(timedelta(hours=25))
    fates = ["rolls back", "commits"]

    def call(fate):
        with transaction.atomic():
            emit("invoice/paid", {"n": fate}, key="7")
            transaction.set_rollback(fate == "rolls back")

    at_once(lambda: again_after_a_deadlock(partial(call, fates.pop())), 2)

    second = Event.objects.get(digest__isnull=False)
    assert second.data == {"n": "commits"}
    assert set(Event.objects.all()) == {first, second}
    assert second.runs.count() == 1


def again_after_a_deadlock(work):
    """Begin again as a caller on MariaDB has to; elsewhere there is no deadlock."""
    while True:
        try:
            return work()
        except OperationalError:
            assert connection.vendor == "mysql"


@pytest.mark.django_db(transaction=True)
@pytest.mark.only_on("mysql")
def test_a_key_that_is_taken_and_cannot_be_seen_is_not_taken_for_an_emission(listener, at_once):
    with connection.cursor() as cursor:
        cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
    with transaction.atomic():
        assert not Event.objects.exists()
        [theirs] = at_once(lambda: emit("invoice/paid", key="7"), 1)
        with pytest.raises(OperationalError, match="begin again"):
            emit("invoice/paid", key="7")
        transaction.set_rollback(True)

    assert emit("invoice/paid", key="7") == theirs


# Many, and from async code.


def test_many_events_come_back_in_order_and_each_starts_its_jobs(jobs, listener):
    events = emit_many(EventSpec("invoice/paid", {"n": n}) for n in range(100))

    assert [event.data["n"] for event in events] == list(range(100))
    assert [event.runs.count() for event in events] == [1] * 100


def test_no_events_are_no_events(jobs):
    assert emit_many([]) == []


def test_one_bad_event_of_many_and_none_is_written(jobs):
    with pytest.raises(InvalidEvent):
        emit_many([EventSpec("invoice/paid"), EventSpec("")])

    assert not Event.objects.exists()


@pytest.mark.django_db(transaction=True)
def test_async_code_emits_too(listener):
    async def from_a_view():
        try:
            one = await aemit("invoice/paid", {"n": 1}, key="7")
            two, three = await aemit_many(
                [EventSpec("invoice/paid", {"n": 2}), EventSpec("invoice/paid", key="7")]
            )
            return one, two, three
        finally:
            await sync_to_async(connections.close_all)()

    one, two, three = asyncio.run(from_a_view())

    assert three == one
    assert [event.data["n"] for event in (one, two)] == [1, 2]
    assert Run.objects.count() == 2


# What is refused, before anything is written.


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("",), "empty"),
        (("x" * 256,), "256"),
        (("user/*",), "trigger"),
        ((None,), "str"),
        (("a\nb",), "control"),
        (("a/b", ["list"]), "dict"),
    ],
    ids=["empty", "long", "wildcard", "none", "control", "data"],
)
def test_an_event_that_cannot_be_kept_is_refused(arguments, complaint, jobs):
    with pytest.raises(InvalidEvent, match=complaint):
        emit(*arguments)
    assert not Event.objects.exists()


@pytest.mark.parametrize(
    "key",
    ["", "x" * 256, 7, b"k", "a\0b", "\ud800"],
    ids=["empty", "long", "number", "bytes", "nul", "surrogate"],
)
def test_a_key_that_cannot_be_kept_is_refused(key, jobs):
    with pytest.raises(InvalidEvent, match="key"):
        emit("a/b", key=key)


@pytest.mark.parametrize("at", [datetime(2026, 1, 1), "tomorrow", HOUR], ids=["naive", "text", "span"])
def test_a_time_that_is_none_is_refused(at, jobs):
    with pytest.raises(InvalidEvent, match="aware datetime"):
        emit("a/b", at=at)


def test_data_that_is_not_json_is_refused_with_the_event_and_the_path(jobs):
    with pytest.raises(TypeError, match=r'event "a/b": \.items\[1\]\.who is .*Group.*primary key'):
        emit("a/b", {"items": [{}, {"who": Group(name="x")}]})
    assert not Event.objects.exists()


def test_data_over_the_size_limit_is_refused_with_the_setting_to_raise(jobs):
    with override_settings(DJANGO_JOBS={"MAX_EVENT_BYTES": 100}):
        emit("a/b", {"text": "x" * 80})
        with pytest.raises(ValueError, match="MAX_EVENT_BYTES"):
            emit("a/b", {"text": "é" * 50})
    assert Event.objects.count() == 1


def test_a_gate_that_nobody_defines_is_an_error_and_not_off(jobs):
    job("misspelt", on("a/b"), gate="paymnt.enabled")(lambda ctx: None)

    with pytest.raises(UnknownGate, match="paymnt"):
        emit("a/b")


# By signal.


def test_sending_the_signal_is_emitting(jobs, listener):
    [(_, event)] = signals.event.send("a view", name="invoice/paid", data={"n": 1}, key="7")

    assert Event.objects.get() == event
    assert event.key == "7"
    assert event.runs.count() == 1


@pytest.fixture
def bridged():
    bridges = []

    def bridge(signal, name, **options):
        bridges.append((signal, options["sender"], emit_on(signal, name, **options)))

    yield bridge
    for signal, sender, receiver in bridges:
        signal.disconnect(receiver, sender=sender)


def test_a_signal_of_django_emits_in_the_transaction_it_was_sent_in(jobs, bridged):
    bridged(post_delete, "group/deleted", sender=Group, data=lambda instance: {"name": instance.name})
    group = Group.objects.create(name="Editors")
    with transaction.atomic():
        Group.objects.get().delete()
        transaction.set_rollback(True)
    assert jobs.emitted("group/deleted") == []

    group.delete()

    assert [event.data for event in jobs.emitted("group/deleted")] == [{"name": "Editors"}]


def test_a_bridge_may_choose_by_when_and_give_a_key(jobs, bridged):
    bridged(
        post_save,
        "group/created",
        sender=Group,
        when=lambda created: created,
        data=lambda instance, **rest: {"name": instance.name, "raw": rest["raw"]},
        key=lambda instance: f"group:{instance.pk}",
    )

    group = Group.objects.create(name="Editors")
    group.save()

    [event] = jobs.emitted("group/created")
    assert event.data == {"name": "Editors", "raw": False}
    assert event.key == f"group:{group.pk}"


def test_receivers_hear_of_events_and_runs_after_the_commit_and_cannot_break_it(
    jobs, listener, django_capture_on_commit_callbacks
):
    heard = []

    def hear(sender, **news):
        heard.append(news.get("event") or news.get("run"))
        raise ValueError("a receiver with a bug")

    signals.event_received.connect(hear)
    signals.run_queued.connect(hear)
    try:
        with django_capture_on_commit_callbacks(execute=True):
            event = emit("invoice/paid")
            assert heard == []
    finally:
        signals.event_received.disconnect(hear)
        signals.run_queued.disconnect(hear)

    assert heard == [event, event.runs.get()]
