"""``services.replay``: a new run for what an old one was for, from the start or from one of its steps."""

from datetime import timedelta
from decimal import Decimal

import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext

from django_jobs import InvalidEvent, JobNotFound, StepError, emit, job, on, registry, services, signals
from django_jobs.exceptions import InvalidVerb
from django_jobs.models import Event, Run, Step

DAY, HOUR = timedelta(days=1), timedelta(hours=1)


@pytest.fixture
def order(ledger, rows):
    """A job with a step of each kind, in order, that tells the ledger each time one really works."""
    job("listener", on("order/packed"))(lambda ctx: None)

    @job("order", on("order/placed"), retries=0)
    def order(ctx):
        item = ctx.event.data["item"]
        price = ctx.step.run("price", lambda: ledger.note(f"price {item}", Decimal("9.50")))
        ctx.step.atomic("book", lambda: ledger.note("book") or rows.add(item))
        try:
            ctx.step.run("gift", lambda: ledger.note("gift") or 1 / 0)
        except StepError:
            pass
        ctx.step.sleep("nap", HOUR)
        ctx.step.emit("tell", "order/packed")
        ctx.step.run("send", ledger.note, f"send {item}")
        return [item, price]

    return order


@pytest.fixture
def placed(order, jobs):
    """A run of that job, over."""
    event = emit("order/placed", {"item": "tea"}, key="order:1")
    jobs.advance(HOUR)
    run = event.runs.get()
    assert (run.status, run.output) == ("completed", ["tea", Decimal("9.50")])
    return run


def finished(jobs, run):
    jobs.drain()
    jobs.advance(DAY)
    run.refresh_from_db()
    return run


def test_everything_runs_again_in_a_new_run_and_the_old_one_stays(placed, jobs, ledger):
    before = Run.objects.filter(pk=placed.pk).values().get()
    steps = list(Step.objects.filter(run=placed).values())
    first, ledger[:] = list(ledger), []

    new = finished(jobs, services.replay(placed))

    assert new.pk != placed.pk
    assert (new.replay_of, new.event, new.job_id) == (placed, placed.event, "order")
    assert (new.status, new.output) == ("completed", placed.output)
    assert ledger == first
    assert Run.objects.filter(pk=placed.pk).values().get() == before
    assert list(Step.objects.filter(run=placed).values()) == steps


def test_from_a_step_on_what_came_before_is_remembered(placed, jobs, ledger, rows):
    ledger.clear()

    new = finished(jobs, services.replay(placed, from_step="tell"))

    assert ledger == ["send tea"]
    assert (new.status, new.output) == ("completed", ["tea", Decimal("9.50")])
    assert rows.names() == ["tea"]
    assert Run.objects.filter(job_id="listener").count() == 2
    old, copied = ([*run.steps.values_list("name", "kind", "status")] for run in (placed, new))
    assert old == copied


def test_copied_checkpoints_are_the_old_ones_to_the_letter(placed):
    new = services.replay(placed, from_step="nap")

    def kept(run):
        steps = run.steps.filter(name__in=["price", "book", "gift"])
        return [{k: v for k, v in step.items() if k not in ("id", "run_id")} for step in steps.values()]

    assert new.steps.count() == 3
    assert kept(new) == kept(placed)


def test_a_slept_sleep_is_not_slept_again(placed, jobs):
    new = services.replay(placed, from_step="send")
    jobs.drain()
    new.refresh_from_db()
    assert new.status == "completed"


def test_from_the_first_step_on_is_from_the_start(placed, jobs, ledger):
    first, ledger[:] = list(ledger), []
    new = services.replay(placed, from_step="price")
    assert not new.steps.exists()
    finished(jobs, new)
    assert ledger == first


def test_a_failed_run_goes_another_way_from_the_step_that_failed(jobs, ledger):
    broken = [True]

    @job("mends", retries=0)
    def mends(ctx):
        ctx.step.run("first", ledger.note, 1)
        ctx.step.run("second", lambda: 1 / 0 if broken else ledger.note(2))

    old = jobs.run(mends)
    broken.clear()
    new = services.replay(old, "second")
    jobs.drain()

    old.refresh_from_db()
    new.refresh_from_db()
    assert (old.status, new.status, ledger) == ("failed", "completed", [1, 2])
    assert not new.attempts.exists()


def test_a_step_that_waited_when_its_run_was_cancelled_works_again(jobs, ledger):
    @job("naps")
    def naps(ctx):
        ctx.step.run("first", ledger.note, 1)
        ctx.step.sleep("nap", DAY)
        ctx.step.run("second", ledger.note, 2)

    old = services.cancel(jobs.run(naps))
    new = services.replay(old, "nap")
    jobs.drain()
    new.refresh_from_db()
    assert (new.status, new.wake_at - new.queued_at) == ("sleeping", DAY)


def test_other_data_takes_the_place_of_the_events_in_the_new_run_alone(placed, jobs, ledger):
    heard = []
    job("also", on("order/placed"))(lambda ctx: heard.append(ctx.event.pk))
    ledger.clear()

    new = finished(jobs, services.replay(placed, data={"item": "rum"}))

    assert new.output == ["rum", Decimal("9.50")]
    assert ledger[0] == "price rum"
    edited, event = new.event, placed.event
    assert edited.data == {"item": "rum"}
    assert (edited.name, edited.key, edited.occurred_at) == (event.name, event.key, event.occurred_at)
    assert edited.edited_from == event.pk
    assert heard == []
    assert [one.pk for one in jobs.emitted("order/placed")] == [event.pk]
    event.refresh_from_db()
    assert event.data == {"item": "tea"}


def test_other_data_with_a_step_reaches_the_steps_that_run_again(placed, jobs, ledger):
    ledger.clear()
    new = finished(jobs, services.replay(placed, from_step="send", data={"item": "rum"}))
    assert ledger == ["send rum"]
    assert new.output == ["rum", Decimal("9.50")]


def test_the_key_of_a_replayed_event_still_keeps_doubles_out(placed):
    services.replay(placed, data={"item": "rum"})
    assert emit("order/placed", {"item": "gin"}, key="order:1").pk == placed.event_id


def test_a_run_started_by_hand_may_be_given_other_data(jobs):
    run = jobs.run(job("echo")(lambda ctx: ctx.event.data), {"a": 1})
    new = services.replay(run, data={"a": 2})
    jobs.drain()
    new.refresh_from_db()
    assert (new.output, new.event.name) == ({"a": 2}, run.event.name)


def test_a_crons_run_keeps_its_slot_and_another_of_the_slot_starts_nothing(jobs):
    from django_jobs import cron, scheduler

    every = cron("0 3 * * *")
    nightly = job("nightly", every)(lambda ctx: [ctx.scheduled_for, ctx.event and ctx.event.data])
    slot = every.next(jobs._now)
    scheduler.fire("nightly", every.key, slot)
    jobs.drain()
    old = Run.objects.get()

    again = services.replay(old)
    told = services.replay(old, data={"force": True})
    jobs.drain()

    assert [Run.objects.get(pk=run.pk).output for run in (again, told)] == [
        [slot, None],
        [slot, {"force": True}],
    ]
    assert scheduler.fire(nightly.id, every.key, slot) is None


def test_a_new_run_is_of_todays_version_and_priority(jobs, monkeypatch):
    old = jobs.run(job("versions", version="1")(lambda ctx: ctx.version))
    monkeypatch.delitem(registry._jobs, "versions")
    job("versions", version="2", priority=lambda event: 7)(lambda ctx: ctx.version)

    new = services.replay(old)
    jobs.drain()

    new.refresh_from_db()
    assert (old.output, new.output, new.version, new.priority) == ("1", "2", "2", 7)


@pytest.mark.parametrize("ending", ["failed", "cancelled", "skipped"])
def test_whatever_has_ended_may_be_replayed(ending, jobs):
    run = job("ends", retries=0)(lambda ctx: 1 / 0).start()
    if ending == "failed":
        jobs.drain()
    elif ending == "cancelled":
        Run.objects.cancel()
    else:
        Run.objects.skip("because")
    assert services.replay(run).status == "queued"
    run.refresh_from_db()
    assert run.status == ending


def test_a_replay_may_be_replayed(placed, jobs, ledger):
    once = finished(jobs, services.replay(placed, "send", data={"item": "rum"}))
    ledger.clear()
    twice = finished(jobs, services.replay(once, "send"))
    assert ledger == ["send rum"]
    assert twice.replay_of == once


# What is refused.


def nothing_new():
    return (Run.objects.count(), Event.objects.count(), Step.objects.count())


@pytest.mark.parametrize("status", ["queued", "sleeping", "running"])
def test_an_open_run_is_not_replayed(status, jobs):
    run = job("naps")(lambda ctx: ctx.step.sleep("nap", DAY)).start()
    if status == "sleeping":
        jobs.drain()
    if status == "running":
        Run.objects.claim(1, jobs=["naps"])
    before = nothing_new()
    with pytest.raises(InvalidVerb, match=f"is {status}; only a run that has ended can be replayed"):
        services.replay(run)
    assert nothing_new() == before


def test_a_step_that_is_not_there_is_refused_with_those_that_are_the_likeliest_first(placed):
    before = nothing_new()
    with pytest.raises(InvalidVerb, match=r'has no step "sent". It has: send, ') as refused:
        services.replay(placed, from_step="sent", data={"item": "rum"})
    assert all(name in str(refused.value) for name in ("price", "book", "gift", "nap"))
    assert nothing_new() == before


def test_of_many_steps_only_the_likeliest_are_named(jobs):
    @job("many")
    def many(ctx):
        for number in range(50):
            ctx.step.run(f"step-{number}", int)

    with pytest.raises(InvalidVerb, match=r"It has: step-49, .* and 40 more\.$"):
        services.replay(jobs.run(many), from_step="step-499")


def test_a_run_without_steps_has_none_to_begin_from(jobs):
    run = jobs.run(job("ends")(lambda ctx: None))
    with pytest.raises(InvalidVerb, match="has no steps to begin from"):
        services.replay(run, from_step="first")


def test_a_job_that_is_gone_or_gated_off_is_not_replayed(jobs, flags, monkeypatch):
    flags({"payment": True})
    run = jobs.run(job("pays", gate="payment")(lambda ctx: None))
    flags({"payment": False})
    with pytest.raises(JobNotFound, match="payment is off"):
        services.replay(run)
    monkeypatch.delitem(registry._jobs, "pays")
    with pytest.raises(JobNotFound):
        services.replay(run)
    assert Run.objects.count() == 1


@pytest.mark.parametrize(("data", "error"), [([1], InvalidEvent), ({"a": object()}, TypeError)])
def test_data_that_cannot_be_is_refused(data, error, placed):
    before = nothing_new()
    with pytest.raises(error):
        services.replay(placed, data=data)
    assert nothing_new() == before


# How.


@pytest.mark.django_db(transaction=True)
def test_a_replay_is_as_many_statements_however_many_steps_are_copied(jobs):
    @job("many")
    def many(ctx):
        for _ in range(ctx.event.data["steps"]):
            ctx.step.run("step", int)
        ctx.step.run("last", int)

    def statements(steps):
        run = jobs.run(many, {"steps": steps})
        with CaptureQueriesContext(connection) as captured:
            new = services.replay(run, from_step="last", data={"steps": steps})
        assert new.steps.count() == steps
        return len([query for query in captured if not query["sql"].startswith("NOTIFY")])

    assert statements(3) == statements(100)


def test_a_replay_is_news(placed, django_capture_on_commit_callbacks):
    heard = []
    hears = {
        signals.run_queued: lambda sender, run, **rest: heard.append(("queued", run.pk)),
        signals.event_received: lambda sender, event, **rest: heard.append("event"),
        signals.admin_action: lambda sender, actor, verb, ids, reason, **rest: heard.append(
            (actor, verb, ids, reason)
        ),
    }
    for signal, receiver in hears.items():
        signal.connect(receiver)
    try:
        with django_capture_on_commit_callbacks(execute=True):
            new = services.replay(placed, data={"item": "rum"}, reason="wrong item", actor="ada")
    finally:
        for signal, receiver in hears.items():
            signal.disconnect(receiver)
    assert heard == [("queued", new.pk), ("ada", "replay", [placed.pk], "wrong item")]


@pytest.mark.django_db(transaction=True)
def test_of_a_retry_and_a_replay_at_once_none_is_half_done(at_once):
    job("fails", retries=0)(lambda ctx: 1 / 0)
    registry.get("fails").start()
    [run] = Run.objects.claim(1, jobs=["fails"])
    Run.objects.held(run).fail({"type": "ValueError", "message": "no", "traceback": ""})
    verbs = iter([services.retry, services.replay, services.retry, services.replay])

    def act():
        verb = next(verbs)
        try:
            return verb.__name__, verb(run)
        except InvalidVerb:
            return verb.__name__, None

    done = [name for name, result in at_once(act) if result]

    run.refresh_from_db()
    assert done.count("retry") == 1
    assert run.status == "queued"
    assert run.replays.count() == done.count("replay")
