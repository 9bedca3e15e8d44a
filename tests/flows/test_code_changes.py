from dataclasses import replace
from datetime import timedelta

from django_jobs import job, registry


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
