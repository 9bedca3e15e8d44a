from datetime import UTC, datetime, timedelta

import pytest
from django.contrib.auth.models import Group
from django.db import transaction
from django.test import TestCase
from django.utils import timezone

from django_jobs import cron, emit, job, on, registry, testing
from django_jobs.models import Run
from django_jobs.testing import Jobs, now


class PlainTestCase(TestCase):
    """The kit needs no pytest: in a TestCase it works inside the test's own transaction."""

    def test_two_weeks_in_a_moment(self):
        with Jobs() as jobs:

            @job("kit-naps")
            def naps(ctx):
                before = now()
                ctx.step.sleep("two-weeks", timedelta(days=14))
                return ctx.step.run("after", lambda: (now() - ctx.now).days) if before else None

            run = jobs.run(naps)
            jobs.advance(timedelta(days=14))
            run.refresh_from_db()
            self.assertEqual(run.output, 14)
        self.assertIsNone(registry.find("kit-naps"))


class AnotherPlainTestCase(TestCase):
    """Imported, the kit lasts as long as the test that uses it."""

    def test_a_the_clock_is_moved_from_anywhere_in_the_test(self):
        @job("kit-naps")
        def naps(ctx):
            ctx.step.sleep("two-weeks", timedelta(days=14))
            return ctx.event.data

        start = testing.now()
        run = testing.run(naps, {"n": 1})
        self.a_week_later()
        self.a_week_later()
        self.assertEqual(Run.objects.get(pk=run.pk).output, {"n": 1})
        self.assertGreater(testing.now() - start, timedelta(days=13))
        self.assertEqual(len(list(testing.jobs.crash_everywhere(naps))), 6)

    def a_week_later(self):
        testing.jobs.advance(timedelta(days=7))

    def test_b_the_next_test_has_the_real_clock_again(self):
        self.assertLess(abs(testing.now() - timezone.now()), timedelta(minutes=1))
        emit("a/b")
        self.assertEqual([event.name for event in testing.emitted()], ["a/b"])


def test_without_a_test_case_the_imported_kit_says_what_to_do(db):
    with pytest.raises(RuntimeError, match="fixture `jobs`"):
        testing.drain()


def test_the_imported_kit_is_the_one_in_use(jobs):
    jobs.travel_to(datetime(2030, 1, 1, tzinfo=UTC))
    testing.advance(timedelta(days=1))

    assert now() == datetime(2030, 1, 2, tzinfo=UTC)


def test_a_kit_within_a_kit_leaves_the_outer_one_its_clock(jobs):
    jobs.travel_to(datetime(2030, 1, 1, tzinfo=UTC))
    with Jobs() as inner:
        inner.travel_to(datetime(2040, 1, 1, tzinfo=UTC))

    assert now() == datetime(2030, 1, 1, tzinfo=UTC)


def test_jobs_of_a_module_that_a_test_imports_first_last_beyond_it(db):
    def handler(ctx):
        pass

    handler.__qualname__ = "handler"
    with Jobs():
        job("imported")(handler)
        job("of-this-test")(lambda ctx: None)

    assert [job.id for job in registry.known()] == ["imported"]


def test_what_happens_on_the_way_happens_in_order(jobs, ledger):
    @job("sleeps")
    def sleeps(ctx):
        ctx.step.sleep("nap", timedelta(hours=ctx.event.data["hours"]))
        ctx.step.run("note", lambda: ledger.note((ctx.event.data["hours"], now() - ctx.now)))

    for hours in (3, 1, 2):
        sleeps.start({"hours": hours})
    jobs.advance(timedelta(hours=5))
    assert ledger == [(h, timedelta(hours=h)) for h in (1, 2, 3)]


def test_emitted_lists_the_events_of_a_name(jobs):
    emit("a/b", {"n": 1})
    emit("a/c")
    emit("a/b", {"n": 2})
    assert [event.data["n"] for event in jobs.emitted("a/b")] == [1, 2]
    assert [event.name for event in jobs.emitted()] == ["a/b", "a/c", "a/b"]


def test_a_job_that_starts_itself_for_ever_is_noticed(jobs, monkeypatch):
    monkeypatch.setattr("django_jobs.testing.MOST_PASSES", 20)

    @job("circle", on("go/round"))
    def circle(ctx):
        ctx.step.emit("again", "go/round")

    emit("go/round")
    with pytest.raises(AssertionError, match="circle is still due; does it start itself"):
        jobs.drain()


def test_commit_callbacks_of_a_job_run_as_in_a_worker(jobs, ledger):
    @job("on-commit")
    def on_commit(ctx):
        ctx.step.run("later", lambda: transaction.on_commit(lambda: ledger.note("committed")))

    jobs.run(on_commit)
    assert ledger == ["committed"]
    assert Run.objects.get().status == "completed"


def test_runs_that_others_start_are_worked_too_whatever_their_priority_and_queue(jobs, ledger):
    for queue, priority in [("default", 7), ("mail", 0), ("slow", -3)]:

        @job(f"in-{queue}", on("a/b"), queue=queue, priority=priority)
        def listener(ctx):
            ledger.note(ctx.job.queue)

    @job("tells")
    def tells(ctx):
        ctx.step.emit("tell", "a/b")

    jobs.run(tells)

    assert ledger == ["default", "mail", "slow"]


def test_crons_and_sleeps_come_in_the_order_of_their_times(jobs, ledger):
    jobs.travel_to(datetime(2026, 5, 4, 0, 30, tzinfo=UTC))

    @job("hourly", cron("0 * * * *"))
    def hourly(ctx):
        ctx.step.run("begin", lambda: ledger.note(("cron", now())))
        ctx.step.sleep("half", timedelta(minutes=30))
        ctx.step.run("end", lambda: ledger.note(("slept", now())))

    jobs.advance(timedelta(hours=2))

    start = datetime(2026, 5, 4, 1, tzinfo=UTC)
    half = timedelta(minutes=30)
    assert ledger == [
        ("cron", start),
        ("slept", start + half),
        ("cron", start + 2 * half),
        ("slept", start + 3 * half),
    ]


def test_the_clock_stands_still_until_it_is_moved(jobs):
    before = now()
    assert now() == before
    jobs.advance(timedelta(hours=1))
    assert now() == before + timedelta(hours=1)


def test_after_the_test_the_clock_goes_on_and_the_jobs_are_forgotten(db):
    with Jobs() as jobs:
        job("of-this-test")(lambda ctx: None)
        jobs.advance(timedelta(days=365))
        virtual = now()

    assert now() < virtual
    assert registry.find("of-this-test") is None


def test_travelling_forward_wakes_the_runs_on_the_way_at_their_times_and_fires_no_cron(jobs, ledger):
    job("hourly", cron("0 * * * *"))(lambda ctx: ledger.note("cron"))

    @job("naps")
    def naps(ctx):
        for day in range(1, 4):
            ctx.step.sleep("night", timedelta(days=1))
            ctx.step.run("note", lambda day=day: ledger.note((day, now() - ctx.now)))

    jobs.run(naps)
    jobs.travel_to(now() + timedelta(days=30))

    assert ledger == [(day, timedelta(days=day)) for day in range(1, 4)]


def test_a_cron_of_this_very_instant_is_due_and_fires_once(jobs, ledger):
    nine = datetime(2027, 5, 3, 9, tzinfo=UTC)
    job("at-nine", cron("0 9 * * *"))(lambda ctx: ledger.note(ctx.scheduled_for))

    jobs.travel_to(nine)
    assert ledger == []
    jobs.drain()
    jobs.drain()
    assert ledger == [nine]

    jobs.advance(timedelta(days=2))
    assert ledger == [nine + timedelta(days=day) for day in range(3)]


def test_advance_starts_after_the_instant_it_begins_at(jobs, ledger):
    job("hourly", cron("0 * * * *"))(lambda ctx: ledger.note(ctx.scheduled_for.hour))

    jobs.travel_to(datetime(2027, 5, 3, tzinfo=UTC))
    jobs.advance(timedelta(hours=3))

    assert ledger == [1, 2, 3]


def test_what_host_code_stamps_with_the_real_time_is_due_while_the_clock_was_not_moved(jobs, ledger):
    job("listens", on("a/b"))(lambda ctx: ledger.note(ctx.event.data["n"]))

    emit("a/b", {"n": 1}, at=timezone.now())
    jobs.drain()
    assert ledger == [1]

    jobs.travel_to(now() - timedelta(hours=1))
    emit("a/b", {"n": 2}, at=timezone.now())
    jobs.drain()
    assert ledger == [1]


def test_travelling_back_in_time_runs_nothing(jobs, ledger):
    job("daily", cron("0 3 * * *"))(lambda ctx: ledger.note("ran"))

    jobs.travel_to(now() - timedelta(days=30))

    assert ledger == []


def test_a_naive_time_to_travel_to_is_refused(jobs):
    with pytest.raises(ValueError, match="aware"):
        jobs.travel_to(datetime(2026, 1, 1))


def test_advance_stops_where_it_was_told_to(jobs, ledger):
    @job("naps")
    def naps(ctx):
        ctx.step.sleep("nap", timedelta(hours=1))
        ledger.note("awake")

    jobs.run(naps)
    jobs.advance(timedelta(minutes=59, seconds=59))
    assert ledger == []
    jobs.advance(timedelta(seconds=1))
    assert ledger == ["awake"]


def test_drain_says_how_many_passes_it_made(jobs):
    naps = job("naps")(lambda ctx: ctx.step.sleep("nap", timedelta(hours=1)))
    naps.start()
    naps.start()

    assert jobs.drain() == 2
    assert jobs.drain() == 0


def test_a_job_may_be_named_by_its_id(jobs):
    job("named")(lambda ctx: ctx.event.data)

    assert jobs.run("named", {"x": 1}).output == {"x": 1}


def test_a_failing_statement_in_a_job_does_not_spoil_the_test(jobs):
    def twice():
        for _ in range(2):
            Group.objects.create(name="the same")

    @job("collides", retries=0)
    def collides(ctx):
        ctx.step.run("collide", twice)

    assert jobs.run(collides).status == "failed"
    assert Group.objects.count() == 0


def test_without_a_crash_there_is_nothing_to_yield_for_and_with_one_each_boundary_is(jobs, ledger):
    @job("one-step")
    def one_step(ctx):
        return ctx.step.run("work", ledger.note, "worked", 7)

    runs = list(jobs.crash_everywhere(one_step))

    # Before and after the checkpoint, and before the end.
    assert [(run.status, run.output, run.passes) for run in runs] == [("completed", 7, 2)] * 3
    assert len(ledger) == 5  # Four runs, and one step worked twice: its worker died before the checkpoint.


def test_a_job_that_breaks_when_its_worker_dies_is_found_out(jobs):
    begun = set()

    @job("careless", retries=0)
    def careless(ctx):
        def once():
            assert ctx.run_id not in begun, "begun before"
            begun.add(ctx.run_id)

        ctx.step.run("begin", once)

    statuses = [run.status for run in jobs.crash_everywhere(careless)]

    assert statuses == ["failed", "completed", "completed"]


def test_data_for_each_crash_may_be_made_by_a_function(jobs):
    numbers = iter(range(100))

    @job("numbered")
    def numbered(ctx):
        return ctx.step.run("work", lambda: ctx.event.data["n"])

    runs = jobs.crash_everywhere(numbered, lambda: {"n": next(numbers)})

    assert [run.output for run in runs] == [0, 1, 2]
