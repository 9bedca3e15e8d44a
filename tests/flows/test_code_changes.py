from datetime import timedelta

from django_jobs import job


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
