"""Signals: emission by signal, both ways, and news that can neither lie nor break anything."""

import logging

import pytest
from django.contrib.auth.models import Group
from django.db import transaction
from django.db.models.signals import post_delete, post_save
from django.dispatch import Signal

from django_jobs import InvalidEvent, NonRetriableError, emit, emit_on, job, on, signals
from django_jobs.models import Event, Run

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("bare_registry")]

happened = Signal()


@pytest.fixture
def bridge():
    """``emit_on``, undone at the end of the test."""
    made = []

    def build(signal, name, **options):
        receiver = emit_on(signal, name, **options)
        made.append((signal, receiver, options.get("sender")))
        return receiver

    yield build
    for signal, receiver, sender in made:
        signal.disconnect(receiver, sender=sender)


@pytest.fixture
def heard():
    """Listen to a signal and keep what it says; undone at the end of the test."""
    made = []

    def listen(signal):
        news = []

        def receiver(sender, **said):
            news.append(said | {"sender": sender})

        signal.connect(receiver, weak=False)
        made.append((signal, receiver))
        return news

    yield listen
    for signal, receiver in made:
        signal.disconnect(receiver)


def names():
    return list(Event.objects.order_by("id").values_list("name", flat=True))


# In: the event signal.


def test_sending_the_event_signal_is_emitting():
    @job("greet", on("user/signed.up"))
    def greet(ctx):
        pass

    signals.event.send("anybody", name="user/signed.up", data={"user_id": 7}, key="signup:7")

    event = Event.objects.get()
    assert (event.name, event.data, event.key) == ("user/signed.up", {"user_id": 7}, "signup:7")
    assert [run.job_id for run in event.runs.all()] == ["greet"]


def test_an_event_sent_by_signal_needs_no_data():
    signals.event.send("anybody", name="user/signed.up")
    assert Event.objects.get().data == {}


def test_the_receiver_answers_with_the_event():
    [(_, event)] = signals.event.send("anybody", name="user/signed.up")
    assert event == Event.objects.get()


def test_an_event_that_cannot_be_is_refused_to_who_sends_it():
    with pytest.raises(InvalidEvent):
        signals.event.send("anybody", name="")


def test_sent_robustly_a_refusal_comes_back_as_the_answer():
    [(_, answer)] = signals.event.send_robust("anybody", name="")
    assert isinstance(answer, InvalidEvent)
    assert names() == []


# In: any Django signal.


def test_a_bridged_signal_emits_with_what_its_functions_take_from_it(bridge):
    bridge(
        post_delete,
        "group/deleted",
        sender=Group,
        data=lambda instance: {"name": instance.name},
        key=lambda instance: f"group:{instance.name}",
    )
    Group.objects.create(name="staff").delete()

    event = Event.objects.get()
    assert (event.name, event.data, event.key) == ("group/deleted", {"name": "staff"}, "group:staff")


def test_a_bridge_without_data_emits_an_event_without(bridge):
    bridge(happened, "it/happened")
    happened.send("anybody", what="it")
    assert Event.objects.get().data == {}


def test_the_functions_of_a_bridge_may_take_everything_some_of_it_or_nothing(bridge):
    bridge(happened, "all/taken", data=lambda **said: {"keys": sorted(said)})
    bridge(happened, "some/taken", data=lambda what, sender: {"what": what, "sender": sender})
    bridge(happened, "none/taken", data=lambda: {"fixed": True})

    happened.send("somebody", what="it", where="here")

    assert {event.name: event.data for event in Event.objects.all()} == {
        "all/taken": {"keys": ["sender", "signal", "what", "where"]},
        "some/taken": {"what": "it", "sender": "somebody"},
        "none/taken": {"fixed": True},
    }


def test_a_bridge_with_when_emits_only_where_it_says_so(bridge):
    bridge(post_save, "group/created", sender=Group, when=lambda created: created)
    group = Group.objects.create(name="staff")
    group.save()
    assert names() == ["group/created"]


def test_a_bridge_hears_its_sender_and_no_other(bridge):
    bridge(happened, "it/happened", sender=Group)
    happened.send(Event)
    assert names() == []
    happened.send(Group)
    assert names() == ["it/happened"]


def test_a_bridged_event_rolls_back_with_the_change_that_caused_it(bridge):
    bridge(post_save, "group/saved", sender=Group, data=lambda instance: {"id": instance.pk})
    with transaction.atomic():
        Group.objects.create(name="staff")
        assert names() == ["group/saved"]
        transaction.set_rollback(True)
    assert names() == []
    assert not Group.objects.exists()


def test_a_bridge_lives_on_without_anybody_holding_it_and_can_be_taken_down(bridge):
    receiver = bridge(happened, "it/happened")
    happened.send("anybody")
    happened.disconnect(receiver)
    happened.send("anybody")
    assert names() == ["it/happened"]


# Out.


def test_news_of_an_event_and_its_run_comes_after_the_commit(heard, django_capture_on_commit_callbacks):
    events, runs = heard(signals.event_received), heard(signals.run_queued)

    @job("greet", on("user/signed.up"))
    def greet(ctx):
        pass

    with django_capture_on_commit_callbacks(execute=True):
        event = emit("user/signed.up")
        assert not events
        assert not runs

    assert [news["event"] for news in events] == [event]
    assert [(news["run"].job_id, news["sender"]) for news in runs] == [("greet", Run)]


def test_what_was_rolled_back_is_no_news(heard, django_capture_on_commit_callbacks):
    events = heard(signals.event_received)
    with django_capture_on_commit_callbacks(execute=True), transaction.atomic():
        emit("user/signed.up")
        transaction.set_rollback(True)
    assert events == []


def test_a_run_is_followed_from_its_start_to_its_end(heard, jobs):
    queued, started = heard(signals.run_queued), heard(signals.run_started)
    steps, finished = heard(signals.step_finished), heard(signals.run_finished)

    @job("greet")
    def greet(ctx):
        return ctx.step.run("say", lambda: "hello")

    run = jobs.run(greet)

    assert [news["run"].pk for news in (*queued, *started, *finished)] == [run.pk] * 3
    assert [(news["run"].pk, news["step"].name, news["step"].status) for news in steps] == [
        (run.pk, "say", "completed")
    ]
    assert (finished[0]["run"].status, finished[0]["run"].output) == ("completed", "hello")


def test_a_receiver_that_raises_breaks_neither_the_run_nor_the_other_receivers(heard, jobs):
    def broken(sender, **news):
        raise RuntimeError("a receiver's own mistake")

    signals.run_finished.connect(broken, weak=False)
    finished = heard(signals.run_finished)

    @job("greet")
    def greet(ctx):
        return "hello"

    try:
        run = jobs.run(greet)
    finally:
        signals.run_finished.disconnect(broken)

    assert (run.status, run.output) == ("completed", "hello")
    assert [news["run"].pk for news in finished] == [run.pk]


# The log.


def test_a_failed_run_is_logged_as_an_error_with_what_it_was(jobs, caplog):
    @job("greet")
    def greet(ctx):
        raise NonRetriableError("nobody is there")

    with caplog.at_level(logging.INFO, logger="django_jobs"):
        run = jobs.run(greet)

    [record] = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert record.getMessage() == f"greet failed: NonRetriableError: nobody is there (run {run.pk})"
    assert (record.run_id, record.job_id) == (str(run.pk), "greet")


def test_the_log_tells_of_a_good_run_without_its_data(jobs, caplog):
    @job("greet")
    def greet(ctx):
        return "a secret answer"

    with caplog.at_level(logging.DEBUG, logger="django_jobs"):
        run = jobs.run(greet, {"password": "a secret"})

    said = [record.getMessage() for record in caplog.records if record.name.startswith("django_jobs")]
    assert said == [f"greet started (run {run.pk})", f"greet completed (run {run.pk})"]
