from datetime import timedelta

import pytest
from django.test import TestCase

from django_jobs import emit, job, on, registry
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
    from django.db import transaction

    @job("on-commit")
    def on_commit(ctx):
        ctx.step.run("later", lambda: transaction.on_commit(lambda: ledger.note("committed")))

    jobs.run(on_commit)
    assert ledger == ["committed"]
    assert Run.objects.get().status == "completed"
