import asyncio
from dataclasses import replace
from datetime import timedelta
from functools import partial
from uuid import uuid4

import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext

from django_jobs import StepError, job, registry
from django_jobs.executor import execute
from django_jobs.models import Run, Step


def test_a_run_that_slept_through_a_deploy_goes_on_with_the_new_code(jobs, ledger):
    def declare(steps, version):
        def changing(ctx):
            for name in steps[: steps.index("nap")]:
                ctx.step.run(name, ledger.note, name)
            ctx.step.sleep("nap", timedelta(days=1))
            for name in steps[steps.index("nap") + 1 :]:
                ctx.step.run(name, ledger.note, name)
            return ctx.version

        return job("changing", version=version)(changing)

    run = jobs.run(declare(["removed", "kept", "old-name", "nap", "end"], "1"))
    declare(["kept", "new-name", "nap", "added", "end"], "2")
    jobs.advance(timedelta(days=1))
    run.refresh_from_db()
    assert ledger == ["removed", "kept", "old-name", "new-name", "added", "end"]
    assert (run.version, run.output) == ("1", "1")


def test_a_step_that_became_another_kind_keeps_what_it_was_remembered_as(jobs, ledger):
    @job("changing")
    def before(ctx):
        ctx.step.run("once", ledger.note, "before", 1)
        ctx.step.sleep("nap", timedelta(days=1))

    def after(ctx):
        return [
            ctx.step.atomic("once", ledger.note, "after", 2),
            ctx.step.run("nap", ledger.note, "worked", 3),
        ]

    run = jobs.run(before)
    registry._jobs["changing"] = replace(before, handler=after)
    jobs.advance(timedelta(days=1))
    run.refresh_from_db()

    # The first was done. The second was not: the sleep had begun, so it is worked when that is over.
    assert (run.status, run.output) == ("completed", [1, 3])
    assert ledger == ["before", "worked"]


def test_a_shorter_version_of_the_job_ends_the_run_where_it_ends(jobs, ledger):
    @job("changing")
    def before(ctx):
        ctx.step.run("first", ledger.note, "first")
        ctx.step.sleep("nap", timedelta(days=1))
        ctx.step.run("second", ledger.note, "second")

    run = jobs.run(before)
    registry._jobs["changing"] = replace(before, handler=lambda ctx: "short")
    jobs.advance(timedelta(days=1))
    run.refresh_from_db()

    assert (run.status, run.output, ledger) == ("completed", "short", ["first"])
    assert run.steps.count() == 2


def test_the_code_may_branch_on_the_version_the_run_began_with(jobs):
    def body(ctx):
        ctx.step.sleep("nap", timedelta(days=1))
        return "old way" if ctx.version == "1" else "new way"

    old = job("changing", version="1")(body)
    first = jobs.run(old)
    new = registry._jobs["changing"] = replace(old, version="2")
    second = jobs.run(new)
    jobs.advance(timedelta(days=1))

    first.refresh_from_db()
    second.refresh_from_db()
    assert [(run.version, run.output) for run in (first, second)] == [("1", "old way"), ("2", "new way")]


# Checkpoints that today's code no longer comes by.


def unvisited(run):
    return sorted(run.steps.filter(unvisited=True).values_list("name", flat=True))


def changed(jobs, before, after):
    """Let a run sleep through a deploy in the middle of ``before``, and end by ``after``."""
    old = job("changing", retries=0)(before)
    run = jobs.run(old)
    assert run.status == "sleeping"
    registry._jobs["changing"] = replace(old, handler=after)
    jobs.advance(timedelta(days=2))
    run.refresh_from_db()
    return run


def night(ctx):
    ctx.step.sleep("night", timedelta(days=1))


def in_steps(*names):
    """A job of these steps, one of which is its night."""

    def body(ctx):
        for name in names:
            night(ctx) if name == "night" else ctx.step.run(name, str)

    return body


@pytest.mark.parametrize(
    ("before", "after", "left"),
    [
        (["a", "b", "night", "c"], ["a", "b", "night", "c"], []),
        (["a", "b", "night", "c"], ["b", "night", "c"], ["a"]),
        (["a", "b", "night", "c"], ["a", "beta", "night", "c"], ["b"]),
        (["a", "b", "night", "c"], ["b", "a", "night", "c"], []),
        (["a", "b", "night", "c"], ["new", "a", "b", "night", "d"], []),
        (["a", "b", "night", "c"], ["a", "b", "c"], ["night"]),
        (["a", "a", "a", "night", "c"], ["a", "night", "c"], ["a#2", "a#3"]),
        (["night", "c"], [], ["night"]),
    ],
)
def test_what_the_code_no_longer_comes_by_is_marked_when_the_run_completes(before, after, left, jobs):
    run = changed(jobs, in_steps(*before), in_steps(*after))

    assert (run.status, unvisited(run)) == ("completed", left)


def test_a_branch_of_the_code_for_runs_of_old_is_visited_by_them(jobs):
    def body(ctx):
        ctx.step.run("first", str)
        night(ctx)
        ctx.step.run("old-way" if ctx.version == "1" else "new-way", str)

    old = job("changing", version="1")(body)
    first = jobs.run(old)
    registry._jobs["changing"] = replace(old, version="2")
    jobs.run("changing")
    jobs.advance(timedelta(days=1))

    assert [step.name for step in first.steps.all()] == ["first", "night", "old-way"]
    assert not Step.objects.filter(unvisited=True).exists()


def test_branches_and_items_that_are_gone_are_marked_each_for_itself(jobs):
    def body(branches, items):
        def body(ctx):
            ctx.step.parallel(*[partial(ctx.step.run, "work", str, name) for name in branches])
            ctx.step.map("write", str, items, key=str)
            night(ctx)

        return body

    run = changed(jobs, body("abc", ["x", "y"]), body("ab", ["y", "z"]))

    assert unvisited(run) == ["work#3", "write-x"]
    assert run.steps.filter(name="write-z").exists()


def test_steps_of_a_job_that_awaits_are_marked_too(jobs):
    def body(*names):
        async def body(ctx):
            await asyncio.gather(*[ctx.step.run(name, str) for name in names])
            await ctx.step.sleep("night", timedelta(days=1))

        return body

    assert unvisited(changed(jobs, body("a", "b"), body("b", "c"))) == ["a"]


def test_a_step_that_failed_and_was_caught_is_visited(jobs):
    def body(ctx):
        try:
            ctx.step.run("fails", int, "x")
        except StepError:
            night(ctx)

    assert unvisited(changed(jobs, body, body)) == []


def test_a_run_that_does_not_complete_has_nothing_marked(jobs):
    def fails(ctx):
        raise ValueError("Before it came by anything.")

    run = changed(jobs, in_steps("a", "night"), fails)

    assert (run.status, unvisited(run)) == ("failed", [])


def test_a_worker_may_die_at_every_boundary_of_that(jobs):
    """The deploy, which takes the first step away, comes in the night."""

    @job("changing")
    def changing(ctx):
        if not Step.objects.filter(run=ctx.run_id, name="night").exists():
            ctx.step.run("removed", str)
        night(ctx)
        ctx.step.run("last", str)

    boundaries = 0
    for run in jobs.crash_everywhere(changing):
        boundaries += 1
        assert (run.status, unvisited(run)) == ("completed", ["removed"])
    assert boundaries >= 8


def test_a_worker_that_lost_the_run_marks_nothing(jobs):
    def after(ctx):
        Run.objects.update(lease=uuid4(), wake_at=ctx.now + timedelta(days=365))

    run = changed(jobs, in_steps("a", "night"), after)

    assert (run.status, unvisited(run)) == ("running", [])


@pytest.mark.django_db(transaction=True)
def test_it_costs_a_statement_where_there_is_something_to_mark_and_none_where_not(jobs):
    old = job("changing")(in_steps("a", "night"))

    def last_pass(after):
        jobs.run(old)
        registry._jobs["changing"] = replace(old, handler=after)
        jobs._now += timedelta(days=1)
        [run] = Run.objects.claim(1, jobs=["changing"])
        with CaptureQueriesContext(connection) as captured:
            execute(run)
        registry._jobs["changing"] = old
        return [query["sql"].split(maxsplit=1)[0].strip(";") for query in captured]

    reading_and_waking = ["SELECT", "UPDATE"]
    assert last_pass(in_steps("a", "night")) == [*reading_and_waking, "UPDATE"]
    assert last_pass(in_steps("night")) == [*reading_and_waking, "BEGIN", "UPDATE", "UPDATE", "COMMIT"]
