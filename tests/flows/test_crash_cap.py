from datetime import timedelta

import pytest

from django_jobs import job, passes
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


@pytest.mark.parametrize(("crashes", "status"), [(2, "completed"), (3, "failed"), (4, "failed")])
def test_the_limit_is_a_setting(crashes, status, jobs, settings):
    settings.DJANGO_JOBS = {"MAX_CRASHES": 3}
    run = job("deadly")(lambda ctx: None).start()
    for _ in range(crashes):
        [claimed] = Run.objects.claim(1, jobs=["deadly"])
        Run.objects.abandon([claimed.hold])

    jobs.advance(timedelta(minutes=5))

    run.refresh_from_db()
    assert run.status == status


def test_a_run_that_gets_on_between_its_crashes_is_not_given_up(jobs, ledger):
    """A checkpoint starts the count anew: it is the step that kills, not the number of deploys it met."""
    dying = []

    @job("long")
    def long(ctx):
        for number in range(12):
            ctx.step.run(f"step-{number}", ledger.note, number)
            if number not in dying:
                dying.append(number)
                raise passes.Died("between two steps")

    run = long.start()
    for _ in range(12):
        with pytest.raises(passes.Died):
            jobs.drain()
        jobs._now += timedelta(minutes=1)
    jobs.drain()

    run.refresh_from_db()
    assert (run.status, run.crashes) == (RunStatus.COMPLETED, 0)
    assert ledger == list(range(12))


def test_a_step_that_kills_its_worker_each_time_is_given_up(jobs, ledger):
    @job("deadly")
    def deadly(ctx):
        ctx.step.run("harmless", ledger.note, "harmless")
        ledger.note("try")
        raise passes.Died("here")

    run = deadly.start()
    for _ in range(5):
        with pytest.raises(passes.Died):
            jobs.drain()
        jobs._now += timedelta(minutes=1)
    jobs.drain()

    run.refresh_from_db()
    assert (run.status, run.error["type"]) == (RunStatus.FAILED, "WorkerCrashed")
    assert "5 times in a row" in run.reason
    assert ledger == ["harmless", *["try"] * 5]
