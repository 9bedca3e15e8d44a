from django_jobs import job
from django_jobs.models import Run, RunStatus
from django_jobs.testing import now


def test_a_run_that_takes_worker_after_worker_down_is_failed_with_that_reason(jobs, ledger):
    deadly = job("deadly")(lambda ctx: ledger.note("ran"))
    run = deadly.start()
    for _ in range(6):
        [claimed] = Run.objects.claim(1, jobs=["deadly"])
        Run.objects.abandon([claimed.hold])
    jobs.drain()
    run.refresh_from_db()
    assert (run.status, run.error["type"], ledger) == (RunStatus.FAILED, "WorkerCrashed", [])
    assert "took its worker down 6 times in a row" in run.reason


def test_a_pass_that_ends_in_order_starts_the_count_anew(jobs):
    @job("mostly-fine")
    def mostly_fine(ctx):
        ctx.step.sleep_until("a-moment", ctx.now)
        ctx.step.sleep_until("tomorrow", now() + (now() - now()))
        return "fine"

    run = mostly_fine.start()
    for _ in range(3):
        [claimed] = Run.objects.claim(1, jobs=["mostly-fine"])
        Run.objects.abandon([claimed.hold])
    jobs.drain()
    run.refresh_from_db()
    assert (run.status, run.output, run.crashes) == (RunStatus.COMPLETED, "fine", 0)
