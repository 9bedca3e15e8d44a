"""``services.pause`` and ``resume``: none of a job's runs begins another pass meanwhile."""

from datetime import UTC, datetime, timedelta

import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext

from django_jobs import cron, emit, health, job, on, services, signals
from django_jobs.broker import RunBroker
from django_jobs.exceptions import InvalidVerb
from django_jobs.models import Job, Run

DAY, MINUTE = timedelta(days=1), timedelta(minutes=1)


@pytest.fixture
def greet(ledger):
    return job("greet", on("user/signed.up"))(lambda ctx: ledger.note(ctx.event.data.get("name")))


@pytest.fixture
def naps(ledger):
    @job("naps")
    def naps(ctx):
        ctx.step.sleep("nap", DAY)
        ctx.step.run("after", ledger.note, "woke")

    return naps


def statuses():
    return [*Run.objects.order_by("pk").values_list("status", flat=True)]


# Waiting.


def test_new_runs_of_a_paused_job_wait_until_it_is_resumed(greet, jobs, ledger):
    services.pause("greet")
    emit("user/signed.up", {"name": "Ada"})
    jobs.advance(DAY)
    assert (statuses(), ledger) == (["queued"], [])

    services.resume("greet")
    jobs.drain()
    assert (statuses(), ledger) == (["completed"], ["Ada"])


def test_other_jobs_go_on(greet, jobs, ledger):
    services.pause("greet")
    other = jobs.run(job("other")(lambda ctx: "done"))
    assert other.output == "done"


def test_a_sleeping_run_of_a_paused_job_sleeps_on(naps, jobs, ledger):
    run = jobs.run(naps)
    services.pause("naps")
    jobs.advance(3 * DAY)
    run.refresh_from_db()
    assert (run.status, ledger) == ("sleeping", [])

    services.resume("naps")
    jobs.drain()
    run.refresh_from_db()
    assert (run.status, ledger) == ("completed", ["woke"])


def test_a_pass_in_progress_goes_on_to_its_end(jobs, ledger):
    @job("pauses-itself")
    def pauses_itself(ctx):
        ctx.step.run("pause", lambda: services.pause("pauses-itself") and None)
        ctx.step.run("after", ledger.note, "after")

    assert jobs.run(pauses_itself).status == "completed"
    assert jobs.run(pauses_itself).status == "queued"
    assert ledger == ["after"]


def test_verbs_work_on_the_runs_of_a_paused_job(naps, jobs):
    run = jobs.run(naps)
    services.pause("naps", mode="skip")
    services.skip_wait(run)
    jobs.drain()
    run.refresh_from_db()
    assert run.status == "sleeping"
    assert services.cancel(run).status == "cancelled"


# Skipping.


def test_new_runs_of_a_job_paused_that_way_are_skipped_with_a_reason(greet, jobs, ledger):
    services.pause("greet", mode="skip")
    run = emit("user/signed.up").runs.get()
    jobs.drain()
    run.refresh_from_db()
    assert (run.status, run.reason) == ("skipped", 'Its turn came while job "greet" was paused.')
    services.resume("greet")
    jobs.drain()
    assert ledger == []


def test_runs_that_were_there_before_wait_whichever_way(greet, naps, jobs, ledger):
    asleep, waiting = jobs.run(naps), greet.start({"name": "Ada"})
    for paused in ("naps", "greet"):
        services.pause(paused, mode="skip")
    jobs.advance(2 * DAY)
    assert statuses() == ["sleeping", "queued"]
    for paused in ("naps", "greet"):
        services.resume(paused)
    jobs.drain()
    assert sorted(ledger) == ["Ada", "woke"]
    assert {asleep.pk, waiting.pk} == set(Run.objects.filter(status="completed").values_list("pk", flat=True))


def test_a_run_whose_turn_comes_after_the_pause_is_not_skipped(greet, jobs, ledger):
    services.pause("greet", mode="skip")
    emit("user/signed.up", {"name": "Ada"}, at=jobs._now + DAY)
    jobs.drain()
    services.resume("greet")
    jobs.advance(DAY)
    assert ledger == ["Ada"]


def test_what_no_cluster_had_come_to_skip_is_skipped_by_resume(greet, jobs, ledger, monkeypatch):
    monkeypatch.setattr("django_jobs.pauses.BATCH", 2)
    services.pause("greet", mode="skip")
    for _ in range(5):
        greet.start()
    services.resume("greet")
    jobs.drain()
    assert (statuses(), ledger) == (["skipped"] * 5, [])


def test_the_way_of_a_pause_may_be_changed_and_counts_from_then_on(greet, jobs, ledger):
    services.pause("greet")
    greet.start({"name": "waits"})
    services.pause("greet", mode="skip")
    greet.start({"name": "skipped"})
    services.pause("greet", mode="wait")
    greet.start({"name": "waits too"})
    services.resume("greet")
    jobs.drain()
    assert (statuses(), sorted(ledger)) == (["completed", "skipped", "completed"], ["waits", "waits too"])


# Crons.


@pytest.fixture
def minutely(jobs, ledger):
    def declare(catch_up):
        jobs.travel_to(datetime(2030, 1, 1, 12, 0, 30, tzinfo=UTC))
        job("minutely", cron("* * * * *", catch_up=catch_up))(
            lambda ctx: ledger.note(ctx.scheduled_for.minute)
        )

    return declare


@pytest.mark.parametrize(("catch_up", "ran"), [("all", [1, 2, 3, 4, 5]), ("latest", [5]), ("skip", [5])])
def test_a_cron_catches_up_as_after_an_outage(catch_up, ran, minutely, jobs, ledger):
    minutely(catch_up)
    services.pause("minutely")
    jobs.advance(5 * MINUTE)
    assert (ledger, statuses()) == ([], ["queued"] * 5)

    services.resume("minutely")
    jobs.drain()

    assert sorted(ledger) == ran
    assert statuses().count("skipped") == 5 - len(ran)
    for run in Run.objects.filter(status="skipped"):
        assert run.reason == f'Its slot passed while job "minutely" was paused (catch_up is "{catch_up}").'


def test_a_cron_that_skips_what_is_late_does_so_after_a_pause(jobs, ledger):
    jobs.travel_to(datetime(2030, 1, 1, 2, 0, tzinfo=UTC))
    job("nightly", cron("0 3 * * *", catch_up="skip"))(lambda ctx: ledger.note("ran"))
    services.pause("nightly")
    jobs.advance(2 * timedelta(hours=1))
    services.resume("nightly")
    jobs.drain()
    assert (statuses(), ledger) == (["skipped"], [])


def test_the_slots_of_a_cron_are_skipped_in_a_pause_that_skips(minutely, jobs, ledger):
    minutely("all")
    services.pause("minutely", mode="skip")
    jobs.advance(2 * MINUTE)
    assert statuses() == ["skipped"] * 2
    services.resume("minutely")
    jobs.advance(MINUTE)
    assert ledger == [3]


def test_a_run_started_by_hand_is_no_slot_to_catch_up_with(minutely, jobs, ledger):
    minutely("latest")
    services.pause("minutely")
    jobs.advance(2 * MINUTE)
    by_hand = services.replay(services.cancel(Run.objects.first()))
    services.resume("minutely")
    jobs.drain()
    by_hand.refresh_from_db()
    assert by_hand.status == "completed"


# What is refused, and what is told.


def test_a_job_nobody_knows_is_not_paused(db):
    for verb in (services.pause, services.resume):
        with pytest.raises(InvalidVerb, match='There is no job "gret"'):
            verb("gret")


def test_a_job_that_only_the_database_remembers_may_be_paused(jobs):
    Job.objects.create(id="forgotten", synced_at=jobs._now)
    assert services.pause("forgotten").paused_at
    assert services.resume("forgotten").paused_at is None


def test_what_is_so_already_is_said_so(greet, jobs):
    services.pause("greet")
    services.resume("greet")
    with pytest.raises(InvalidVerb, match='"greet" is not paused'):
        services.resume("greet")
    services.pause("greet")
    before = Job.objects.values().get(pk="greet")
    with pytest.raises(InvalidVerb, match='"greet" is paused already, and its new runs wait'):
        services.pause("greet")
    with pytest.raises(InvalidVerb, match="wait or skip, not 'stop'"):
        services.pause("greet", mode="stop")
    assert Job.objects.values().get(pk="greet") == before


def test_writing_down_the_registry_again_leaves_a_pause_as_it_is(greet, jobs):
    services.pause("greet", mode="skip")
    before = Job.objects.values_list("paused_at", "pause_mode", "paused_after").get(pk="greet")
    services.sync()
    assert Job.objects.values_list("paused_at", "pause_mode", "paused_after").get(pk="greet") == before


def test_people_and_ends_are_news(greet, jobs, django_capture_on_commit_callbacks):
    heard = []

    def hear_person(sender, actor, verb, ids, reason, **rest):
        heard.append((actor, verb, ids, reason))

    def hear_end(sender, run, **rest):
        heard.append((run.job_id, run.status))

    signals.admin_action.connect(hear_person)
    signals.run_finished.connect(hear_end)
    try:
        with django_capture_on_commit_callbacks(execute=True):
            services.pause("greet", "skip", reason="too loud", actor="ada")
            greet.start()
            services.resume("greet", actor="bob")
    finally:
        signals.admin_action.disconnect(hear_person)
        signals.run_finished.disconnect(hear_end)
    assert heard == [
        ("ada", "pause", ["greet"], "too loud"),
        ("greet", "skipped"),
        ("bob", "resume", ["greet"], ""),
    ]


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("verb", ["pause", "resume"])
def test_of_several_at_once_one_does_it_and_the_others_are_told(verb, greet, at_once):
    services.pause("greet")
    if verb == "pause":
        services.resume("greet")

    def act():
        try:
            return getattr(services, verb)("greet").pk
        except InvalidVerb:
            return "told"

    assert sorted(at_once(act)) == ["greet", "told", "told", "told"]


# Clusters.


def claimed(broker):
    return [run.job_id for _, run in broker.dequeue(10)]


def test_a_cluster_that_looks_ahead_learns_of_pauses_and_of_their_end(greet, naps, jobs):
    broker = RunBroker()
    broker.outlook()
    services.pause("greet")
    greet.start()
    assert broker.outlook().run is None
    assert broker.served() == ["naps"]
    assert claimed(broker) == []

    services.resume("greet")
    assert broker.outlook().run is not None
    assert claimed(broker) == ["greet"]


def test_a_cluster_that_has_just_begun_knows_what_is_paused(greet, jobs):
    services.pause("greet")
    greet.start()
    assert claimed(RunBroker()) == []


def test_looking_for_pauses_is_no_statement_of_its_own(greet, naps, jobs):
    broker = RunBroker()
    for change in (lambda: None, lambda: services.pause("greet"), lambda: services.pause("naps")):
        change()
        broker.outlook()
        with CaptureQueriesContext(connection) as captured:
            broker.outlook()
        assert len(captured) == 1
    assert broker.paused == {"greet", "naps"}


def test_a_pause_is_no_illness(greet, jobs):
    services.pause("greet")
    greet.start()
    jobs.advance(DAY)

    assert health.health()["late_seconds"] == 0
    [finding] = [finding for finding in health.doctor() if finding.id == "paused"]
    assert "1 run of" in finding.what
    assert finding.mend.endswith("manage.py jobs resume greet")
